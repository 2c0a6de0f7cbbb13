"""Reading `WORKDIR/checkpoints/STEP/{params,ema,train,record}`, for sampling, export and the start of a next stage.

Parameters and their moving average are items of their own, so they are read without the optimiser's state. `record` is
JSON: the model's config, the directory of the frozen components, and the resolved run config. `training.checkpoint`
writes these folders during a run and `training.resume` restores a whole training state from them.
"""

import contextlib
import json
import re
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath
from flax import nnx

from mask2dit_jax.errors import UserError, is_no_answer
from mask2dit_jax.io.paths import absolute
from mask2dit_jax.parallel.sharding import name_of

FOLDER = "checkpoints"
DAMAGE = (OSError, ValueError, KeyError)  # what reading a missing or truncated file raises


def find(path: epath.PathLike) -> epath.Path:
    """Return the checkpoint folder that a path means.

    Args:
        path: a workdir or its `checkpoints` folder, for the newest checkpoint, or the folder of one step.

    Raises:
        UserError: there is no checkpoint.
    """
    path = epath.Path(path)
    for folder in (path / FOLDER, path):
        if folder.is_dir():
            steps = complete_steps(folder)
            if steps:
                return folder / str(max(steps))
    if (path / "record").exists():
        return path
    raise UserError(f"there is no checkpoint in {path}; give a training workdir or one of its checkpoints/STEP folders")


def complete_steps(folder: epath.Path) -> list[int]:
    """Return the steps whose checkpoints are complete; a job may still be writing the newest one."""
    found = (child for child in folder.iterdir() if child.name.isdigit() and child.is_dir())
    return [int(child.name) for child in found if ocp.utils.is_checkpoint_finalized(child)]


def has_checkpoint(path: epath.PathLike) -> bool:
    """Tell whether `find` finds a checkpoint in `path`."""
    try:
        find(path)
    except UserError:
        return False
    return True


def read_record(checkpoint: epath.Path) -> dict[str, Any]:
    """Read the `record` of a checkpoint that `find` returned.

    Raises:
        UserError: the file is missing or holds no JSON.
    """
    file = checkpoint / "record" / "metadata"
    try:
        return json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"checkpoint {checkpoint} is damaged: {file} is missing or no JSON; use another one") from error


def metadata(item: epath.Path):
    """Read shapes and dtypes of an item such as `params`, without its arrays."""
    return ocp.StandardCheckpointHandler().metadata(absolute(item))  # Orbax accepts absolute paths only


def read_item(item: epath.Path, abstract):
    """Read an item onto the shapes, dtypes and shardings of `abstract`.

    Skips Orbax's barriers: not every process reads, and a process that finds damage must not leave others waiting.
    """
    return ocp.StandardCheckpointHandler().restore(absolute(item), args=ocp.args.StandardRestore(abstract))


def load_params(checkpoint: epath.Path, abstract: nnx.State, item: str = "params") -> nnx.State:
    """Load the parameters of a checkpoint, or their moving average (item "ema").

    Args:
        abstract: shapes, dtypes and shardings to load onto.

    Raises:
        UserError: the checkpoint holds other shapes, is damaged, or its storage does not answer.
    """
    stored_shapes(checkpoint, abstract, item)
    with _damage_named(checkpoint):
        return read_item(checkpoint / item, abstract)


def stored_names(checkpoint: epath.Path, item: str) -> set[str]:
    """Return the paths of an item's parameters; none if the checkpoint has no such item."""
    if not (checkpoint / item).exists():
        return set()
    with _damage_named(checkpoint):
        leaves = jax.tree_util.tree_leaves_with_path(metadata(checkpoint / item))
    return {name_of(path).removesuffix(".value") for path, _ in leaves}


def stored_shapes(checkpoint: epath.Path, abstract: nnx.State, item: str = "params") -> nnx.State:
    """Return `abstract` with the dtypes in which the checkpoint stores its parameters.

    Raises:
        UserError: the stored shapes differ from `abstract`; Orbax would report that as a page of tree differences.
    """
    with _damage_named(checkpoint):
        stored = jax.tree.leaves(metadata(checkpoint / item))
    leaves, tree = jax.tree.flatten(abstract)
    if [tuple(leaf.shape) for leaf in stored] != [tuple(leaf.shape) for leaf in leaves]:
        raise UserError(f"checkpoint {checkpoint} is of a model of other sizes than its record says; use another one")
    return tree.unflatten([jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for leaf in stored])


def save_params(workdir: epath.PathLike, params: nnx.State, record: dict[str, Any]) -> None:
    """Write a checkpoint of step 0 that holds parameters alone: ported weights for a run to start from."""
    folder = epath.Path(workdir) / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    options = ocp.CheckpointManagerOptions(enable_async_checkpointing=False)
    with ocp.CheckpointManager(absolute(folder), options=options) as manager:
        args = ocp.args.Composite(params=ocp.args.StandardSave(params), record=ocp.args.JsonSave(record))
        manager.save(0, args=args, force=True)


@contextlib.contextmanager
def _damage_named(checkpoint: epath.Path):
    """Turn the many errors, pages long, that a missing or truncated file causes into one line."""
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
    """Tell whether the storage does not answer, or refuses us, as opposed to files that are missing or truncated."""
    error = error.__cause__ if isinstance(error, UserError) and error.__cause__ else error
    if is_no_answer(error):
        return True
    if isinstance(error, OSError):
        return not isinstance(error, FileNotFoundError | NotADirectoryError | IsADirectoryError)
    return bool(re.search("UNAVAILABLE|DEADLINE_EXCEEDED|PERMISSION_DENIED|UNAUTHENTICATED|ABORTED", str(error)))


def no_answer(folder: epath.Path, reason: str) -> UserError:
    """Return the error for a checkpoint whose storage does not answer."""
    return UserError(
        f"checkpoint {folder} cannot be read now ({reason}): that is no damage, and nothing was changed; start again "
        "when the storage answers and this account may read"
    )


def reason_of(error: Exception, folder: epath.PathLike = "") -> str:
    """Return an error's first line, without the path of `folder`, which the caller names itself."""
    message = str(error).replace(f"{folder}/", "") if folder else str(error)
    return (message or type(error).__name__).strip().splitlines()[0][:200]
