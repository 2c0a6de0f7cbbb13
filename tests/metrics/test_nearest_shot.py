"""Tests the distance between a scene and a shot, and the order of the shots."""

import numpy as np
import pytest

from mask2dit_jax.metrics.nearest_shot import distances, shot_distance


def shot(seed: int, length: int = 20) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 255, (length, 8, 8, 3), dtype=np.uint8)


def test_a_cut_out_of_a_shot_is_at_distance_zero():
    assert shot_distance(shot(0)[4:17:3], shot(0), stride=3) == 0
    assert shot_distance(shot(0)[4:17:3], shot(0), stride=2) > 50


def test_distance_is_in_grey_levels():
    frames = np.full((3, 4, 4, 3), 100, np.uint8)
    assert shot_distance(frames + 7, np.repeat(frames, 4, axis=0), stride=1) == pytest.approx(7)


def test_nearest_comes_first():
    noisy = (shot(1)[0:9].astype(int) + 3).clip(0, 255).astype(np.uint8)
    found = distances(noisy, {"a": shot(0), "b": shot(1), "c": shot(2)}, stride=1)
    assert next(iter(found)) == "b"
    assert found["b"] < 4 < found["a"]


def test_a_shot_too_short_for_the_stride_is_read_more_densely():
    assert shot_distance(shot(0, 9)[::2], shot(0, 9), stride=3) == 0
