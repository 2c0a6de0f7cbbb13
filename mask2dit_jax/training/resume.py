"""Resuming a run from its newest complete checkpoint, on any mesh and any number of processes.

A damaged checkpoint is renamed to `damaged-STEP` and named in the log, and the run resumes from the one before. All
processes resume from the same one. Storage that does not answer is no damage: it is asked again, then the run ends.
"""

import functools
import itertools
import time
from collections.abc import Callable
from typing import TypeVar

import jax
import numpy as np
from absl import logging
from etils import epath
from flax import nnx
from jax.experimental import multihost_utils

from mask2dit_jax.errors import UserError
from mask2dit_jax.parallel.sharding import name_of
from mask2dit_jax.pretrained.stored_checkpoint import (
    DAMAGE,
    is_out_of_reach,
    metadata,
    no_answer,
    read_item,
    read_record,
    reason_of,
)
from mask2dit_jax.training.checkpoint import TRAIN, Manager
from mask2dit_jax.training.step import TrainState

_T = TypeVar("_T")
_PAUSES = (10.0, 30.0)  # seconds to wait before storage that did not answer is asked again
_FINE, _DAMAGED, _OUT_OF_REACH = range(3)


def set_aside_unreadable(manager: Manager) -> int | None:
    """Set aside checkpoints whose record or metadata cannot be read, from the newest on until one can.

    Returns:
        The step of the newest checkpoint that can be read; None if nothing was ever saved.

    Raises:
        UserError: there are checkpoints, but none can be read, or they are not of a training run. The same error comes
            when a scheduler restarts the job, because a run never starts over without being told to.
    """
    steps = sorted(manager.all_steps(), reverse=True)
    if not steps and any(manager.directory.glob("damaged-*")):
        raise _none_left(manager)
    if jax.process_index() == 0:
        for step in steps:
            reason = _damage(manager.directory / str(step))
            if reason is None:
                break
            _set_aside(manager.directory / str(step), reason)
    _reload(manager)
    if steps and manager.latest_step() is None:
        raise _none_left(manager)
    if steps and not (manager.directory / str(manager.latest_step()) / "train").exists():
        raise UserError(
            f"{manager.directory} holds parameters without a training state, so no run can resume there; "
            f"start one in another workdir with --config.init_from={manager.directory.parent}"
        )
    return manager.latest_step()


def restore(manager: Manager, abstract: TrainState) -> TrainState:
    """Restore the newest checkpoint that is not damaged.

    If the run keeps a moving average that the checkpoint lacks, the average starts as a copy of the parameters.

    Args:
        manager: the run's checkpoints.
        abstract: shapes, dtypes and shardings to restore onto.

    Raises:
        UserError: the state is that of another model or of other trained parameters, no checkpoint can be read, or the
            storage does not answer.
    """
    while (step := manager.latest_step()) is not None:
        folder, state, verdict, reason = manager.directory / str(step), None, _FINE, "so says another process"
        try:
            state = _patiently(functools.partial(_read_state, folder, abstract))
        except Exception as error:
            if is_out_of_reach(error):
                verdict = _OUT_OF_REACH
            elif isinstance(error, DAMAGE):
                verdict = _DAMAGED
            else:
                raise
            reason = reason_of(error, folder)
        # All processes must resume from the same checkpoint, although each reads other files of it.
        worst = np.max(multihost_utils.process_allgather(np.array(verdict)))
        if worst == _FINE:
            return state
        if worst == _OUT_OF_REACH:
            raise no_answer(folder, reason)
        if jax.process_index() == 0:
            _set_aside(folder, reason)
        _reload(manager)
    raise _none_left(manager)


def samples_seen(manager: Manager, step: int) -> int:
    """Return how many samples a run saw before it saved `step`, whichever batch sizes it had until then.

    A record of before this was recorded has one batch size for all its steps.
    """
    if step == 0:
        return 0
    record = _patiently(lambda: read_record(manager.directory / str(step)))
    return record.get("samples_seen", step * record["config"]["global_batch_size"])


