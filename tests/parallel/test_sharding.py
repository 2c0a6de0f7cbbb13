"""Sharding tables: every parameter has one row, large ones are sharded, and no change goes unnoticed."""

import json
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx
from jax.sharding import AbstractMesh
from jax.sharding import PartitionSpec as P

from mask2dit_jax.models.cogvideox import COGVIDEOX
from mask2dit_jax.models.dit import DiT, DiTConfig
from mask2dit_jax.models.t5 import T5, T5Config, T5Encoder
from mask2dit_jax.models.vae import COGVIDEOX_VAE, VAE, VAEConfig
from mask2dit_jax.parallel import sharding
from mask2dit_jax.parallel.mesh import AXES

SLICE = AbstractMesh((1, 8, 8, 1), AXES)  # what 5B trains on at 64 chips
MODELS = {"2b": DiTConfig.cogvideox_2b, "5b": DiTConfig.cogvideox_5b}
GOLDEN = Path(__file__).parent / "golden"


def abstract(kind, config) -> nnx.State:
    return nnx.state(nnx.eval_shape(lambda: kind(config, rngs=nnx.Rngs(0))))


def described(params, table, mesh) -> dict[str, list]:
    """Return {path: one entry for each axis}, with lists for several mesh axes, as JSON stores them."""
    specs = jax.tree_util.tree_map_with_path(
        lambda path, x: sharding.fit(sharding.spec_of(sharding.name_of(path), table), x.shape, mesh), params
    )
    leaves = jax.tree_util.tree_leaves_with_path(specs, is_leaf=lambda x: isinstance(x, P))
    return {sharding.name_of(path): json.loads(json.dumps(tuple(spec))) for path, spec in leaves}


@pytest.mark.parametrize("size", MODELS)
def test_every_parameter_lies_where_it_lay(size):
    """If this fails and the change is intended, the new golden file is what `described` returns."""
    found = described(abstract(DiT, MODELS[size]()), COGVIDEOX.sharding_table, SLICE)
    assert found == json.loads((GOLDEN / f"sharding_{size}.json").read_text())


@pytest.mark.parametrize("size", MODELS)
def test_no_chip_holds_a_large_parameter_whole(size):
    mesh = AbstractMesh((1, 8, 4, 2), AXES)
    params = abstract(DiT, MODELS[size]())
    specs = described(params, COGVIDEOX.sharding_table, mesh)
    whole = total = 0
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        entries = specs[sharding.name_of(path)]
        axes = [axis for entry in entries for axis in ([entry] if isinstance(entry, str) else entry or ())]
        share = leaf.size / math.prod(mesh.shape[axis] for axis in axes)
        whole, total = whole + share, total + leaf.size
    assert whole < 1.05 * total / mesh.size


@pytest.mark.parametrize(
    ("kind", "config", "table"),
    [(T5Encoder, T5Config.xxl(), T5.sharding_table), (VAE, VAEConfig(), COGVIDEOX_VAE.sharding_table)],
)
def test_encoders_have_their_rows(kind, config, table):
    specs = described(abstract(kind, config), table, SLICE)
    sharded = [path for path, spec in specs.items() if any(spec)]
    assert ("blocks.mlp.up.kernel" in sharded) == (kind is T5Encoder)


def test_optimiser_state_follows_its_parameters():
    params = abstract(DiT, DiTConfig(2, 16, 1))
    state = jax.eval_shape(optax.adamw(1e-3).init, params)
    mesh = jax.make_mesh((1, 2, 2, 1), AXES, axis_types=(jax.sharding.AxisType.Auto,) * 4)
    ours = sharding.parameter_shardings(params, mesh, COGVIDEOX.sharding_table)
    theirs = sharding.parameter_shardings(state, mesh, COGVIDEOX.sharding_table)
    assert theirs[0].mu == theirs[0].nu == ours
    assert theirs[0].count.spec == P()


@pytest.mark.parametrize(("table", "count"), [([], 0), ([("a.*", P()), (".*b", P())], 2)])
def test_a_parameter_with_no_row_or_several(table, count):
    with pytest.raises(ValueError, match=f"parameter a.b matches {count} rows"):
        sharding.spec_of("a.b", table)


def test_axes_that_do_not_divide_are_left_out():
    mesh = AbstractMesh((1, 4, 6, 2), AXES)
    spec = P(("fsdp", "context"), "tensor")
    assert sharding.fit(spec, (24, 3), mesh) == P(("fsdp", "context"), None)
    assert sharding.fit(spec, (12, 2), mesh) == P(("fsdp",), ("tensor",))
    assert sharding.fit(spec, (6, 2), mesh) == P(("context",), ("tensor",))


def test_without_a_mesh_activations_stay_as_they_are():
    x = jnp.ones((3, 5))
    assert sharding.constrain(x, sharding.TOKENS) is x
