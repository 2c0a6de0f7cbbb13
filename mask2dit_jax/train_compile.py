"""Compile the programs of a config for a slice of TPUs, without a TPU: does it fit, and what does a step cost?

    python -m mask2dit_jax.train_compile --config=configs/sft.py:5b --topology=v5p:4x4x4 --json=FILE

A training config compiles the very `train_step` that `train` runs. A sampling config compiles the denoising step that
`sample` runs, for one host of the slice. --encoders adds the text encoder and the VAE. Without pretrained weights, the
sizes are those of CogVideoX. FILE gets the figures of the main program, those of all programs under "programs", and
what the job holds in HBM at once under "job".
"""

import dataclasses
import functools
import json
import math

import jax
import jax.numpy as jnp
from absl import flags, logging
from jax.sharding import Mesh, NamedSharding
from ml_collections import config_flags

from mask2dit_jax.config import RunConfig, SampleConfig, TrainConfig, read_config
from mask2dit_jax.diffusion.schedule import NoiseSchedule, ScheduleConfig
from mask2dit_jax.errors import UserError, run_main
from mask2dit_jax.io.atomic import atomic_output
from mask2dit_jax.layout import SceneLayout
from mask2dit_jax.models import sizes as scene_sizes
from mask2dit_jax.models.backbone import TRAINING_PASSES, TransformerConfig
from mask2dit_jax.models.registry import DEFAULT_BACKBONE, CodecConfig, backbone_of, codec_of
from mask2dit_jax.models.t5 import T5, T5Config
from mask2dit_jax.models.vae import VAEConfig
from mask2dit_jax.ops.attention.splash import FORWARD_PRODUCTS, splash_work
from mask2dit_jax.parallel import sharding
from mask2dit_jax.parallel.chips import Topology, parse_topology, prepare_compiler
from mask2dit_jax.parallel.mesh import CONTEXT, DATA, FSDP, TENSOR, check_tokens, local_mesh, make_mesh
from mask2dit_jax.pretrained.encoders import text_encode, video_decode, video_encode
from mask2dit_jax.pretrained.pretrained import Pretrained
from mask2dit_jax.pretrained.transformer_source import TransformerSource
from mask2dit_jax.sampling.engine import sampling_config, sampling_mesh
from mask2dit_jax.sampling.window import WindowSampler
from mask2dit_jax.tpu.report import CompileReport, ModelFlops, compile_and_analyse, format_table, splash_kernel_flops
from mask2dit_jax.training import setup

_CONFIG = config_flags.DEFINE_config_file("config", None, "Run config, e.g. configs/sft.py:5b.", lock_config=True)
_TOPOLOGY = flags.DEFINE_string("topology", None, "Chips to compile for: v5p:4x4x4, v5e:8x8, or by product, v5p-128.")
_SLICES = flags.DEFINE_integer("slices", 1, "Number of such slices, joined over the data center network.")
_JSON = flags.DEFINE_string("json", None, "File for the figures.")
_ENCODERS = flags.DEFINE_bool("encoders", False, "Compile the text encoder and the VAE as well, and add up the job.")
flags.mark_flags_as_required(["config", "topology"])


def main(argv):
    """Compile, and print what fits and what a step costs."""
    if len(argv) > 1:
        raise UserError(f"what is {argv[1]}? settings are given as --config.field=value")
    prepare_compiler()
    config = read_config(_CONFIG.value, RunConfig, "train_compile")
    topology = parse_topology(_TOPOLOGY.value, _SLICES.value)
    is_training = isinstance(config, TrainConfig)
    sizes = Sizes.of(config)
    if is_training:
        batch = config.global_batch_size
        mesh = make_mesh(dataclasses.asdict(config.mesh), topology.devices(), config.samples_at_once)
        reports = [_compile_train(config, mesh, topology, sizes)]
    else:
        batch, host = 1 + sampling_config(config).guided, topology.host()  # one host samples a story
        mesh = sampling_mesh(config, sizes.model, sizes.vae, host.devices())
        reports = [_compile_denoise(config, mesh, host, sizes)]
    if _ENCODERS.value:
        reports += _compile_encoders(config, topology, sizes, decode=not is_training)
    print(format_table(reports))
    job = _job(reports)
    print(_format_job(job))
    if _JSON.value:
        given = {"mesh": dict(mesh.shape), "batch": batch}
        result = reports[0].to_json() | given | {"job": job, "programs": [report.to_json() for report in reports]}
        with atomic_output(_JSON.value) as path:
            path.write_text(json.dumps(result, indent=2) + "\n")
        print(_JSON.value)


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Sizes of the models of a job: those of `pretrained`, or CogVideoX's own if nothing is downloaded yet."""

    model: TransformerConfig
    vae: CodecConfig
    text_encoder: T5Config
    schedule: ScheduleConfig

    @classmethod
    def of(cls, config: RunConfig) -> "Sizes":
        """Read the sizes that a config stands for."""
        if config.pretrained:
            pretrained = Pretrained.open(config.pretrained)
            vae, text_encoder = pretrained.vae.config, pretrained.text_encoder.config
            schedule = pretrained.schedule
        else:
            is_2b = config.preset == "2b"
            vae = VAEConfig.cogvideox_2b() if is_2b else VAEConfig.cogvideox_5b()
            schedule = ScheduleConfig.cogvideox_2b() if is_2b else ScheduleConfig.cogvideox_5b()
            text_encoder = T5Config.xxl()
        return cls(_transformer_sizes(config, vae, text_encoder), vae, text_encoder, schedule)


