"""A profiler trace of a few training steps, for TensorBoard's profile page or Perfetto."""

import contextlib
from collections.abc import Iterator, Sequence

import jax
from absl import logging
from etils import epath


class StepTrace:
    """A trace of a range of steps.

    A run that resumes within the range traces the rest of it. A run that ends or is stopped within it traces up to its
    end.
    """

    def __init__(self, steps: Sequence[int], folder: epath.PathLike, num_steps: int):
        """Choose the steps to trace.

        Args:
            steps: First and last step, both inclusive, or empty for no trace.
            folder: Output folder, local or gs://.
            num_steps: Last step of the run.
        """
        first, last = steps or (1, 0)
        self._steps, self._folder = range(first, min(last, num_steps) + 1), epath.Path(folder)
        self._is_on = False

    @contextlib.contextmanager
    def __call__(self, step: int) -> Iterator[None]:
        """Wrap the dispatch of a step. Waits for the last traced step, because the trace would otherwise miss it."""
        if step in self._steps and not self._is_on:
            jax.profiler.start_trace(str(self._folder))
            self._is_on = True
        with jax.profiler.StepTraceAnnotation("train", step_num=step):
            yield
        if self._is_on and step == self._steps[-1]:
            self.close()

    def close(self) -> None:
        """Stop a running trace and write it. If that fails, a warning is logged and the run continues."""
        if not self._is_on:
            return
        self._is_on = False
        jax.block_until_ready(jax.live_arrays())
        try:
            jax.profiler.stop_trace()
        except RuntimeError as error:  # from a disk or a bucket
            logging.warning("cannot write the profile to %s: %s", self._folder, str(error).splitlines()[0])
        else:
            logging.info("wrote the profile to %s", self._folder)
