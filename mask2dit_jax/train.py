"""Train the multi-scene transformer: pretraining, SFT or an ablation, as the config says.

    python -m mask2dit_jax.train --config=configs/sft.py --config.pretrained=CogVideoX-5b --config.data.path=sft.json
    python -m mask2dit_jax.train --config=configs/sft.py:tiny --workdir=workdir/sft

A run started again in the same workdir resumes from its newest checkpoint. On SIGTERM it saves and exits with code 143,
on Ctrl-C with 130; a second Ctrl-C ends it at once.
docs/training.md describes what it logs.
"""

import collections
import dataclasses
import functools
import sys
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
from absl import flags, logging
from ml_collections import config_flags
from tqdm import tqdm

from mask2dit_jax.config import TrainConfig, changes, cosine_end, read_config
from mask2dit_jax.errors import UserError, run_main
from mask2dit_jax.io.compiled_programs import keep_compiled_programs
from mask2dit_jax.parallel import distributed
from mask2dit_jax.parallel.mesh import make_mesh
from mask2dit_jax.pretrained import stored_checkpoint
from mask2dit_jax.pretrained.pretrained import Pretrained
from mask2dit_jax.pretrained.transformer_source import TransformerSource
from mask2dit_jax.sampling.preview import Preview
from mask2dit_jax.training import checkpoint, resume, scene_lengths, setup, validation
from mask2dit_jax.training.events import EventFile, open_event_file
from mask2dit_jax.training.metrics import MetricsLog
from mask2dit_jax.training.optimizer import learning_rate
from mask2dit_jax.training.profile import StepTrace
from mask2dit_jax.training.program import TrainProgram, global_batch, local_rows
from mask2dit_jax.training.step import Batch, TrainState, evaluated_params
from mask2dit_jax.training.stopping import StopRequest
from mask2dit_jax.training.training_data import TrainingData, open_training_data

_CONFIG = config_flags.DEFINE_config_file("config", None, "Run config, such as configs/sft.py.", lock_config=True)
_WORKDIR = flags.DEFINE_string(
    "workdir", None, "Folder of the run, for checkpoints and TensorBoard logs; default: runs/NAME, such as runs/sft."
)
flags.mark_flag_as_required("config")

# Steps dispatched ahead of the devices. One keeps them busy, and SIGTERM then waits for two steps at most.
_STEPS_AHEAD = 1


def main(argv):
    """Open weights and data, find where the run starts, and train."""
    if len(argv) > 1:
        raise UserError(f"what is {argv[1]}? settings are given as --config.field=value")
    distributed.initialize(sigterm_is_asked_for=True)
    keep_compiled_programs()
    config = read_config(_CONFIG.value, TrainConfig, "train")
    config.require("pretrained", "data.path")
    workdir = _WORKDIR.value or f"runs/{config.name}"
    for remark in config.remarks():
        logging.warning("%s", remark)
    mesh = make_mesh(dataclasses.asdict(config.mesh), batch_size=config.samples_at_once)

    keep = {"keep": config.keep_checkpoints, "keep_every": config.keep_every}
    with distributed.held_by_all(workdir), checkpoint.open_manager(workdir, **keep) as manager:
        pretrained = Pretrained.open(config.pretrained)
        start, source = _find_start(config, pretrained, manager)
        if config.sample_every:
            pretrained.vae.require_weights("storyboards need it; set sample_every=0")
        vae_config = pretrained.vae.config
        wanted = setup.model_from_scratch(config, vae_config, pretrained.text_encoder.config)
        stored = setup.stored_model(source, wanted, config) if source else wanted
        pretrained.check_fits(stored)
        programs = setup.train_programs(config, mesh, stored, vae_config, pretrained.schedule)
        logging.info("%s in %s\n%s", config.name, workdir, programs[0].summary())
        data = open_training_data(config, pretrained, programs[0].model)
        with jax.set_mesh(mesh):
            state = _start_state(programs[0], start, source, manager)
            rows = local_rows(programs[0].abstract_batch)
            with open_event_file(workdir) as events, StopRequest() as stop:
                if events:
                    events.add_text("config", f"<pre>{_CONFIG.value}</pre>", int(state.step))
                watch = Watch(config, programs, pretrained, workdir, data, rows, events)
                seen = resume.samples_seen(manager, int(state.step))
                if start == "resume":
                    logging.info("data: going on after %d samples", seen)
                batches = _placed(config, programs, data, int(state.step), seen, rows)
                last = _run(config, state, batches, seen, watch, manager, stop)
    if last < config.num_steps:
        logging.info("stopped: step %d, checkpoints in %s", last, workdir)
        sys.exit(stop.exit_code)
    logging.info("done: step %d, checkpoints in %s", last, workdir)


