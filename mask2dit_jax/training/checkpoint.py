"""Checkpoints of a run, written by Orbax: `WORKDIR/checkpoints/STEP/{params,ema,train,record}`.

`params` and `ema` are items of their own, so that `pretrained.stored_checkpoint` reads them without
the optimiser. The record says how many samples were seen; the data of the next step depends on that and the seed.

A folder gets its name once all of it is written, so a killed run leaves no partial checkpoint. In a bucket, where
nothing can be renamed, the last file written marks the checkpoint as complete. `training.resume` restores a run.
"""

import contextlib
import errno
import sys
from typing import Any

import orbax.checkpoint as ocp
from absl import logging
from etils import epath
from orbax.checkpoint.checkpoint_managers import preservation_policy

from mask2dit_jax.errors import UserError, is_no_answer
from mask2dit_jax.io.paths import absolute
from mask2dit_jax.pretrained.stored_checkpoint import FOLDER, complete_steps, reason_of
from mask2dit_jax.training.step import TrainState

TRAIN = ("step", "opt_state", "skipped", "skipped_in_a_row")  # the fields of a state that make up `train`


class Manager(ocp.CheckpointManager):
    """Orbax's manager, whose failures to write are one line each."""

    def reached_preemption(self, step: int) -> bool:
        """Return False: the loop asks JAX once a step, and a second question from Orbax's thread would lose count."""
        return False

    def close(self):
        """Wait for the writes under way; if another error is already being raised, only log what went wrong."""
        under_way = sys.exception()
        try:
            with writing(self):
                super().close()
        except UserError as error:
            if under_way is None:
                raise
            logging.warning("%s", error)


def open_manager(workdir: epath.PathLike, *, keep: int, keep_every: int = 0, asynchronous: bool = True) -> Manager:
    """Open the checkpoints of a workdir, which is created if need be, and remove what a killed run left half-written.

    Args:
        workdir: local or gs://.
        keep: number of newest checkpoints to keep.
        keep_every: also keep the checkpoints of steps that are a multiple of this; 0 keeps no others.
        asynchronous: save in the background, from a copy of the state in host memory.

    Raises:
        UserError: the workdir cannot be written.
    """
    folder = epath.Path(workdir) / FOLDER
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".writable"
        probe.write_text("")
        probe.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"workdir {workdir} cannot be written ({error.strerror or error}); choose another") from error
    kept = [preservation_policy.LatestN(keep)]
    if keep_every:
        kept.append(preservation_policy.EveryNSteps(keep_every))
    options = ocp.CheckpointManagerOptions(
        preservation_policy=preservation_policy.AnyPreservationPolicy(kept),
        cleanup_tmp_directories=True,
        enable_async_checkpointing=asynchronous,
    )
    return Manager(absolute(folder), options=options)


def save(manager: Manager, state: TrainState, record: dict[str, Any]) -> None:
    """Start saving a state in the background; a step that is saved already is not saved again.

    `manager.wait_until_finished()` waits for the save, and so does closing the manager.

    Raises:
        UserError: this checkpoint or the one before could not be written; earlier ones are intact.
    """
    step = int(state.step)
    with writing(manager):
        manager.wait_until_finished()
        if step in manager.all_steps():
            return
        items = {
            "params": ocp.args.StandardSave(state.params),
            "train": ocp.args.StandardSave({name: getattr(state, name) for name in TRAIN}),
            "record": ocp.args.JsonSave(record),
        }
        if state.ema is not None:
            items["ema"] = ocp.args.StandardSave(state.ema)
        manager.save(step, args=ocp.args.Composite(**items), force=True)


def check_written(manager: Manager) -> None:
    """Raise UserError if a save in the background has failed; waits for nothing."""
    if not manager.is_saving_in_progress():
        wait_until_written(manager)


def wait_until_written(manager: Manager) -> None:
    """Wait for the save in the background.

    Raises:
        UserError: the checkpoint could not be written.
    """
    with writing(manager):
        manager.wait_until_finished()


@contextlib.contextmanager
def writing(manager: Manager):
    """Turn failures to write into one line.

    A full disk causes one of several kinds of error, in the call that saves or in a later one.
    """
    try:
        yield
    except Exception as error:
        if not isinstance(error, OSError | ValueError | RuntimeError) and not is_no_answer(error):
            raise
        steps = complete_steps(manager.directory)
        good = f"step {max(steps)} is the newest one that was" if steps else "none was yet"
        reason = reason_of(error, manager.directory)
        remedy = "make room there, then start" if _is_full(error) else "start"
        raise UserError(
            f"a checkpoint could not be written to {manager.directory} ({reason}); {good}: {remedy} again to go on"
        ) from error


def _is_full(error: Exception) -> bool:
    """Tell whether disk or quota is used up, in the words of Python, tensorstore or TensorFlow's file systems."""
    words = ("no space left", "resource_exhausted", "quota", "file too large")
    return getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or any(
        word in str(error).lower() for word in words
    )
