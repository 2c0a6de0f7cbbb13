"""Benchmarks the GPU path on one card with random weights, in under five minutes.

    python benchmarks/gpu.py                    runs every section, the most informative first
    python benchmarks/gpu.py --only='train|vae' runs the sections whose name matches
    python benchmarks/gpu.py --tiny             runs the same code on a CPU, to test the script itself

Attention is compared with dense attention in fp32, forward and backward, before anything is timed. PyTorch and the
classes of diffusers are timed too, if they are installed. Results are written to --output immediately, so an
interrupted run keeps its measurements. docs/gpu.md shows the figures.
"""

import argparse
import dataclasses
import functools
import json
import os
import re
import subprocess
import sys
import time
import traceback
from pathlib import Path

BEGUN = time.monotonic()
parser = argparse.ArgumentParser()
parser.add_argument("--seconds", type=float, default=240, help="begin no section later than this")
parser.add_argument("--tiny", action="store_true", help="use tiny models, which a CPU can run")
parser.add_argument("--torch", action="store_true", help="(internal) run the PyTorch half")
parser.add_argument("--only", default="", help="run only sections that match this regular expression")
parser.add_argument("--output", default="gpu.json", help="JSON file for the results")
ARGS = parser.parse_args()
sys.path.insert(0, str(Path(__file__).parents[1]))
PEAK = 989e12  # dense bf16 FLOP/s of an H100 or H200 SXM
HEAD, TEXT = 64, 226


@dataclasses.dataclass(frozen=True)
class Size:
    """The size of a transformer."""

    heads: int
    layers: int
    rope: bool

    @property
    def width(self):
        """Width of the transformer."""
        return self.heads * HEAD


SIZES = {"2b": Size(30, 30, False), "5b": Size(48, 42, True)}
FRAMES, ROWS, COLUMNS = 13, 60, 90  # latents of 49 frames at 480 x 720
if ARGS.tiny:
    SIZES = {"2b": Size(2, 2, False), "5b": Size(4, 2, True)}
    FRAMES, ROWS, COLUMNS = 3, 8, 12
TOKENS = TEXT + FRAMES * ROWS // 2 * COLUMNS // 2


def forward_flops(size: Size, scenes: int = 1) -> float:
    """Return the FLOPs of one sample under mask v2, whose video tokens attend to all videos and their own text."""
    text, video = TEXT, TOKENS - TEXT
    pairs = scenes * (text * text + 2 * text * video) + (scenes * video) ** 2
    return size.layers * (24 * scenes * TOKENS * size.width**2 + 4 * size.width * pairs)


# --- PyTorch ----------------------------------------------------------------------------------------------------------