def _run(
    config: TrainConfig,
    state: TrainState,
    batches: Iterator[tuple[TrainProgram, Batch]],
    seen: int,
    watch: "Watch",
    manager: checkpoint.Manager,
    stop: StopRequest,
) -> int:
    """Train until the last step or a request to stop. Save a checkpoint every so often, and at the end.

    Args:
        config: the run.
        state: where it starts.
        batches: of each step, with its program.
        seen: samples that the steps before have seen.
        watch: logs, validates and draws storyboards.
        manager: of the checkpoints.
        stop: says when to end before the last step.

    Returns:
        The number of the last step.
    """
    first_step, total = int(state.step), config.num_steps
    log, record = watch.log, setup.run_record(config, watch.program.model)
    under_way, compiled = collections.deque(), set()
    with tqdm(total=total, initial=first_step, desc="training", unit="step", disable=not watch.is_first) as progress:
        for step in range(first_step + 1, total + 1):
            with log.waiting():
                program, batch = next(batches)
            if program.objective.layout not in compiled:  # the first call returns when the step is compiled
                progress.set_description("compiling")
                compiled.add(program.objective.layout)
            with watch.trace(step):
                state, metrics = program.step(state, batch)
            progress.set_description("training", refresh=False)
            under_way.append(metrics["loss"])
            if len(under_way) > _STEPS_AHEAD:
                under_way.popleft().block_until_ready()
            progress.set_postfix(log.add(step, metrics, program.flops), refresh=False)
            progress.update()
            seen += config.global_batch_size
            watch.look(step, state)
            is_last = stop.is_due(step) or step == total
            if step % config.checkpoint_every == 0 or is_last:
                checkpoint.save(manager, state, record | {"samples_seen": seen})
            elif step % config.log_every == 0:
                checkpoint.check_written(manager)
            if is_last:
                break
    watch.trace.close()
    log.flush()
    checkpoint.wait_until_written(manager)  # as long as `stop` is in charge of the signals
    return int(state.step)


class Watch:
    """Observes a run: logs, validation, storyboards and profiler traces."""

    def __init__(
        self, config: TrainConfig, programs, pretrained, workdir, data: TrainingData, rows, events: EventFile | None
    ):
        """Open the logs.

        Args:
            config: the run.
            programs: the run's programs; the first validates and draws storyboards.
            pretrained: the frozen components, for storyboards.
            workdir: folder of the run.
            data: the training data.
            rows: rows of a global batch that this process reads.
            events: TensorBoard file, None on processes that write none.
        """
        self.program = programs[0]
        self.is_first = jax.process_index() == 0
        self._config, self._data, self._rows = config, data, rows
        self.log = MetricsLog(
            events,
            config.log_every,
            learning_rate(self.program.optimizer),
            samples_per_step=config.global_batch_size,
            max_skipped=config.max_skipped_updates,
            skipped_items=data.skipped,
        )
        self.trace = StepTrace(config.profile_steps, f"{workdir}/profile", config.num_steps)
        if config.sample_every:
            self._preview = Preview(self.program, pretrained, config.sample_steps, workdir, events)

    def look(self, step: int, state: TrainState) -> None:
        """Validate and draw a storyboard when they are due, with the averaged parameters if there are any."""
        params = evaluated_params(state, self.program.update)
        if _is_due(step, self._config.validate_every):
            losses = jax.device_get(self.program.validate(params, self._fixed_batch))
            self.log.write(step, validation.scalars(losses, self.program.objective))
        if _is_due(step, self._config.sample_every):
            self._preview(step, params, self._fixed_batch["text"], self._fixed_captions)
        if _is_due(step, self._config.checkpoint_every):  # processes wait for each other there anyway
            self._data.gather_skipped()

    @functools.cached_property
    def _fixed_batch(self) -> Batch:
        """The batch of step 0, whichever step the run starts at."""
        batch = next(_batches(self._config, self._data, 0, self._rows))
        batch = scene_lengths.cut_scenes(batch, self.program.stored_layout, self.program.objective.layout)
        return global_batch(batch, self.program.abstract_batch, self._rows)

    @functools.cached_property
    def _fixed_captions(self) -> list[str]:
        """What the first sample of the batch of step 0 shows, on the process that draws storyboards."""
        return self._data.captions(self._config.seed) if self.is_first else []


