"""The response to what stops a run: SIGTERM from a scheduler or a preempted TPU VM, and SIGINT, which is Ctrl-C."""

import os
import signal

import jax
from absl import logging
from jax.experimental import multihost_utils

from mask2dit_jax.parallel import distributed


class StopRequest:
    """A context in which SIGTERM or SIGINT ends the run between two steps, not in the middle of one.

    Not all of several processes receive the signal, and those that do receive it at different steps. JAX tells all
    processes of a SIGTERM and chooses a step that none has reached yet, so a process passes SIGINT on as SIGTERM.
    Therefore each process must call `is_due` after every step.

    A second SIGINT ends the process at once (`errors.run_main`).
    """

    def __init__(self):
        """Prepare the context. `jax.distributed` must be initialised first, if it is used."""
        self._received: signal.Signals | None = None
        self._by_jax = jax.distributed.is_initialized()  # JAX then has its own handler of SIGTERM
        self._before = {}

    def __enter__(self):
        """Install the signal handlers, but leave SIGTERM to JAX if it has its own."""
        for number in (signal.SIGINT,) if self._by_jax else (signal.SIGINT, signal.SIGTERM):
            self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_):
        """Restore the previous signal handlers."""
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @property
    def exit_code(self) -> int:
        """The code of a process that the signal kills. It is not 0, so whatever restarts jobs starts the run again."""
        return 128 + (self._received or signal.SIGTERM)

    def is_due(self, step: int) -> bool:
        """Return whether the run should end after `step`.

        Processes do not wait for each other, except at the one step where all of them return True.
        """
        if not self._by_jax:
            due = self._received is not None
        elif due := multihost_utils.reached_preemption_sync_point(step):
            received = distributed.gather_json(self._received)  # None where JAX alone told of it
            self._received = signal.SIGINT if signal.SIGINT in received else signal.SIGTERM
        if due:
            logging.info("%s: saving step %d, then stopping", self._received.name, step)
        return due

    def _note(self, number, _):
        self._received = self._received or signal.Signals(number)
        if self._by_jax and number == signal.SIGINT:
            os.kill(os.getpid(), signal.SIGTERM)
