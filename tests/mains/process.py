"""`python -m mask2dit_jax.MAIN ...` in a process of its own, but forked from one that has imported JAX already.

Importing takes three seconds, most command lines in these tests fail a moment later, and there are dozens of them.
"""

import atexit
import dataclasses
import multiprocessing
import multiprocessing.forkserver
import os
import runpy
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
_SERVER = multiprocessing.get_context("forkserver")
_IMPORTED = (
    *(
        "mask2dit_jax.training.training_data",
        "mask2dit_jax.pretrained.transformer_source",
        "mask2dit_jax.curate.build_records",
    ),
    *("mask2dit_jax.media.storyboard", "mask2dit_jax.curate.shot_dataset", "mask2dit_jax.sampling.extension"),
    *("mask2dit_jax.training.optimizer", "mask2dit_jax.parallel.mesh", "ml_collections.config_flags"),
    "mask2dit_jax.training.events",
)


@dataclasses.dataclass(frozen=True)
class Finished:
    code: int
    stdout: str
    stderr: str


def start_server() -> None:
    """What the environment says now holds for every process."""
    _SERVER.set_forkserver_preload(list(_IMPORTED))
    multiprocessing.forkserver.ensure_running()


def start(folder: Path, main: str, arguments: tuple[str, ...], environment: dict[str, str]):
    """Starts a main in the repository's root; `folder` takes what it prints, as `stdout` and `stderr`."""
    process = _SERVER.Process(target=_run, args=(main, arguments, environment, folder / "stdout", folder / "stderr"))
    process.start()
    return process


def finish(folder: Path, process) -> Finished:
    process.join(timeout=900)
    assert process.exitcode is not None, f"what printed into {folder} does not end"
    return Finished(process.exitcode, (folder / "stdout").read_text(), (folder / "stderr").read_text())


def run(folder: Path, main: str, arguments: tuple[str, ...], environment: dict[str, str]) -> Finished:
    return finish(folder, start(folder, main, arguments, environment))


def _run(main, arguments, environment, out, err):
    for stream, path in ((1, out), (2, err)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream)
    os.environ.update(environment)
    os.chdir(ROOT)
    sys.argv = [main, *arguments]
    try:
        runpy.run_module(f"mask2dit_jax.{main}", run_name="__main__", alter_sys=True)
    finally:  # multiprocessing leaves it out, and JAX waits there for the other processes
        atexit._run_exitfuncs()
