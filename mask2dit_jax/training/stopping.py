"""Stopping on SIGTERM, sent by a user, a scheduler, or a TPU VM that is about to be preempted."""

import signal

import jax
from absl import logging
from jax.experimental import multihost_utils

# As if the signal had ended the process, so that whatever restarts the job starts it again.
EXIT_CODE = 128 + signal.SIGTERM


class StopRequest:
    """A context in which SIGTERM ends the run after a step instead of in the middle of one.

    Of several processes not all receive the signal, and not at the same step. JAX tells all of them and chooses a step
    that none has reached yet, so every process must ask at every step.
    """

    def __init__(self):
        """Note whether JAX coordinates several processes."""
        self._asked = False
        self._by_jax = jax.distributed.is_initialized()  # which then has a handler of its own

    def __enter__(self):
        """Handle SIGTERM, unless JAX does."""
        if not self._by_jax:
            self._before = signal.signal(signal.SIGTERM, self._note)
        return self

    def __exit__(self, *_):
        """Restore the earlier handler."""
        if not self._by_jax:
            signal.signal(signal.SIGTERM, self._before)

    def is_due(self, step: int) -> bool:
        """Tell whether the run should end after `step`; does not wait for other processes."""
        due = multihost_utils.reached_preemption_sync_point(step) if self._by_jax else self._asked
        if due:
            logging.info("SIGTERM: saving step %d, then stopping", step)
        return due

    def _note(self, *_):
        self._asked = True
