"""Port weights between a diffusers directory and our own layout, in either direction.

    python -m mask2dit_jax.port_weights --from=CogVideoX-5b --to=WORKDIR
    python -m mask2dit_jax.port_weights --from=WORKDIR --to=DIR

A diffusers directory (transformer/ vae/ text_encoder/ tokenizer/ scheduler/) becomes a workdir that a run can start
from, `--config.pretrained=WORKDIR`. A workdir or a checkpoint becomes a diffusers directory; the frozen components come
from the directory that the run used. If none is missing, diffusers opens the result as a pipeline, which samples one
scene: `diffusers.CogVideoXPipeline.from_pretrained("DIR")`. Components that are missing are named and left out, and
model_index.json with them. Everything happens in host memory, so any machine will do.
"""

import jax
import jax.numpy as jnp
from absl import flags, logging
from etils import epath

from mask2dit_jax.config import PRECISIONS
from mask2dit_jax.errors import UserError, run_main
from mask2dit_jax.pretrained import directory, stored_checkpoint
from mask2dit_jax.pretrained.pretrained import FROZEN, Pretrained
from mask2dit_jax.pretrained.transformer_source import WEIGHTS

_FROM = flags.DEFINE_string("from", None, "A diffusers directory, a workdir or a checkpoint.", required=True)
_TO = flags.DEFINE_string(
    "to", None, "A new folder; it becomes a workdir if --from is a diffusers directory, and the other way round."
)
_DTYPE = flags.DEFINE_enum("dtype", None, list(PRECISIONS), "Type of the written parameters; default: as stored.")
_WEIGHTS = flags.DEFINE_enum(
    "weights", "auto", WEIGHTS, "Parameters of a checkpoint; auto: the moving average, if there is one."
)
flags.mark_flag_as_required("to")


def main(argv):
    """Port in the direction that --from asks for, and print what was written."""
    if len(argv) > 1:
        raise UserError(f"what is {argv[1]}? name the folders with --from=DIR --to=DIR")
    jax.config.update("jax_platforms", "cpu")
    source, target = epath.Path(_FROM.value), epath.Path(_TO.value)
    dtype = _DTYPE.value and jnp.dtype(_DTYPE.value)
    _check(source, target)
    if stored_checkpoint.has_checkpoint(source):
        written = _to_diffusers(source, target, dtype)
    else:
        written = _to_workdir(source, target, dtype)
    print(f"{target}: {', '.join(written)}")


def _check(source: epath.Path, target: epath.Path):
    if not source.exists():
        raise UserError(f"--from={source} does not exist; give a diffusers directory, a workdir or a checkpoint")
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise UserError(f"--to={target} is there already; give a new folder, so that nothing is overwritten")
    try:
        target.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--to={target} cannot be written ({error.strerror}); choose another folder") from error


def _to_workdir(source: epath.Path, target: epath.Path, dtype) -> list[str]:
    """Port a diffusers directory. Reads every config before any weights, and one component at a time."""
    names = [name for name in directory.COMPONENTS if (source / name).exists()]
    if not names:
        raise UserError(f"{source} holds none of {', '.join(directory.COMPONENTS)}; is it a diffusers directory?")
    configs = {name: directory.load_config(source, name) for name in names}
    written = directory.copy_rest(source, target)
    for name, config in configs.items():
        params = directory.load_component(source, name, config, dtype=dtype)
        if name == "transformer":
            stored_checkpoint.save_params(target, params, {"model": config.to_json(), "pretrained": str(target)})
        else:
            origin = directory.origin(source / name) + (f"-{_DTYPE.value}" if _DTYPE.value else "")
            directory.save_component(target, name, config, params, origin)
        del params
        written.append(name)
    _name_missing(written)
    return written


def _to_diffusers(source: epath.Path, target: epath.Path, dtype) -> list[str]:
    """Export a checkpoint, with the frozen components of its run if they are still there."""
    pretrained = Pretrained.open(source, weights=_WEIGHTS.value)
    transformer = pretrained.transformer
    logging.info("transformer: %s", transformer)
    directory.save_diffusers(target, "transformer", transformer.config(), transformer.stored(), dtype=dtype)
    written = ["transformer"]
    if not pretrained.folder.exists():
        logging.warning(
            "the run's pretrained directory %s is gone: only the transformer is written, and no %s",
            *(pretrained, directory.MODEL_INDEX),
        )
        return written
    for name in FROZEN:
        component = getattr(pretrained, name)
        if component.has_weights:
            directory.save_diffusers(target, name, component.config, component.load(), dtype=dtype)
            written.append(name)
    written += directory.copy_rest(pretrained.folder, target)
    if not _name_missing(written, f", nor {directory.MODEL_INDEX}"):
        try:
            directory.save_model_index(target)
        except UserError as error:
            logging.warning("no %s is written: %s", directory.MODEL_INDEX, error)
        else:
            written.append(directory.MODEL_INDEX)
    return written


def _name_missing(written: list[str], consequence: str = "") -> list[str]:
    missing = [name for name in (*directory.COMPONENTS, *directory.COPIED) if name not in written]
    if missing:
        logging.warning("missing in the source, so not written: %s%s", ", ".join(missing), consequence)
    return missing


if __name__ == "__main__":
    run_main(main)
