"""Tests that splash attention compiles for TPUs (none is needed) and that no array in it is tokens by tokens."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mask2dit_jax.layout import SceneLayout
from mask2dit_jax.ops.attention.api import attend
from mask2dit_jax.ops.attention.splash import splash_attention
from mask2dit_jax.parallel.chips import parse_topology
from mask2dit_jax.parallel.mesh import AXES, BATCH, CONTEXT, TENSOR

LAYOUT = SceneLayout(frames=(8, 8, 8), grid=(16, 16), text_tokens=32)


def compiled_hlo(attention, sizes, heads=4) -> str:
    mesh = Mesh(np.array(parse_topology("v5e:2x2").devices()).reshape(sizes), AXES)

    def run(q, k, v, weights):
        out, pull_back = jax.vjp(attention, q, k, v)
        return out, *pull_back(weights)

    with jax.set_mesh(mesh):
        sharding = NamedSharding(mesh, PartitionSpec(BATCH, CONTEXT, TENSOR))
        x = jax.ShapeDtypeStruct((1, LAYOUT.num_tokens, heads, 64), jnp.bfloat16, sharding=sharding)
        return jax.jit(run).trace(x, x, x, x).lower(lowering_platforms=("tpu",)).compile().as_text()


def largest_array(hlo: str) -> int:
    shapes = re.findall(r"\b(?:pred|[a-z]+\d+)\[([\d,]+)\]", hlo)
    return max(int(np.prod([int(n) for n in shape.split(",")])) for shape in shapes)


@pytest.mark.parametrize("way", ["ulysses", "gather"])
def test_no_array_is_tokens_by_tokens(way):
    run = functools.partial(splash_attention, mask="v2", layout=LAYOUT, way=way)
    hlo = compiled_hlo(run, (1, 1, 4, 1))
    assert all(f"splash_mha_{kernel}" in hlo for kernel in ("fwd", "dq", "dkv"))
    assert ("all-to-all" in hlo) == (way == "ulysses")
    assert largest_array(hlo) < LAYOUT.num_tokens**2 / 4


def test_auto_is_splash_where_the_mesh_is_of_tpus():
    assert "splash_mha_fwd" in compiled_hlo(functools.partial(attend, mask="v1", layout=LAYOUT), (1, 1, 2, 2))