def torch_half() -> dict:
    """Return the times of PyTorch in ms."""
    import torch
    import torch.nn.functional as F
    from torch import nn

    device = "cpu" if ARGS.tiny else "cuda"
    dtype = torch.float32 if ARGS.tiny else torch.bfloat16
    found = {"torch": torch.__version__}

    def timed(run, repeats=3, warm=2):
        for _ in range(warm):
            run()
        if device == "cuda":
            torch.cuda.synchronize()
        begun = time.perf_counter()
        for _ in range(repeats):
            run()
        if device == "cuda":
            torch.cuda.synchronize()
        return (time.perf_counter() - begun) / repeats * 1e3

    class Block(nn.Module):
        """A block of CogVideoX: adaLN, joint attention with normalised queries and keys, feed-forward."""

        def __init__(self, width, heads):
            super().__init__()
            self.heads = heads
            self.modulation = nn.ModuleList([nn.Linear(512, 6 * width) for _ in range(2)])
            self.norms = nn.ModuleList([nn.LayerNorm(width, eps=1e-5) for _ in range(2)])
            self.qkv = nn.ModuleList([nn.Linear(width, width) for _ in range(3)])
            self.qk_norm = nn.ModuleList([nn.LayerNorm(HEAD, eps=1e-6) for _ in range(2)])
            self.out = nn.Linear(width, width)
            self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

        def modulated(self, index, x, time):
            parts = self.modulation[index](F.silu(time))[:, None].chunk(6, dim=-1)
            shift, scale, gate = (
                torch.cat([t.expand(-1, TEXT, -1), v.expand(-1, x.shape[1] - TEXT, -1)], 1)
                for v, t in zip(parts[:3], parts[3:], strict=True)
            )
            return self.norms[index](x) * (1 + scale) + shift, gate

        def forward(self, x, time):
            h, gate = self.modulated(0, x, time)
            q, k, v = (f(h).unflatten(-1, (self.heads, HEAD)).transpose(1, 2) for f in self.qkv)
            q, k = self.qk_norm[0](q), self.qk_norm[1](k)
            mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
            x = x + gate * self.out(mixed)
            h, gate = self.modulated(1, x, time)
            return x + gate * self.down(F.gelu(self.up(h), approximate="tanh"))

    for name, size in SIZES.items():
        block = Block(size.width, size.heads).to(device, dtype)
        for batch in (1, 2):
            x = torch.randn(batch, TOKENS, size.width, device=device, dtype=dtype)
            step = torch.randn(batch, 512, device=device, dtype=dtype)
            kinds = {"eager": block} if ARGS.tiny or batch == 1 else {"eager": block, "compiled": torch.compile(block)}
            for kind, run in kinds.items():
                with torch.no_grad():
                    ms = timed(lambda run=run, x=x, step=step: run(x, step)) * size.layers
                found[f"{name} blocks, forward, batch {batch}, {kind}"] = ms
        x = torch.randn(1, TOKENS, size.width, device=device, dtype=dtype, requires_grad=True)
        step = torch.randn(1, 512, device=device, dtype=dtype)

        def both(block=block, x=x, step=step):
            out = torch.utils.checkpoint.checkpoint(block, x, step, use_reentrant=False)
            out.sum().backward()

        import torch.utils.checkpoint

        found[f"{name} blocks, forward and backward, remat full, eager"] = timed(both) * size.layers
    for kind in ("FLASH_ATTENTION", "CUDNN_ATTENTION"):
        if ARGS.tiny:
            break
        from torch.nn.attention import SDPBackend, sdpa_kernel

        q = torch.randn(1, 48, TOKENS, HEAD, device=device, dtype=dtype, requires_grad=True)
        try:
            with sdpa_kernel(getattr(SDPBackend, kind)):
                with torch.no_grad():
                    found[f"attention 48 heads, forward, {kind}"] = timed(
                        lambda q=q: F.scaled_dot_product_attention(q, q, q)
                    )
                found[f"attention 48 heads, both, {kind}"] = timed(
                    lambda q=q: F.scaled_dot_product_attention(q, q, q).sum().backward()
                )
        except RuntimeError as error:
            found[f"attention, {kind}"] = str(error).splitlines()[0][:100]
    try:
        import diffusers
    except ImportError:
        return found | {"diffusers": "not installed"}
    found["diffusers"] = diffusers.__version__
    try:
        with torch.no_grad():
            if not ARGS.tiny:
                vae = diffusers.AutoencoderKLCogVideoX(
                    down_block_types=("CogVideoXDownBlock3D",) * 4,
                    up_block_types=("CogVideoXUpBlock3D",) * 4,
                    block_out_channels=(128, 256, 256, 512),
                    scaling_factor=0.7,
                ).to(device, dtype)
                z = torch.randn(1, 16, FRAMES, ROWS, COLUMNS, device=device, dtype=dtype)
                found["diffusers VAE decode"] = timed(lambda: vae.decode(z), repeats=1, warm=1)
                del vae
                torch.cuda.empty_cache()
            size = SIZES["5b"]
            with torch.device(device):
                before = torch.get_default_dtype()
                torch.set_default_dtype(dtype)
                model = diffusers.CogVideoXTransformer3DModel(
                    num_attention_heads=size.heads,
                    num_layers=size.layers,
                    use_rotary_positional_embeddings=True,
                    sample_height=ROWS,
                    sample_width=COLUMNS,
                    sample_frames=4 * FRAMES - 3,
                )
                torch.set_default_dtype(before)
            inputs = {
                "hidden_states": torch.randn(2, FRAMES, 16, ROWS, COLUMNS, device=device, dtype=dtype),
                "encoder_hidden_states": torch.randn(2, TEXT, 4096, device=device, dtype=dtype),
                "timestep": torch.tensor([500, 500], device=device),
                "image_rotary_emb": tuple(torch.rand(2, TOKENS - TEXT, HEAD, device=device)),
            }
            found["diffusers 5B forward, batch 2, eager"] = timed(lambda: model(**inputs), repeats=2, warm=1)
    except Exception as error:
        found["diffusers failed"] = str(error).splitlines()[0][:160]
    return found