def _transformer_sizes(config: RunConfig, vae: CodecConfig, text_encoder: T5Config) -> TransformerConfig:
    """Return the sizes of the weights that the config names, or else those of the config or of its preset."""
    is_training = isinstance(config, TrainConfig)
    stored = (config.init_from if is_training else config.checkpoint) or config.pretrained
    source = TransformerSource.find(stored) if stored else None
    if source:
        return source.config()
    if is_training:
        return setup.model_from_scratch(config, vae, text_encoder)
    if config.preset not in DEFAULT_BACKBONE.sizes:
        raise UserError(f"there is no transformer in {stored}; set --config.checkpoint to a training workdir")
    return DEFAULT_BACKBONE.sizes[config.preset](mask=config.mask)


def _compile_train(config: TrainConfig, mesh: Mesh, topology: Topology, sizes: Sizes) -> CompileReport:
    program = setup.train_program(config, mesh, sizes.model, sizes.vae, sizes.schedule)
    layout = program.objective.layout
    needed = _model_flops(program.model, layout, mesh, config.global_batch_size, topology, True)
    return _compile("train step", lambda: program.lower("tpu"), mesh, topology, needed, layout)


def _compile_denoise(config: SampleConfig, mesh: Mesh, topology: Topology, sizes: Sizes) -> CompileReport:
    sampling = sampling_config(config)
    model = scene_sizes.with_run_settings(sizes.model, config)
    layout = scene_sizes.scene_layout(config, model, sizes.vae)
    check_tokens(layout.num_tokens, mesh)
    graph, params = backbone_of(model).abstract(model, jnp.dtype(config.compute_dtype), mesh)
    sampler = WindowSampler(graph, params, NoiseSchedule(sizes.schedule), sampling, mesh)
    needed = _model_flops(model, layout, mesh, 1 + sampling.guided, topology, False)
    return _compile("denoising step", lambda: sampler.lower(model, layout, "tpu"), mesh, topology, needed, layout)


def _compile_encoders(config: RunConfig, topology: Topology, sizes: Sizes, decode: bool) -> list[CompileReport]:
    """Compile the frozen components as they run, for one scene on one host. Their ideal FLOPs are not counted."""
    dtype = jnp.dtype(config.compute_dtype)
    layout = scene_sizes.scene_layout(config, sizes.model, sizes.vae)
    latent_size = [side * sizes.model.patch_size for side in layout.grid]
    host, frames = topology.host(), (config.num_frames, config.height, config.width)
    text_mesh, vae_mesh = local_mesh(devices=host.devices()), local_mesh(tuple(latent_size), host.devices())
    text_graph, text_params = T5.abstract(sizes.text_encoder, dtype, text_mesh)
    vae_graph, vae_params = codec_of(sizes.vae).abstract(sizes.vae, dtype, vae_mesh)
    ids = _replicated(text_mesh, (1, layout.text_tokens), jnp.int32)
    programs = [("text encode", text_mesh, text_encode(text_graph), text_params, ids)]
    encode, chunks = video_encode(vae_graph), sizes.vae.encode_chunks(frames)
    programs += _chunk_programs("vae encode", vae_mesh, encode, vae_params, (*frames, 3), chunks)
    if decode:
        latents = (layout.frames[0], *latent_size, sizes.vae.latent_channels)
        chunks = sizes.vae.decode_chunks(latents[0], config.decode_chunking)
        run = video_decode(vae_graph, sizes.vae.scaling_factor)
        programs += _chunk_programs("vae decode", vae_mesh, run, vae_params, latents, chunks)

    def lower(run, *arguments):
        overwritten = range(2, len(arguments))  # the cache of a chunk is donated to that of the next
        return jax.jit(run, donate_argnums=overwritten).trace(*arguments).lower(lowering_platforms=("tpu",))

    return [
        _compile(name, functools.partial(lower, *program), mesh, host, ModelFlops(0, 0))
        for name, mesh, *program in programs
    ]


