"""Compares every mask in every implementation on meshes of 8 simulated devices with dense attention on one device.

This is a program of its own (`python -m tests.ops.attention_on_mesh`), because a process cannot change its number of
devices. It prints JSON: case -> largest difference of the output and of each of the three gradients.
"""

import functools
import json
import os
import sys

import jax
import numpy as np
from jax.sharding import Mesh

import tests.conftest  # noqa: F401  checks the jaxtyping signatures here too
from mask2dit_jax.layout import SceneLayout
from mask2dit_jax.ops.attention.api import IMPLEMENTATIONS, dense_attention
from mask2dit_jax.ops.attention.splash import splash_attention
from mask2dit_jax.ops.masks import PREDICATES
from mask2dit_jax.parallel.mesh import AXES
from tests.xla_flags import XLA_FLAGS

# 327 tokens, which divide over no mesh and fill no block.
LAYOUT = SceneLayout(frames=(2, 1, 3), grid=(5, 9), text_tokens=19)
HEADS = 4  # divide over a context of 2 or 4, but not of 8

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


def case_name(sizes, name: str, mask: str) -> str:
    return f"{'x'.join(map(str, sizes))}-{name}-{mask}"


CASES = [case_name(sizes, name, mask) for sizes, runs in RUNS.items() for name in runs for mask in PREDICATES]


def differences(mask: str) -> dict[str, list[float]]:
    shape = (2, LAYOUT.num_tokens, HEADS, 8)
    *inputs, weights = (jax.random.normal(key, shape) for key in jax.random.split(jax.random.key(0), 4))
    case = {"mask": mask, "layout": LAYOUT}
    wanted = output_and_gradients(functools.partial(dense_attention, **case), inputs, weights)
    out = {}
    for sizes, runs in RUNS.items():
        mesh = Mesh(np.array(jax.devices()[: np.prod(sizes)]).reshape(sizes), AXES)
        for name, attention in runs.items():
            with jax.set_mesh(mesh):
                got = output_and_gradients(functools.partial(attention, **case), inputs, weights)
            pairs = zip(got, wanted, strict=True)
            out[case_name(sizes, name, mask)] = [float(np.abs(a - b).max()) for a, b in pairs]
    return out


if __name__ == "__main__":
    # JAX reads this when it first asks for devices.
    os.environ["XLA_FLAGS"] = f"{XLA_FLAGS} --xla_force_host_platform_device_count=8"
    results = {}
    for each in PREDICATES:
        results |= differences(each)
    json.dump(results, sys.stdout)
