"""Errors a user can act on: one line that names the thing and the remedy, no traceback."""

import io
import os
import re
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from itertools import pairwise
from logging import ERROR
from pathlib import Path
from typing import NoReturn

from absl import app, flags, logging
from tqdm import tqdm

_LAST_WORDS = 3.0  # seconds for the processes that fail as well to say why

_leave: Callable[[int], NoReturn] = sys.exit


class UserError(Exception):
    """Bad input. The message is one line: what is wrong, with which thing, and what to do about it."""


def is_no_answer(error: BaseException) -> bool:
    """Whether a bucket does not answer, or not to this account: what gcsfs has no OSError for."""
    libraries = {kind.__module__.partition(".")[0] for kind in type(error).__mro__}
    return bool(libraries & {"gcsfs", "google", "aiohttp", "requests"})


def leave_at_once(*, is_first: bool) -> None:
    """From now on a failure ends this process where it stands.

    It is one of several: on its way out JAX would wait for the others, which wait for this one in a collective. The
    first of them keeps their accounts; when it ends, JAX aborts the others with pages of C++.
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
    """Runs an absl main; bad input or a bad flag ends as one line on stderr and exit code 1."""
    try:
        app.run(_reporting(main), flags_parser=_parse_flags)
    except KeyboardInterrupt:
        _die("interrupted")


def _reporting(main):
    def wrapped(argv):
        logging.set_verbosity(logging.INFO)
        handler = logging.get_absl_handler()
        handler.addFilter(_is_worth_reading)
        handler.python_handler.setStream(_AboveProgressBars())
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
        # Out here the error and the frames it held are gone, so that an open progress bar has ended its line.
        _die(message)

    return wrapped


class _AboveProgressBars(io.TextIOBase):
    """stderr, where a line does not run into an open progress bar."""

    def write(self, text: str) -> int:
        tqdm.write(text, sys.stderr, end="")
        return len(text)


def _is_worth_reading(record) -> bool:
    """Orbax and TFDS tell of their inner life through absl too; of that, only errors are for the user, and not those
    that are raised as well: they come with a traceback."""
    if not any(library in record.pathname for library in ("orbax", "tensorflow_datasets")):
        return True
    return record.levelno >= ERROR and not record.exc_info


def _parse_flags(argv):
    _check_config_file(argv)
    try:
        return flags.FLAGS(argv)
    # ml_collections reports a field that the config lacks as KeyError, or as AttributeError of a KeyError; a value of a
    # wrong type as TypeError or ValueError.
    except (KeyError, AttributeError) as error:
        _die(_unknown_field(str(error), argv))
    except (flags.Error, TypeError, ValueError) as error:
        _die(_wrong_flag(str(error)))
    except ImportError as error:
        _die(f"the config cannot be read: {error}; start in the folder that holds configs/")


def _check_config_file(argv):
    """ml_collections reports a missing config file only when the config is first used, as a page of attempts."""
    for arg, following in pairwise([*argv[1:], ""]):
        name, equals, value = arg.partition("=")
        path = (value if equals else following).partition(":")[0]
        if name in ("--config", "-config") and not (path.endswith(".py") and Path(path).is_file()):
            _die(f"config file {path!r} does not exist or is no Python file; give one like configs/sft.py:tiny")


def _unknown_field(message: str, argv) -> str:
    """ml_collections names the field alone; the user knows it as a part of an argument."""
    field = (re.search(r"lookup: ([\w.]+)", message) or re.match(r"\W*(\w+)", message))[1]
    argument = next((arg for arg in argv if re.search(rf"\.{field}\b", arg.partition("=")[0])), None)
    if argument is None:
        return f"the config cannot be read: {message}; give a file like configs/sft.py:tiny"
    similar = re.search(r'Did you mean "(\w+)"', message)
    remedy = f"did you mean {similar[1]!r}?" if similar else "the file of the config lists its fields"
    return f"{argument}: the config has no field {field!r}; {remedy}"


def _wrong_flag(message: str) -> str:
    unset = re.findall(r"Flag (--\w+) must have a value other than None", message)
    if unset:
        return f"{' and '.join(sorted(unset))} must be given; --help says what for"
    # An error inside a config file comes with a page of traceback, its message last.
    flag, _, cause = message.partition(": Error whilst parsing config file:")
    if cause:
        return f"{flag}: {cause.strip().splitlines()[-1].partition(': ')[2]}"
    wrong_type = message.startswith("flag --config.")
    return f"{message}; give a value of the type that the config has there" if wrong_type else message


def _one_line(error) -> str:
    return " ".join(str(error).split())


def _die(message) -> NoReturn:
    print(f"error: {_one_line(message)}", file=sys.stderr)
    _leave(1)
