"""Checkpoints of a run: `WORKDIR/checkpoints/STEP/{params,ema,train,record}`, written by Orbax.

The parameters are an item of their own, and so is their moving average, so that sampling, export and a next stage read
them without the optimiser. `record` is JSON: the model's config, where the frozen components came from, and the
resolved run config. Where the data stands is no item: the batch of a step depends on the seed and the step alone.

A folder gets its name when all of it is written, so a run that is killed leaves none that is half; in a bucket, where
nothing can be renamed, the last file says that all of it is there. How a run goes on from what is there: resume.py.
"""

import contextlib
import errno
import json
import re
import sys
from typing import Any

import jax
import orbax.checkpoint as ocp
from absl import logging
from etils import epath
from flax import nnx
from orbax.checkpoint.checkpoint_managers import preservation_policy

from mask2dit_jax.errors import UserError, is_no_answer
from mask2dit_jax.io.paths import absolute
from mask2dit_jax.parallel.sharding import name_of
from mask2dit_jax.training.step import TrainState

FOLDER = "checkpoints"
DAMAGE = (OSError, ValueError, KeyError)  # what reading a missing or cut file raises
TRAIN = ("step", "opt_state", "skipped", "skipped_in_a_row")  # the fields of a state that make up `train`


class Manager(ocp.CheckpointManager):
    """Orbax's, whose failures to write are one line."""

    def reached_preemption(self, step: int) -> bool:
        """Never: the loop asks JAX, once a step. Asked from a thread about an older step, JAX would lose count."""
        return False

    def close(self):
        """If an error is on its way out already, that is the one to be told."""
        under_way = sys.exception()
        try:
            with writing(self):
                super().close()
        except UserError as error:
            if under_way is None:
                raise
            logging.warning("%s", error)


def open_manager(workdir: epath.PathLike, *, keep: int, keep_every: int = 0, asynchronous: bool = True) -> Manager:
    """Makes the workdir if need be; what a killed run left half-written is removed.

    Args:
        keep: so many of the newest checkpoints are kept,
        keep_every: and those of steps that are a multiple of this (0: no others).
        asynchronous: saving goes on in the background, from a copy of the state in host memory.
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
    """Starts writing in the background; `manager.wait_until_finished()` or closing it waits. Once is enough for a step.

    Raises:
        UserError: this one or the one before could not be written; what was there is still there.
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
    """Raises UserError if the background could not write; waits for nothing."""
    if not manager.is_saving_in_progress():
        with writing(manager):
            manager.wait_until_finished()


@contextlib.contextmanager
def writing(manager: Manager):
    """A full disk shows as one of several kinds of error, in the call that saves or in one that comes later."""
    try:
        yield
    except Exception as error:
        if not isinstance(error, OSError | ValueError | RuntimeError) and not is_no_answer(error):
            raise
        steps = _steps(manager.directory)
        good = f"step {max(steps)} is the newest one that was" if steps else "none was yet"
        reason = reason_of(error, manager.directory)
        remedy = "make room there, then start" if _is_full(error) else "start"
        raise UserError(
            f"a checkpoint could not be written to {manager.directory} ({reason}); {good}: {remedy} again to go on"
        ) from error


def _is_full(error: Exception) -> bool:
    """What Python, tensorstore and TensorFlow's file systems say of a disk without room, or a quota that is used up."""
    words = ("no space left", "resource_exhausted", "quota", "file too large")
    return getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or any(
        word in str(error).lower() for word in words
    )


def save_params(workdir: epath.PathLike, params: nnx.State, record: dict[str, Any]) -> None:
    """A checkpoint at step 0 with parameters alone: ported weights, to start a run from."""
    with open_manager(workdir, keep=1, asynchronous=False) as manager:
        args = ocp.args.Composite(params=ocp.args.StandardSave(params), record=ocp.args.JsonSave(record))
        manager.save(0, args=args, force=True)


def find(path: epath.PathLike) -> epath.Path:
    """The checkpoint folder meant by a workdir (its newest), by a `checkpoints` folder, or by a folder of one step."""
    path = epath.Path(path)
    for folder in (path / FOLDER, path):
        if folder.is_dir():
            steps = _steps(folder)
            if steps:
                return folder / str(max(steps))
    if (path / "record").exists():
        return path
    raise UserError(f"there is no checkpoint in {path}; give a training workdir or one of its checkpoints/STEP folders")


