"""Compares the speed of this package's parts with the PyTorch classes of diffusers and transformers, on a CPU.

    JAX_PLATFORMS=cpu GLIBC_TUNABLES=glibc.malloc.hugetlb=1 python benchmarks/against_pytorch.py [--only=VAE] [--json=F]

Both sides have the same weights (ours, exported), inputs, precision (fp32) and number of threads. Their outputs are
compared first. Then they take turns, and the medians count. A ratio below 1 means that JAX takes less time. The ratio
of the CPU seconds of all threads is meaningful even on a busy machine.

diffusers' transformer knows no scenes. Under mask v5, which masks nothing, it computes the same function as ours. For
v2 it gets the attention of the authors' code, a cross-attention for the text and the video of each scene.
"""

import dataclasses
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import torch
import torch.nn.functional as F
from absl import app, flags
from diffusers import AutoencoderKLCogVideoX, CogVideoXDDIMScheduler, CogVideoXTransformer3DModel
from flax import nnx
from transformers import T5EncoderModel

sys.path.insert(0, str(Path(__file__).parents[1]))

from mask2dit_jax.diffusion.samplers import SamplerConfig
from mask2dit_jax.diffusion.schedule import NoiseSchedule, ScheduleConfig
from mask2dit_jax.layout import SceneLayout
from mask2dit_jax.models.dit import DiTConfig
from mask2dit_jax.models.t5 import T5Config, T5Encoder
from mask2dit_jax.models.vae import VAE, VAEConfig
from mask2dit_jax.ops import positions
from mask2dit_jax.parallel.mesh import make_mesh
from mask2dit_jax.pretrained import directory as port
from mask2dit_jax.sampling.window import SamplingConfig, WindowSampler
from mask2dit_jax.training.optimizer import OptimizerConfig
from mask2dit_jax.training.program import TrainProgram
from mask2dit_jax.training.step import Objective

JSON = flags.DEFINE_string("json", None, "JSON file for the results.")
ONLY = flags.DEFINE_string("only", "", "Run only cases whose name contains this.")
ROUNDS = flags.DEFINE_integer("rounds", 3, "Number of timed runs of each side.", lower_bound=1)

TORCH_CLASSES = {
    "transformer": CogVideoXTransformer3DModel,
    "vae": AutoencoderKLCogVideoX,
    "text_encoder": T5EncoderModel,
}
LAYOUT = SceneLayout(frames=(2, 2, 2), grid=(8, 12), text_tokens=226)  # 678 text and 576 video tokens
DIT = DiTConfig(num_heads=8, head_dim=64, num_layers=4, text_embed_dim=1024, attention="auto", remat="dots")
T5 = T5Config(32128, width=1024, hidden_width=2816, num_layers=4, num_heads=16, head_dim=64)
FULL_VAE = VAEConfig.cogvideox_5b()
SMALL_VAE = dataclasses.replace(FULL_VAE, block_out_channels=(64, 128, 128, 256))
SCHEDULE = ScheduleConfig.cogvideox_5b()
STEPS, GUIDANCE = 4, 6.0


@dataclasses.dataclass(frozen=True)
class Case:
    """Two implementations of the same function.

    Attributes:
        name: Name of the case.
        ours: Runs JAX and returns a NumPy array.
        theirs: Runs PyTorch and returns an array of the same shape.
        tolerance: Largest difference, relative to the largest value.
    """

    name: str
    ours: Callable[[], np.ndarray]
    theirs: Callable[[], np.ndarray]
    tolerance: float = 1e-3


def twins(name: str, config):
    """Return the graph and random parameters of our module, and the PyTorch module with the same parameters."""
    graph, state = nnx.split(port.COMPONENTS[name].module(config))
    random = np.random.default_rng(0)

    def leaf(path, x):
        spread = np.prod(x.shape[-2 if "blocks" in str(path[0]) and name != "vae" else 0 : -1]) ** -0.5
        kernel = "kernel" in str(path) or "embedding" in str(path)
        start = "scale" in str(path[-2:]) and not kernel
        return jnp.asarray(start + random.standard_normal(x.shape, np.float32) * (spread if kernel else 0.05))

    params = jax.tree_util.tree_map_with_path(leaf, state)
    with tempfile.TemporaryDirectory() as folder:
        port.save_diffusers(folder, name, config, params)
        reference = TORCH_CLASSES[name].from_pretrained(Path(folder) / name, torch_dtype=torch.float32)
    return graph, params, reference


