"""The components of a pretrained directory: their names, their classes, and where their weights are.

    DIR/transformer/   config.json  diffusion_pytorch_model*.safetensors
    DIR/vae/           config.json  diffusion_pytorch_model*.safetensors
    DIR/text_encoder/  config.json  model*.safetensors
    DIR/tokenizer/     DIR/scheduler/scheduler_config.json
    DIR/model_index.json

is a diffusers directory, the form in which CogVideoX and Mask2DiT are released; only diffusers reads the last file,
which names the class of each component. Instead of safetensors, a component
folder may hold `params/` (Orbax, our own layout), which `port_weights` writes and which is read without transposing.
"""

import dataclasses
import hashlib
import os
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import orbax.checkpoint as ocp
from absl import logging
from etils import epath
from flax import nnx
from jax.sharding import SingleDeviceSharding

from mask2dit_jax.diffusion.schedule import CLASS_NAMES as SCHEDULER_CLASSES
from mask2dit_jax.diffusion.schedule import ScheduleConfig
from mask2dit_jax.errors import UserError
from mask2dit_jax.io.content import file_hash
from mask2dit_jax.io.paths import absolute
from mask2dit_jax.models import registry
from mask2dit_jax.models.architecture import Architecture
from mask2dit_jax.models.port_rules import Rule, flatten
from mask2dit_jax.models.t5 import T5, T5Config
from mask2dit_jax.pretrained.safetensors import (
    load_state,
    open_weights,
    read_json,
    save_weights,
    weight_files,
    write_json,
)
from mask2dit_jax.pretrained.tokenizer import tokenizer_files

PARAMS = "params"
ORIGIN = "origin.txt"  # beside ported parameters
_CONFIG = "config.json"
_STRAY = ("Thumbs.db", "desktop.ini")  # what Windows leaves in folders
SCHEDULER_CONFIG = "scheduler/scheduler_config.json"
# Folders without weights, which are the same in every layout, and the files of which each must hold one.
COPIED = {"tokenizer": ("spiece.model", "tokenizer.json"), "scheduler": ("scheduler_config.json",)}
MODEL_INDEX = "model_index.json"
_PIPELINE = "CogVideoXPipeline"
# Classes that diffusers builds this pipeline of, by component. What our own codecs write has none.
_PIPELINE_CLASSES = {
    "transformer": ("diffusers", ("CogVideoXTransformer3DModel",)),
    "vae": ("diffusers", ("AutoencoderKLCogVideoX",)),
    "text_encoder": ("transformers", ("T5EncoderModel",)),
    "tokenizer": ("transformers", ("T5Tokenizer",)),
    "scheduler": ("diffusers", SCHEDULER_CLASSES),
}


@dataclasses.dataclass(frozen=True)
class Component:
    """How one folder becomes a module.

    Attributes:
        name: of the folder.
        read_config: makes the config of the contents of config.json.
        architecture: finds the network of a config.
        weights_name: how its safetensors files are called.
    """

    name: str
    read_config: Callable[[Mapping[str, Any]], Any]
    architecture: Callable[[Any], Architecture]
    weights_name: str

    def module(self, config, **kwargs) -> nnx.Module:
        """Return the module with a shape in place of every parameter."""
        return self.architecture(config).memoryless(config, **kwargs)

    def table(self, config) -> tuple[Rule, ...]:
        """Return the port table."""
        return self.architecture(config).port_table(config)


COMPONENTS = {
    c.name: c
    for c in (
        Component("transformer", registry.read_transformer_config, registry.backbone_of, "diffusion_pytorch_model"),
        Component("vae", registry.read_codec_config, registry.codec_of, "diffusion_pytorch_model"),
        Component("text_encoder", T5Config.from_json, lambda config: T5, "model"),
    )
}


def has_weights(directory: epath.PathLike, name: str) -> bool:
    """Return whether the component's folder holds weights in either layout."""
    folder = epath.Path(directory) / name
    return (folder / PARAMS).exists() or (folder.exists() and any(folder.glob("*.safetensors*")))


