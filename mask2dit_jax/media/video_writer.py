"""Frames -> mp4."""

import itertools
import os
from collections.abc import Iterable
from fractions import Fraction

import av
import numpy as np
from av.video.reformatter import Colorspace
from jaxtyping import UInt8
from tqdm import tqdm

from mask2dit_jax.errors import UserError
from mask2dit_jax.io.atomic import atomic_output

# Small frames show every artefact, so quality is spent freely: x264 is visually lossless from about 17 down.
# A player that is not told all three of a picture's colours guesses all of them, by the size of the picture.
_COLOURS = "colorprim=bt709:transfer=bt709:colormatrix=bt709"
_ENCODER = {"crf": "16", "preset": "medium", "x264-params": _COLOURS}


def write_video(path: str | os.PathLike, frames: Iterable[UInt8[np.ndarray, "h w 3"]], fps: int | float) -> None:
    """Writes RGB frames as H.264 (yuv420p, BT.709, index at the front): what every player and browser opens.

    H.264 with halved chroma needs an even size: an odd frame gets its last row or column twice. The file appears at
    `path` (local or gs://) only when it is whole.

    Args:
        frames: of one size: an array (f h w 3), or frames that are made while they are written.
        fps: frames a second.

    Raises:
        UserError: no frames, an fps that is not positive, or a path that cannot be written.
    """
    if not fps > 0:
        raise UserError(f"cannot write {path}: fps must be positive, not {fps}")
    frames = iter(frames)
    first = next(frames, None)
    if first is None or not first.size:
        raise UserError(f"cannot write {path}: the video has no frames")
    padding = ((0, first.shape[0] % 2), (0, first.shape[1] % 2), (0, 0))
    with (
        atomic_output(path) as local,
        av.open(local, "w", format="mp4", options={"movflags": "+faststart"}) as container,
    ):
        stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1001), options=_ENCODER)
        stream.height, stream.width = (side + side % 2 for side in first.shape[:2])
        stream.pix_fmt = "yuv420p"
        frames = itertools.chain([first], frames)
        for image in tqdm(frames, desc=f"writing {os.path.basename(path)}", unit="frame", delay=2):
            frame = av.VideoFrame.from_ndarray(np.pad(image, padding, mode="edge"), format="rgb24")
            container.mux(stream.encode(frame.reformat(format="yuv420p", dst_colorspace=Colorspace.ITU709)))
        container.mux(stream.encode(None))
