"""Given scenes: clips, or pictures that are repeated for the length of the scene.

A picture could also be a scene of a single latent frame, with a sixth of the tokens. But the model was trained on
scenes of one length, with consecutive positions, and it has seen still shots, so a picture is repeated. A story file
asks for a single frame with `seconds: 0.1`.
"""

import bisect
import math
from collections.abc import Sequence

import numpy as np
from absl import logging
from jaxtyping import Float32

from mask2dit_jax.errors import UserError
from mask2dit_jax.media.pictures import is_picture, read_picture
from mask2dit_jax.media.transforms import fit_frames, resized_shape
from mask2dit_jax.media.video_reader import VideoInfo, check_frames, probe, read_frames
from mask2dit_jax.story.story import Scene

_MUCH = 0.4  # share of a picture that may be cropped without a warning
_LONG = 0.5  # seconds of a clip that may be left out without a warning
_FAST = 0.05  # relative change of a clip's speed that is allowed without a warning
_TICK = 1e-3  # seconds; to such multiples Matroska rounds its time stamps


def check_given(scene: Scene, num_frames: int, fps: int | float, size: tuple[int, int]) -> float:
    """Warn if a given scene loses much of its picture or of its length, or if it is shown too fast or too slow.

    Args:
        scene: given scene.
        num_frames: pixel frames that it has in the story.
        fps: frames per second of the story.
        size: height and width of the story.

    Returns:
        The share of its picture that it loses to the centre crop.

    Raises:
        UserError: the file is missing, damaged, of another kind, or too short.
    """
    path = scene.given
    if is_picture(path):
        return _warn_of_loss(path, read_picture(path).shape[:2], size)
    info = probe(path)
    used = _frames(scene, info, num_frames, fps)
    check_frames(path, used[-1] + 1)
    _warn_of_length(path, info, used, fps)
    return _warn_of_loss(path, (info.height, info.width), size)


def read_given(
    scene: Scene, num_frames: int, fps: int | float, size: tuple[int, int]
) -> Float32[np.ndarray, "f _h _w 3"]:
    """Return the frames of a given clip at the story's rate, or its repeated picture, in [-1, 1].

    Args:
        scene: given scene.
        num_frames: pixel frames that it has in the story.
        fps: frames per second of the story.
        size: height and width of the story.

    Raises:
        UserError: as `check_given`.
    """
    path = scene.given
    if is_picture(path):
        return np.repeat(fit_frames(read_picture(path)[None], size), num_frames, axis=0)
    return fit_frames(read_frames(path, _frames(scene, probe(path), num_frames, fps)), size)


def _frames(scene: Scene, info: VideoInfo, num_frames: int, fps: int | float) -> Sequence[int]:
    """Return which frames of the clip are the scene.

    At a steady rate these are evenly spaced ones, as in training, so that motion is even, if not of quite the right
    speed. At a varying rate these are what a player shows at each moment, by the time stamps.

    Raises:
        UserError: The clip is too short.
    """
    first, stride = round(scene.start * info.fps), max(1, round(info.fps / fps))
    steady = range(first, first + (num_frames - 1) * stride + 1, stride)
    moments = [scene.start + number / fps for number in range(num_frames)]
    if info.is_steady:
        needed, fits = f"{steady.stop} of its {float(info.fps):g} a second", steady.stop <= info.num_frames
    else:
        needed, fits = f"{moments[-1]:.1f} of its {info.duration:.1f} s", moments[-1] < info.duration
    if not fits:
        raise UserError(
            f"{scene.given}: {info.num_frames} frames are too few; {num_frames} frames at {fps:g} a second"
            f"{f' from second {scene.start:g} on' if scene.start else ''} need {needed}; "
            "give a longer clip, fewer `seconds` or num_frames, or a picture"
        )
    return steady if info.is_steady else [bisect.bisect_right(info.times, moment + _TICK) - 1 for moment in moments]


def _warn_of_length(path: str, info: VideoInfo, used: Sequence[int], fps: int | float) -> None:
    """Warn of what is left out, and of another speed, which only a clip of a steady rate can have."""
    shown = info.times[used[-1]] + float(1 / info.fps) if info.is_steady else info.times[used[0]] + len(used) / fps
    left_out = info.duration - shown
    if not used[0] and left_out > _LONG:
        logging.warning(
            "%s: the first %.1f s of its %.1f s are the scene; `start: %.1f` in a story file takes the last",
            *(path, info.duration - left_out, info.duration, math.floor(10 * left_out) / 10),
        )
    speed = fps * used.step / float(info.fps) if info.is_steady else 1.0
    if abs(speed - 1) > _FAST:
        logging.warning(
            "%s: %.4g frames a second become %g, so that it is %.2f times as fast; give it %g or a multiple",
            *(path, float(info.fps), fps, speed, fps),
        )


def _warn_of_loss(path: str, shape: tuple[int, int], size: tuple[int, int]) -> float:
    """Return the share that is cropped. Warn if it is much: only a band of a portrait clip fits into a landscape."""
    height, width = resized_shape(shape, size)
    kept = size[0] * size[1] / (height * width)
    if kept < 1 - _MUCH:
        logging.warning(
            "%s: only the middle %.0f %% of its %d x %d picture fit into %d x %d; crop it yourself to choose the part",
            *(path, 100 * kept, *shape, *size),
        )
    return 1 - kept