def normal(*shape: int) -> np.ndarray:
    """Draw standard normal numbers, the same in every call."""
    return np.random.default_rng(1).standard_normal(shape, np.float32)


def in_torch(x, *order: int) -> torch.Tensor:
    """Return a tensor with its axes reordered, in memory too."""
    return torch.from_numpy(np.ascontiguousarray(np.asarray(x).transpose(order)))


FRAMES_FIRST, CHANNELS_FIRST = (0, 1, 4, 2, 3), (0, 4, 1, 2, 3)  # b f h w c -> axis orders of PyTorch's DiT and VAE


class GroupedProcessor:
    """The attention of the authors' code for mask v2: T_i sees [T_i; V_i], V_i sees [T_i; V_1 .. V_n]."""

    def __call__(self, attn, hidden_states, encoder_hidden_states, image_rotary_emb=None, **_):
        """Attend as a processor of diffusers' Attention."""
        num_text = encoder_hidden_states.shape[1]
        x = torch.cat([encoder_hidden_states, hidden_states], dim=1)
        q, k, v = (f(x).unflatten(2, (attn.heads, -1)).transpose(1, 2) for f in (attn.to_q, attn.to_k, attn.to_v))
        q, k = attn.norm_q(q), attn.norm_k(k)
        q, k = rotated(q, num_text, image_rotary_emb), rotated(k, num_text, image_rotary_emb)
        texts = [slice(s.start, s.stop) for s in LAYOUT.segments if s.is_text]
        videos = [slice(s.start, s.stop) for s in LAYOUT.segments if not s.is_text]
        everything = slice(num_text, None)
        outs = [attended(q, k, v, text, (text, video)) for text, video in zip(texts, videos, strict=True)]
        outs += [attended(q, k, v, video, (text, everything)) for text, video in zip(texts, videos, strict=True)]
        out = attn.to_out[0](torch.cat(outs, dim=2).transpose(1, 2).flatten(2))
        return out[:, num_text:], out[:, :num_text]


def attended(q, k, v, queries: slice, keys: tuple[slice, ...]):
    """Attend a run of queries to several runs of keys, which are copied together."""
    k, v = (torch.cat([x[:, :, run] for run in keys], dim=2) for x in (k, v))
    return F.scaled_dot_product_attention(q[:, :, queries], k, v)


def rotated(x, num_text, table):
    """Apply RoPE to the video tokens."""
    cos, sin = table
    text, video = x[:, :, :num_text], x[:, :, num_text:]
    even, odd = video.unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack([-odd, even], dim=-1).flatten(-2)
    return torch.cat([text, video * cos + turned * sin], dim=2)


def torch_rope(config: DiTConfig):
    """Return our RoPE angles as diffusers' cosine and sine tables."""
    angles = np.asarray(positions.rope_angles(LAYOUT, config.base_grid, config.head_dim)).repeat(2, axis=1)
    return torch.from_numpy(np.cos(angles)), torch.from_numpy(np.sin(angles))


def transformer(mask: str):
    """Return config, graph, parameters and the PyTorch transformer for a mask."""
    config = dataclasses.replace(DIT, mask=mask)
    graph, params, reference = twins("transformer", config)
    if mask == "v2":
        reference.set_attn_processor(GroupedProcessor())
    return config, graph, params, reference


def dit_inputs(samples: int = 1):
    """Return random latents (b f h w c) and text embeddings (b s t x)."""
    height, width = (side * DIT.patch_size for side in LAYOUT.grid)
    latents = normal(samples, LAYOUT.num_frames, height, width, DIT.latent_channels)
    return latents, normal(samples, LAYOUT.num_scenes, LAYOUT.text_tokens, DIT.text_embed_dim)


def predict(reference, latents, text, timestep, rope):
    """Run the PyTorch transformer."""
    return reference(latents, text.flatten(1, 2), timestep.expand(len(latents)), image_rotary_emb=rope).sample


def forward_case(mask: str) -> Case:
    """Return the case of a forward pass of the transformer."""
    config, graph, params, reference = transformer(mask)
    latents, text = dit_inputs()
    rope, step = torch_rope(config), np.full((1, LAYOUT.num_scenes), 500)
    run = jax.jit(lambda params, *inputs: nnx.merge(graph, params)(*inputs, layout=LAYOUT))

    @torch.no_grad()
    def theirs():
        v = predict(reference, in_torch(latents, *FRAMES_FIRST), torch.from_numpy(text), torch.tensor([500]), rope)
        return v.numpy().transpose(0, 1, 3, 4, 2)

    return Case(f"DiT forward, {mask}", lambda: np.asarray(run(params, latents, text, step)), theirs)


