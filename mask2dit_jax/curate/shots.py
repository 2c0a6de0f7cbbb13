"""Cutting long videos into shots: PySceneDetect finds the cuts, each shot becomes a file of its own.

    NAME-2.mp4    the second shot of NAME
    NAME-2.json   what it was made from: hash of the video, first and last frame, rate, encoder; and its own hash

A shot is kept only if it is the file that was written, and if it would be made from the same again.
"""

import collections
import dataclasses
import itertools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from scenedetect import ContentDetector, FrameTimecode
from tqdm import tqdm

from mask2dit_jax.io.atomic import atomic_output
from mask2dit_jax.io.content import file_hash
from mask2dit_jax.media.video_reader import iter_frames, probe
from mask2dit_jax.media.video_writer import CODEC, ENCODER, PIXELS, write_video

_FORMAT = 1  # raise it when the same frames of a video are decoded or written in another way
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

    Keeps a file that was made from the same frames of the same video with the same settings. Holds one frame at a time
    in memory.

    Raises:
        UserError: the video cannot be read, or a file cannot be written.
    """
    paths = [Path(folder) / f"{shot.name}.mp4" for shot in shots]
    frames, position = iter_frames(shots[0].video), 0
    fps, source = float(probe(shots[0].video).fps), file_hash(shots[0].video)
    for shot, path in zip(shots, tqdm(paths, f"writing shots of {shots[0].video.name}", unit="shot"), strict=True):
        made_from = {
            "format": _FORMAT,
            "source": source,
            "frames": [shot.start, shot.stop - 1],
            "fps": fps,
            "encoder": {"codec": CODEC, "pixels": PIXELS, **ENCODER},
        }
        if not _is_written(path, made_from):
            collections.deque(itertools.islice(frames, shot.start - position), maxlen=0)  # skips the frames between
            write_video(path, itertools.islice(frames, shot.num_frames), fps)
            with atomic_output(path.with_suffix(".json")) as partial:
                partial.write_text(json.dumps({**made_from, "shot": file_hash(path)}, indent=2) + "\n")
            position = shot.stop
    return paths


def _is_written(path: Path, made_from: Mapping[str, object]) -> bool:
    """Return whether the file is the one that was made from this: neither damaged since nor replaced."""
    try:
        return json.loads(path.with_suffix(".json").read_text()) == {**made_from, "shot": file_hash(path)}
    except (OSError, ValueError):  # of an older version, or left by a kill; it is written again
        return False
