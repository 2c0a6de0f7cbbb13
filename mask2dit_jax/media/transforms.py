"""The frame transform of training: resize by the short side, crop the centre, scale to [-1, 1]."""

import numpy as np
from jaxtyping import Float32, UInt8
from PIL import Image


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
