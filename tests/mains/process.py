"""Run `python -m mask2dit_jax.MAIN ...` without importing JAX each time, which takes three seconds.

`run` forks a process of its own from a server that has imported JAX. `Shared` runs one main after another in a single
process, for the many command lines that are refused before they do anything.
"""

import atexit
import dataclasses
import multiprocessing
import multiprocessing.forkserver
import os
import runpy
import sys
import traceback
from pathlib import Path

from absl import app, flags
from absl.testing import flagsaver

ROOT = Path(__file__).parents[2]
_PATIENCE = 1800  # seconds, many times what any main here takes
_SERVER = multiprocessing.get_context("forkserver")
_IMPORTED = (
    *("mask2dit_jax.training_data", "mask2dit_jax.pretrained.transformer_source", "mask2dit_jax.curate.build_records"),
    *("mask2dit_jax.media.storyboard", "mask2dit_jax.curate.shot_dataset", "mask2dit_jax.sampling.engine"),
    *("mask2dit_jax.training.optimizer", "mask2dit_jax.parallel.mesh", "ml_collections.config_flags"),
    "mask2dit_jax.training.events",
)


@dataclasses.dataclass(frozen=True)
class Finished:
    code: int
    stdout: str
    stderr: str


def start_server() -> None:
    """Start the server; its processes keep the environment of this moment."""
    _SERVER.set_forkserver_preload(list(_IMPORTED))
    multiprocessing.forkserver.ensure_running()


def start(folder: Path, main: str, arguments: tuple[str, ...], environment: dict[str, str]):
    """Start a main in the repository's root; what it prints goes to `folder`/stdout and `folder`/stderr."""
    process = _SERVER.Process(target=_run, args=(main, arguments, environment, folder))
    process.start()
    return process


def finish(folder: Path, process) -> Finished:
    """Wait for a main that `start` started with the same folder."""
    process.join(timeout=_PATIENCE)
    assert process.exitcode is not None, f"what printed into {folder} does not end"
    return _finished(folder, process.exitcode)


def run(folder: Path, main: str, arguments: tuple[str, ...], environment: dict[str, str]) -> Finished:
    """Run a main in a process of its own and wait for its end."""
    return finish(folder, start(folder, main, arguments, environment))


class Shared:
    """A process that runs one main after another, each with fresh flags."""

    def __init__(self, folder: Path):
        """What the mains print goes to `folder`."""
        self._folder = folder
        self._process = None

    def run(self, main: str, arguments: tuple[str, ...]) -> Finished:
        """Run a main and wait for its end; an exception that it lets through counts as in a process of its own."""
        if self._process is None or not self._process.is_alive():
            self._connection, theirs = _SERVER.Pipe()
            self._process = _SERVER.Process(target=_serve, args=(theirs, self._folder))
            self._process.start()
            theirs.close()
        self._connection.send((main, arguments))
        assert self._connection.poll(_PATIENCE), f"{main} {' '.join(arguments)} does not end"
        try:
            code = self._connection.recv()
        except EOFError:  # the main has ended the whole process
            self._process.join()
            code = self._process.exitcode
        return _finished(self._folder, code)

    def close(self) -> None:
        """End the process, if there is one."""
        if self._process is not None:
            self._connection.close()
            self._process.join()


def _finished(folder: Path, code: int) -> Finished:
    return Finished(code, (folder / "stdout").read_text(), (folder / "stderr").read_text())


def _run(main: str, arguments: tuple[str, ...], environment: dict[str, str], folder: Path) -> None:
    _print_to(folder)
    os.environ.update(environment)
    try:
        _run_module(main, arguments)
    finally:  # multiprocessing leaves it out, and JAX waits there for the other processes
        atexit._run_exitfuncs()


def _serve(connection, folder: Path) -> None:
    app.define_help_flags()  # absl defines them once in a process
    while True:
        try:
            main, arguments = connection.recv()
        except EOFError:
            return
        flags.FLAGS.unparse_flags()
        _print_to(folder)
        with flagsaver.flagsaver():
            code = _exit_code(main, arguments)
        sys.stdout.flush()
        sys.stderr.flush()
        connection.send(code)


def _exit_code(main: str, arguments: tuple[str, ...]) -> int:
    try:
        _run_module(main, arguments)
    except SystemExit as end:
        if isinstance(end.code, int | None):
            return end.code or 0
        print(end.code, file=sys.stderr)  # as Python does
        return 1
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def _run_module(main: str, arguments: tuple[str, ...]) -> None:
    os.chdir(ROOT)
    sys.argv = [main, *arguments]
    runpy.run_module(f"mask2dit_jax.{main}", run_name="__main__", alter_sys=True)


def _print_to(folder: Path) -> None:
    for stream, name in ((1, "stdout"), (2, "stderr")):
        file = os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, stream)
        os.close(file)
