"""Being asked to stop: SIGTERM, from a user, a scheduler, or a TPU VM that is about to be taken away."""

import signal

import jax
from absl import logging
from jax.experimental import multihost_utils

EXIT_CODE = 128 + signal.SIGTERM  # as of a process that the signal ended: not done, so whoever restarts jobs does


class StopRequest:
    """Inside `with`, SIGTERM ends the run after a step, and not in the middle of one.

    Of several processes not all get the signal, and none at the same step. JAX spreads the news and names a step that
    none has reached; so all of them must ask at every step.
    """

    def __init__(self):
        self._asked = False
        self._by_jax = jax.distributed.is_initialized()  # which then has a handler of its own

    def __enter__(self):
        if not self._by_jax:
            self._before = signal.signal(signal.SIGTERM, self._note)
        return self

    def __exit__(self, *_):
        if not self._by_jax:
            signal.signal(signal.SIGTERM, self._before)

    def is_due(self, step: int) -> bool:
        """Whether the run is to end after `step`; asks no other process."""
        due = multihost_utils.reached_preemption_sync_point(step) if self._by_jax else self._asked
        if due:
            logging.info("SIGTERM: saving step %d, then stopping", step)
        return due

    def _note(self, *_):
        self._asked = True
