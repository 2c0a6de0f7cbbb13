"""Tests that attention on a mesh equals attention on one device, forward and backward."""

import json
import subprocess
import sys

import pytest

from tests.ops.attention_on_mesh import CASES

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def differences() -> dict[str, list[float]]:
    command = [sys.executable, "-m", "tests.ops.attention_on_mesh"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


@pytest.mark.parametrize("case", CASES)
def test_equals_one_device(case, differences):
    output, *gradients = differences[case]
    assert output < 2e-6
    assert max(gradients) < 3e-6
