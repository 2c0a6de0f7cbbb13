"""LoRA: small matrices beside frozen ones, x W + alpha / rank (x A) B (Hu et al. 2021). B starts at zero: no change."""

import functools

import jax
import jax.numpy as jnp
from flax import nnx

from mask2dit_jax.axes import Floats
from mask2dit_jax.config import LoRAConfig

NAMES = ("lora_a", "lora_b")
PATTERN = r".*\.lora_[ab]"  # the paths of all adapters


class AdaptedLinear(nnx.Linear):
    """A linear layer, with an adapter if `lora` is given."""

    def __init__(self, in_features: int, out_features: int, *, lora: LoRAConfig | None, rngs: nnx.Rngs, **kwargs):
        super().__init__(in_features, out_features, rngs=rngs, **kwargs)
        self.lora = lora
        if lora:
            init, dtype = nnx.initializers.lecun_normal(), self.param_dtype
            self.lora_a = nnx.Param(init(rngs.params(), (in_features, lora.rank), dtype))
            self.lora_b = nnx.Param(jnp.zeros((lora.rank, out_features), dtype))

    def __call__(self, x: Floats["... i"]) -> Floats["... o"]:
        out = super().__call__(x)
        if self.lora is None:
            return out
        x, a, b = (value.astype(out.dtype) for value in (x, self.lora_a.get_value(), self.lora_b.get_value()))
        return out + (x @ a) @ b * self.lora.scale


def without_adapters(params: nnx.State) -> nnx.State:
    return nnx.split_state(params, _is_adapter, ...)[1]


def adapters_of(params: nnx.State) -> nnx.State:
    return nnx.split_state(params, _is_adapter, ...)[0]


def merge(params: nnx.State, lora: LoRAConfig) -> nnx.State:
    """Parameters of the plain model that computes the same: W + alpha / rank A B, in the dtype of W. Uses them up."""
    flat = dict(nnx.to_flat_state(params))
    merged = []
    for path, leaf in flat.items():
        if path[-1] in NAMES:
            continue
        if path[-1] == "kernel" and (*path[:-1], "lora_a") in flat:
            a, b = (flat[*path[:-1], name].get_value() for name in NAMES)
            leaf = leaf.copy(_added(leaf.get_value(), a, b, lora.scale))
        merged.append((path, leaf))
    return nnx.from_flat_state(merged)


@functools.partial(jax.jit, static_argnums=3, donate_argnums=0)
def _added(kernel: Floats["n i o"], a: Floats["n i r"], b: Floats["n r o"], scale: float) -> Floats["n i o"]:
    a, b = a.astype(jnp.float32), b.astype(jnp.float32)
    update = jnp.einsum("nir,nro->nio", a, b, precision="highest")
    return (kernel.astype(jnp.float32) + scale * update).astype(kernel.dtype)


def _is_adapter(path, _) -> bool:
    return path[-1] in NAMES
