"""Read and write the weights of a diffusers component folder: one safetensors file, or shards with an index.

Weights are read from a memory map straight into the arrays of the model. We map the files ourselves, because
safetensors' `safe_open`, which checks every file, returns copies, and a stacked parameter would briefly exist twice.
"""

import collections
import dataclasses
import functools
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from tqdm import tqdm

from mask2dit_jax.errors import UserError
from mask2dit_jax.io.atomic import atomic_output
from mask2dit_jax.io.paths import is_remote
from mask2dit_jax.models.port_rules import Rule, export, flatten, plan, unflatten

NAMES = ("diffusion_pytorch_model", "model")  # of transformer and vae; of text_encoder
_INDEX = ".safetensors.index.json"
_DTYPES = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": jnp.bfloat16}
_ALIGNMENT = 64  # bytes; XLA on the CPU uses a NumPy buffer without copying only if it is aligned like this
_COLUMNS = 64  # copied at a time; transposing a large matrix at once misses the cache at every element and is 4x slower


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """One tensor of a safetensors file. Only what is indexed in `view()` is read.

    Attributes:
        file: that holds the tensor.
        offset: of its data, in bytes.
        shape: of the tensor.
        dtype: of the tensor.
    """

    file: Path
    offset: int
    shape: tuple[int, ...]
    dtype: np.dtype

    def view(self) -> np.ndarray:
        """Map the tensor into memory."""
        return np.memmap(self.file, self.dtype, "r", self.offset, self.shape)


def read_json(path: str | os.PathLike) -> dict:
    """Read the object in a JSON file such as `config.json`. Raises UserError if it is missing or damaged."""
    try:
        raw = json.loads(epath.Path(path).read_text(encoding="utf-8").removeprefix("\ufeff"))
    except OSError as error:
        raise UserError(
            f"cannot read {path} ({error.strerror or error}); is its folder a complete download?"
        ) from error
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON ({error}); download it again") from error
    if not isinstance(raw, dict):
        raise UserError(f"{path} holds no JSON object; download it again")
    return raw


def write_json(path: str | os.PathLike, raw: Mapping) -> None:
    """Write an object for `read_json`, completely or not at all."""
    with atomic_output(path) as local:
        local.write_text(json.dumps(raw, indent=2) + "\n", encoding="utf-8")


def open_weights(folder: str | os.PathLike) -> dict[str, StoredTensor]:
    """Return all tensors of a component folder (`transformer`, `vae`, `text_encoder`) by key; their data is not read.

    Raises:
        UserError: the folder is missing, remote, empty or ambiguous, a shard is missing or damaged, the index is
            damaged, or a shard lacks a tensor that the index lists.
    """
    folder = _local(folder)
    if not folder.is_dir():
        raise UserError(f"weights folder {folder} does not exist; give a folder that holds safetensors files")
    path = _entry(folder)
    if path is None:
        raise UserError(
            f"weights folder {folder} holds neither {' nor '.join(f'{name}.safetensors' for name in NAMES)} "
            "(nor their index); PyTorch .bin files must be converted to safetensors first"
        )
    return _open_shards(Path(path)) if path.name.endswith(_INDEX) else dict(_open_file(Path(path)))


def weight_files(folder: str | os.PathLike) -> list[epath.Path]:
    """Return the files that `open_weights` reads in a folder, local or gs://: none if it holds no weights.

    Raises:
        UserError: the folder is ambiguous, a shard is missing, or the index is damaged.
    """
    path = _entry(folder)
    if path is None:
        return []
    if not path.name.endswith(_INDEX):
        return [path]
    return [path, *(path.parent / shard for shard in sorted(set(_weight_map(path).values())))]


def _entry(folder: str | os.PathLike) -> epath.Path | None:
    """Return the file that all weights of a folder are found from: the index, or the only safetensors file."""
    names = [name + suffix for name in NAMES for suffix in (_INDEX, ".safetensors")]
    found = [name for name in names if (epath.Path(folder) / name).exists()]
    if len(found) > 1:
        raise UserError(f"weights folder {folder} holds both {' and '.join(found)}; remove all but one")
    return epath.Path(folder) / found[0] if found else None


def _local(folder) -> Path:
    if is_remote(folder):
        raise UserError(
            f"weights folder {folder} is remote, but weight files are memory-mapped; copy it to a local disk"
        )
    return Path(folder)


