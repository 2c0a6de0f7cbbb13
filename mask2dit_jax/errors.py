"""Errors a user can act on: one line that names the thing and the remedy, no traceback."""

import sys
from collections.abc import Callable, Sequence
from logging import ERROR

from absl import app, flags, logging


class UserError(Exception):
    """Bad input. The message is one line: what is wrong, with which thing, and what to do about it."""


def run_main(main: Callable[[Sequence[str]], None]) -> None:
    """Runs an absl main; bad input or a bad flag ends as one line on stderr and exit code 1."""
    try:
        app.run(_reporting(main), flags_parser=_parse_flags)
    except KeyboardInterrupt:
        _die("interrupted")


def _reporting(main):
    def wrapped(argv):
        logging.set_verbosity(logging.INFO)
        logging.get_absl_handler().addFilter(_is_worth_reading)
        try:
            main(argv)
        except UserError as error:
            _die(error)

    return wrapped


def _is_worth_reading(record) -> bool:
    """Orbax tells of its inner life through absl too; of that, only errors are for the user."""
    return record.levelno >= ERROR or "orbax" not in record.pathname


def _parse_flags(argv):
    try:
        return flags.FLAGS(argv)
    # ml_collections reports an unknown field as AttributeError or KeyError, a wrong type as TypeError or ValueError, a
    # missing config file as IOError: all of them are a wrong command line here.
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError, OSError, UserError) as error:
        _die(f"{_one_line(error)} (the fields of a config are listed in the file that --config names)")


def _one_line(error) -> str:
    return " ".join(str(error).split())


def _die(message):
    print(f"error: {_one_line(message)}", file=sys.stderr)
    sys.exit(1)
