"""Sizes of a mesh: requested, chosen, impossible."""

import itertools
import math

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from mask2dit_jax.errors import UserError
from mask2dit_jax.parallel.abstract import count_in_words
from mask2dit_jax.parallel.chips import parse_topology
from mask2dit_jax.parallel.mesh import (
    AXES,
    check_batch,
    check_tokens,
    choose_sizes,
    describe_mesh,
    make_mesh,
    sizes_for_any_length,
)


def sizes(num_devices, batch, num_slices=1, **asked):
    return tuple(choose_sizes(asked, num_devices, num_slices, batch).values())


@pytest.mark.parametrize(
    ("num_devices", "batch", "chosen"),
    [(1, 8, (1, 1, 1, 1)), (4, 8, (1, 4, 1, 1)), (16, 8, (1, 8, 2, 1)), (64, 8, (1, 8, 8, 1)), (8, 6, (1, 2, 4, 1))],
)
def test_samples_first_then_tokens(num_devices, batch, chosen):
    assert sizes(num_devices, batch) == chosen


def test_what_is_asked_for_stays():
    assert sizes(64, 16, context=4) == (1, 16, 4, 1)
    assert sizes(64, 8, tensor=2) == (1, 8, 4, 2)
    assert sizes(8, 3, data=1, fsdp=2, context=2, tensor=2) == (1, 2, 2, 2)


@pytest.mark.parametrize("num_devices", [1, 4, 8])
def test_stories_whose_scenes_have_any_length_divide(num_devices):
    """A text has 226 tokens and a latent frame 1350; 13, 12 and 12 frames would not divide over four devices."""
    chosen = sizes_for_any_length({}, num_devices, 2, (226, 1350), 48)
    assert math.prod(chosen.values()) == num_devices
    for frames in itertools.product(range(1, 14), repeat=3):
        assert (3 * 226 + sum(frames) * 1350) % chosen["context"] == 0
    assert sizes_for_any_length({"context": 4}, 8, 2, (226, 1350), 48)["context"] == 4  # as asked for


def test_slices_are_joined_along_data():
    assert sizes(32, 8, num_slices=2) == (2, 4, 4, 1)
    mesh = make_mesh({}, parse_topology("v5e:2x2", num_slices=2).devices(), batch_size=8)
    assert dict(mesh.shape) == {"data": 2, "fsdp": 4, "context": 1, "tensor": 1}
    by_slice = [{device.slice_index for device in part.flat} for part in mesh.devices]
    assert by_slice in ([{0}, {1}], [{1}, {0}])


def test_all_devices_of_this_process():
    mesh = make_mesh({"fsdp": 2, "context": 2}, jax.devices()[:4])
    assert mesh.axis_names == AXES
    assert mesh.devices.shape == (1, 2, 2, 1)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"fsdp": 3}, "does not fit 8 devices; set --config.mesh.AXIS"),
        ({"fsdp": -1}, "fsdp=-1, .* at least 1, or 0"),
        ({"model": 2}, "a mesh has no axis 'model'"),
        ({"fsdp": 2, "context": 2}, "does not fit 8 devices"),
    ],
)
def test_sizes_that_cannot_be(asked, message):
    with pytest.raises(UserError, match=message):
        sizes(8, 8, **({"data": 1, "tensor": 1} | asked)) if len(asked) > 1 else sizes(8, 8, **asked)


def test_slices_that_data_does_not_split_over():
    devices = parse_topology("v5e:2x2", num_slices=2).devices()
    with pytest.raises(UserError, match=r"mesh.data=1 does not split over 2 slices"):
        make_mesh({"data": 1, "fsdp": 8}, devices)


def test_batches_and_tokens_that_do_not_divide():
    mesh = make_mesh({"data": 2, "fsdp": 2, "context": 2})
    check_batch(8, mesh)
    check_tokens(10, mesh)
    with pytest.raises(UserError, match=r"global_batch_size=6 .* mesh.data x mesh.fsdp = 4; use a multiple of 4"):
        check_batch(6, mesh)
    with pytest.raises(UserError, match=r"the 9 tokens of a sample do not divide over mesh.context=2"):
        check_tokens(9, mesh)


def test_a_mesh_in_words():
    assert describe_mesh(make_mesh({"fsdp": 2}, jax.devices()[:4])) == "4 x cpu, mesh fsdp=2, context=2"
    assert describe_mesh(make_mesh(devices=jax.devices()[:1])) == "1 x cpu"


@pytest.mark.parametrize(("count", "words"), [(512, "512"), (1728, "1.73 K"), (1_700_000, "1.7 M"), (5 * 10**9, "5 B")])
def test_a_number_of_parameters_in_words(count, words):
    assert count_in_words(nnx.State({"kernel": jax.ShapeDtypeStruct((count,), jnp.float32)})) == words
