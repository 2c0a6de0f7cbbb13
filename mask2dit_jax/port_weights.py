"""Ports weights between a diffusers directory and our own layout, either way.

    python -m mask2dit_jax.port_weights --from=CogVideoX-5b --to=WORKDIR
    python -m mask2dit_jax.port_weights --from=WORKDIR --to=DIR

A diffusers directory (transformer/ vae/ text_encoder/ tokenizer/ scheduler/) becomes a workdir that a run can start
from, `--config.pretrained=WORKDIR`. A workdir or a checkpoint becomes a diffusers directory; the frozen components come
from where the run had them. What is not there is named, and left out. All of it happens in host memory, on any machine.
"""

import jax
import jax.numpy as jnp
from absl import flags, logging
from etils import epath

from mask2dit_jax.config import PRECISIONS
from mask2dit_jax.errors import UserError, run_main
from mask2dit_jax.pretrained import directory as port
from mask2dit_jax.pretrained import named, stored_checkpoint
from mask2dit_jax.pretrained.transformer_source import WEIGHTS, TransformerSource

_FROM = flags.DEFINE_string("from", None, "A diffusers directory, a workdir or a checkpoint.", required=True)
_TO = flags.DEFINE_string("to", None, "A new folder; a workdir if --from is a diffusers directory, else the other way.")
_DTYPE = flags.DEFINE_enum("dtype", None, list(PRECISIONS), "Type of the written parameters; default: as stored.")
_WEIGHTS = flags.DEFINE_enum(
    "weights", "auto", WEIGHTS, "Of a checkpoint: the moving average, if there is one, or not."
)
flags.mark_flag_as_required("to")

FROZEN = ("vae", "text_encoder")


def main(argv):
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
    """Reads every config before any weights, and one component at a time."""
    names = [name for name in port.COMPONENTS if (source / name).exists()]
    if not names:
        raise UserError(f"{source} holds none of {', '.join(port.COMPONENTS)}; is it a diffusers directory?")
    configs = {name: port.load_config(source, name) for name in names}
    written = port.copy_rest(source, target)
    for name, config in configs.items():
        params = port.load_component(source, name, config, dtype=dtype)
        if name == "transformer":
            stored_checkpoint.save_params(target, params, {"model": config.to_json(), "pretrained": str(target)})
        else:
            origin = port.origin(source / name) + (f"-{_DTYPE.value}" if _DTYPE.value else "")
            port.save_component(target, name, config, params, origin)
        del params
        written.append(name)
    _name_missing(written)
    return written


def _to_diffusers(source: epath.Path, target: epath.Path, dtype) -> list[str]:
    transformer = TransformerSource.require(source, _WEIGHTS.value)
    logging.info("transformer: %s", transformer)
    port.save_diffusers(target, "transformer", transformer.config(), transformer.stored(), dtype=dtype)
    written = ["transformer"]
    frozen = _frozen_directory(source, transformer)
    if frozen is None:
        logging.warning("the run's pretrained directory is not there any more: only the transformer is written")
        return written
    for name in FROZEN:
        if port.has_weights(frozen, name):
            config = port.load_config(frozen, name)
            port.save_diffusers(target, name, config, port.load_component(frozen, name, config), dtype=dtype)
            written.append(name)
    written += port.copy_rest(frozen, target)
    _name_missing(written)
    return written


def _frozen_directory(source: epath.Path, transformer: TransformerSource) -> epath.Path | None:
    """Where the VAE and the text encoder are: beside a ported checkpoint, or where the run's config says."""
    if any(port.has_weights(source, name) for name in FROZEN):
        return source
    recorded = stored_checkpoint.read_record(transformer.folder)["pretrained"]
    directory = epath.Path(named.pretrained_directory(recorded))
    return directory if directory.exists() else None


def _name_missing(written: list[str]):
    missing = [name for name in (*port.COMPONENTS, *port.COPIED) if name not in written]
    if missing:
        logging.warning("not there, so not written: %s", ", ".join(missing))


if __name__ == "__main__":
    run_main(main)
