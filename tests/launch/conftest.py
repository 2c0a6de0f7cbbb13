"""A checkout of its own with the real scripts, and a cloud that lives in a folder."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

LAUNCH = Path(__file__).parents[2] / "launch"
PATIENCE = 600  # seconds, hundreds of times what anything here takes
SETTINGS = {
    **{"PROJECT": "my-project", "ZONE": "us-west4-a", "NAME": "pod", "BUCKET": "gs://bucket/runs"},
    **{"ACCELERATOR": "v5litepod-16", "RUNTIME_VERSION": "v2-alpha-tpuv5-lite"},
    **{"POLL": "0.1", "PASS_ENV": "RESTART_DELAY UPLOAD_EVERY", "RESTART_DELAY": "0", "UPLOAD_EVERY": "1"},
}


@dataclasses.dataclass(frozen=True)
class Cloud:
    folder: Path
    checkout: Path

    def run(self, script: str, *arguments: str, **settings: str) -> subprocess.CompletedProcess:
        """Runs launch/SCRIPT with the settings above, other values for some of them."""
        environment = {
            **{"PATH": f"{self.folder / 'bin'}:{os.environ['PATH']}", "HOME": str(self.folder / "home")},
            **{"STAND_IN": str(self.folder), **SETTINGS, **settings},
        }
        command = [str(self.checkout / "launch" / script), *arguments]
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=PATIENCE)

    def succeed(self, script: str, *arguments: str, **settings: str) -> str:
        finished = self.run(script, *arguments, **settings)
        assert finished.returncode == 0, finished.stderr
        return finished.stdout

    def fail(self, script: str, *arguments: str, **settings: str) -> str:
        """The line that tells a user what is wrong: the only one that starts with "error"."""
        finished = self.run(script, *arguments, **settings)
        assert finished.returncode == 1, (finished.returncode, finished.stderr)
        (line,) = [line for line in finished.stderr.splitlines() if line.startswith("error: ")]
        return line

    def will(self, **plan: str) -> None:
        """What is to happen; see the stand-ins."""
        for name, words in plan.items():
            (self.folder / name).write_text(words)

    @property
    def calls(self) -> list[list[str]]:
        return _lines(self.folder / "calls")

    @property
    def commands(self) -> list[str]:
        """What was called of gcloud, without looking at states: "create", "delete", "ssh", "cp", ..."""
        names = [call[3] if call[0] == "compute" else call[1] for call in self.calls]
        return [name for name in names if name != "describe"]

    def runs(self, worker: int, kind: str = "runs") -> list[dict]:
        return _lines(self.folder / f"{kind}_{worker}")

    def stages(self, worker: int) -> list[str]:
        return [run["arguments"][1].removeprefix("mask2dit_jax.") for run in self.runs(worker)]

    def in_bucket(self, pattern: str) -> list[Path]:
        return sorted((self.folder / "bucket").glob(pattern))


def wait_for(condition: Callable[[], object]) -> None:
    """Return as soon as `condition` holds."""
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, "it does not happen"
        time.sleep(0.05)


def _lines(path: Path) -> list:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


@pytest.fixture(scope="session")
def checkout(tmp_path_factory) -> Path:
    """A repository with the real scripts, and stages that only exist."""
    folder = tmp_path_factory.mktemp("checkout")
    shutil.copytree(LAUNCH, folder / "launch", ignore=shutil.ignore_patterns("env"))
    for name in ("mask2dit_jax/train.py", "mask2dit_jax/self_check.py", "configs/sft.py"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("")
    git = ["git", "-C", str(folder), "-c", "user.name=test", "-c", "user.email=test@example.com"]
    for words in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "sources"]):
        subprocess.run([*git, *words], check=True, capture_output=True)
    # `git stash create` in install.sh makes a commit, too.
    for name in ("user.name", "user.email"):
        subprocess.run([*git, "config", name, "test@example.com"], check=True)
    return folder


@pytest.fixture
def cloud(tmp_path, checkout) -> Iterator[Cloud]:
    (tmp_path / "bin").mkdir()
    (tmp_path / "home").mkdir()
    tools = {"gcloud": "stand_in_gcloud.py", "uv": "stand_in_worker.py uv", "stage": "stand_in_worker.py stage"}
    for name, what in tools.items():
        tool = tmp_path / "bin" / name
        tool.write_text(f'#!/bin/sh\nexec {sys.executable} -S -E {Path(__file__).parent}/{what} "$@"\n')
        tool.chmod(0o755)
    cloud = Cloud(tmp_path, checkout)
    cloud.will(states="ACTIVE")
    yield cloud
    subprocess.run([tmp_path / "bin/gcloud", "compute", "tpus", "tpu-vm", "delete"], env={"STAND_IN": str(tmp_path)})
