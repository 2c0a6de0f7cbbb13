"""Cutting long videos into shots: PySceneDetect finds the cuts, each shot becomes a file of its own."""

import collections
import dataclasses
import itertools
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from scenedetect import ContentDetector, FrameTimecode
from tqdm import tqdm

from mask2dit_jax.errors import UserError
from mask2dit_jax.media.video_reader import iter_frames, probe
from mask2dit_jax.media.video_writer import write_video

_DETECTION_WIDTH = 256  # pixels; PySceneDetect's own programs shrink videos to about this size


@dataclasses.dataclass(frozen=True)
class Shot:
    """The frames from `start` to `stop`, which is not included, of a video; `number` counts its shots from 1."""

    video: Path
    number: int
    start: int
    stop: int

    @property
    def name(self) -> str:
        """Name of the shot's file, without its ending."""
        return f"{self.video.stem}-{self.number}"

    @property
    def num_frames(self) -> int:
        """Number of frames."""
        return self.stop - self.start


def find_shots(video: str | Path, threshold: float = 27.0) -> list[Shot]:
    """Find all shots of a video, in order; together they are the whole video.

    The detector sees frames that we decode: `scenedetect.detect` computes frame numbers from time stamps, which are not
    the numbers of the decoded frames if the frame rate varies.

    Args:
        video: file of the video.
        threshold: difference between two frames in a row that counts as a cut (ContentDetector; PySceneDetect's default
            is 27).

    Raises:
        UserError: the video cannot be read.
    """
    video = Path(video)
    info = probe(video)
    detector = ContentDetector(threshold=threshold)
    factor = max(1, info.width // _DETECTION_WIDTH)
    cuts, stop = [], 0
    for frame in tqdm(iter_frames(video), f"finding cuts in {video.name}", info.num_frames, unit="frame"):
        small = np.asarray(Image.fromarray(frame).reduce(factor))
        cuts += detector.process_frame(FrameTimecode(stop, info.fps), small[:, :, ::-1])  # it wants BGR
        stop += 1
    bounds = [0, *sorted({cut.frame_num for cut in cuts}), stop]
    return [Shot(video, number, *bound) for number, bound in enumerate(itertools.pairwise(bounds), 1)]


def write_shots(shots: Sequence[Shot], folder: str | Path) -> list[Path]:
    """Write each shot of one video to `folder/<name>.mp4`, re-encoded at the same frame rate in high quality.

    Keeps a file that is whole and newer than the video. Holds one frame at a time in memory.

    Raises:
        UserError: the video cannot be read, or a file cannot be written.
    """
    paths = [Path(folder) / f"{shot.name}.mp4" for shot in shots]
    frames, position = iter_frames(shots[0].video), 0
    fps = float(probe(shots[0].video).fps)
    for shot, path in zip(shots, tqdm(paths, f"writing shots of {shots[0].video.name}", unit="shot"), strict=True):
        if not _is_written(shot, path):
            collections.deque(itertools.islice(frames, shot.start - position), maxlen=0)  # skips the frames between
            write_video(path, itertools.islice(frames, shot.num_frames), fps)
            position = shot.stop
    return paths


def _is_written(shot: Shot, path: Path) -> bool:
    if not path.exists() or path.stat().st_mtime < shot.video.stat().st_mtime:
        return False
    try:
        return probe(path).num_frames == shot.num_frames
    except UserError:  # left by a kill or damaged since; it is written again
        return False