def _weight_map(index: os.PathLike) -> dict[str, str]:
    """Read which shard holds each tensor; all shards are there."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
        raise UserError(f"{index} has no weight_map from tensors to files; download it again")
    for shard in sorted(set(weight_map.values())):
        if not (epath.Path(index).parent / shard).exists():
            raise UserError(f"shard {shard!r}, named by {index}, is missing; download it into the same folder")
    return weight_map


def _open_shards(index: Path) -> dict[str, StoredTensor]:
    weight_map = _weight_map(index)
    tensors = {}
    for shard in sorted(set(weight_map.values())):
        # A tensor that the index does not list is kept. The port table decides whether the model has a place for it.
        tensors |= {
            key: tensor for key, tensor in _open_file(index.parent / shard) if weight_map.get(key, shard) == shard
        }
    for key, shard in weight_map.items():
        if key not in tensors:
            raise UserError(f"tensor {key!r} is not in {shard!r}, where {index} promises it; download both again")
    return tensors


def _open_file(path: Path) -> Iterator[tuple[str, StoredTensor]]:
    try:
        with safe_open(path, framework="numpy"):  # checks the header against itself and against the file's size
            pass
        with path.open("rb") as file:
            data_start = 8 + int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(data_start - 8))
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is no complete safetensors file ({error}); download it again") from error
    header.pop("__metadata__", None)
    for key, entry in header.items():
        if entry["dtype"] not in _DTYPES:
            raise UserError(
                f"{path}: tensor {key!r} is of type {entry['dtype']}; only {', '.join(_DTYPES)} are supported"
            )
        dtype = np.dtype(_DTYPES[entry["dtype"]])
        yield key, StoredTensor(path, data_start + entry["data_offsets"][0], tuple(entry["shape"]), dtype)


def load_state(
    table: Iterable[Rule],
    weights: Mapping[str, StoredTensor | np.ndarray],
    abstract_state,
    *,
    dtype=None,
    shardings=None,
    what: str = "checkpoint",
):
    """Load a model's state from safetensors, strictly (see `port_rules.plan`).

    Host memory holds at most one copy of the parameters: each device's slice is read from the memory map into the
    buffer that JAX then owns (on the CPU) or transfers. A process reads only what its own devices need.

    Args:
        table: port table of the model.
        weights: from `open_weights`, or arrays in memory.
        abstract_state: NNX state whose leaves have `.shape`, such as `nnx.eval_shape` returns.
        dtype: of all parameters, or a mapping from their paths; None keeps that of the file.
        shardings: state of the same structure with a `jax.sharding.Sharding` for each parameter; None puts all on the
            first device.
        what: name of the checkpoint in messages and in the progress bar.

    Returns:
        NNX state of jax arrays, for `nnx.update` or `nnx.merge`.

    Raises:
        UserError: a tensor is missing, is unknown, or has the wrong shape.
    """
    sources = collections.defaultdict(dict)
    for key, slot in plan(table, {key: tensor.shape for key, tensor in weights.items()}, abstract_state, what).items():
        sources[slot.path][slot.layer] = (weights[key], slot.transform)
    placement = _placement(abstract_state, shardings)
    loaded = {}
    with tqdm(desc=what, unit="B", unit_scale=True, delay=1, disable=None) as progress:
        for path, leaf in flatten(abstract_state).items():
            wanted = dtype[path] if isinstance(dtype, Mapping) else dtype
            kind = jax.dtypes.canonicalize_dtype(wanted or _common_dtype(sources[path]))
            read = functools.partial(_read_slice, sources[path], leaf.shape, kind, progress)
            loaded[path] = leaf.copy(jax.make_array_from_callback(leaf.shape, placement[path], read))
    return unflatten(loaded, abstract_state)


def _placement(abstract_state, shardings) -> dict[str, jax.sharding.Sharding]:
    if shardings is None:
        one_device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        return dict.fromkeys(flatten(abstract_state), one_device)
    return {path: leaf.get_value() for path, leaf in flatten(shardings).items()}


def _common_dtype(source) -> np.dtype:
    """Return the common type of a stacked parameter, whose layers may be stored in several types."""
    return functools.reduce(jnp.promote_types, (tensor.dtype for tensor, _ in source.values()))


def _read_slice(source, shape, dtype, progress, index: tuple[slice, ...]) -> np.ndarray:
    """Read one device's part of a parameter. Layout and type change on the way from the memory map to the buffer."""
    target = _aligned_empty([len(range(*part.indices(size))) for part, size in zip(index, shape, strict=True)], dtype)
    if None in source:
        _copy(target, source[None], index)
    else:
        for position, layer in enumerate(range(*index[0].indices(shape[0]))):
            _copy(target[position], source[layer], index[1:])
    progress.update(target.nbytes)
    return target


