"""The log of a running training, which writes TensorBoard scalars for a window of steps at a time."""

import contextlib
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from absl import logging

from mask2dit_jax.errors import UserError
from mask2dit_jax.parallel.chips import chip_of
from mask2dit_jax.training.events import EventFile
from mask2dit_jax.training.step import NUM_BUCKETS


class MetricsLog:
    """A log that writes each window of steps one window late, so that it never waits for the step in flight."""

    def __init__(
        self,
        events: EventFile | None,
        every: int,
        rate,
        *,
        samples_per_step: int = 1,
        max_skipped: int = 10,
        skipped_items: Mapping[str, str] | None = None,
    ):
        """Start the first window.

        Args:
            events: Event file of the process that writes; None on the others.
            every: Number of steps in a window.
            rate: Maps a step to its learning rate.
            samples_per_step: Global batch size.
            max_skipped: Number of consecutive skipped updates at which `add` raises a UserError.
            skipped_items: Name -> reason of each data item that is left out. May grow during training.
        """
        self._events, self._every, self._rate = events, every, rate
        self._samples, self._max_skipped = samples_per_step, max_skipped
        self._skipped_items, self._told = {} if skipped_items is None else skipped_items, set()
        self._pending, self._ready, self._shown = [], None, {}
        self._step, self._since = 0, time.monotonic()
        self._waited = self._flops = 0.0

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Measure the time of the block as time spent waiting for data."""
        begun = time.monotonic()
        yield
        self._waited += time.monotonic() - begun

    def add(self, step: int, metrics: Mapping[str, Any], flops: float = 0.0) -> dict[str, str]:
        """Add a step, and return the newest written means for a progress bar.

        Args:
            step: Number of the step.
            metrics: Metrics that `train_step` returned, still on the device.
            flops: Matrix FLOPs that the model needs for the step, on all chips together.

        Raises:
            UserError: Too many consecutive updates were skipped. This is raised up to a window late.
        """
        self._pending.append(metrics)
        self._step = step
        self._flops += flops
        if step % self._every == 0:
            self._write()
            self._close_window()
        return self._shown

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """Write scalars of another origin, such as validation."""
        if self._events:
            for name, value in scalars.items():
                self._events.add_scalar(name, value, step)

    def flush(self):
        """Write the remaining windows. The last one may be short."""
        self._write()
        if self._pending:
            self._close_window()
            self._write()

    def _close_window(self):
        elapsed = time.monotonic() - self._since
        steps_per_second = len(self._pending) / elapsed
        speed = {
            "steps_per_second": steps_per_second,
            "samples_per_second": steps_per_second * self._samples,
            "input_bound_share": self._waited / elapsed,
            **_utilisation(self._flops / elapsed / jax.device_count()),
        }
        self._ready = (self._step, self._pending, speed)
        self._pending, self._since = [], time.monotonic()
        self._waited = self._flops = 0.0

    def _write(self):
        if self._ready is None:
            return
        (step, window, speed), self._ready = self._ready, None
        host = jax.device_get(window)
        scalars = _means(host) | {"learning_rate": float(self._rate(step)), **speed, **_memory()}
        scalars["skipped_items"] = len(self._skipped_items)
        self._shown = {"loss": f"{scalars['loss']:.4f}"}
        self.write(step, scalars)
        self._name_skipped(step)
        in_a_row = max(int(metrics["skipped_in_a_row"]) for metrics in host)
        if in_a_row >= self._max_skipped:
            raise UserError(
                f"{in_a_row} updates in a row, up to step {step}, were skipped because loss or gradient were not "
                "finite, and the parameters are unchanged; lower optimizer.learning_rate, or check the data"
            )

    def _name_skipped(self, step: int):
        new = [name for name in self._skipped_items if name not in self._told]
        self._told.update(new)
        if new and self._events:
            lines = "\n".join(f"{name}: {self._skipped_items[name]}" for name in new)
            self._events.add_text("skipped_items", lines, step)


def _means(window: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Return the means over the steps of a window, without steps whose update was skipped."""
    total = {name: np.sum([metrics[name] for metrics in window], axis=0) for name in window[0]}
    updated = [metrics for metrics in window if metrics["is_updated"]]
    scalars = {
        name: float(np.mean([metrics[name] for metrics in updated])) if updated else float("nan")
        for name in ("loss", "grad_norm", "param_norm")
    }
    scalars["skipped_updates"] = float(window[-1]["skipped"])
    if len(updated) < len(window):
        logging.warning(
            "skipped %d of %d updates because they were not finite", len(window) - len(updated), len(window)
        )
    for kind in ("fixed", "extension"):
        if total[f"num_{kind}"]:
            scalars[f"loss_{kind}"] = float(total[f"loss_{kind}_sum"] / total[f"num_{kind}"])
    for bucket in np.flatnonzero(total["num_bucket"]):
        share = total["loss_bucket_sum"][bucket] / total["num_bucket"][bucket]
        scalars[f"loss_by_timestep/{bucket}_of_{NUM_BUCKETS}"] = float(share)
    return scalars


def _utilisation(flops_per_second: float) -> dict[str, float]:
    """Return the FLOP/s of one chip, and their share of its peak if the peak is known."""
    if not flops_per_second:
        return {}
    scalars = {"tflops_per_second_a_chip": flops_per_second / 1e12}
    chip = chip_of(jax.devices()[0])
    return scalars | ({"mfu": flops_per_second / chip.peak_flops} if chip else {})


def _memory() -> dict[str, float]:
    """Return the memory use of this process's fullest device. A CPU has no such figures."""
    stats = [stats for device in jax.local_devices() if (stats := device.memory_stats())]
    names = {"hbm_gib": "bytes_in_use", "hbm_peak_gib": "peak_bytes_in_use"}
    return {
        ours: max(s[theirs] for s in stats) / 2**30
        for ours, theirs in names.items()
        if stats and all(theirs in s for s in stats)
    }
