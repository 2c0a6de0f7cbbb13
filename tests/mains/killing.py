"""Runs of `train` that are killed and started again, in one process or in two.

    JAX_PLATFORMS=cpu python -m tests.mains.killing --processes=2 --kills=20

kills a tiny run at so many random moments, a third of them while a checkpoint is being written, starts it again each
time, and compares its last checkpoint bit for bit with that of a run that nothing disturbed. --signal=TERM or INT
tells it to stop instead. The suite takes fewer.
"""

import argparse
import contextlib
import os
import random
import signal
import socket
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from tests.mains import process
from tests.mains.conftest import Commands


class Job:
    """`train` in so many processes, each with what it prints in a folder of its own."""

    def __init__(self, folder: Path, count: int, flags: Sequence[object]):
        with socket.socket() as free:
            free.bind(("localhost", 0))
            address = f"localhost:{free.getsockname()[1]}"
        self._folders = [folder / str(number) for number in range(count)]
        self._processes = []
        for number, own in enumerate(self._folders):
            own.mkdir(parents=True, exist_ok=True)
            told = {"COORDINATOR_ADDRESS": address, "NUM_PROCESSES": str(count), "PROCESS_ID": str(number)}
            arguments = tuple(map(str, flags))
            self._processes.append(process.start(own, "train", arguments, told if count > 1 else {}))

    @property
    def is_running(self) -> bool:
        return all(p.exitcode is None for p in self._processes)

    def wait_until(self, happened: Callable[[], bool]) -> None:
        """Wait until it happened or the job has ended."""
        while self.is_running and not happened():
            time.sleep(0.001)

    def kill(self, sent: signal.Signals = signal.SIGKILL, only: int | None = None) -> None:
        for p in self._processes if only is None else [self._processes[only]]:
            if p.exitcode is None:
                os.kill(p.pid, sent)

    def finish(self) -> list[process.Finished]:
        return [process.finish(*pair) for pair in zip(self._folders, self._processes, strict=True)]


def steps(workdir: Path) -> list[int]:
    """Return the steps of the checkpoints that are complete."""
    found = workdir / "checkpoints"
    return sorted(int(path.name) for path in found.iterdir() if path.name.isdigit()) if found.exists() else []


def half_written(workdir: Path) -> set[tuple[str, int]]:
    """Return what is being saved, or was when a run was killed, each with the time it was last changed."""
    found = set()
    for path in (workdir / "checkpoints").glob("*orbax-checkpoint-tmp*"):
        with contextlib.suppress(FileNotFoundError):
            found.add((path.name, path.stat().st_ctime_ns))
    return found


def kill_again_and_again(
    start: Callable[[], Job], workdir: Path, kills: int, rng: random.Random, sent: signal.Signals = signal.SIGKILL
) -> list[str]:
    """Return what each kill met; the last start is left to run to its end."""
    met = []
    for number in range(kills):
        left, before = half_written(workdir), steps(workdir)
        job = start()

        def is_saving(left=left):
            return bool(half_written(workdir) - left)

        if number % 3 == 0:
            job.wait_until(is_saving)
            time.sleep(rng.uniform(0, 0.05))
        elif number % 3 == 1:
            job.wait_until(lambda before=before: steps(workdir) != before)
            time.sleep(rng.uniform(0, 0.5))
        else:
            time.sleep(rng.uniform(0, 6))
        state = "ended" if not job.is_running else "saving" if is_saving() else "not saving"
        job.kill(sent)
        codes = sorted(finished.code for finished in job.finish())  # 143, 130: SIGTERM, SIGINT
        met.append(f"{state}, {before} -> {steps(workdir)}, exit codes {codes}")
    for finished in start().finish():
        assert finished.code == 0, finished.stderr
    return met


def main():
    from tests.mains import conftest
    from tests.mains.test_train import assert_same, read

    parser = argparse.ArgumentParser()
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--signal", choices=("KILL", "TERM", "INT"), default="KILL")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name, pytest.MonkeyPatch.context() as environment:
        folder = Path(name)
        conftest.set_environment(environment, folder, folder / "compiled")
        commands = Commands(folder, folder / "compiled", process.Shared(folder))
        dataset = conftest.make_dataset(folder / "data")
        reference, killed = folder / "reference", folder / "killed"

        def start(workdir):
            fields = {"num_steps": given.steps, "checkpoint_every": 1, "ema_decay": 0.9}
            flags = commands.train_flags("pretrain", workdir, dataset.csv, **fields)
            return Job(folder / "printed" / workdir.name, given.processes, flags)

        for finished in start(reference).finish():
            assert finished.code == 0, finished.stderr
        sent = signal.Signals[f"SIG{given.signal}"]
        for line in kill_again_and_again(lambda: start(killed), killed, given.kills, random.Random(given.seed), sent):
            print(line, flush=True)
        assert_same(read(killed, given.steps), read(reference, given.steps))
        print(
            f"{given.kills} times {sent.name}, {given.processes} processes: step {given.steps} is bit for bit the same"
        )


if __name__ == "__main__":
    main()