def train_case(mask: str) -> Case:
    """Return the case of a train step: forward, backward, clipping and AdamW.

    Each side draws its own noise, so only shapes can be compared. Our backward pass recomputes elementwise work, as in
    the tiny preset (remat "dots").
    """
    config, _, params, reference = transformer(mask)
    latents, text = dit_inputs()
    optimizer = OptimizerConfig(warmup_steps=0)
    schedule = NoiseSchedule(SCHEDULE)
    program = TrainProgram(
        make_mesh(devices=jax.devices()[:1]), config, Objective(schedule, LAYOUT, 0.7), optimizer, 1, dtype=jnp.float32
    )
    batch = {"mean": latents, "logvar": np.full_like(latents, -30), "text": text}
    state = program.start(params)
    rope, x, words = torch_rope(config), in_torch(latents * 0.7, *FRAMES_FIRST), torch.from_numpy(text)
    abar = torch.from_numpy(np.asarray(schedule.alphas_cumprod, np.float32))
    theirs_optimizer = torch.optim.AdamW(
        reference.parameters(), lr=1e-5, betas=(0.9, 0.999), eps=1e-10, weight_decay=3e-2, fused=True
    )

    def ours():
        nonlocal state
        with jax.set_mesh(program.mesh):
            state, metrics = program.step(state, batch)
        return np.asarray(metrics["loss"])

    def theirs():
        t, noise = torch.randint(0, 1000, (1,)), torch.randn_like(x)
        a, b = abar[t].sqrt(), (1 - abar[t]).sqrt()
        loss = F.mse_loss(predict(reference, a * x + b * noise, words, t, rope), a * noise - b * x)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(reference.parameters(), 0.05)
        theirs_optimizer.step()
        theirs_optimizer.zero_grad()
        return loss.detach().numpy()

    return Case(f"train step, {mask}", ours, theirs, tolerance=np.inf)


def encode_case() -> Case:
    """Return the case of encoding with the full-size VAE."""
    graph, params, reference = twins("vae", FULL_VAE)
    pixels = np.clip(normal(1, 9, 64, 96, 3), -1, 1)
    run = jax.jit(lambda params, x: VAE.encode(nnx.merge(graph, params), x).mean)

    @torch.no_grad()
    def theirs():
        mean = reference.encode(in_torch(pixels, *CHANNELS_FIRST)).latent_dist.mean
        return mean.numpy().transpose(0, 2, 3, 4, 1)

    return Case("VAE encode", lambda: np.asarray(run(params, pixels)), theirs)


def decode_case() -> Case:
    """Return the case of decoding with the full-size VAE."""
    graph, params, reference = twins("vae", FULL_VAE)
    latents = normal(1, 3, 8, 12, 16)
    run = jax.jit(lambda params, x: VAE.decode(nnx.merge(graph, params), x, "diffusers"))

    @torch.no_grad()
    def theirs():
        return reference.decode(in_torch(latents, *CHANNELS_FIRST)).sample.numpy().transpose(0, 2, 3, 4, 1)

    return Case("VAE decode", lambda: np.asarray(run(params, latents)), theirs)


def t5_case() -> Case:
    """Return the case of encoding a prompt with a smaller T5."""
    graph, params, reference = twins("text_encoder", T5)
    ids = np.random.default_rng(1).integers(0, T5.vocab_size, (1, 226)).astype(np.int32)
    run = jax.jit(lambda params, ids: T5Encoder.__call__(nnx.merge(graph, params), ids))

    @torch.no_grad()
    def theirs():
        return reference(torch.from_numpy(ids).long()).last_hidden_state.numpy()

    return Case("T5 encode", lambda: np.asarray(run(params, ids)), theirs)


