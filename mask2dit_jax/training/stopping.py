"""The response to SIGTERM, which a user, a scheduler or the preemption of a TPU VM sends to stop a run."""

import signal

import jax
from absl import logging
from jax.experimental import multihost_utils

# The code of a process killed by SIGTERM. It is not 0, so whatever restarts jobs starts the run again.
EXIT_CODE = 128 + signal.SIGTERM


class StopRequest:
    """A context in which SIGTERM ends the run between two steps, not in the middle of one.

    Not all of several processes receive the signal, and those that do receive it at different steps. JAX tells all
    processes and chooses a step that none has reached yet. Therefore each process must call `is_due` after every step.
    """

    def __init__(self):
        """Prepare the context. `jax.distributed` must be initialised first, if it is used."""
        self._asked = False
        self._by_jax = jax.distributed.is_initialized()  # JAX then has its own signal handler

    def __enter__(self):
        """Install the signal handler, unless JAX has its own."""
        if not self._by_jax:
            self._before = signal.signal(signal.SIGTERM, self._note)
        return self

    def __exit__(self, *_):
        """Restore the previous signal handler."""
        if not self._by_jax:
            signal.signal(signal.SIGTERM, self._before)

    def is_due(self, step: int) -> bool:
        """Return whether the run should end after `step`. Does not communicate with other processes."""
        due = multihost_utils.reached_preemption_sync_point(step) if self._by_jax else self._asked
        if due:
            logging.info("SIGTERM: saving step %d, then stopping", step)
        return due

    def _note(self, *_):
        self._asked = True
