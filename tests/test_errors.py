"""Ctrl-C ends a main with one line and code 130; a second one ends it wherever it is."""

import signal
import subprocess
import sys

import pytest

MAIN = """
import signal, sys, time
from mask2dit_jax.errors import run_main

def main(argv):
    {before}
    print("running", flush=True)
    time.sleep(600)

run_main(main)
"""


def interrupted(program: str, times: int = 1, ignored: bool = False) -> tuple[int, str]:
    """Return the exit code and what is printed to stderr by a main that is interrupted so many times."""
    shell = ("trap '' INT; " if ignored else "") + 'exec "$0" -c "$1"'
    command = ["sh", "-c", shell, sys.executable, program]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as started:
        for _ in range(times):
            assert started.stdout.readline() == "running\n"
            started.send_signal(signal.SIGINT)
        return started.wait(timeout=60), started.stderr.read()


@pytest.mark.parametrize("ignored", [False, True])
def test_ctrl_c_is_one_line_and_code_130(ignored):
    """Also in a background job of a shell that has no job control, which starts with SIGINT ignored."""
    code, printed = interrupted(MAIN.format(before=""), ignored=ignored)
    assert (code, printed) == (130, "interrupted: whatever is complete is kept; start again to go on\n")


def test_a_second_ctrl_c_ends_what_answers_none():
    """As the first one of a training run, which saves; or while Python waits for XLA."""
    program = MAIN.format(before='signal.signal(signal.SIGINT, lambda *_: print("running", flush=True))')
    code, printed = interrupted(program, times=2)
    assert (code, printed) == (130, "\ninterrupted again: ended at once\n")
