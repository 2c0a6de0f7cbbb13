"""Frames -> mp4."""

import os
from fractions import Fraction

import av
import numpy as np
from av.video.reformatter import Colorspace
from jaxtyping import UInt8
from tqdm import tqdm

from mask2dit_jax.data.output_file import atomic_output
from mask2dit_jax.errors import UserError

# Small frames show every artefact, so quality is spent freely: x264 is visually lossless from about 17 down.
_ENCODER = {"crf": "16", "preset": "medium"}


def write_video(path: str | os.PathLike, frames: UInt8[np.ndarray, "f h w 3"], fps: int | float) -> None:
    """Writes RGB frames as H.264 (yuv420p, BT.709, index at the front): what every player and browser opens.

    H.264 with halved chroma needs an even size: an odd frame gets its last row or column twice. The file appears at
    `path` (local or gs://) only when it is whole.

    Args:
        fps: frames a second.

    Raises:
        UserError: no frames, an fps that is not positive, or a path that cannot be written.
    """
    if not frames.size:
        raise UserError(f"cannot write {path}: the video has no frames (shape {frames.shape})")
    if not fps > 0:
        raise UserError(f"cannot write {path}: fps must be positive, not {fps}")
    frames = np.pad(frames, ((0, 0), (0, frames.shape[1] % 2), (0, frames.shape[2] % 2), (0, 0)), mode="edge")
    with (
        atomic_output(path) as local,
        av.open(local, "w", format="mp4", options={"movflags": "+faststart"}) as container,
    ):
        stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1001), options=_ENCODER)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        # Named and used: a player that has to guess takes BT.601 or BT.709 by the size of the picture.
        stream.codec_context.colorspace = Colorspace.ITU709
        for image in tqdm(frames, desc=f"writing {os.path.basename(path)}", unit="frame", delay=2):
            frame = av.VideoFrame.from_ndarray(image, format="rgb24")
            container.mux(stream.encode(frame.reformat(format="yuv420p", dst_colorspace=Colorspace.ITU709)))
        container.mux(stream.encode(None))
