"""What is logged, and that logging never waits for the step in flight."""

import itertools
import types

import jax
import numpy as np
import pytest

from mask2dit_jax.errors import UserError
from mask2dit_jax.parallel.chips import CHIPS
from mask2dit_jax.training import metrics as metrics_module
from mask2dit_jax.training.events import EventFile
from mask2dit_jax.training.metrics import MetricsLog


class Kept(EventFile):
    """Keeps what would be written."""

    def __init__(self):
        self.scalars, self.texts = {}, {}

    def add_scalar(self, name, value, step):
        self.scalars.setdefault(name, {})[step] = value

    def add_text(self, name, text, step):
        self.texts[step] = text


def step_metrics(loss=1.0, is_updated=True, skipped=0, in_a_row=0, **more):
    bucket = np.zeros(10)
    given = {"loss": loss, "grad_norm": 2.0, "param_norm": 3.0, "is_updated": is_updated, "skipped": skipped}
    sums = {"loss_fixed_sum": 0.0, "num_fixed": 0, "loss_extension_sum": 0.0, "num_extension": 0}
    return given | {"skipped_in_a_row": in_a_row, "loss_bucket_sum": bucket, "num_bucket": bucket} | sums | more


def log_of(events, every=2, **more):
    return MetricsLog(events, every, lambda step: step / 10, **more)


@pytest.fixture
def clock(monkeypatch):
    """Seconds that pass only when the test says so."""
    now = types.SimpleNamespace(time=0.0)
    monkeypatch.setattr(metrics_module.time, "monotonic", lambda: now.time)
    return now


def test_means_and_sums():
    events, bucket = Kept(), np.eye(10)
    log = log_of(events)
    log.add(
        1, step_metrics(1.0, loss_fixed_sum=6.0, num_fixed=3, loss_bucket_sum=6 * bucket[2], num_bucket=2 * bucket[2])
    )
    log.add(2, step_metrics(3.0, loss_fixed_sum=2.0, num_fixed=1, loss_bucket_sum=bucket[2], num_bucket=bucket[2]))
    log.add(3, step_metrics(5.0))
    log.flush()
    assert events.scalars["loss"] == {2: 2.0, 3: 5.0}  # the last window is a short one
    assert (events.scalars["grad_norm"][2], events.scalars["param_norm"][2]) == (2.0, 3.0)
    assert events.scalars["learning_rate"][2] == 0.2
    assert events.scalars["loss_fixed"] == {2: 2.0}
    assert "loss_extension" not in events.scalars
    assert events.scalars["loss_by_timestep/2_of_10"] == {2: 7 / 3}


def test_speed(clock, monkeypatch):
    """Two seconds a step, half a second of them spent on waiting for data."""
    monkeypatch.setattr(metrics_module, "chip_of", lambda device: CHIPS["v5e"])
    events = Kept()
    log = log_of(events, samples_per_step=8)
    for step in (1, 2):
        with log.waiting():
            clock.time += 0.5
        clock.time += 1.5
        log.add(step, step_metrics(), flops=197e12 * jax.device_count())
    log.flush()
    found = {name: values[2] for name, values in events.scalars.items()}
    assert found["steps_per_second"] == 0.5
    assert found["samples_per_second"] == 4
    assert found["input_bound_share"] == 0.25
    assert found["tflops_per_second_a_chip"] == pytest.approx(98.5)
    assert found["mfu"] == pytest.approx(0.5)


def test_a_step_is_read_only_when_the_next_is_under_way(monkeypatch):
    """With every step logged: what is fetched when step n is handed in is older than n, and fetched at one go."""
    fetched = []
    monkeypatch.setattr(jax, "device_get", lambda window: fetched.append([m["loss"] for m in window]) or window)
    log = log_of(Kept(), every=1)
    for step in range(1, 5):
        log.add(step, step_metrics(float(step)))
        assert list(itertools.chain(*fetched)) == [float(n) for n in range(1, step)]
    log = log_of(Kept(), every=3)
    fetched.clear()
    for step in range(1, 8):
        log.add(step, step_metrics(float(step)))
    assert fetched == [[1.0, 2.0, 3.0]]


def test_nothing_of_a_step_is_touched_before(monkeypatch):
    """Not by a comparison, a format or a sum either: any of them would wait for the device."""

    class InFlight:
        def __getattr__(self, name):
            raise AssertionError(f"{name} of a step in flight was asked for")

        __array__ = __float__ = __bool__ = __int__ = __add__ = __str__ = lambda self, *_: self.anything

    log = log_of(None, every=1)
    log.add(1, dict.fromkeys(step_metrics(), InFlight()))
    with pytest.raises(AssertionError, match="in flight"):
        log.flush()


def test_skipped_updates_count_and_end_the_run():
    events = Kept()
    log = log_of(events, every=2, max_skipped=3)
    nan = float("nan")
    log.add(1, step_metrics(1.0))
    log.add(2, step_metrics(nan, False, skipped=1, in_a_row=1))
    log.add(3, step_metrics(nan, False, skipped=2, in_a_row=2))
    log.add(4, step_metrics(nan, False, skipped=3, in_a_row=3))
    assert events.scalars["loss"] == {2: 1.0}
    assert events.scalars["skipped_updates"] == {2: 1.0}
    with pytest.raises(UserError, match="3 updates in a row, up to step 4, were skipped because loss or gradient"):
        log.flush()
    assert np.isnan(events.scalars["loss"][4])


def test_items_left_out_are_counted_and_named_once():
    events, skipped = Kept(), {"a.mp4": "it is empty"}
    log = log_of(events, every=1, skipped_items=skipped)
    log.add(1, step_metrics())
    log.add(2, step_metrics())
    skipped["b.mp4"] = "no video stream"
    log.add(3, step_metrics())
    log.flush()
    assert events.scalars["skipped_items"] == {1: 1, 2: 2, 3: 2}
    assert events.texts == {1: "a.mp4: it is empty", 2: "b.mp4: no video stream"}
