"""Compares the frame transform with that of the authors' code, and tests where it differs."""

import numpy as np
import pytest
import torch

from mask2dit_jax.media.transforms import cropped_share, fit_frames, resize_frames, resized_shape, say_cropped


def official(frames, size):
    """Apply torchvision's Resize(min(size)) + CenterCrop(size) + Normalize(0.5), for frames that cover `size`."""
    height, width = frames.shape[1:3]
    short, long = min(size), int(min(size) * max(height, width) / min(height, width))
    resized = (short, long) if height <= width else (long, short)
    pixels = torch.from_numpy(frames).permute(0, 3, 1, 2).float() / 255
    pixels = torch.nn.functional.interpolate(pixels, resized, mode="bilinear", antialias=True, align_corners=False)
    top, left = round((resized[0] - size[0]) / 2.0), round((resized[1] - size[1]) / 2.0)
    pixels = pixels[:, :, top : top + size[0], left : left + size[1]]
    return ((pixels - 0.5) / 0.5).permute(0, 2, 3, 1).numpy()


@pytest.mark.parametrize(
    ("shape", "size"),
    [((272, 640), (32, 64)), ((97, 203), (48, 80)), ((203, 97), (80, 48)), ((32, 64), (32, 48)), ((20, 51), (32, 48))],
)
def test_equals_the_official_transform(shape, size):
    rng = np.random.default_rng(0)
    frames = rng.integers(0, 256, (2, *shape, 3)).astype(np.uint8)
    ours = fit_frames(frames, size)
    assert ours.shape == (2, *size, 3)
    np.testing.assert_allclose(ours, official(frames, size), atol=2 / 127.5)  # Pillow rounds to 8 bits, twice


@pytest.mark.parametrize(("shape", "size"), [((30, 30), (32, 48)), ((64, 48), (32, 48)), ((31, 40), (480, 720))])
def test_a_frame_that_would_not_cover_is_enlarged_not_padded(shape, size):
    fitted = fit_frames(np.full((1, *shape, 3), 200, np.uint8), size)
    assert fitted.shape == (1, *size, 3)
    np.testing.assert_allclose(fitted, 200 / 127.5 - 1)
    resized = resized_shape(shape, size)
    assert min(have - want for have, want in zip(resized, size, strict=True)) == 0  # and no more than needed


def test_range():
    frames = np.stack([np.zeros((32, 48, 3), np.uint8), np.full((32, 48, 3), 255, np.uint8)])
    fitted = fit_frames(frames, (16, 16))
    assert fitted.dtype == np.float32
    assert (fitted[0] == -1).all()
    assert (fitted[1] == 1).all()


def test_the_crop_is_central():
    frames = np.zeros((1, 32, 96, 3), np.uint8)
    frames[:, :, 40:56] = 255
    assert (fit_frames(frames, (32, 16)) == fit_frames(frames, (32, 16))[:, :, ::-1]).all()


@pytest.mark.parametrize(("shape", "box"), [
    ((32, 96), np.s_[8:24]), ((96, 32), np.s_[:, 18:29]), ((64, 96), np.s_[:]), ((8, 9), np.s_[:, 6:42]),
])  # fmt: skip
def test_padding_keeps_the_whole_picture_and_is_black(shape, box):
    fitted = resize_frames(np.full((2, *shape, 3), 200, np.uint8), (32, 48), "pad")
    expected = np.zeros((32, 48, 3), np.uint8)
    expected[box] = 200
    np.testing.assert_array_equal(fitted, [expected] * 2)


def test_stretching_keeps_the_whole_picture_and_has_no_bars():
    frames = np.zeros((1, 32, 96, 3), np.uint8)
    frames[:, :, :48] = 200
    fitted = resize_frames(frames, (48, 32), "stretch")
    assert fitted.shape == (1, 48, 32, 3)
    assert (fitted[:, :, :15] == 200).all()
    assert (fitted[:, :, 17:] == 0).all()


@pytest.mark.parametrize(("shape", "share"), [((32, 48), 0), ((64, 96), 0), ((32, 96), 1 / 2), ((96, 32), 7 / 9)])
def test_the_share_that_is_cropped(shape, share):
    assert cropped_share(shape, (32, 48)) == pytest.approx(share)


def test_clips_that_lose_much_are_counted():
    shapes = [(32, 48), (32, 96), (96, 32), (32, 59)]  # the last one loses less than a fifth
    said = say_cropped(shapes, (32, 48))
    assert said.startswith("more than a fifth of the picture is cropped in 2 of 4 clips, up to 78 %; ")
    assert say_cropped(shapes[::3], (32, 48)) == say_cropped([], (32, 48)) == ""
