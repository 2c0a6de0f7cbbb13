"""Exact frame-by-frame reading of video files through PyAV."""

import contextlib
import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from jaxtyping import UInt8

from mask2dit_jax.errors import UserError

_REMEDY = "replace the file or remove it from the data"


@dataclasses.dataclass(frozen=True)
class VideoInfo:
    """The properties of a video as it is displayed.

    Attributes:
        num_frames: Number of frames that are shown.
        width: Width in pixels after rotation.
        height: Height in pixels after rotation.
        fps: Average frame rate.
    """

    num_frames: int
    width: int
    height: int
    fps: Fraction

    @property
    def duration(self) -> float:
        """Duration in seconds."""
        return float(self.num_frames / self.fps)


def probe(path: str | Path) -> VideoInfo:
    """Return the properties of a video, with the number of frames that are really in the file.

    This reads all packets but decodes only the first frame. The count in the header is not reliable: it is too large
    for a truncated file, it includes frames that an edit list hides, and some containers have none.

    Raises:
        UserError: The file is missing, empty, not a video, has no video stream, or has fewer frames than its header
            promises.
    """
    with _open(path) as (container, stream):
        discarded = [packet.is_discard for packet in container.demux(stream) if packet.size]
        if len(discarded) < stream.frames:
            raise UserError(f"{path}: truncated, {len(discarded)} of {stream.frames} frames are present; {_REMEDY}")
        fps = stream.average_rate or stream.guessed_rate
        num_frames = discarded.count(False)
    if not fps or not num_frames:
        raise UserError(f"{path}: has no moving picture; {_REMEDY}")
    height, width, _ = read_frames(path, [0])[0].shape
    return VideoInfo(num_frames, width, height, fps)


def iter_frames(path: str | Path) -> Iterator[UInt8[np.ndarray, "h w 3"]]:
    """Yield all frames in display order, as RGB, rotated as the file specifies. Holds one frame at a time in memory.

    Raises:
        UserError: The file cannot be opened (see `probe`), or a frame cannot be decoded.
    """
    with _open(path) as (container, stream):
        stream.thread_type = "AUTO"
        for frame in container.decode(stream):
            yield np.ascontiguousarray(np.rot90(frame.to_ndarray(format="rgb24"), frame.rotation // 90))


def read_frames(path: str | Path, indices: Sequence[int]) -> UInt8[np.ndarray, "f h w 3"]:
    """Return the frames `indices`, in that order.

    The file is decoded up to the last of them. Only the requested frames are kept in memory.

    Raises:
        UserError: See `iter_frames`; or an index is negative or beyond the last frame.
    """
    wanted = set(indices)
    if not wanted or min(wanted) < 0:
        raise UserError(f"{path}: frame indices must not be empty or negative, but are {list(indices)}")
    frames = itertools.islice(iter_frames(path), max(wanted) + 1)
    kept, num_frames = {}, 0
    for num_frames, frame in enumerate(frames, start=1):
        if num_frames - 1 in wanted:
            kept[num_frames - 1] = frame
    if num_frames <= max(wanted):
        raise UserError(f"{path}: frame {max(wanted)} was asked for, but only {num_frames} frames can be decoded")
    return np.stack([kept[index] for index in indices])


@contextlib.contextmanager
def _open(path: str | Path):
    """Yield the container and its first video stream. Turns FFmpeg's errors in the block into a UserError."""
    if not Path(path).is_file():
        raise UserError(f"{path}: no such file; correct the path in the data")
    if not Path(path).stat().st_size:
        raise UserError(f"{path}: the file is empty; {_REMEDY}")
    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise UserError(f"{path}: has no video stream; {_REMEDY}")
            yield container, container.streams.video[0]
    except av.FFmpegError as error:
        raise UserError(f"{path}: damaged, truncated or not a video ({error.strerror}); {_REMEDY}") from error
