"""Where parameters, optimiser state, batches and activations lie on the mesh.

One table a model: path pattern -> partition of the axes, left to right. A parameter matches exactly one row. What is
made from parameters (Adam's moments, EMA) has their paths at its end, and so their rows.
"""

import re
from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from mask2dit_jax.axes import Array
from mask2dit_jax.parallel.mesh import BATCH, CONTEXT, TENSOR, WEIGHTS

P = PartitionSpec
Table = Sequence[tuple[str, PartitionSpec]]
_ALL = (*WEIGHTS, TENSOR)  # where no axis is heads or hidden units

# Kernels are (layer, in, out) in the blocks and (in, out) outside. The large axis of each is sharded over WEIGHTS;
# heads and hidden units over TENSOR, so that a block exchanges activations twice, after `out` and after `down`.
DIT: Table = (
    (r"blocks\.attn\.(query|key|value)\.kernel", P(None, WEIGHTS, TENSOR)),
    (r"blocks\.attn\.(query|key|value)\.bias", P(None, TENSOR)),
    (r"blocks\.attn\.out\.kernel", P(None, TENSOR, WEIGHTS)),
    (r"blocks\.attn\.norm_[qk]\.(scale|bias)", P()),
    (r"blocks\.mlp\.up\.kernel", P(None, WEIGHTS, TENSOR)),
    (r"blocks\.mlp\.up\.bias", P(None, TENSOR)),
    (r"blocks\.mlp\.down\.kernel", P(None, TENSOR, WEIGHTS)),
    (r"blocks\.norm[12]\.modulation\.linear\.kernel", P(None, None, _ALL)),
    (r"blocks\.norm[12]\.modulation\.linear\.bias", P(None, _ALL)),
    (r"blocks\.(attn\.out|mlp\.down|norm[12]\.norm)\.(scale|bias)", P()),
    (r"modulation_out\.linear\.kernel", P(None, _ALL)),
    (r"(text_embed|time_embed\.linear_[12])\.kernel", P(_ALL, None)),
    (r"(patch_embed|proj_out)\.kernel", P()),  # small, and used on all tokens
    (r"(patch_embed|text_embed|time_embed\.linear_[12]|modulation_out\.linear|proj_out)\.bias", P()),
    (r"norm_(final|out)\.(scale|bias)", P()),
    # LoRA: each adapter as the side of the kernel that it stands beside.
    (r"blocks\.(attn\.(query|key|value)|mlp\.up)\.lora_a", P(None, WEIGHTS, None)),
    (r"blocks\.(attn\.(query|key|value)|mlp\.up)\.lora_b", P(None, None, TENSOR)),
    (r"blocks\.(attn\.out|mlp\.down)\.lora_a", P(None, TENSOR, None)),
    (r"blocks\.(attn\.out|mlp\.down)\.lora_b", P(None, None, WEIGHTS)),
)

# The encoders only run forward: their parameters are sharded for memory, not for speed.
T5: Table = (
    (r"token_embedding\.embedding", P(None, _ALL)),
    (r"relative_bias\.embedding", P()),
    (r"blocks\.attn\.(query|key|value)\.kernel", P(None, WEIGHTS, TENSOR)),
    (r"blocks\.attn\.out\.kernel", P(None, TENSOR, WEIGHTS)),
    (r"blocks\.mlp\.(gate|up)\.kernel", P(None, WEIGHTS, TENSOR)),
    (r"blocks\.mlp\.down\.kernel", P(None, TENSOR, WEIGHTS)),
    (r"(blocks\.(attn|mlp)_norm|final_norm)\.scale", P()),
)
VAE: Table = ((r".*", P()),)  # 0.2 B parameters; its activations are what is large

# Activations, at the points where models say so.
TOKENS = P(BATCH, CONTEXT)  # (b l d), and (b l anything)
HEADS = P(BATCH, CONTEXT, TENSOR)  # (b l k m)
HIDDEN = P(BATCH, CONTEXT, TENSOR)  # (b l f)
SAMPLES = P(BATCH)  # (b ...)
FRAMES = P(BATCH, None, CONTEXT, TENSOR)  # (b f h w c): a VAE's frames, cut into rows and columns of tiles


def spec_of(path: str, table: Table) -> PartitionSpec:
    """The partition of one parameter.

    Raises:
        ValueError: no row of the table matches, or several do.
    """
    rows = [spec for pattern, spec in table if re.fullmatch(pattern, path)]
    if len(rows) != 1:
        raise ValueError(f"parameter {path} matches {len(rows)} rows of the sharding table, not one")
    return rows[0]


def fit(spec: PartitionSpec, shape: Sequence[int], mesh: Mesh | AbstractMesh) -> PartitionSpec:
    """`spec` without the mesh axes that do not divide the array (the sizes of small models need not be multiples)."""
    return P(*(_dividing(entry, size, mesh) for entry, size in zip(spec, shape, strict=False)))


def _dividing(entry, size: int, mesh) -> tuple[str, ...] | None:
    kept = []
    for axis in (entry,) if isinstance(entry, str) else entry or ():
        if size % mesh.shape[axis] == 0:
            kept.append(axis)
            size //= mesh.shape[axis]
    return tuple(kept) or None


def parameter_shardings(params, mesh: Mesh, table: Table):
    """The sharding of every leaf of a (possibly abstract) parameter state, or of anything that mirrors one.

    Leaves outside of it, counters and keys, which are scalars, are replicated.
    """

    def place(path: Sequence[Any], leaf):
        if leaf.ndim == 0:
            return NamedSharding(mesh, P())
        return NamedSharding(mesh, fit(spec_of(name_of(path), table), leaf.shape, mesh))

    return jax.tree_util.tree_map_with_path(place, params)


def name_of(path) -> str:
    """The path of a parameter, without what holds it (`opt_state[1].mu`) and without the variable's `.value`."""
    keys = [getattr(entry, "key", None) for entry in path]
    return ".".join(str(key) for key in keys if isinstance(key, str))


def constrain(x: Array, spec: PartitionSpec) -> Array:
    """Says where an activation lies, on the mesh of `jax.set_mesh`; outside of one, `x` as it is."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return x
    return jax.lax.with_sharding_constraint(x, fit(spec, x.shape, mesh))


def placed(abstract, shardings):
    """Shapes and dtypes together with where they are to lie."""
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), abstract, shardings)


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, P())
