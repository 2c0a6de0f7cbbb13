"""The trace of a few steps; that a whole run writes one is in tests/mains/test_features.py."""

import jax.numpy as jnp
from jax._src import profiler

from mask2dit_jax.training.profile import StepTrace


def test_a_run_that_is_stopped_within_the_trace_writes_what_there_is(tmp_path):
    trace = StepTrace((2, 100), tmp_path / "profile", num_steps=100)
    for step in (1, 2, 3):
        with trace(step):
            jnp.ones(8).sum()
    assert not list(tmp_path.rglob("*.xplane.pb"))
    trace.close()
    assert len(list(tmp_path.rglob("*.xplane.pb"))) == 1
    trace.close()  # nothing is under way


def test_a_run_that_is_stopped_before_the_trace_writes_none(tmp_path):
    trace = StepTrace((2, 3), tmp_path / "profile", num_steps=100)
    with trace(1):
        pass
    trace.close()
    assert not list(tmp_path.iterdir())


def test_a_trace_that_cannot_be_written_ends_no_run(tmp_path, caplog):
    (tmp_path / "profile").write_text("a file where the folder should be")
    trace = StepTrace((1, 1), tmp_path / "profile", num_steps=1)
    try:
        with trace(1):
            jnp.ones(8).sum()
    finally:
        profiler._profile_state.reset()  # JAX leaves it as it was; another test may trace, too
    assert "cannot write the profile" in caplog.text
