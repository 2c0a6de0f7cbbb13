"""Errors a user can act on: one line that names the thing and the remedy, no traceback."""

import contextlib
import difflib
import io
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from logging import ERROR, LogRecord
from pathlib import Path
from typing import Any, NoReturn

from absl import app, flags, logging
from tqdm import tqdm

_LAST_WORDS = 3.0  # seconds for the processes that fail as well to say why

INTERRUPTED = 128 + signal.SIGINT  # exit code after Ctrl-C, as of a process that the signal kills

_SHIPPED = Path(__file__).parents[1]  # the checkout, or where pip installs configs/ beside the package

_leave: Callable[[int], NoReturn] = sys.exit


class UserError(Exception):
    """Report bad input. The message is one line: what is wrong, with which thing, and what to do about it."""


def is_no_answer(error: BaseException) -> bool:
    """Return whether a bucket did not answer, or refused this account, in a way that gcsfs has no OSError for."""
    libraries = {kind.__module__.partition(".")[0] for kind in type(error).__mro__}
    return bool(libraries & {"gcsfs", "google", "aiohttp", "requests"})


def leave_at_once(*, is_first: bool) -> None:
    """Make every later failure end this process where it stands, because it is one of several.

    On its way out JAX would wait for the other processes, which wait for this one in a collective.

    Args:
        is_first: whether the others report to this process. When it ends, JAX aborts them with pages of C++, so it
            leaves them a moment to say what went wrong.
    """

    def leave(code: int) -> NoReturn:
        try:
            sys.stdout.flush()
            sys.stderr.flush()
            if is_first:
                time.sleep(_LAST_WORDS)
        finally:
            os._exit(code)

    global _leave
    _leave = leave


def run_main(main: Callable[[Sequence[str]], None]) -> None:
    """Run an absl main; bad input or a bad flag ends as one line on stderr and exit code 1.

    Ctrl-C ends as one line and exit code 130, unless the main has a handler of its own; a second one ends the process
    wherever it is.
    """
    with _late_answers_dropped(), _interrupts_heard():
        with contextlib.suppress(KeyboardInterrupt):
            app.run(_reporting(main), flags_parser=_parse_flags)  # ends with SystemExit
        # Here the exception and the frames it held are gone, so an open progress bar has ended its line.
        print("interrupted: whatever is complete is kept; start again to go on", file=sys.stderr)
        _leave(INTERRUPTED)


@contextlib.contextmanager
def _interrupts_heard() -> Iterator[None]:
    """Raise KeyboardInterrupt at a SIGINT, and end the process at the second one, even while it compiles.

    Python runs handlers in the main thread only, which may be in XLA for minutes. What a signal writes to a socket
    reaches another thread. A shell without job control starts its background jobs with SIGINT ignored, so that
    `kill -INT` would do nothing; here it is always heard.
    """
    reader, writer = socket.socketpair()
    writer.setblocking(False)

    def watch() -> None:
        count = 0
        while received := reader.recv(64):
            count += received.count(signal.SIGINT)
            if count > 1:
                os.write(2, b"\ninterrupted again: ended at once\n")  # print could wait for the main thread
                os._exit(INTERRUPTED)

    threading.Thread(target=watch, daemon=True).start()
    fd = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
        signal.set_wakeup_fd(fd)
        writer.close()


@contextlib.contextmanager
def _late_answers_dropped() -> Iterator[None]:
    """Drop dozens of tracebacks that Python would print when one array of a checkpoint cannot be written.

    Orbax then abandons the other arrays and closes their event loop, and offers no way to wait for them. The writes
    end later, in threads of tensorstore where nothing can catch an exception, so only this hook of the process can
    tell them from exceptions that matter. The main owns the process; no library code sets the hook.
    """
    hook = sys.unraisablehook

    def report(unraisable: Any) -> None:
        if str(unraisable.exc_value) != "Event loop is closed":  # asyncio has no type of its own for it
            hook(unraisable)

    sys.unraisablehook = report
    try:
        yield
    finally:
        sys.unraisablehook = hook


def _reporting(main: Callable[[Sequence[str]], None]) -> Callable[[Sequence[str]], None]:
    def wrapped(argv):
        _make_log_readable()
        try:
            main(argv)
            return
        except UserError as error:
            message = str(error)
        except Exception as error:
            if isinstance(error, ImportError) and "gcsfs" in str(error):
                message = 'a path in gs:// needs a package that is not installed; pip install -e ".[gcs]"'
            elif is_no_answer(error):
                message = f"the storage does not answer ({_one_line(error)[:200]}); start again when it does"
            elif _leave is sys.exit:
                raise
            else:
                traceback.print_exc()
                _leave(1)
        # Here the error and the frames it held are gone, so an open progress bar has ended its line.
        _die(message)

    return wrapped


def _make_log_readable() -> None:
    """Log to stderr what a user wants to read, around open progress bars.

    It stays so until the process ends: threads of Orbax log after the main has returned.
    """
    logging.set_verbosity(logging.INFO)
    handler = logging.get_absl_handler()
    handler.addFilter(_is_worth_reading)  # once, however often it is called
    handler.python_handler.setStream(_AboveProgressBars())