def _copy(target, source, index):
    tensor, transform = source
    values = transform.to_nnx(tensor.view())[index]
    for start in range(0, target.shape[-1], _COLUMNS):
        columns = np.s_[..., start : start + _COLUMNS]
        np.copyto(target[columns], values[columns], casting="same_kind")


def _aligned_empty(shape, dtype) -> np.ndarray:
    size = math.prod(shape) * np.dtype(dtype).itemsize
    buffer = np.empty(size + _ALIGNMENT, np.uint8)
    start = -buffer.ctypes.data % _ALIGNMENT
    return buffer[start : start + size].view(dtype).reshape(shape)


def save_weights(
    table: Iterable[Rule],
    state: Any,
    folder: str | os.PathLike,
    *,
    name: str,
    max_shard_bytes: int = 5 * 10**9,
    dtype=None,
) -> None:
    """Write a model's state as `name.safetensors`, or as shards with an index if it does not fit into one file.

    One shard at a time is in memory. Files are renamed when all are complete, the index last, so that a folder that is
    half-written is never mistaken for a complete one. Earlier weights of that name are replaced.

    Args:
        table: port table of the model.
        state: the parameters.
        folder: of the component, on a local disk.
        name: "diffusion_pytorch_model" (transformer, vae) or "model" (text encoder).
        max_shard_bytes: size above which weights are split.
        dtype: of the tensors in the files; None keeps that of the state.

    Raises:
        UserError: the folder cannot be written, or the disk is full.
    """
    folder = _local(folder)
    parts: list[tuple[Path, list[str]]] = []
    shard: dict[str, np.ndarray] = {}

    def write_shard():
        parts.append((folder / f"{name}-{len(parts) + 1:05d}.tmp", list(shard)))
        save_file(shard, parts[-1][0], metadata={"format": "pt"})
        parts[-1][0].chmod(folder.stat().st_mode & 0o666)  # safetensors creates files that only their owner can read
        shard.clear()

    try:
        folder.mkdir(parents=True, exist_ok=True)
        total, in_shard = 0, 0
        for key, _, read in export(table, state):
            tensor = _as_type(read(), dtype)
            if shard and in_shard + tensor.nbytes > max_shard_bytes:
                write_shard()
                in_shard = 0
            shard[key] = tensor
            in_shard += tensor.nbytes
            total += tensor.nbytes
        write_shard()
        _publish(folder, name, parts, total)
    except (SafetensorError, OSError) as error:
        raise UserError(
            f"cannot write weights into {folder}: {error}; is there room, and may you write there?"
        ) from error
    finally:
        for path, _ in parts:
            path.unlink(missing_ok=True)


def _as_type(tensor: np.ndarray, dtype) -> np.ndarray:
    return tensor if dtype is None else tensor.astype(dtype, copy=False)


def _publish(folder: Path, name: str, parts: list[tuple[Path, list[str]]], total_size: int):
    """Rename complete files. Until the last line, `open_weights` finds no weights in the folder."""
    index, single = folder / f"{name}{_INDEX}", folder / f"{name}.safetensors"
    for stale in (index, single, *folder.glob(f"{name}-*-of-*.safetensors")):
        stale.unlink(missing_ok=True)
    if len(parts) == 1:
        parts[0][0].rename(single)
        return
    weight_map = {}
    for number, (path, keys) in enumerate(parts, start=1):
        shard = f"{name}-{number:05d}-of-{len(parts):05d}.safetensors"
        path.rename(folder / shard)
        weight_map |= dict.fromkeys(keys, shard)
    raw = {"metadata": {"total_size": total_size}, "weight_map": dict(sorted(weight_map.items()))}
    partial = index.with_suffix(".tmp")
    write_json(partial, raw)
    partial.rename(index)
