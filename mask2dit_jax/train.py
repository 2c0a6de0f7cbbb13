"""Trains the multi-scene transformer: pretraining, SFT and their ablations, chosen by the config.

    python -m mask2dit_jax.train --config=configs/sft.py:tiny --workdir=workdir/sft

A run started again in the same workdir goes on from its newest checkpoint.
"""

import functools
import time
from collections.abc import Iterator

import jax
import numpy as np
from absl import flags, logging
from jax.experimental import multihost_utils
from ml_collections import ConfigDict, config_flags
from tensorboardX import SummaryWriter
from tqdm import tqdm

from mask2dit_jax import caches, setup_run
from mask2dit_jax.curate.encode import encode_clips
from mask2dit_jax.data.cache import CacheSettings, LatentCache
from mask2dit_jax.data.pipeline import make_batches
from mask2dit_jax.data.sampling import PretrainSampling, SftSampling
from mask2dit_jax.data.scenes import ConsecutiveShots, UnrelatedClips
from mask2dit_jax.data.sources import read_pretrain_csv, read_sft_json
from mask2dit_jax.encoders import TextEncoder, VideoCodec
from mask2dit_jax.errors import UserError, run_main
from mask2dit_jax.models.dit import DiTConfig
from mask2dit_jax.parallel import distributed
from mask2dit_jax.parallel.mesh import make_mesh
from mask2dit_jax.port import pretrained as port
from mask2dit_jax.training import checkpoint
from mask2dit_jax.training.optimizer import learning_rate
from mask2dit_jax.training.program import TrainProgram, global_batch, local_rows
from mask2dit_jax.training.step import Batch, TrainState
from mask2dit_jax.transformer import TransformerSource

_CONFIG = config_flags.DEFINE_config_file("config", None, "Run config, e.g. configs/sft.py:tiny.", lock_config=True)
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run: checkpoints and TensorBoard logs.")
flags.mark_flags_as_required(["config", "workdir"])


def main(argv):
    if len(argv) > 1:
        raise UserError(f"what is {argv[1]}? settings are given as --config.field=value")
    distributed.initialize()
    caches.keep_compiled_programs()
    config, workdir = _CONFIG.value, _WORKDIR.value
    setup_run.check_values(config, "train", "num_steps")
    logging.info("config:\n%s", config)
    mesh = make_mesh(config.mesh.to_dict(), batch_size=config.global_batch_size)

    with checkpoint.open_manager(workdir, keep=config.keep_checkpoints) as manager:
        pretrained = setup_run.resolve_pretrained(config)
        start, source = _find_start(config, pretrained, manager)
        vae_config, text_config = setup_run.encoder_configs(pretrained)
        wanted = setup_run.model_from_scratch(config, vae_config, text_config)
        stored = setup_run.stored_model(source, wanted, config) if source else wanted
        setup_run.check_encoders(stored, pretrained)
        program = setup_run.train_program(config, mesh, stored, vae_config, port.load_schedule(pretrained))
        cache, samples = _prepare_data(config, pretrained, program.model)
        with jax.set_mesh(mesh):
            state = _start_state(program, start, source, manager)
            rows = local_rows(program.abstract_batch)
            batches = make_batches(
                cache,
                samples,
                global_batch_size=config.global_batch_size,
                seed=config.seed,
                start_step=int(state.step),
                rows=rows,
            )
            _run(config, program, state, (global_batch(b, program.abstract_batch, rows) for b in batches), manager)
    logging.info("done: step %d, checkpoints in %s", config.num_steps, workdir)


def _run(config: ConfigDict, program: TrainProgram, state: TrainState, batches: Iterator[Batch], manager):
    """Steps until the config's last one; a checkpoint now and then, and at the end."""
    first_step = int(state.step)
    record = {"model": program.model.to_json(), "pretrained": str(config.pretrained), "config": config.to_dict()}
    is_first = jax.process_index() == 0
    log = MetricsLog(
        SummaryWriter(str(manager.directory.parent)) if is_first else None,
        config.log_every,
        learning_rate(program.optimizer),
    )
    total = config.num_steps
    with tqdm(total=total, initial=first_step, desc="training", unit="step", disable=not is_first) as progress:
        for step in range(first_step + 1, config.num_steps + 1):
            state, metrics = program.step(state, next(batches))
            progress.set_postfix(log.add(step, metrics), refresh=False)
            progress.update()
            if step % config.checkpoint_every == 0 or step == config.num_steps:
                checkpoint.save(manager, state, record)
    log.flush()


class MetricsLog:
    """Writes a window of steps at a time, one window late: reading a metric never waits for the step in flight."""

    def __init__(self, writer: SummaryWriter | None, every: int, rate):
        self._writer, self._every, self._rate = writer, every, rate
        self._pending, self._ready, self._shown = [], None, {}
        self._step, self._since = 0, time.monotonic()

    def add(self, step: int, metrics) -> dict[str, str]:
        """Returns what a progress bar shows: the newest means that are written."""
        self._pending.append(metrics)
        self._step = step
        if step % self._every == 0:
            self._write()
            self._close_window()
        return self._shown

    def flush(self):
        """Writes what is left; the last window may be a short one."""
        self._write()
        if self._pending:
            self._close_window()
            self._write()
        if self._writer:
            self._writer.close()

    def _close_window(self):
        elapsed, self._since = time.monotonic() - self._since, time.monotonic()
        self._ready = (self._step, self._pending, len(self._pending) / elapsed)
        self._pending = []

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


def _start_state(program: TrainProgram, start: str, source: TransformerSource | None, manager) -> TrainState:
    """Every parameter comes straight onto its devices."""
    if start == "resume":
        return checkpoint.restore(manager, program.abstract_state)
    return program.start(source.load(program.abstract_params) if source else program.random_params())


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
        compute_dtype=config.compute_dtype,
    )
    dtype = setup_run.resolve_dtype(config.compute_dtype)
    codec, text_encoder = VideoCodec(pretrained, dtype), TextEncoder(pretrained, model_config.text_tokens, dtype)
    cache = LatentCache.open(data.cache, settings)
    encode = functools.partial(
        encode_clips,
        cache=cache,
        encode_video=codec.encode,
        encode_text=text_encoder,
        skip_damaged=data.skip_damaged,
    )
    if jax.process_count() > 1:  # each its share, on a disk that all can read; what is left of them after that, alone
        encode(clips[jax.process_index() :: jax.process_count()])
        multihost_utils.sync_global_devices("encoded")
    usable = encode(clips).usable
    if data.kind == "pretrain":
        return cache, UnrelatedClips(usable, config.num_scenes)
    return cache, ConsecutiveShots(groups, config.num_scenes, usable)


if __name__ == "__main__":
    run_main(main)
