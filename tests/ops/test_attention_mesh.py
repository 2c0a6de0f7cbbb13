"""Every mask in every implementation, on meshes of 8 simulated devices, equals dense attention on one."""

import functools

import jax
import numpy as np
import pytest
from jax.sharding import Mesh

from mask2dit_jax.layout import SceneLayout
from mask2dit_jax.ops.attention.api import IMPLEMENTATIONS, dense_attention
from mask2dit_jax.ops.attention.splash import splash_attention
from mask2dit_jax.ops.masks import PREDICATES
from mask2dit_jax.parallel.mesh import AXES

pytestmark = pytest.mark.slow

# 327 tokens: they divide over no mesh and fill no block.
LAYOUT = SceneLayout(frames=(2, 1, 3), grid=(5, 9), text_tokens=19)
HEADS = 4  # divide over a context of 2 and 4, not of 8

OTHERS = {name: attention for name, attention in IMPLEMENTATIONS.items() if name != "splash"}
ULYSSES, GATHER = ({way: functools.partial(splash_attention, way=way)} for way in ("ulysses", "gather"))
RUNS = {  # data, fsdp, context, tensor
    (1, 1, 8, 1): IMPLEMENTATIONS,
    (2, 1, 2, 2): OTHERS | ULYSSES,
    (1, 2, 4, 1): ULYSSES | GATHER,
}


def output_and_gradients(attention, inputs, weights):
    @jax.jit
    def run(*inputs):
        out, pull_back = jax.vjp(attention, *inputs)
        return out, *pull_back(weights)

    return [np.asarray(x) for x in run(*inputs)]


CASES = [(sizes, name, mask) for sizes, runs in RUNS.items() for name in runs for mask in PREDICATES]


@functools.cache
def inputs_and_weights():
    shape = (2, LAYOUT.num_tokens, HEADS, 8)
    return tuple(np.asarray(jax.random.normal(key, shape)) for key in jax.random.split(jax.random.key(0), 4))


@functools.cache
def on_one_device(mask: str):
    *inputs, weights = inputs_and_weights()
    return output_and_gradients(functools.partial(dense_attention, mask=mask, layout=LAYOUT), inputs, weights)


@pytest.mark.parametrize(
    ("sizes", "name", "mask"), CASES, ids=["-".join(["x".join(map(str, sizes)), *words]) for sizes, *words in CASES]
)
def test_equals_one_device(sizes, name, mask):
    *inputs, weights = inputs_and_weights()
    mesh = Mesh(np.array(jax.devices()[: np.prod(sizes)]).reshape(sizes), AXES)
    with jax.set_mesh(mesh):
        attention = functools.partial(RUNS[sizes][name], mask=mask, layout=LAYOUT)
        found = output_and_gradients(attention, inputs, weights)
    output, *gradients = (np.abs(a - b).max() for a, b in zip(found, on_one_device(mask), strict=True))
    assert output < 2e-6
    assert max(gradients) < 3e-6
