"""What a scene looks like in numbers, and what has drifted."""

import numpy as np
import pytest

from mask2dit_jax.story.statistics import FrameStatistics, drift, latent_statistics


def measure(*colours):
    measured = FrameStatistics((np.full((4, 6, 3), colour, np.uint8) for colour in colours), keep=[0])
    assert sum(1 for _ in measured) == len(colours)
    return measured.result()


@pytest.mark.parametrize(("colour", "mean", "saturation"), [
    ((0, 0, 0), 0, 0), ((255, 255, 255), 1, 0), ((255, 0, 0), 0.2126, 1), ((0, 255, 0), 0.7152, 1),
    ((200, 100, 100), (0.2126 * 200 + 0.7874 * 100) / 255, 0.5),
])  # fmt: skip
def test_plain_colours(colour, mean, saturation):
    assert measure(colour) == pytest.approx({"mean": mean, "contrast": 0, "saturation": saturation}, abs=1e-5)


def test_contrast_is_within_a_frame():
    assert measure((0, 0, 0), (255, 255, 255)) == pytest.approx({"mean": 0.5, "contrast": 0, "saturation": 0}, abs=1e-5)
    half = np.zeros((4, 6, 3), np.uint8)
    half[:2] = 255
    measured = FrameStatistics([half], keep=[0])
    list(measured)
    assert measured.result()["contrast"] == pytest.approx(0.5)
    np.testing.assert_array_equal(measured.kept, [half])


def test_drift_is_against_the_first_scene():
    latents = np.full((1, 2, 2, 3), 0.5, np.float32)
    first, second = latent_statistics(latents), latent_statistics(latents * 3)
    assert drift([first, second]) == [{"latent_mean": 0, "latent_std": 0}, {"latent_mean": 1, "latent_std": 0}]
