"""A profiler trace of a few steps, for TensorBoard's profile page or Perfetto."""

import contextlib
from collections.abc import Iterator, Sequence

import jax
from absl import logging
from etils import epath


class StepTrace:
    """Traces steps `first` to `last`, both included, into `folder`; none if `steps` is empty."""

    def __init__(self, steps: Sequence[int], folder: epath.PathLike):
        self._first, self._last = steps or (0, 0)
        self._folder = epath.Path(folder)

    @contextlib.contextmanager
    def __call__(self, step: int) -> Iterator[None]:
        """Around what a step dispatches. The last step traced is waited for, or the trace would end before it."""
        if step == self._first:
            jax.profiler.start_trace(str(self._folder))
        with jax.profiler.StepTraceAnnotation("train", step_num=step):
            yield
        if step == self._last:
            jax.effects_barrier()
            jax.block_until_ready(jax.live_arrays())
            jax.profiler.stop_trace()
            logging.info("profile: steps %d to %d in %s", self._first, self._last, self._folder)