def has_parameters(name: str, config) -> bool:
    """Return whether a component with this config has parameters at all; the lossless codec has none."""
    return bool(jax.tree.leaves(COMPONENTS[name].module(config)))


def load_config(directory: epath.PathLike, name: str):
    """Read the component's config from its config.json.

    Raises:
        UserError: the directory or the file is missing, or the file is damaged.
    """
    directory = epath.Path(directory)
    if not directory.exists():
        raise UserError(f"pretrained directory {directory} does not exist; give the directory that holds {name}/")
    return COMPONENTS[name].read_config(read_json(directory / name / _CONFIG))


def load_schedule(directory: epath.PathLike) -> ScheduleConfig:
    """Read the noise schedule of a directory. Raises UserError if it is missing or damaged."""
    return ScheduleConfig.from_json(read_json(epath.Path(directory) / SCHEDULER_CONFIG))


def load_component(directory: epath.PathLike, name: str, config, *, dtype=None, shardings=None) -> nnx.State:
    """Load the component's parameters.

    Args:
        directory: that holds the component's folder.
        name: of the component.
        config: of the component.
        dtype: of the parameters, or a mapping from their paths; None keeps that of the file.
        shardings: a sharding for all parameters, or a state of shardings; None puts all on the first device.

    Raises:
        UserError: weights are missing or damaged, or do not match the config.
    """
    component, folder = COMPONENTS[name], epath.Path(directory) / name
    state = nnx.state(component.module(config))
    if isinstance(shardings, jax.sharding.Sharding):
        shardings = jax.tree.map(lambda _: shardings, state)
    if not jax.tree.leaves(state):
        return state
    logging.info("reading %s", folder)
    if (folder / PARAMS).exists():
        return _restore(folder / PARAMS, state, dtype, shardings)
    return load_state(
        component.table(config), open_weights(folder), state, dtype=dtype, shardings=shardings, what=str(folder)
    )


def _restore(folder: epath.Path, state, dtype, shardings) -> nnx.State:
    """Restore with the handler, because Orbax's checkpointers wait for all processes and not all of them read."""
    handler = ocp.StandardCheckpointHandler()
    stored = jax.tree.leaves(handler.metadata(absolute(folder)))
    leaves, tree = jax.tree.flatten(state)
    dtypes = [dtype[path] for path in flatten(state)] if isinstance(dtype, Mapping) else [dtype] * len(leaves)
    here = SingleDeviceSharding(jax.local_devices()[0])  # otherwise Orbax looks for the devices of the writer
    places = jax.tree.leaves(shardings) if shardings is not None else [here] * len(leaves)
    targets = [
        jax.ShapeDtypeStruct(leaf.shape, wanted or entry.dtype, sharding=place)
        for leaf, entry, wanted, place in zip(leaves, stored, dtypes, places, strict=True)
    ]
    return handler.restore(absolute(folder), args=ocp.args.StandardRestore(tree.unflatten(targets)))


def load_module(directory: epath.PathLike, name: str, *, dtype, param_dtype=None, shardings=None) -> nnx.Module:
    """Load a component that is ready to run.

    Args:
        directory: that holds the component's folder.
        name: of the component.
        dtype: of the computation.
        param_dtype: of the parameters; None keeps that of the file.
        shardings: see `load_component`.
    """
    config = load_config(directory, name)
    graph, _ = nnx.split(COMPONENTS[name].module(config, dtype=dtype))
    return nnx.merge(graph, load_component(directory, name, config, dtype=param_dtype, shardings=shardings))


def save_diffusers(directory: epath.PathLike, name: str, config, params: nnx.State, *, dtype=None) -> None:
    """Write a component in the form that diffusers and transformers read.

    Args:
        directory: that gets the component's folder.
        name: of the component.
        config: of the component.
        params: its parameters.
        dtype: of the written parameters; None keeps that of `params`.
    """
    component, folder = COMPONENTS[name], epath.Path(directory) / name
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / _CONFIG, config.to_json())
    save_weights(component.table(config), params, folder, name=component.weights_name, dtype=dtype)


