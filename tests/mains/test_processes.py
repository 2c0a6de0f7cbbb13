"""Several processes, each with a device of its own, take the same steps as one."""

import dataclasses
import os
import socket
import time
from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np
import pytest

from mask2dit_jax.data.latents import SceneRecords
from mask2dit_jax.io.run_hold import folder_held
from tests.mains.test_train import read

pytestmark = pytest.mark.slow


def train_together(commands, count: int, folder, flags, main="train", last=()) -> list:
    """Run `main` in `count` processes at once, each with a folder for its output.

    The last process gets the flags `last` as well.
    """
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"

    def run(number: int):
        told = {"COORDINATOR_ADDRESS": address, "NUM_PROCESSES": str(count), "PROCESS_ID": str(number)}
        (folder / str(number)).mkdir(parents=True)
        given = (*flags, *last) if number == count - 1 else flags
        return dataclasses.replace(commands, shared=folder / str(number))(main, *given, **told)

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(run, range(count)))


def test_four_processes_take_the_steps_of_one(commands, dataset, pretrain_workdir, tmp_path):
    """Four on a mesh of two axes (two: test_kills.py). The cache is new: they also share the encoding of the clips."""
    count, fields = 4, {"mesh__fsdp": 2, "mesh__context": 2, "data__cache": tmp_path / "cache"}
    workdir = tmp_path / "run"
    flags = commands.train_flags("pretrain", workdir, dataset.csv, **fields)
    for finished in train_together(commands, count, tmp_path / "processes", flags):
        assert finished.code == 0, finished.stderr
    ours, alone = read(workdir, 2), read(pretrain_workdir, 2)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), ours["params"], alone["params"])
    assert len(list(workdir.glob("events*"))) == 1
    (latents,) = (path for path in (tmp_path / "cache").iterdir() if path.is_dir())
    assert len(SceneRecords(latents).clips) == len(list(latents.glob("*array_record*"))) == len(dataset.clips)


@pytest.mark.parametrize("count", [1, 2])
def test_a_second_run_in_a_workdir_ends_with_one_line(commands, dataset, tmp_path, count):
    """In all of its processes; it writes nothing there, and may start when the first one is gone."""
    workdir = tmp_path / "run"
    flags = commands.train_flags("pretrain", workdir, dataset.csv, num_steps=1, seed=7)
    with folder_held(workdir):
        for finished in train_together(commands, count, tmp_path / "second", flags):
            assert finished.code == 1
            here = f"process {os.getpid()} on {socket.gethostname()}"
            assert finished.stderr.splitlines()[-1].startswith(f"error: {workdir} is in use by {here} since")
        assert [path.name for path in workdir.iterdir()] == [".lock"]
    for finished in train_together(commands, count, tmp_path / "third", flags):
        assert finished.code == 0, finished.stderr


def test_one_that_fails_alone_ends_at_once_and_says_why(commands, dataset, tmp_path):
    """On its way out JAX would wait five minutes for the other, which waits for it."""
    flags = commands.train_flags("pretrain", tmp_path / "run", dataset.csv, mesh__fsdp=2)
    folder = tmp_path / "processes"
    other, failed = train_together(commands, 2, folder, flags, last=["--config.data.path=nowhere.csv"])
    end = time.time()
    assert failed.code == 1
    assert failed.stderr.splitlines()[-1].startswith("error: nowhere.csv")
    assert other.code != 0
    said_why = (folder / "1" / "stderr").stat().st_mtime
    assert end - said_why < 250  # counted from there, as a busy machine takes long to start
