"""Checkpoints of a run: `WORKDIR/checkpoints/STEP/{params,train,record}`, written by Orbax.

The parameters are an item of their own, so that sampling, export and a next stage read them without the optimiser.
`record` is JSON: the model's config, where the frozen components came from, and the resolved run config.
"""

import contextlib
import json
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath
from flax import nnx

from mask2dit_jax.errors import UserError
from mask2dit_jax.training.step import TrainState

FOLDER = "checkpoints"


def open_manager(workdir: epath.PathLike, *, keep: int, asynchronous: bool = True) -> ocp.CheckpointManager:
    """Makes the workdir if need be; the newest `keep` checkpoints are kept.

    Args:
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
    options = ocp.CheckpointManagerOptions(max_to_keep=keep, enable_async_checkpointing=asynchronous)
    return ocp.CheckpointManager(folder.absolute(), options=options)


def save(manager: ocp.CheckpointManager, state: TrainState, record: dict[str, Any]) -> None:
    """Starts writing in the background; `manager.wait_until_finished()` or closing it waits."""
    train = {"step": state.step, "opt_state": state.opt_state}
    manager.save(
        int(state.step),
        args=ocp.args.Composite(
            params=ocp.args.StandardSave(state.params),
            train=ocp.args.StandardSave(train),
            record=ocp.args.JsonSave(record),
        ),
    )


def save_params(workdir: epath.PathLike, params: nnx.State, record: dict[str, Any]) -> None:
    """A checkpoint at step 0 with parameters alone: ported weights, to start a run from."""
    with open_manager(workdir, keep=1, asynchronous=False) as manager:
        args = ocp.args.Composite(params=ocp.args.StandardSave(params), record=ocp.args.JsonSave(record))
        manager.save(0, args=args, force=True)


def restore(manager: ocp.CheckpointManager, abstract: TrainState) -> TrainState:
    """The newest checkpoint, onto the shardings of `abstract` (shapes and dtypes of the state)."""
    step = manager.latest_step()
    if not (manager.directory / str(step) / "train").exists():
        raise UserError(
            f"{manager.directory} holds parameters without a training state, so no run can resume there; "
            f"start one in another workdir with --config.init_from={manager.directory.parent}"
        )
    targets = {"step": abstract.step, "opt_state": abstract.opt_state}
    args = ocp.args.Composite(params=ocp.args.StandardRestore(abstract.params), train=ocp.args.StandardRestore(targets))
    with _damage_named(manager.directory / str(step)):
        restored = manager.restore(step, args=args)
    return TrainState(restored.train["step"], restored.params, restored.train["opt_state"])


def find(path: epath.PathLike) -> epath.Path:
    """The checkpoint folder meant by a workdir (its newest), by a `checkpoints` folder, or by a folder of one step."""
    path = epath.Path(path)
    for folder in (path / FOLDER, path):
        if folder.is_dir():
            steps = [int(child.name) for child in folder.iterdir() if child.name.isdigit() and child.is_dir()]
            if steps:
                return folder / str(max(steps))
    if (path / "record").exists():
        return path
    raise UserError(f"there is no checkpoint in {path}; give a training workdir or one of its checkpoints/STEP folders")


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


def load_params(checkpoint: epath.Path, abstract: nnx.State) -> nnx.State:
    """The parameters of a checkpoint, onto the shardings and dtypes of `abstract`."""
    stored_shapes(checkpoint, abstract)
    args = ocp.args.Composite(params=ocp.args.StandardRestore(abstract))
    with _damage_named(checkpoint), _reader(checkpoint) as manager:
        return manager.restore(int(checkpoint.name), args=args).params


def stored_shapes(checkpoint: epath.Path, abstract: nnx.State) -> nnx.State:
    """`abstract` with the dtypes that the checkpoint's parameters are stored in.

    Raises:
        UserError: its shapes are not those of `abstract`; Orbax would report that as a page of tree differences.
    """
    with _damage_named(checkpoint), _reader(checkpoint) as manager:
        stored = jax.tree.leaves(manager.item_metadata(int(checkpoint.name)).params)
    leaves, tree = jax.tree.flatten(abstract)
    if [tuple(leaf.shape) for leaf in stored] != [tuple(leaf.shape) for leaf in leaves]:
        raise UserError(f"checkpoint {checkpoint} is of a model of other sizes than its record says; use another one")
    return tree.unflatten([jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for leaf in stored])


@contextlib.contextmanager
def _damage_named(checkpoint: epath.Path):
    """A file that is missing or cut short inside a checkpoint shows as one of many kinds of error, pages long."""
    try:
        yield
    except (OSError, ValueError, KeyError) as error:
        reason = (str(error) or type(error).__name__).strip().splitlines()[0][:200]
        raise UserError(
            f"checkpoint {checkpoint} is damaged ({reason}); delete its folder to go on from the one before, or use "
            "another one"
        ) from error


def _reader(checkpoint: epath.Path) -> ocp.CheckpointManager:
    options = ocp.CheckpointManagerOptions(read_only=True)
    registry = {"params": ocp.StandardCheckpointHandler()}
    return ocp.CheckpointManager(checkpoint.parent.absolute(), options=options, item_handlers=registry)
