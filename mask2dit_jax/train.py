"""Trains the multi-scene transformer: pretraining, SFT and their ablations, chosen by the config.

    python -m mask2dit_jax.train --config=configs/sft.py:tiny --workdir=workdir/sft

A run started again in the same workdir goes on from its newest checkpoint.
"""

import time

import jax
import numpy as np
from absl import flags, logging
from flax import nnx
from ml_collections import ConfigDict, config_flags
from tensorboardX import SummaryWriter
from tqdm import tqdm

from mask2dit_jax import setup_run
from mask2dit_jax.curate.encode import encode_clips
from mask2dit_jax.data.cache import CacheSettings, LatentCache
from mask2dit_jax.data.pipeline import make_batches
from mask2dit_jax.data.sampling import PretrainSampling, SftSampling
from mask2dit_jax.data.scenes import ConsecutiveShots, UnrelatedClips
from mask2dit_jax.data.sources import read_pretrain_csv, read_sft_json
from mask2dit_jax.diffusion.schedule import NoiseSchedule
from mask2dit_jax.encoders import TextEncoder, VideoCodec
from mask2dit_jax.errors import UserError, run_main
from mask2dit_jax.models.dit import DiT, DiTConfig
from mask2dit_jax.parallel import mesh as meshes
from mask2dit_jax.port import pretrained as port
from mask2dit_jax.training import checkpoint
from mask2dit_jax.training.optimizer import OptimizerConfig, learning_rate, make_optimizer
from mask2dit_jax.training.step import Objective, TrainState, init_state, make_train_step
from mask2dit_jax.transformer import TransformerSource

_CONFIG = config_flags.DEFINE_config_file("config", None, "Run config, e.g. configs/sft.py:tiny.", lock_config=True)
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run: checkpoints and TensorBoard logs.")
flags.mark_flags_as_required(["config", "workdir"])


def main(argv):
    if len(argv) > 1:
        raise UserError(f"what is {argv[1]}? settings are given as --config.field=value")
    config, workdir = _CONFIG.value, _WORKDIR.value
    setup_run.check_values(config, "train", "num_steps")
    logging.info("config:\n%s", config)
    mesh = meshes.make_mesh()
    meshes.check_batch_size(config.global_batch_size, mesh)

    with checkpoint.open_manager(workdir, keep=config.keep_checkpoints) as manager:
        pretrained = setup_run.resolve_pretrained(config)
        start, source = _find_start(config, pretrained, manager)
        stored = source.config() if source else setup_run.model_from_scratch(config, pretrained)
        model_config = setup_run.with_run_settings(stored, config)
        setup_run.check_encoders(model_config, pretrained)
        vae_config = port.load_config(pretrained, "vae")
        layout = setup_run.scene_layout(config, model_config, vae_config)
        objective = Objective(
            NoiseSchedule(port.load_schedule(pretrained)),
            layout,
            vae_config.scaling_factor,
            config.condition_probability,
            config.condition,
        )
        graph, abstract = _abstract_model(config, model_config)
        optimizer_config = OptimizerConfig(**config.optimizer.to_dict(), num_steps=config.num_steps)
        optimizer = make_optimizer(optimizer_config)
        cache, samples = _prepare_data(config, pretrained, model_config)

        replicated = meshes.replicated(mesh)
        state = _start_state(config, start, source, model_config, abstract, optimizer, replicated, manager)
        train_step = jax.jit(
            make_train_step(graph, optimizer, objective, jax.random.key(config.seed)),
            donate_argnums=0,
            out_shardings=(replicated, replicated),
        )
        first_step = int(state.step)
        batches = make_batches(
            cache,
            samples,
            global_batch_size=config.global_batch_size,
            seed=config.seed,
            start_step=first_step,
            shard=(jax.process_index(), jax.process_count()),
        )
        record = {
            "model": model_config.to_json(),
            "pretrained": str(config.pretrained),
            "config": config.to_dict(),
        }
        writer = SummaryWriter(str(workdir)) if jax.process_index() == 0 else None
        log = MetricsLog(writer, config.log_every, learning_rate(optimizer_config))
        with tqdm(total=config.num_steps, initial=first_step, desc="training", unit="step") as progress:
            for step in range(first_step + 1, config.num_steps + 1):
                state, metrics = train_step(state, meshes.global_batch(next(batches), mesh))
                progress.set_postfix(log.add(step, metrics), refresh=False)
                progress.update()
                if step % config.checkpoint_every == 0 or step == config.num_steps:
                    checkpoint.save(manager, state, record)
        log.flush()
    logging.info("done: step %d, checkpoints in %s", config.num_steps, workdir)


