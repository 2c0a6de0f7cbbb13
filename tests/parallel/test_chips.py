import subprocess
import sys

import pytest

from mask2dit_jax.errors import UserError
from mask2dit_jax.parallel.chips import CHIPS, Topology, parse_topology


@pytest.mark.parametrize(
    ("name", "same_as", "num_chips"),
    [
        ("v5e-16", "v5e:4x4", 16),
        ("v5e-64", "v5e:8x8", 64),
        ("v5e-256", "v5e:16x16", 256),
        ("v6e-64", "v6e:8x8", 64),
        ("v5p-8", "v5p:2x2x1", 4),
        ("v5p-32", "v5p:2x2x4", 16),
        ("v5p-128", "v5p:4x4x4", 64),
        ("v4-8", "v4:2x2x1", 4),
    ],
)
def test_product_names_are_topologies(name, same_as, num_chips):
    topology = parse_topology(name)
    assert topology == parse_topology(same_as)
    assert topology.name == same_as
    assert topology.num_chips == num_chips
    assert len(topology.devices()) == num_chips
    assert max(device.coords for device in topology.devices())[: len(topology.shape)] == [n - 1 for n in topology.shape]


@pytest.mark.parametrize(
    "name", ["v5x:4x4", "v5e", "v5e:4x4x4", "v5p:4x4", "v5e-17", "v5p-7", "v5e:0x4", "v5e:64x64", "v5p:", "h100-8"]
)
def test_unknown_names_list_what_exists(name):
    with pytest.raises(UserError, match=r"v5e-\{.*16,.*64.*v5p-\{8,.*v6e-"):
        parse_topology(name)


def test_rings_and_lines():
    assert not any(parse_topology("v5e:8x8").wraps(dim) for dim in range(2))
    assert [parse_topology("v5e:8x16").wraps(dim) for dim in range(2)] == [False, True]
    assert all(parse_topology("v5p:4x4x4").wraps(dim) for dim in range(3))
    # The closing links belong to whole cubes of 4 x 4 x 4.
    assert not any(parse_topology("v5p:2x2x4").wraps(dim) for dim in range(3))


def test_several_slices():
    topology = parse_topology("v5e:2x2", num_slices=2)
    assert topology == Topology(CHIPS["v5e"], (2, 2), 2)
    assert topology.name == "2 x v5e:2x2"
    assert topology.num_chips == len(topology.devices()) == 8
    assert {device.slice_index for device in topology.devices()} == {0, 1}


def test_a_second_process_may_compile_at_the_same_time_and_nothing_is_printed():
    parse_topology("v5e:2x2").devices()  # this process holds libtpu now
    code = "from mask2dit_jax.parallel.chips import parse_topology; print(len(parse_topology('v5e:2x2').devices()))"
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert (other.stdout, other.stderr) == ("4\n", "")
