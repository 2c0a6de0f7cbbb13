"""The frame transform of training: resize by the short side, crop the centre, scale to [-1, 1]."""

from collections.abc import Iterable

import numpy as np
from jaxtyping import Float32, UInt8
from PIL import Image

LARGE_LOSS = 0.2  # share of a picture whose loss is said


def fit_frames(frames: UInt8[np.ndarray, "f h w 3"], size: tuple[int, int]) -> Float32[np.ndarray, "f _h _w 3"]:
    """Resize, crop and scale frames of any size to what the VAE takes: `size` (height, width), values in [-1, 1]."""
    return scale_pixels(crop_frames(frames, size))


def crop_frames(frames: UInt8[np.ndarray, "f h w 3"], size: tuple[int, int]) -> UInt8[np.ndarray, "f _h _w 3"]:
    """Resize frames so that the SHORT side becomes the smaller side of `size` (height, width), and crop the centre.

    This is the Resize + CenterCrop of the authors' code, but for one thing: where the resized frame would not cover
    `size` (a frame less oblong than the target) theirs pads with black bars, which a model would learn to draw; here it
    is enlarged until it covers. Bilinear with antialiasing, on 8 bits.
    """
    height, width = resized_shape(frames.shape[1:3], size)
    top, left = round((height - size[0]) / 2), round((width - size[1]) / 2)
    box = np.s_[top : top + size[0], left : left + size[1]]
    resized = (Image.fromarray(frame).resize((width, height), Image.Resampling.BILINEAR) for frame in frames)
    return np.stack([np.asarray(frame)[box] for frame in resized])


def resize_frames(
    frames: UInt8[np.ndarray, "f h w 3"], size: tuple[int, int], fit: str
) -> UInt8[np.ndarray, "f _h _w 3"]:
    """Bring frames of any shape to `size` (height, width).

    Args:
        frames: of one clip.
        size: height and width.
        fit: "crop" as `crop_frames`; "pad": the whole picture, with black beside it; "stretch": the whole picture,
            distorted.
    """
    if fit == "crop":
        return crop_frames(frames, size)
    scale = min(size[0] / frames.shape[1], size[1] / frames.shape[2])
    height, width = size if fit == "stretch" else (max(1, round(side * scale)) for side in frames.shape[1:3])
    top, left = (size[0] - height) // 2, (size[1] - width) // 2
    page = np.zeros((len(frames), *size, 3), np.uint8)
    for shown, frame in zip(page, frames, strict=True):
        resized = Image.fromarray(frame).resize((width, height), Image.Resampling.BILINEAR)
        shown[top : top + height, left : left + width] = np.asarray(resized)
    return page


def scale_pixels(frames: UInt8[np.ndarray, "f h w 3"]) -> Float32[np.ndarray, "f h w 3"]:
    """Scale 8 bits to [-1, 1]."""
    return frames.astype(np.float32) / 127.5 - 1


def resized_shape(shape: tuple[int, int], size: tuple[int, int]) -> tuple[int, int]:
    """Return the height and width to which frames of `shape` are resized before the crop to `size`."""
    height, width = shape
    short, long = min(size), int(min(size) * max(shape) / min(shape))
    resized = (short, long) if height <= width else (long, short)
    if resized[0] >= size[0] and resized[1] >= size[1]:
        return resized
    scale = max(size[0] / height, size[1] / width)
    return max(size[0], round(height * scale)), max(size[1], round(width * scale))


def cropped_share(shape: tuple[int, int], size: tuple[int, int]) -> float:
    """Return the share of the picture that frames of `shape` lose where they are cropped to `size`."""
    height, width = resized_shape(shape, size)
    return 1 - size[0] * size[1] / (height * width)


def say_cropped(shapes: Iterable[tuple[int, int]], size: tuple[int, int]) -> str:
    """Say how many clips, of these heights and widths, lose more than a fifth of their picture; "" if none does."""
    shares = [cropped_share(shape, size) for shape in shapes]
    large = sum(share > LARGE_LOSS for share in shares)
    if not large:
        return ""
    return (
        f"more than a fifth of the picture is cropped in {large} of {len(shares)} clips, up to {100 * max(shares):.0f} "
        "%; --config.data.fit=pad or stretch keeps all of it"
    )