def _steps(folder: epath.Path) -> list[int]:
    """Of the checkpoints that are whole: a job may be writing the newest one."""
    found = (child for child in folder.iterdir() if child.name.isdigit() and child.is_dir())
    return [int(child.name) for child in found if ocp.utils.is_checkpoint_finalized(child)]


def has_checkpoint(path: epath.PathLike) -> bool:
    try:
        find(path)
    except UserError:
        return False
    return True


def read_record(checkpoint: epath.Path) -> dict[str, Any]:
    """The `record` of a checkpoint found by `find`."""
    file = checkpoint / "record" / "metadata"
    try:
        return json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"checkpoint {checkpoint} is damaged: {file} is missing or no JSON; use another one") from error


def metadata(item: epath.Path):
    return ocp.StandardCheckpointHandler().metadata(absolute(item))  # Orbax refuses any other


def read_item(item: epath.Path, abstract):
    """Without Orbax's barriers: not every process reads, and one that finds damage must leave no other waiting."""
    return ocp.StandardCheckpointHandler().restore(absolute(item), args=ocp.args.StandardRestore(abstract))


def load_params(checkpoint: epath.Path, abstract: nnx.State, item: str = "params") -> nnx.State:
    """The parameters of a checkpoint (or their average, "ema"), onto the shardings and dtypes of `abstract`."""
    stored_shapes(checkpoint, abstract, item)
    with _damage_named(checkpoint):
        return read_item(checkpoint / item, abstract)


def stored_names(checkpoint: epath.Path, item: str) -> set[str]:
    """The paths of an item's parameters; none if the checkpoint has no such item."""
    if not (checkpoint / item).exists():
        return set()
    with _damage_named(checkpoint):
        leaves = jax.tree_util.tree_leaves_with_path(metadata(checkpoint / item))
    return {name_of(path).removesuffix(".value") for path, _ in leaves}


def stored_shapes(checkpoint: epath.Path, abstract: nnx.State, item: str = "params") -> nnx.State:
    """`abstract` with the dtypes that the checkpoint's parameters are stored in.

    Raises:
        UserError: its shapes are not those of `abstract`; Orbax would report that as a page of tree differences.
    """
    with _damage_named(checkpoint):
        stored = jax.tree.leaves(metadata(checkpoint / item))
    leaves, tree = jax.tree.flatten(abstract)
    if [tuple(leaf.shape) for leaf in stored] != [tuple(leaf.shape) for leaf in leaves]:
        raise UserError(f"checkpoint {checkpoint} is of a model of other sizes than its record says; use another one")
    return tree.unflatten([jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for leaf in stored])


@contextlib.contextmanager
def _damage_named(checkpoint: epath.Path):
    """A file that is missing or cut short inside a checkpoint shows as one of many kinds of error, pages long."""
    try:
        yield
    except Exception as error:
        if is_out_of_reach(error):
            raise no_answer(checkpoint, reason_of(error, checkpoint)) from error
        if not isinstance(error, DAMAGE):
            raise
        raise UserError(
            f"checkpoint {checkpoint} is damaged ({reason_of(error, checkpoint)}); delete its folder to go on from the "
            "one before, or use another one"
        ) from error


def is_out_of_reach(error: Exception) -> bool:
    """Whether the storage does not answer, or not to us, as opposed to files that are missing or cut."""
    error = error.__cause__ if isinstance(error, UserError) and error.__cause__ else error
    if is_no_answer(error):
        return True
    if isinstance(error, OSError):
        return not isinstance(error, FileNotFoundError | NotADirectoryError | IsADirectoryError)
    return bool(re.search("UNAVAILABLE|DEADLINE_EXCEEDED|PERMISSION_DENIED|UNAUTHENTICATED|ABORTED", str(error)))


def no_answer(folder: epath.Path, reason: str) -> UserError:
    return UserError(
        f"checkpoint {folder} cannot be read now ({reason}): that is no damage, and nothing was changed; start again "
        "when the storage answers and this account may read"
    )


def reason_of(error: Exception, folder: epath.PathLike = "") -> str:
    """In short, and without the path of `folder`, which whoever asks has named."""
    message = str(error).replace(f"{folder}/", "") if folder else str(error)
    return (message or type(error).__name__).strip().splitlines()[0][:200]