if ARGS.torch:
    print(json.dumps(torch_half()))
    sys.exit()

# --- JAX --------------------------------------------------------------------------------------------------------------

RESULTS: dict = {}
ROWS_SHOWN: list[tuple[str, str]] = []


def show(name: str, value: str, **numbers) -> None:
    """Print a result and write all results so far."""
    RESULTS[name] = numbers or value
    ROWS_SHOWN.append((name, value))
    Path(ARGS.output).write_text(json.dumps(RESULTS, indent=1) + "\n")
    print(f"{time.monotonic() - BEGUN:6.0f} s  {name:58s} {value}", flush=True)


def section(function):
    """Run a section now if it is chosen and there is time left. A failure does not end the script."""
    name = function.__name__
    if re.search(ARGS.only, name) and time.monotonic() - BEGUN < ARGS.seconds:
        try:
            function()
        except Exception as error:
            show(f"{name} FAILED", f"{type(error).__name__}: {str(error).strip().splitlines()[0][:150]}")
            traceback.print_exc(limit=-4)
    elif re.search(ARGS.only, name):
        show(f"{name} skipped", "no time left")
    return function


@section
def pytorch_beside():
    """Time PyTorch in a process of its own, before JAX takes the memory."""
    command = [sys.executable, __file__, "--torch", *(["--tiny"] if ARGS.tiny else [])]
    try:
        run = subprocess.run(command, capture_output=True, text=True, timeout=80)
    except subprocess.TimeoutExpired:
        show("PyTorch", "took more than 80 s")
        return
    if run.returncode:
        show("PyTorch", (run.stderr.strip().splitlines() or ["failed"])[-1][:120])
        return
    for name, value in json.loads(run.stdout.strip().splitlines()[-1]).items():
        show(f"torch: {name}", f"{value:9.1f} ms" if isinstance(value, float) else str(value), ms=value)


os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.93")

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
from flax import nnx  # noqa: E402

from mask2dit_jax.diffusion.samplers import Sampler, SamplerConfig  # noqa: E402
from mask2dit_jax.diffusion.schedule import NoiseSchedule, ScheduleConfig  # noqa: E402
from mask2dit_jax.layout import SceneLayout  # noqa: E402
from mask2dit_jax.models.dit import DiT, DiTConfig  # noqa: E402
from mask2dit_jax.models.vae import VAE, VAEConfig  # noqa: E402
from mask2dit_jax.ops.attention.api import attend, best_implementation  # noqa: E402
from mask2dit_jax.parallel.abstract import memoryless  # noqa: E402
from mask2dit_jax.sampling.window import make_denoise_step  # noqa: E402
from mask2dit_jax.training.optimizer import OptimizerConfig, make_optimizer  # noqa: E402
from mask2dit_jax.training.step import Objective, init_state, make_train_step  # noqa: E402

BF16 = jnp.bfloat16
device = jax.devices()[0]
show("jax, device", f"{jax.__version__}, {device.device_kind}; auto is {best_implementation(BF16)}")


