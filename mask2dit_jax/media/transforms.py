"""The frame transform of training: resize by the short side, crop the centre, scale to [-1, 1]."""

import numpy as np
from jaxtyping import Float32, UInt8
from PIL import Image


def fit_frames(frames: UInt8[np.ndarray, "f h w 3"], size: tuple[int, int]) -> Float32[np.ndarray, "f _h _w 3"]:
    """Convert frames of any size to the input of the VAE.

    The SHORT side is resized to the smaller side of `size`, and the centre is cropped, as in the Resize + CenterCrop +
    Normalize of the authors' code. One thing differs. If the resized frame would not cover `size` (because it is less
    oblong than the target), theirs pads with black bars, which a model would learn to draw. Here, the frame is enlarged
    until it covers `size`. Resizing is bilinear with antialiasing, in 8 bits.

    Args:
        frames: RGB frames.
        size: Height and width of the result in pixels.
    """
    height, width = resized_shape(frames.shape[1:3], size)
    top, left = round((height - size[0]) / 2), round((width - size[1]) / 2)
    box = np.s_[top : top + size[0], left : left + size[1]]
    fitted = [
        np.asarray(Image.fromarray(frame).resize((width, height), Image.Resampling.BILINEAR))[box] for frame in frames
    ]
    return np.stack(fitted).astype(np.float32) / 127.5 - 1


def resized_shape(shape: tuple[int, int], size: tuple[int, int]) -> tuple[int, int]:
    """Return the height and width to which frames of `shape` are resized before the crop to `size`."""
    height, width = shape
    short, long = min(size), int(min(size) * max(shape) / min(shape))
    resized = (short, long) if height <= width else (long, short)
    if resized[0] >= size[0] and resized[1] >= size[1]:
        return resized
    scale = max(size[0] / height, size[1] / width)
    return max(size[0], round(height * scale)), max(size[1], round(width * scale))