def _chunk_programs(name: str, mesh: Mesh, run, params, shape: tuple[int, ...], chunks: list[slice]) -> list[tuple]:
    """Return the program of a clip's first chunk, and that of the chunks after it, if there are any."""
    first, *rest = (_replicated(mesh, (chunk.stop - chunk.start, *shape[1:])) for chunk in chunks)
    programs = [(name, mesh, functools.partial(run, cache=None), params, first)]
    if rest:
        with jax.set_mesh(mesh):
            _, cache = jax.eval_shape(functools.partial(run, cache=None), params, first)
        places = jax.tree.map(lambda x: NamedSharding(mesh, sharding.fit(sharding.FRAMES, x.shape, mesh)), cache)
        programs.append((f"{name}, next", mesh, run, params, rest[0], sharding.placed(cache, places)))
    return programs


def _replicated(mesh: Mesh, shape: tuple[int, ...], dtype=jnp.float32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding.replicated(mesh))


def _compile(
    name: str, lower, mesh: Mesh, topology: Topology, needed: ModelFlops, layout: SceneLayout | None = None
) -> CompileReport:
    logging.info("%s: mesh %s; lowering", name, " x ".join(f"{axis} {size}" for axis, size in mesh.shape.items()))
    with jax.set_mesh(mesh):
        lowered = lower()
    logging.info("%s: compiling for %d chips", name, topology.num_chips)
    tokens = (layout.num_tokens // mesh.shape[CONTEXT], layout.num_tokens) if layout else None
    return compile_and_analyse(lowered, topology=topology, model_flops=needed, name=name, tokens=tokens)


def _model_flops(
    model: TransformerConfig, layout: SceneLayout, mesh: Mesh, batch: int, topology: Topology, training: bool
) -> ModelFlops:
    backbone = backbone_of(model)
    passes = TRAINING_PASSES if training else 1
    share = passes * batch / mesh.size
    batch_shards = math.gcd(batch, mesh.shape[DATA] * mesh.shape[FSDP])
    work = splash_work(
        model.mask,
        layout,
        heads=model.num_heads,
        head_dim=model.head_dim,
        context=mesh.shape[CONTEXT],
        tensor=mesh.shape[TENSOR],
        batch=batch / batch_shards,
        mxu=topology.chip.mxu_width,
    )
    return ModelFlops(
        matmul_ideal=backbone.matmul_flops(model, layout) * share,
        attention_ideal=backbone.attention_flops(model, layout) * share,
        kernels=splash_kernel_flops(work.forward_executed / FORWARD_PRODUCTS),
        head_dim=model.head_dim,
        attention_occupancy=work.occupancy,
    )


def _job(reports: list[CompileReport]) -> dict:
    """Return the HBM that one chip needs if the job holds the arguments of all programs while each of them runs."""
    held = sum(report.hbm_arguments_gib or 0 for report in reports)
    peaks = {r.name: r.hbm_peak_gib + held - (r.hbm_arguments_gib or 0) for r in reports}
    limit = reports[0].hbm_limit_gib
    peak = max(peaks.values())
    return {"hbm_peak_gib": peak, "hbm_limit_gib": limit, "hbm_headroom_gib": limit - peak, "fits": peak <= limit}


def _format_job(job: dict) -> str:
    fits = f"{job['hbm_headroom_gib']:.2f} GiB to spare" if job["fits"] else f"{-job['hbm_headroom_gib']:.2f} GiB over"
    return f"all of these in one job: {job['hbm_peak_gib']:.2f} of {job['hbm_limit_gib']:.2f} GiB a chip, {fits}"


if __name__ == "__main__":
    run_main(main)
