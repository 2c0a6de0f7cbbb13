"""Several processes, each with a device of its own, take the same steps as one."""

import dataclasses
import socket
from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np
import pytest

from tests.mains.test_train import read

pytestmark = pytest.mark.slow


def train_together(commands, count: int, folder, flags, main="train") -> list:
    """Runs `main` in `count` processes at once; their output goes into folders of their own."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"

    def run(number: int):
        told = {"COORDINATOR_ADDRESS": address, "NUM_PROCESSES": str(count), "PROCESS_ID": str(number)}
        (folder / str(number)).mkdir(parents=True)
        return dataclasses.replace(commands, shared=folder / str(number))(main, *flags, **told)

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(run, range(count)))


def test_training(commands, dataset, pretrain_workdir, tmp_path):
    """Four on a mesh of two axes (two: test_kills.py). The cache is new: they also share the encoding of the clips."""
    count, fields = 4, {"mesh__fsdp": 2, "mesh__context": 2, "data__cache": tmp_path / "cache"}
    workdir = tmp_path / "run"
    flags = commands.train_flags("pretrain", workdir, dataset.csv, **fields)
    for finished in train_together(commands, count, tmp_path / "processes", flags):
        assert finished.code == 0, finished.stderr
    ours, alone = read(workdir, 2), read(pretrain_workdir, 2)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), ours["params"], alone["params"])
    assert len(list(workdir.glob("events*"))) == 1
    assert len(list((tmp_path / "cache").rglob("*.safetensors"))) == len(dataset.clips)
