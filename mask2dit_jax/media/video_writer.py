"""Writing of frames to mp4 files."""

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

# Small frames show every artefact, so the quality is high: x264 is visually lossless from about crf 17 down.
# Unless a file states all three of its colour properties, a player guesses all of them from the frame size.
_COLOURS = "colorprim=bt709:transfer=bt709:colormatrix=bt709"
CODEC, PIXELS = "libx264", "yuv420p"
ENCODER = {"crf": "16", "preset": "medium", "x264-params": _COLOURS}


def write_video(path: str | os.PathLike, frames: Iterable[UInt8[np.ndarray, "h w 3"]], fps: int | float) -> None:
    """Write RGB frames as H.264 (yuv420p, BT.709, index at the front), which every player and browser opens.

    Halved chroma needs even sizes, so an odd frame repeats its last row or column. The file appears at `path` only once
    it is complete.

    Args:
        path: Output, local or gs://.
        frames: Frames of one size, as an array (f h w 3) or an iterable that makes them on demand.
        fps: Frames per second.

    Raises:
        UserError: There are no frames, `fps` is not positive, or `path` cannot be written.
    """
    if not fps > 0:
        raise UserError(f"cannot write {path}: fps must be positive, but is {fps}")
    frames = iter(frames)
    first = next(frames, None)
    if first is None or not first.size:
        raise UserError(f"cannot write {path}: the video has no frames")
    padding = ((0, first.shape[0] % 2), (0, first.shape[1] % 2), (0, 0))
    with (
        atomic_output(path) as local,
        av.open(f"file:{local}", "w", format="mp4", options={"movflags": "+faststart"}) as container,
    ):
        stream = container.add_stream(CODEC, rate=Fraction(fps).limit_denominator(1001), options=ENCODER)
        stream.height, stream.width = (side + side % 2 for side in first.shape[:2])
        stream.pix_fmt = PIXELS
        frames = itertools.chain([first], frames)
        for image in tqdm(frames, desc=f"writing {os.path.basename(path)}", unit="frame", delay=2):
            frame = av.VideoFrame.from_ndarray(np.pad(image, padding, mode="edge"), format="rgb24")
            container.mux(stream.encode(frame.reformat(format=PIXELS, dst_colorspace=Colorspace.ITU709)))
        container.mux(stream.encode(None))
