"""Small videos and data files whose frames say where they come from, for the tests of the data side."""

import numpy as np

from mask2dit_jax.data.sources import Clip
from mask2dit_jax.media.video_writer import write_video

GREY_STEP = 3  # between the grey levels of neighbouring frames: far more than what the encoder loses


def numbered_frames(count, height=32, width=48, first=0):
    """Frame i is plain grey of level 3 * (first + i), so that a decoded frame tells its number."""
    levels = np.arange(first, first + count, dtype=np.uint8) * GREY_STEP
    return np.broadcast_to(levels[:, None, None, None], (count, height, width, 3)).copy()


def frame_numbers(frames):
    return np.rint(frames.mean((1, 2, 3)) / GREY_STEP).astype(int).tolist()


def make_clip(folder, name="clip.mp4", count=20, caption="a grey picture", **kind):
    write_video(folder / name, numbered_frames(count, **kind), 25)
    return Clip(name, folder / name, caption, count, 25.0, 48, 32)