def _read_state(folder: epath.Path, abstract: TrainState) -> TrainState:
    names = TRAIN + (("ema",) if abstract.ema is not None and (folder / "ema").exists() else ())
    wanted = {
        "params": abstract.params,
        "train": {name: getattr(abstract, name) for name in TRAIN},
    } | ({"ema": abstract.ema} if "ema" in names else {})
    read = {}
    for item, target in wanted.items():
        _check_shapes(folder, item, target)
        read[item] = read_item(folder / item, target)
    ema = read.get("ema")
    if abstract.ema is not None and ema is None:
        logging.info("%s has no moving average: it begins as a copy of the parameters", folder)
        ema = _ema_of(read["params"], abstract.ema)
    return TrainState(params=read["params"], ema=ema, **read["train"])


def _ema_of(params: nnx.State, abstract: nnx.State) -> nnx.State:
    leaves = {name_of(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(params)}

    def copy(path, target):
        same = jax.jit(lambda x: x.astype(target.dtype) + 0, out_shardings=target.sharding)
        return same(leaves[name_of(path)])

    return jax.tree_util.tree_map_with_path(copy, abstract)


def _check_shapes(folder: epath.Path, item: str, target) -> None:
    if _shapes(metadata(folder / item)) != _shapes(target):
        what = {"params": "of a model of other sizes", "train": "of an optimiser of other parameters"}
        raise UserError(
            f"{item} of {folder} is {what.get(item, 'an average of other parameters')}: keep model, trainable and lora "
            f"as they were, or start another workdir with --config.init_from={folder.parent.parent}"
        )


def _shapes(tree) -> dict[str, tuple[int, ...]]:
    """Return shapes by path; Orbax stores a named tuple as a dictionary, and a variable as its value."""

    def name(path) -> str:
        keys = (getattr(entry, "key", getattr(entry, "name", None)) for entry in path)
        return ".".join(key for key in keys if isinstance(key, str) and key != "value")

    return {name(path): tuple(leaf.shape) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def _damage(folder: epath.Path) -> str | None:
    """Return what is wrong with a checkpoint, as far as shows without reading its arrays; None if nothing is."""

    def look():  # ported weights are parameters alone, and their record has no run config
        items = ("params", "train") if "config" in read_record(folder) else ("params",)
        for item in items:
            metadata(folder / item)

    try:
        _patiently(look)
    except Exception as error:
        if is_out_of_reach(error):
            raise no_answer(folder, reason_of(error, folder)) from error
        if not isinstance(error, (UserError, *DAMAGE)):
            raise
        return reason_of(error, folder)
    return None


def _patiently(read: Callable[[], _T]) -> _T:
    """Return what `read` returns; if the storage does not answer, pause and try again."""
    for pause in _PAUSES:
        try:
            return read()
        except Exception as error:
            if not is_out_of_reach(error):
                raise
            logging.warning("no answer from the storage (%s): asking again in %g s", reason_of(error), pause)
        time.sleep(pause)
    return read()


def _set_aside(folder: epath.Path, reason: str) -> None:
    name = f"damaged-{folder.name}"
    names = itertools.chain([name], (f"{name}-{number}" for number in itertools.count(2)))
    aside = next(folder.parent / name for name in names if not (folder.parent / name).exists())
    folder.rename(aside)
    logging.warning(
        "checkpoint %s is damaged (%s): it is set aside as %s, and the one before is used", folder, reason, aside.name
    )


def _reload(manager: Manager) -> None:
    multihost_utils.sync_global_devices("checkpoints set aside")
    manager.reload()


def _none_left(manager: Manager) -> UserError:
    return UserError(
        f"no checkpoint in {manager.directory} can be read, and all are set aside as damaged-STEP; delete these to "
        "start this run over, rename one back to STEP if its files are intact, or use another workdir"
    )
