"""The frame transform of training: resize the short side, crop the centre, scale to [-1, 1]."""

import numpy as np
from jaxtyping import Float32, UInt8
from PIL import Image


def fit_frames(frames: UInt8[np.ndarray, "f h w 3"], size: tuple[int, int]) -> Float32[np.ndarray, "f _h _w 3"]:
    """Frames of any size as the VAE takes them.

    The SHORT side becomes the smaller side of `size` (height, width), then the centre is cut out, as in the authors'
    Resize + CenterCrop + Normalize. One thing differs: where the resized frame would not cover `size` (a frame less
    oblong than the target) theirs pads with black bars, which a model would learn to draw; here it is enlarged until it
    covers. Bilinear with antialiasing, on 8 bits.
    """
    height, width = resized_shape(frames.shape[1:3], size)
    top, left = round((height - size[0]) / 2), round((width - size[1]) / 2)
    box = np.s_[top : top + size[0], left : left + size[1]]
    fitted = [
        np.asarray(Image.fromarray(frame).resize((width, height), Image.Resampling.BILINEAR))[box] for frame in frames
    ]
    return np.stack(fitted).astype(np.float32) / 127.5 - 1


def resized_shape(shape: tuple[int, int], size: tuple[int, int]) -> tuple[int, int]:
    """Height and width that frames of `shape` are resized to before `size` is cut out of their centre."""
    height, width = shape
    short, long = min(size), int(min(size) * max(shape) / min(shape))
    resized = (short, long) if height <= width else (long, short)
    if resized[0] >= size[0] and resized[1] >= size[1]:
        return resized
    scale = max(size[0] / height, size[1] / width)
    return max(size[0], round(height * scale)), max(size[1], round(width * scale))