def timed(run, *arguments, repeats=3):
    """Return the seconds of the first call of a jitted function, with compilation, and the milliseconds of the next."""
    begun = time.perf_counter()
    jax.block_until_ready(run(*arguments))
    first = time.perf_counter() - begun
    jax.block_until_ready(run(*arguments))
    begun = time.perf_counter()
    for _ in range(repeats):
        out = run(*arguments)
    jax.block_until_ready(out)
    return first, (time.perf_counter() - begun) / repeats * 1e3


def speed(name, ms, flops, compiled):
    """Show a time with its FLOP/s and share of the peak.

    Args:
        name: Name of the result.
        ms: Milliseconds per call.
        flops: FLOPs that a call needs.
        compiled: Seconds of the first call.
    """
    rate = flops / ms * 1e3
    show(
        name,
        f"{ms:9.1f} ms  {rate / 1e12:6.1f} TFLOP/s  {rate / PEAK:5.1%}  (first call {compiled:.0f} s)",
        ms=ms,
        tflops=rate / 1e12,
        first_call_s=compiled,
    )


def qkv(layout, heads, dtype, number=3):
    """Return `number` random arrays (1 l k m)."""
    keys = jax.random.split(jax.random.key(0), number)
    return [jax.random.normal(key, (1, layout.num_tokens, heads, HEAD), jnp.float32).astype(dtype) for key in keys]


def with_gradients(attention):
    """Return a jitted function that computes the output of an attention and its three gradients."""

    def run(q, k, v, d_out):
        out, back = jax.vjp(attention, q, k, v)
        return out, *back(d_out)

    return jax.jit(run)


@section
def attention_agrees():
    """Compare output and gradients of each implementation in bf16 with dense attention in fp32.

    An error is the largest difference divided by the largest value. As bf16 has 8 bits, 1e-2 is rounding and 1e-1 is
    wrong.
    """
    even = SceneLayout.of_equal_scenes(3, 2, (8, 12), TEXT)
    odd = SceneLayout((1, 3, 2), (5, 7), 33)  # unequal scenes, and no length is even
    wanted = [("v1", even), ("v2", even), ("v5", even), ("v2", odd), ("v3", odd), ("v4", odd)]
    for mask, layout in wanted:
        inputs = qkv(layout, 4, BF16, 4)
        call = functools.partial(attend, mask=mask, layout=layout)
        with jax.default_matmul_precision("highest"):
            exact = with_gradients(functools.partial(call, implementation="dense"))(
                *(x.astype(jnp.float32) for x in inputs)
            )
        for name in ("cudnn", "grouped"):
            if name == "grouped" and (mask, layout) != ("v2", even):
                continue
            got = with_gradients(functools.partial(call, implementation=name))(*inputs)
            errors = [
                float(jnp.abs(g.astype(jnp.float32) - e).max() / jnp.abs(e).max())
                for g, e in zip(got, exact, strict=True)
            ]
            verdict = "ok" if max(errors) < 3e-2 and all(np.isfinite(errors)) else "WRONG"
            text = "  ".join(
                f"{part} {error:.1e}" for part, error in zip(("out", "dq", "dk", "dv"), errors, strict=True)
            )
            show(f"{name}, {mask}, {layout.num_tokens} tokens", f"{verdict}: {text}", errors=errors)


