"""Port tables are strict: anything that does not fit is an error that names the tensor."""

import jax
import numpy as np
import pytest
from flax import nnx

from mask2dit_jax.errors import UserError
from mask2dit_jax.models.port_rules import KEEP, Rule, export, flatten, plan, torch_key, unflatten
from tests.models.toy import TABLE, Toy, abstract_toy

SHAPES = {
    "embed.weight": (10, 6),
    **{f"blocks.{layer}.w.weight": (12, 6) for layer in range(3)},
    **{f"blocks.{layer}.w.bias": (12,) for layer in range(3)},
    "down.0.conv.weight": (4, 2, 3, 3),
    "down.1.conv.weight": (8, 4, 3, 3),
}


def plan_toy(shapes):
    return plan(TABLE, shapes, abstract_toy(), what="toy")


def test_every_key_finds_its_slot():
    slots = plan_toy(SHAPES)
    assert slots.keys() == SHAPES.keys()
    assert (slots["blocks.2.w.weight"].path, slots["blocks.2.w.weight"].layer) == ("blocks.kernel", 2)
    assert (slots["down.1.conv.weight"].path, slots["down.1.conv.weight"].layer) == ("down.1.kernel", None)


@pytest.mark.parametrize("key", SHAPES)
def test_a_missing_tensor_is_named(key):
    with pytest.raises(UserError, match=f"toy: tensor '{key}' is missing"):
        plan_toy({name: shape for name, shape in SHAPES.items() if name != key})


@pytest.mark.parametrize("key", ["extra", "blocks.x.w.weight", "blocks.0.w.weight.more", "down.0.conv.bias"])
def test_an_unknown_tensor_is_named(key):
    with pytest.raises(UserError, match=f"toy: tensor '{key}' is not one this model knows"):
        plan_toy(SHAPES | {key: (1,)})


def test_a_parameter_the_model_lacks_is_named():
    with pytest.raises(UserError, match=r"'down.2.conv.weight' would fill 'down.2.kernel'"):
        plan_toy(SHAPES | {"down.2.conv.weight": (8, 4, 3, 3)})


@pytest.mark.parametrize(
    ("key", "shape"),
    [("blocks.1.w.weight", (6, 12)), ("down.0.conv.weight", (2, 4, 3, 3)), ("down.0.conv.weight", (4, 2, 3))],
)
def test_a_wrong_shape_is_named(key, shape):
    with pytest.raises(UserError, match=f"toy: tensor '{key}' has shape"):
        plan_toy(SHAPES | {key: shape})


def test_a_wrong_number_of_layers_is_named():
    with pytest.raises(UserError, match=r"'blocks.3.w.bias' .* in 3 layers"):
        plan_toy(SHAPES | {"blocks.3.w.bias": (12,)})


@pytest.mark.parametrize("names", [("tied.weight",), ("embed.weight", "tied.weight"), ("tied.weight", "embed.weight")])
def test_one_tensor_under_several_names(names):
    shapes = {name: shape for name, shape in SHAPES.items() if name != "embed.weight"}
    slots = plan_toy(shapes | dict.fromkeys(names, (10, 6)))
    assert [key for key, slot in slots.items() if slot.path == "embed.embedding"] == [names[0]]


def test_two_tensors_for_one_parameter():
    table = (*TABLE, Rule("other.weight", "embed.embedding", KEEP))
    with pytest.raises(UserError, match=r"'embed.weight' and 'other.weight' are both meant for 'embed.embedding'"):
        plan(table, SHAPES | {"other.weight": (10, 6)}, abstract_toy())


def test_export_gives_every_tensor_back():
    tensors = {}
    for key, shape, read in export(TABLE, nnx.state(Toy())):
        tensors[key] = read()
        assert tensors[key].shape == shape
        assert tensors[key].flags.c_contiguous
    assert {key: tensor.shape for key, tensor in tensors.items()} == SHAPES
    kernel = np.asarray(Toy().blocks.kernel[...])
    np.testing.assert_array_equal(tensors["blocks.1.w.weight"], kernel[1].T)
    np.testing.assert_array_equal(
        tensors["down.0.conv.weight"][3, 1], np.asarray(Toy().down[0].kernel[...])[:, :, 1, 3]
    )


def test_flatten_and_back():
    state = nnx.state(Toy())
    again = unflatten(flatten(state), state)
    assert jax.tree.structure(again) == jax.tree.structure(state)
    assert jax.tree.all(jax.tree.map(lambda a, b: a is b, again, state))


def test_key_of_a_parameter():
    assert torch_key(TABLE, "blocks.bias", 2) == "blocks.2.w.bias"
    assert torch_key(TABLE, "down.1.kernel", None) == "down.1.conv.weight"