class _AboveProgressBars(io.TextIOBase):
    """Write to stderr without running into an open progress bar."""

    def write(self, text: str) -> int:
        tqdm.write(text, sys.stderr, end="")
        return len(text)


def _is_worth_reading(record: LogRecord) -> bool:
    """Drop what Orbax, TFDS and asyncio (for Orbax) log, except errors that no exception reports as well."""
    if not any(library in record.pathname for library in ("orbax", "tensorflow_datasets", "asyncio")):
        return True
    return record.levelno >= ERROR and not record.exc_info


def _parse_flags(argv: Sequence[str]) -> list[str]:
    argv = _with_shipped_config(argv)
    path = _config_path(argv)
    if path is not None:
        file = path.partition(":")[0]
        # ml_collections would report it when the config is first used, as a page of attempts.
        if not (file.endswith(".py") and Path(file).is_file()):
            _die(f"config file {file!r} does not exist or is no Python file; give one like configs/sft.py:tiny")
    try:
        return flags.FLAGS(argv)
    except (flags.Error, AttributeError, ImportError, LookupError, TypeError, ValueError) as error:
        _die(_unset_flags() or _wrong_config(path, argv) or str(error))


def _with_shipped_config(argv: Sequence[str]) -> list[str]:
    """Return the arguments with a --config that this folder does not have taken from beside the package.

    So `--config=configs/sft.py` works from any folder, and a file of that name in the user's folder comes first.
    """
    path = _config_path(argv)
    file = (path or "").partition(":")[0]
    if not file or Path(file).is_file() or not (_SHIPPED / file).is_file():
        return list(argv)
    if str(_SHIPPED) not in sys.path:
        sys.path.append(str(_SHIPPED))  # config files import each other as `configs.NAME`
    shipped = str(_SHIPPED / path)
    return [argument.removesuffix(path) + shipped if argument.endswith(path) else argument for argument in argv]


def _config_path(argv: Sequence[str]) -> str | None:
    """Return the value of --config, FILE or FILE:PRESET."""
    for argument, following in pairwise([*argv[1:], ""]):
        name, equals, value = argument.partition("=")
        if name in ("--config", "-config"):
            return value if equals else following
    return None


def _unset_flags() -> str | None:
    """Return what to say of required flags that are missing; absl looks for them when it has parsed all others."""
    if not flags.FLAGS.is_parsed():
        return None
    validators = [validator for name in flags.FLAGS for validator in flags.FLAGS[name].validators]
    # One for several flags asks for the first of them.
    unset = sorted({f"--{validator.get_flags_names()[0]}" for validator in validators if not _passes(validator)})
    return f"{' and '.join(unset)} must be given; --help says what for" if unset else None


def _passes(validator: Any) -> bool:
    try:
        validator.verify(flags.FLAGS)
    except flags.ValidationError:
        return False
    return True


def _wrong_config(path: str | None, argv: Sequence[str]) -> str | None:
    """Return what is wrong with the config or with a field set in it, if the main takes a config.

    ml_collections reports a field that does not exist as a KeyError, or an AttributeError, that names neither the
    argument nor its part in it, and an error inside the file as the text of its traceback. So the file is loaded again
    and the fields are looked up here.
    """
    if path is None or "config" not in flags.FLAGS:
        return None
    try:
        config = flags.FLAGS["config"].parser.parse(path)
    except ImportError as error:
        return f"the config cannot be read: {error}; start in the folder that holds configs/"
    except (TypeError, ValueError) as error:  # raised while the file's own error was handled
        return f"--config={path}: {error.__context__ or error}"
    except Exception as error:
        return f"the config cannot be read: {error}; give a file like configs/sft.py:tiny"
    given = pairwise([*argv[1:], ""])
    return next(filter(None, (_wrong_field(config, *pair) for pair in given)), None)


def _wrong_field(config: Any, argument: str, following: str) -> str | None:
    """Return what is wrong with an argument that sets a field, --config.FIELD=VALUE or --config.FIELD VALUE."""
    if not argument.lstrip("-").startswith("config."):
        return None
    name, equals, value = argument.lstrip("-").partition("=")
    _, *fields = name.split(".")
    for field in fields:
        known = list(config) if hasattr(config, "keys") else []
        if field not in known:
            similar = difflib.get_close_matches(field, known, n=1)
            remedy = f"did you mean {similar[0]!r}?" if similar else "the file of the config lists its fields"
            return f"{argument}: the config has no field {field!r}; {remedy}"
        config = config[field]
    if name in flags.FLAGS and (equals or not flags.FLAGS[name].boolean):
        try:
            flags.FLAGS[name].parser.parse(value if equals else following)
        except (TypeError, ValueError) as error:
            return f"{argument}: {error}; give a value of the type that the config has there"
    return None


def _one_line(error: object) -> str:
    return " ".join(str(error).split())


def _die(message: str) -> NoReturn:
    print(f"error: {_one_line(message)}", file=sys.stderr)
    _leave(1)
