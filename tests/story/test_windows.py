"""Which windows a story is made of."""

import pytest

from mask2dit_jax.errors import UserError
from mask2dit_jax.story.windows import plan_windows


@pytest.mark.parametrize(("scenes", "window", "given", "expected"), [
    (3, 3, 0, [((), (0, 1, 2))]),
    (5, 3, 0, [((), (0, 1, 2)), ((1, 2), (3,)), ((2, 3), (4,))]),
    (3, 3, 2, [((0, 1), (2,))]),
    (5, 3, 3, [((1, 2), (3,)), ((2, 3), (4,))]),
    (4, 3, 1, [((0,), (1, 2)), ((1, 2), (3,))]),  # around the one that is given
    (3, 2, 0, [((), (0, 1)), ((1,), (2,))]),
    (2, 3, 0, [((), (0, 1))]),  # a story shorter than the window
    (2, 3, 1, [((0,), (1,))]),
    (1, 1, 0, [((), (0,))]),
])  # fmt: skip
def test_plan(scenes, window, given, expected):
    assert [(planned.known, planned.new) for planned in plan_windows(scenes, window, given)] == expected


@pytest.mark.parametrize(("scenes", "window", "given", "expected"), [
    (6, 3, 0, [((), (0, 1, 2)), ((0, 2), (3,)), ((0, 3), (4,)), ((0, 4), (5,))]),
    (5, 4, 3, [((0, 1, 2), (3,)), ((0, 2, 3), (4,))]),
])  # fmt: skip
def test_anchor(scenes, window, given, expected):
    planned = plan_windows(scenes, window, given, anchor=True)
    assert [(window.known, window.new) for window in planned] == expected


def test_work_is_linear_in_scenes():
    windows = plan_windows(40, 3)
    assert len(windows) == 38
    assert max(len(window.scenes) for window in windows) == 3


@pytest.mark.parametrize(("scenes", "window", "given", "anchor", "message"), [
    (0, 3, 0, False, "0 prompts leave nothing to generate"),
    (2, 3, 2, False, "2 given scenes of 2 leave nothing to generate"),
    (2, 1, 0, False, "num_scenes must be at least 2"),
    (3, 2, 0, True, "an anchor needs num_scenes of at least 3"),
])  # fmt: skip
def test_numbers_that_do_not_fit(scenes, window, given, anchor, message):
    with pytest.raises(UserError, match=message):
        plan_windows(scenes, window, given, anchor=anchor)