@section
def attention_speed():
    """Time attention alone, forward and with gradients, for one and three scenes."""
    layouts = {1: SceneLayout.of_equal_scenes(1, FRAMES, (ROWS // 2, COLUMNS // 2), TEXT)}
    layouts[3] = dataclasses.replace(layouts[1], frames=(FRAMES,) * 3)
    heads = SIZES["5b"].heads
    for scenes, layout in layouts.items():
        inputs = qkv(layout, heads, BF16, 4)
        flops = (forward_flops(SIZES["5b"], scenes) / SIZES["5b"].layers) - 24 * layout.num_tokens * (heads * HEAD) ** 2
        call = functools.partial(attend, mask="v2", layout=layout, implementation="cudnn")
        first, ms = timed(jax.jit(call), *inputs[:3])
        speed(f"joined cuDNN, v2, {scenes} scenes, forward", ms, flops, first)
        first, ms = timed(with_gradients(call), *inputs)
        speed(f"joined cuDNN, v2, {scenes} scenes, both (3.5 x)", ms, 3.5 * flops, first)
        if scenes == 1 and device.platform == "gpu":
            plain = functools.partial(jax.nn.dot_product_attention, implementation="cudnn")
            first, ms = timed(with_gradients(plain), *inputs)
            speed("one plain cuDNN call (v5), both", ms, 3.5 * 4 * heads * HEAD * layout.num_tokens**2, first)


def model_config(name: str, **kwargs) -> DiTConfig:
    """Return the config of model "2b" or "5b"."""
    size = SIZES[name]
    return DiTConfig(
        num_heads=size.heads,
        head_dim=HEAD,
        num_layers=size.layers,
        rope=size.rope,
        sample_height=ROWS,
        sample_width=COLUMNS,
        sample_frames=4 * FRAMES - 3,
        **({"attention": "auto"} | kwargs),
    )


def random_like(abstract, scale=0.02):
    """Make small random parameters on the device."""
    leaves, tree = jax.tree.flatten(abstract)

    def make():
        keys = jax.random.split(jax.random.key(1, impl="rbg"), len(leaves))
        return [
            (scale * jax.random.normal(k, x.shape, jnp.float32)).astype(x.dtype)
            for k, x in zip(keys, leaves, strict=True)
        ]

    return tree.unflatten(jax.jit(make)())


@functools.lru_cache(maxsize=1)
def model_of(name: str):
    """Return the graph and random parameters of a model. Only the last one is kept in memory."""
    graph, abstract = nnx.split(memoryless(DiT, model_config(name), dtype=BF16, param_dtype=BF16))
    return graph, random_like(abstract)


def full_size_layout(scenes: int) -> SceneLayout:
    """Return the layout of `scenes` full-size scenes."""
    return SceneLayout.of_equal_scenes(scenes, FRAMES, (ROWS // 2, COLUMNS // 2), TEXT)


def time_denoising(scenes: int, repeats: int):
    """Time a 5B sampling step with guidance, which makes a batch of 2, and show 50 of them."""
    graph, params = model_of("5b")
    sampler = Sampler(SamplerConfig(num_steps=50), NoiseSchedule(ScheduleConfig.cogvideox_5b()))
    step = jax.jit(make_denoise_step(graph, sampler, guided=True), static_argnames="layout")
    x = jax.random.normal(jax.random.key(2), (1, scenes * FRAMES, ROWS, COLUMNS, 16))
    text = jax.random.normal(jax.random.key(3), (2, scenes, TEXT, 4096))
    run = functools.partial(step, layout=full_size_layout(scenes))
    arguments = (params, sampler.init(x), x, x, text, np.zeros(scenes, bool), np.float32(6), jax.random.key(4))
    first, ms = timed(run, *arguments, repeats=repeats)
    finite = bool(jnp.isfinite(run(*arguments)[1]).all())
    speed(f"5B denoising step with guidance, {scenes} scenes", ms, 2 * forward_flops(SIZES["5b"], scenes), first)
    show(f"5B, 50 of these steps, {scenes} scenes", f"{ms * 50 / 1e3:9.1f} s; finite {finite}", seconds=ms / 20)


def time_train_step(name: str, scenes: int, repeats: int):
    """Time a train step of batch 1, with parameters and moments in bf16 instead of fp32, so that 5B fits into 80 GB."""
    config = model_config(name, remat="attention")
    graph, abstract = nnx.split(memoryless(DiT, config, dtype=BF16, param_dtype=BF16))
    params = random_like(abstract)
    layout = full_size_layout(scenes)
    schedule = NoiseSchedule(ScheduleConfig.cogvideox_5b())
    objective = Objective(schedule, layout, 0.7, condition_probability=0.5)
    optimizer = make_optimizer(OptimizerConfig())
    step = jax.jit(make_train_step(graph, optimizer, objective, 0), donate_argnums=0)
    shape = (1, FRAMES * scenes, ROWS, COLUMNS, 16)
    batch = {
        "mean": jax.random.normal(jax.random.key(5), shape),
        "logvar": jnp.full(shape, -10.0),
        "text": jax.random.normal(jax.random.key(6), (1, scenes, TEXT, 4096)),
    }
    state = jax.jit(lambda p: init_state(p, optimizer), donate_argnums=0)(params)
    del params
    begun = time.perf_counter()
    state, metrics = step(state, batch)
    jax.block_until_ready(metrics)
    first = time.perf_counter() - begun
    begun = time.perf_counter()
    for _ in range(repeats):
        state, metrics = step(state, batch)
    jax.block_until_ready(metrics)
    ms = (time.perf_counter() - begun) / repeats * 1e3
    speed(f"{name} train step, {scenes} scenes, remat attention", ms, 3 * forward_flops(SIZES[name], scenes), first)
    stats = device.memory_stats() or {}
    peak = stats.get("peak_bytes_in_use", 0) / 2**30
    show(f"{name} train step, {scenes} scenes: loss, peak so far", f"{float(metrics['loss']):.3f}, {peak:.1f} GiB")


@section
def denoise_5b():
    """Time sampling of one scene."""
    time_denoising(1, repeats=3)


@section
def train_5b():
    """Time a train step of 5B on one scene."""
    model_of.cache_clear()
    time_train_step("5b", 1, 3)


@section
def vae_decode():
    """Time decoding 49 frames of 480 x 720, chunk by chunk as in sampling."""
    model_of.cache_clear()
    config = VAEConfig.cogvideox_5b()
    if ARGS.tiny:
        config = dataclasses.replace(config, block_out_channels=(32, 32, 32, 32), layers_per_block=1)
    graph, abstract = nnx.split(memoryless(VAE, config, dtype=BF16, param_dtype=BF16))
    params = random_like(abstract, 0.05)

    def decode(params, latents, cache):
        pixels, cache = nnx.merge(graph, params).decode_chunk(latents, cache)
        return jnp.clip(pixels * 127.5 + 127.5, 0, 255).astype(jnp.uint8), cache

    run = jax.jit(decode, donate_argnums=2)
    latents = np.random.default_rng(0).standard_normal((1, FRAMES, ROWS, COLUMNS, 16), np.float32)

    def whole():
        cache, out = None, []
        for chunk in config.decode_chunks(FRAMES, "mask2dit"):
            pixels, cache = run(params, latents[:, chunk], cache)
            out.append(pixels)
        return out

    first, ms = timed(whole, repeats=1)
    show("VAE decode, 49 frames", f"{ms:9.1f} ms  (first call {first:.0f} s)", ms=ms, first_call_s=first)


@section
def denoise_5b_three_scenes():
    """Time sampling of the paper's 3 scenes, 53,328 tokens."""
    time_denoising(3, repeats=1)


@section
def train_2b():
    """Time a train step of 2B on one scene."""
    time_train_step("2b", 1, 3)


@section
def forward_2b():
    """Time a forward pass of 2B on one scene."""
    graph, params = model_of("2b")
    layout = full_size_layout(1)
    x = jax.random.normal(jax.random.key(2), (1, FRAMES, ROWS, COLUMNS, 16))
    text = jax.random.normal(jax.random.key(3), (1, 1, TEXT, 4096))

    @jax.jit
    def run(params, x, text):
        return nnx.merge(graph, params)(x, text, jnp.full((1, 1), 500), layout=layout)

    first, ms = timed(run, params, x, text)
    speed("2b forward, 1 scene", ms, forward_flops(SIZES["2b"]), first)


@section
def train_5b_three_scenes():
    """Time a train step of 5B on the paper's 3 scenes, 53,328 tokens."""
    model_of.cache_clear()
    time_train_step("5b", 3, 1)


print(f"\n{ARGS.output}; {time.monotonic() - BEGUN:.0f} s")
print("\n".join(f"| {name} | {value} |" for name, value in [("what", "result"), ("---", "---"), *ROWS_SHOWN]))