def _is_due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _batches(config: TrainConfig, data: TrainingData, start_sample: int, rows) -> Iterator[dict[str, np.ndarray]]:
    return data.batches(start_sample, rows, config.global_batch_size, config.seed)


def _placed(
    config: TrainConfig, programs: tuple[TrainProgram, ...], data: TrainingData, start_step: int, seen: int, rows
) -> Iterator[tuple[TrainProgram, Batch]]:
    """Yield each step's batch on its devices, with the program for the lengths of its scenes."""
    by_layout = {program.objective.layout: program for program in programs}
    for number, batch in enumerate(_batches(config, data, seen, rows), start=start_step):
        program = by_layout[scene_lengths.draw(tuple(by_layout), config.seed, number)]
        batch = scene_lengths.cut_scenes(batch, program.stored_layout, program.objective.layout)
        yield program, global_batch(batch, program.abstract_batch, rows)


def _find_start(config: TrainConfig, pretrained: Pretrained, manager) -> tuple[str, TransformerSource | None]:
    """Return what the run starts from: its checkpoint, `init_from`, `pretrained` or random numbers, in this order."""
    if (step := resume.set_aside_unreadable(manager)) is not None:
        logging.info("start: resuming step %d of %s", step, manager.directory)
        source = TransformerSource.require(manager.directory)
        _log_changes(stored_checkpoint.read_record(source.folder).get("config", {}), config, step)
        return "resume", source
    if config.init_from:
        source = TransformerSource.require(config.init_from)
        logging.info("start: parameters of %s", source)
        return "parameters", source
    source = pretrained.find_transformer()
    logging.info("start: %s", f"pretrained weights of {source}" if source else "from scratch")
    return ("parameters", source) if source else ("scratch", None)


def _log_changes(before: Mapping[str, Any], config: TrainConfig, step: int) -> None:
    """Log what differs from the run that saved `step`, and what it does to the learning rate."""
    if changed := changes(before, config):
        logging.warning("resumed with other settings: %s", "; ".join(changed))
    if step >= config.num_steps:
        logging.warning("step %d is done and num_steps=%d: nothing is left to train", step, config.num_steps)
        return
    optimizer = config.scheduled_optimizer
    if optimizer.schedule != "cosine" or not before:
        return
    end = cosine_end(before["num_steps"], before["optimizer"]["decay_steps"], before["optimizer"]["warmup_steps"])
    if end != optimizer.decay_steps:
        rate = float(learning_rate(optimizer)(step))
        logging.warning("the cosine ends at step %d, not %d: it goes on at %.3g", optimizer.decay_steps, end, rate)


def _start_state(program: TrainProgram, start: str, source: TransformerSource | None, manager) -> TrainState:
    """Load or initialise the state; each parameter goes straight to its devices."""
    if start == "resume":
        return resume.restore(manager, program.abstract_state)
    if source:
        return program.start(program.adapted(source.load(program.abstract_plain)))
    if program.model.lora:
        raise UserError("lora adapts weights, and there are none: set --config.init_from or --config.pretrained")
    return program.start(program.random_params())


if __name__ == "__main__":
    run_main(main)