def save_component(directory: epath.PathLike, name: str, config, params: nnx.State, ported_from: str) -> None:
    """Write a component in our own layout.

    Args:
        directory: that gets the component's folder.
        name: of the component.
        config: of the component.
        params: its parameters.
        ported_from: `origin` of the folder that the parameters were ported from; it stays their origin.
    """
    folder = epath.Path(directory) / name
    folder.mkdir(parents=True, exist_ok=True)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(absolute(folder / PARAMS), params, force=True)
    write_json(folder / _CONFIG, config.to_json())
    (folder / ORIGIN).write_text(f"{ported_from}\n{file_hash(folder / _CONFIG)}")


def fingerprint(directory: epath.PathLike, names: Iterable[str]) -> str:
    """Hash components of a directory. The hash is the same for equal components, whether they were ported or not."""
    return _digest(f"{name} {origin(epath.Path(directory) / name)}" for name in sorted(names))


def origin(folder: epath.Path) -> str:
    """Return what identifies one component: a hash of the content of the files that are read from its folder.

    Other files do not count. A ported component has the origin that was recorded when it was ported, unless its
    config.json has changed since.

    Raises:
        UserError: weight files are missing, ambiguous or unreadable.
    """
    ported = (folder / PARAMS).exists()
    if ported and (folder / ORIGIN).exists():
        recorded, *config = (folder / ORIGIN).read_text().split()
        changed = config and (folder / _CONFIG).exists() and config != [file_hash(folder / _CONFIG)]
        return _digest([recorded, file_hash(folder / _CONFIG)]) if changed else recorded
    if folder.name == "tokenizer":
        return hash_files(folder, tokenizer_files(folder))
    configs = [folder / _CONFIG] if (folder / _CONFIG).exists() else []
    return hash_files(folder, [*configs, *(stored_files(folder / PARAMS) if ported else weight_files(folder))])


def hash_files(folder: epath.Path, files: Iterable[epath.Path]) -> str:
    """Hash the names and the content of files in a folder. Raises UserError if one cannot be read."""
    try:
        return _digest(f"{os.path.relpath(file, folder)} {file_hash(file)}" for file in files)
    except OSError as error:
        raise UserError(
            f"{error.filename or folder} cannot be read ({error.strerror or error}); copy it again"
        ) from error


def stored_files(folder: epath.Path) -> list[epath.Path]:
    """Return the files that Orbax wrote into a folder such as `params/`, without those of desktops and editors."""
    found = []
    for path in sorted(folder.iterdir()) if folder.exists() else ():
        if path.name not in _STRAY and not path.name.startswith(".") and not path.name.endswith("~"):
            found += stored_files(path) if path.is_dir() else [path]
    return found


def _digest(lines: Iterable[str]) -> str:
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


def copy_rest(source: epath.PathLike, target: epath.PathLike) -> list[str]:
    """Copy the folders that hold no weights, and return the names of those that the source has.

    A folder that lacks the file that matters in it counts as missing.
    """
    copied = []
    for name, needed in COPIED.items():
        folder = epath.Path(source) / name
        if not any((folder / file).exists() for file in needed):
            continue
        (epath.Path(target) / name).mkdir(parents=True, exist_ok=True)
        for file in folder.iterdir():
            if not file.is_dir():
                file.copy(epath.Path(target) / name / file.name, overwrite=True)
        copied.append(name)
    return copied


def save_model_index(directory: epath.PathLike) -> None:
    """Write the file by which diffusers opens a directory of all components as one pipeline.

    Raises:
        UserError: a component is of a class that the pipeline does not take.
    """
    folder, index = epath.Path(directory), {"_class_name": _PIPELINE}
    for name, (library, classes) in _PIPELINE_CLASSES.items():
        config = SCHEDULER_CONFIG if name == "scheduler" else f"{name}/config.json"
        written = read_json(folder / config) if library == "diffusers" else {}
        index[name] = [library, written.get("_class_name", classes[0])]
        if index[name][1] not in classes:
            raise UserError(f"{folder / config}: {_PIPELINE} of diffusers takes no {index[name][1]}")
    write_json(folder / MODEL_INDEX, index)