def sampling_case() -> Case:
    """Return the case of sampling: four guided steps, and a VAE of half the width on every fourth row and column."""
    config, graph, params, reference = transformer("v2")
    vae_graph, vae_params, vae = twins("vae", SMALL_VAE)
    latents, text = dit_inputs()
    negative = np.zeros_like(text)
    sampler = WindowSampler(
        graph, params, NoiseSchedule(SCHEDULE), SamplingConfig(SamplerConfig("ddim", STEPS), guidance_scale=GUIDANCE)
    )
    decode = jax.jit(lambda params, z: VAE.decode(nnx.merge(vae_graph, params), z / 0.7, "diffusers"))
    known = np.zeros(LAYOUT.num_scenes, bool)
    rope = torch_rope(config)

    def ours():
        out = sampler(latents, text, negative, known, layout=LAYOUT, key=jax.random.key(0))
        scenes = [out[:, run, ::4, ::4] for run in LAYOUT.frame_slices]
        return np.concatenate([np.asarray(decode(vae_params, scene)) for scene in scenes], axis=1)

    @torch.no_grad()
    def theirs():
        scheduler = CogVideoXDDIMScheduler.from_config(SCHEDULE.to_json())
        scheduler.set_timesteps(STEPS)
        x, words = in_torch(latents, *FRAMES_FIRST), torch.from_numpy(np.concatenate([negative, text]))
        for t in scheduler.timesteps:
            unconditional, conditional = predict(reference, torch.cat([x] * 2), words, t[None], rope).chunk(2)
            guided = unconditional + GUIDANCE * (conditional - unconditional)
            x = scheduler.step(guided, t, x, return_dict=False)[0]
        scenes = [x[:, run, :, ::4, ::4].transpose(1, 2) / 0.7 for run in LAYOUT.frame_slices]
        return torch.cat([vae.decode(scene).sample for scene in scenes], dim=2).numpy().transpose(0, 2, 3, 4, 1)

    return Case("sampling run", ours, theirs, tolerance=1e-2)


CASES = {
    "DiT forward, v5": lambda: forward_case("v5"),
    "DiT forward, v2": lambda: forward_case("v2"),
    "train step, v5": lambda: train_case("v5"),
    "train step, v2": lambda: train_case("v2"),
    "VAE encode": encode_case,
    "VAE decode": decode_case,
    "T5 encode": t5_case,
    "sampling run": sampling_case,
}


def time_case(case: Case, rounds: int) -> dict:
    """Compare the outputs of both sides, then time them in turns.

    Raises:
        AssertionError: The outputs differ by more than the tolerance.
    """
    ours, theirs = case.ours(), case.theirs()  # compiles, warms up
    if ours.shape != theirs.shape:
        raise AssertionError(f"{case.name}: shapes {ours.shape} and {theirs.shape}")
    difference = float(np.abs(ours - theirs).max() / np.abs(theirs).max())
    if not difference <= case.tolerance:
        raise AssertionError(f"{case.name}: outputs differ by {difference:.1e} of the largest value")
    wall, busy = {"jax": [], "pytorch": []}, {"jax": [], "pytorch": []}
    for _ in range(rounds):
        for side, run in (("jax", case.ours), ("pytorch", case.theirs)):
            start, start_busy = time.perf_counter(), time.process_time()
            run()
            wall[side].append(time.perf_counter() - start)
            busy[side].append(time.process_time() - start_busy)
    seconds, cpu_seconds = ({side: statistics.median(all_times) for side, all_times in t.items()} for t in (wall, busy))
    return {
        "name": case.name,
        "seconds": seconds,
        "ratio": seconds["jax"] / seconds["pytorch"],
        "cpu_seconds": cpu_seconds,
        "cpu_ratio": cpu_seconds["jax"] / cpu_seconds["pytorch"],
        "difference": difference,
        "all_seconds": wall,
    }


def main(_):
    """Run all cases and print a Markdown table."""
    threads = len(os.sched_getaffinity(0))  # as many as XLA uses
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    print(f"{threads} threads, jax {jax.__version__} on {jax.default_backend()}, torch {torch.__version__}, fp32\n")
    print("| | JAX s | PyTorch s | ratio | CPU seconds ratio | largest difference |\n|---|---|---|---|---|---|")
    results = []
    for name, make in CASES.items():
        if ONLY.value in name:
            found = time_case(make(), ROUNDS.value)
            results.append(found)
            difference = "-" if name.startswith("train") else f"{found['difference']:.0e}"
            numbers = (*found["seconds"].values(), found["ratio"], found["cpu_ratio"])
            print(f"| {name} | {' | '.join(f'{number:.2f}' for number in numbers)} | {difference} |", flush=True)
    if JSON.value:
        Path(JSON.value).write_text(json.dumps({"threads": threads, "cases": results}, indent=2) + "\n")


if __name__ == "__main__":
    app.run(main)
