"""Tests every mask in every implementation: its Jacobian, its values and gradients, and the size of its arrays."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.ad_checkpoint import print_saved_residuals
from jax.extend.core import jaxprs_in_params

from mask2dit_jax.errors import UserError
from mask2dit_jax.layout import SceneLayout
from mask2dit_jax.ops.attention import grouped
from mask2dit_jax.ops.attention.api import IMPLEMENTATIONS, attend
from mask2dit_jax.ops.attention.residuals import RESIDUALS
from mask2dit_jax.ops.masks import PREDICATES, dense_mask

EQUAL = SceneLayout(frames=(2, 2), grid=(1, 2), text_tokens=2)
UNEQUAL = SceneLayout(frames=(2, 1, 3), grid=(1, 2), text_tokens=2)
ONE_SCENE = SceneLayout(frames=(2,), grid=(2, 2), text_tokens=3)
LAYOUTS = [
    pytest.param(EQUAL, id="equal", marks=pytest.mark.slow),  # what holds for unequal scenes holds for equal ones
    pytest.param(UNEQUAL, id="unequal"),
    pytest.param(ONE_SCENE, id="one"),
]


def make_attend(mask, layout, implementation):
    return jax.jit(functools.partial(attend, mask=mask, layout=layout, implementation=implementation))


def random_qkv(layout, heads=2, dim=4, batch=1, seed=0):
    keys = jax.random.split(jax.random.key(seed), 3)
    return tuple(jax.random.normal(k, (batch, layout.num_tokens, heads, dim)) for k in keys)


def masked_softmax(q, k, v, allowed):
    """Compute attention by its definition, in NumPy."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    logits = np.einsum("bqkm,blkm->bkql", q, k) / np.sqrt(q.shape[-1])
    weights = np.where(allowed, np.exp(logits - logits.max(-1, keepdims=True)), 0)
    return np.einsum("bkql,blkm->bqkm", weights / weights.sum(-1, keepdims=True), v)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("mask", PREDICATES)
def test_equals_the_definition_and_its_jacobian_is_zero_exactly_where_the_mask_forbids(mask, implementation, layout):
    q, k, v = random_qkv(layout)
    run = functools.partial(attend, mask=mask, layout=layout, implementation=implementation)
    allowed = dense_mask(mask, layout)

    @jax.jit
    def output_and_influence(q, k, v):
        """Return the output, and the influence of the keys and of the values, query token x token."""
        jacobians = jax.jacrev(lambda *args: run(*args)[0], argnums=(1, 2))(q, k, v)
        return run(q, k, v), *(jnp.abs(jacobian[:, :, :, 0]).max(axis=(1, 2, 4, 5)) for jacobian in jacobians)

    out, keys, values = map(np.asarray, output_and_influence(q, k, v))
    np.testing.assert_allclose(out, masked_softmax(q, k, v, allowed), atol=2e-6)
    np.testing.assert_array_equal(values != 0, allowed)
    assert not keys[~allowed].any()
    if (allowed.sum(axis=1) > 1).all():  # a single key always has weight 1
        assert keys[allowed].all()


def gradients(mask, layout, implementation):
    q, k, v = random_qkv(layout)
    weights = random_qkv(layout, seed=1)[0]
    run = functools.partial(attend, mask=mask, layout=layout, implementation=implementation)
    return jax.jit(jax.grad(lambda *args: (run(*args) * weights).sum(), argnums=(0, 1, 2)))(q, k, v)


@functools.cache
def dense_gradients(mask):
    return gradients(mask, UNEQUAL, "dense")


@pytest.mark.parametrize("implementation", [name for name in IMPLEMENTATIONS if name != "dense"])
@pytest.mark.parametrize("mask", PREDICATES)
def test_gradients_agree(mask, implementation):
    for got, want in zip(gradients(mask, UNEQUAL, implementation), dense_gradients(mask), strict=True):
        np.testing.assert_allclose(got, want, atol=5e-6)


def test_a_policy_that_keeps_attention_keeps_what_the_backward_kernels_need(capsys):
    """Without the output and the log-sum-exp, the backward pass would run the forward kernel again."""
    keep = jax.checkpoint_policies.save_only_these_names(RESIDUALS)
    run = functools.partial(attend, mask="v2", layout=UNEQUAL, implementation="cudnn")
    print_saved_residuals(jax.checkpoint(lambda q: run(2 * q, 3 * q, 4 * q).sum(), policy=keep), random_qkv(UNEQUAL)[0])
    named = [line for line in capsys.readouterr().out.splitlines() if f"named '{RESIDUALS}'" in line]
    assert len(named) == 2


@pytest.mark.parametrize("mask", PREDICATES)
def test_blocks_of_queries_change_nothing(mask, monkeypatch):
    monkeypatch.setattr(grouped, "QUERY_BLOCK", 3)
    q, k, v = random_qkv(UNEQUAL, batch=2)
    out = make_attend(mask, UNEQUAL, "grouped")(q, k, v)
    np.testing.assert_allclose(out, masked_softmax(q, k, v, dense_mask(mask, UNEQUAL)), atol=2e-6)
    for got, want in zip(gradients(mask, UNEQUAL, "grouped"), dense_gradients(mask), strict=True):
        np.testing.assert_allclose(got, want, atol=5e-6)


@pytest.mark.parametrize("mask", PREDICATES)
def test_off_the_cpu_all_heads_go_together(mask, monkeypatch):
    monkeypatch.setattr(grouped, "platform", lambda: "gpu")
    q, k, v = random_qkv(UNEQUAL, batch=2)
    out = make_attend(mask, UNEQUAL, "grouped")(q, k, v)
    np.testing.assert_allclose(out, masked_softmax(q, k, v, dense_mask(mask, UNEQUAL)), atol=2e-6)
    for got, want in zip(gradients(mask, UNEQUAL, "grouped"), dense_gradients(mask), strict=True):
        np.testing.assert_allclose(got, want, atol=5e-6)


def largest_token_pair_array(jaxpr, tokens: int) -> int:
    """Return the size of the largest array in the program or in a program nested in it."""
    most = 0
    for equation in jaxpr.eqns:
        for inner in jaxprs_in_params(equation.params):
            most = max(most, largest_token_pair_array(inner, tokens))
        for variable in equation.outvars:
            most = max(most, int(np.prod(variable.aval.shape)))
    return most


@pytest.mark.parametrize("mask", PREDICATES)
def test_grouped_attention_never_holds_a_square_array(mask):
    layout = SceneLayout(frames=(8, 8, 8), grid=(16, 16), text_tokens=32)
    tokens = layout.num_tokens
    shape = jax.ShapeDtypeStruct((1, tokens, 1, 16), jnp.float32)
    run = functools.partial(attend, mask=mask, layout=layout, implementation="grouped")
    jaxpr = jax.make_jaxpr(jax.grad(lambda *args: run(*args).sum(), argnums=(0, 1, 2)))(shape, shape, shape)
    assert largest_token_pair_array(jaxpr.jaxpr, tokens) <= grouped.QUERY_BLOCK * tokens
    dense = jax.make_jaxpr(functools.partial(attend, mask=mask, layout=layout, implementation="dense"))
    assert largest_token_pair_array(dense(shape, shape, shape).jaxpr, tokens) >= tokens**2


def test_unknown_implementation_names_the_choices():
    with pytest.raises(UserError, match="attention 'flash' does not exist; choose one of auto, dense, grouped"):
        attend(*random_qkv(EQUAL), mask="v2", layout=EQUAL, implementation="flash")
