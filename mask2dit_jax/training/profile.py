"""A profiler trace of a few steps, for TensorBoard's profile page or Perfetto."""

import contextlib
from collections.abc import Iterator, Sequence

import jax
from absl import logging
from etils import epath


class StepTrace:
    """Traces steps `first` to `last`, both included, into `folder`; none if `steps` is empty.

    A run that resumes between the two traces the rest; one that ends there, or is stopped, traces up to its end.
    """

    def __init__(self, steps: Sequence[int], folder: epath.PathLike, num_steps: int):
        first, last = steps or (1, 0)
        self._steps, self._folder = range(first, min(last, num_steps) + 1), epath.Path(folder)
        self._is_on = False

    @contextlib.contextmanager
    def __call__(self, step: int) -> Iterator[None]:
        """Around what a step dispatches. The last step traced is waited for, or the trace would end before it."""
        if step in self._steps and not self._is_on:
            jax.profiler.start_trace(str(self._folder))
            self._is_on = True
        with jax.profiler.StepTraceAnnotation("train", step_num=step):
            yield
        if self._is_on and step == self._steps[-1]:
            self.close()

    def close(self) -> None:
        """Writes what was traced so far, if a trace is under way. If it cannot be written, the run goes on."""
        if not self._is_on:
            return
        self._is_on = False
        jax.block_until_ready(jax.live_arrays())
        try:
            jax.profiler.stop_trace()
        except RuntimeError as error:  # of a disk or of a bucket
            logging.warning("the profile cannot be written to %s: %s", self._folder, str(error).splitlines()[0])
        else:
            logging.info("profile: in %s", self._folder)
