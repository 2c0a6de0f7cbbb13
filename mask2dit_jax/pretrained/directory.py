"""The components of a pretrained directory: what they are called, which class they are, where their weights lie.

    DIR/transformer/   config.json  diffusion_pytorch_model*.safetensors
    DIR/vae/           config.json  diffusion_pytorch_model*.safetensors
    DIR/text_encoder/  config.json  model*.safetensors
    DIR/tokenizer/     DIR/scheduler/scheduler_config.json

is a diffusers directory, as CogVideoX and Mask2DiT are released. A component folder may hold `params/` (Orbax, our own
layout) in place of the safetensors: what `port_weights` makes, read without any transposing.
"""

import dataclasses
import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax
import orbax.checkpoint as ocp
from absl import logging
from etils import epath
from flax import nnx
from jax.sharding import SingleDeviceSharding

from mask2dit_jax.diffusion.schedule import ScheduleConfig
from mask2dit_jax.errors import UserError
from mask2dit_jax.io.paths import absolute
from mask2dit_jax.models import registry
from mask2dit_jax.models.architecture import Architecture
from mask2dit_jax.models.port_rules import Rule, flatten
from mask2dit_jax.models.t5 import T5, T5Config
from mask2dit_jax.pretrained.safetensors import load_state, open_weights, read_json, save_weights, write_json

PARAMS = "params"
ORIGIN = "origin.txt"  # beside ported parameters
_ENDS = 1 << 20
COPIED = ("tokenizer", "scheduler")  # folders without weights: the same in every layout
SCHEDULER_CONFIG = "scheduler/scheduler_config.json"


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
    folder = epath.Path(directory) / name
    return (folder / PARAMS).exists() or (folder.exists() and any(folder.glob("*.safetensors*")))


def has_parameters(name: str, config) -> bool:
    """Whether a component of this config has parameters at all: the lossless codec has none."""
    return bool(jax.tree.leaves(COMPONENTS[name].module(config)))


def load_config(directory: epath.PathLike, name: str):
    """The component's config, from its config.json."""
    directory = epath.Path(directory)
    if not directory.exists():
        raise UserError(f"pretrained directory {directory} does not exist; give the directory that holds {name}/")
    return COMPONENTS[name].read_config(read_json(directory / name / "config.json"))


def load_schedule(directory: epath.PathLike) -> ScheduleConfig:
    return ScheduleConfig.from_json(read_json(epath.Path(directory) / SCHEDULER_CONFIG))


def load_component(directory: epath.PathLike, name: str, config, *, dtype=None, shardings=None) -> nnx.State:
    """The component's parameters, on the devices of `shardings` (a tree like the state, or one for all; or none).

    Args:
        dtype: of the parameters, or by path; None keeps that of the file.
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
    """By the handler: Orbax's checkpointers wait for all processes, of which not all read."""
    handler = ocp.StandardCheckpointHandler()
    stored = jax.tree.leaves(handler.metadata(absolute(folder)))
    leaves, tree = jax.tree.flatten(state)
    dtypes = [dtype[path] for path in flatten(state)] if isinstance(dtype, Mapping) else [dtype] * len(leaves)
    here = SingleDeviceSharding(jax.local_devices()[0])  # said, as Orbax would look for the devices of the writer
    places = jax.tree.leaves(shardings) if shardings is not None else [here] * len(leaves)
    targets = [
        jax.ShapeDtypeStruct(leaf.shape, wanted or entry.dtype, sharding=place)
        for leaf, entry, wanted, place in zip(leaves, stored, dtypes, places, strict=True)
    ]
    return handler.restore(absolute(folder), args=ocp.args.StandardRestore(tree.unflatten(targets)))


def load_module(directory: epath.PathLike, name: str, *, dtype, param_dtype=None, shardings=None) -> nnx.Module:
    """A component ready to run: computation in `dtype`, parameters kept in `param_dtype` (None: as stored)."""
    config = load_config(directory, name)
    graph, _ = nnx.split(COMPONENTS[name].module(config, dtype=dtype))
    return nnx.merge(graph, load_component(directory, name, config, dtype=param_dtype, shardings=shardings))


def save_diffusers(directory: epath.PathLike, name: str, config, params: nnx.State, *, dtype=None) -> None:
    """Writes the component as diffusers (or transformers) reads it."""
    component, folder = COMPONENTS[name], epath.Path(directory) / name
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "config.json", config.to_json())
    save_weights(component.table(config), params, folder, name=component.weights_name, dtype=dtype)


def save_component(directory: epath.PathLike, name: str, config, params: nnx.State, ported_from: str) -> None:
    """Writes the component in our own layout.

    Args:
        ported_from: `origin` of where the parameters were ported from, which stays theirs.
    """
    folder = epath.Path(directory) / name
    folder.mkdir(parents=True, exist_ok=True)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(absolute(folder / PARAMS), params, force=True)
    (folder / ORIGIN).write_text(ported_from)
    write_json(folder / "config.json", config.to_json())


def fingerprint(directory: epath.PathLike, names: Iterable[str]) -> str:
    """Tells apart directories whose components differ, and not those that hold the same, ported or not."""
    digest = hashlib.sha256()
    for name in sorted(names):
        digest.update(f"{name} {origin(epath.Path(directory) / name)}".encode())
    return digest.hexdigest()[:16]


def origin(folder: epath.Path) -> str:
    """Of one component: a hash of every file's name, size and both ends, or what was written down when it was ported.

    Not of whole files: the text encoder alone has 10 GB or more, and weights that differ at all differ in their ends.
    """
    if (folder / ORIGIN).exists():
        return (folder / ORIGIN).read_text()
    digest = hashlib.sha256()
    for file in _files(folder):
        size = file.stat().length
        digest.update(f"{file.relative_to(folder)} {size}".encode())
        with file.open("rb") as stream:
            digest.update(stream.read(_ENDS))
            stream.seek(max(0, size - _ENDS))
            digest.update(stream.read(_ENDS))
    return digest.hexdigest()[:16]


def _files(folder: epath.Path) -> Iterator[epath.Path]:
    for path in sorted(folder.iterdir()) if folder.exists() else ():
        yield from _files(path) if path.is_dir() else (path,)


def copy_rest(source: epath.PathLike, target: epath.PathLike) -> list[str]:
    """Copies the folders that hold no weights; returns the names of those that the source has."""
    copied = []
    for name in COPIED:
        folder = epath.Path(source) / name
        if not folder.exists():
            continue
        (epath.Path(target) / name).mkdir(parents=True, exist_ok=True)
        for file in folder.iterdir():
            file.copy(epath.Path(target) / name / file.name, overwrite=True)
        copied.append(name)
    return copied