class MetricsLog:
    """Writes a window of steps at a time, one window late: reading a metric never waits for the step in flight."""

    def __init__(self, writer: SummaryWriter | None, every: int, rate):
        self._writer, self._every, self._rate = writer, every, rate
        self._pending, self._ready, self._shown, self._since = [], None, {}, time.monotonic()

    def add(self, step: int, metrics) -> dict[str, str]:
        """Returns what a progress bar shows: the newest means that are written."""
        self._pending.append(metrics)
        if step % self._every == 0:
            elapsed, self._since = time.monotonic() - self._since, time.monotonic()
            self._write()
            self._ready = (step, self._pending, len(self._pending) / elapsed)
            self._pending = []
        return self._shown

    def flush(self):
        self._write()
        if self._writer:
            self._writer.close()

    def _write(self):
        if self._ready is None:
            return
        (step, window, steps_per_second), self._ready = self._ready, None
        host = jax.device_get(window)
        total = {name: float(np.sum([m[name] for m in host])) for name in host[0]}
        scalars = {
            "loss": total["loss"] / len(host),
            "grad_norm": total["grad_norm"] / len(host),
            "learning_rate": float(self._rate(step)),
            "steps_per_second": steps_per_second,
        }
        for kind in ("fixed", "extension"):
            if total[f"num_{kind}"]:
                scalars[f"loss_{kind}"] = total[f"loss_{kind}_sum"] / total[f"num_{kind}"]
        self._shown = {"loss": f"{scalars['loss']:.4f}"}
        if self._writer:
            for name, value in scalars.items():
                self._writer.add_scalar(name, value, step)


def _find_start(config: ConfigDict, pretrained, manager) -> tuple[str, TransformerSource | None]:
    """What the run starts from, in this order: resume, init_from, the pretrained directory, random numbers."""
    if manager.latest_step() is not None:
        logging.info("start: resuming step %d of %s", manager.latest_step(), manager.directory)
        return "resume", TransformerSource.require(manager.directory)
    if config.init_from:
        source = TransformerSource.require(config.init_from)
        logging.info("start: parameters of %s", source)
        return "parameters", source
    source = TransformerSource.find(pretrained)
    logging.info("start: %s", f"pretrained weights of {source}" if source else "from scratch")
    return ("parameters", source) if source else ("scratch", None)


def _abstract_model(config: ConfigDict, model_config: DiTConfig):
    dtypes = {
        "dtype": setup_run.resolve_dtype(config.compute_dtype),
        "param_dtype": setup_run.resolve_dtype(config.param_dtype),
    }
    return nnx.split(nnx.eval_shape(lambda: DiT(model_config, rngs=nnx.Rngs(config.seed), **dtypes)))


def _start_state(config, start, source, model_config, abstract, optimizer, sharding, manager) -> TrainState:
    """Shapes first, then every parameter straight onto its devices."""

    def placed(tree):
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree)

    def init():
        param_dtype = setup_run.resolve_dtype(config.param_dtype)
        return nnx.state(DiT(model_config, rngs=nnx.Rngs(config.seed), param_dtype=param_dtype))

    if start == "resume":
        return checkpoint.restore(manager, placed(jax.eval_shape(lambda p: init_state(p, optimizer), abstract)))
    params = source.load(placed(abstract)) if source else jax.jit(init, out_shardings=sharding)()
    return jax.jit(lambda p: init_state(p, optimizer), out_shardings=sharding, donate_argnums=0)(params)


def _prepare_data(config: ConfigDict, pretrained, model_config: DiTConfig):
    """The latent cache, filled, and the samples to draw from it."""
    data = config.data
    if not data.path:
        raise UserError("no data: set --config.data.path to the csv (pretrain) or json (sft) of your clips")
    match data.kind:
        case "pretrain":
            clips = read_pretrain_csv(data.path)
            sampling = PretrainSampling(config.num_frames, stride=data.max_stride)
        case "sft":
            groups = read_sft_json(data.path)
            clips = [clip for group in groups for clip in group.clips]
            sampling = SftSampling(config.num_frames, min_stride=data.min_stride, max_stride=data.max_stride)
    settings = CacheSettings(
        sampling=sampling,
        size=(config.height, config.width),
        variants=data.clip_variants,
        seed=config.seed,
        max_tokens=model_config.text_tokens,
        encoders=port.fingerprint(pretrained, ("vae", "text_encoder", "tokenizer")),
    )
    dtype = setup_run.resolve_dtype(config.compute_dtype)
    codec, text_encoder = VideoCodec(pretrained, dtype), TextEncoder(pretrained, model_config.text_tokens, dtype)
    cache = LatentCache.open(data.cache, settings)
    usable = encode_clips(clips, cache, codec.encode, text_encoder, skip_damaged=data.skip_damaged).usable
    if data.kind == "pretrain":
        return cache, UnrelatedClips(usable, config.num_scenes)
    return cache, ConsecutiveShots(groups, config.num_scenes, usable)


if __name__ == "__main__":
    run_main(main)
