"""Given scenes: clips, or pictures that are repeated for the length of the scene.

A picture could also be a scene of a single latent frame, with a sixth of the tokens. But the model was trained on
scenes of one length, with consecutive positions, and it has seen still shots, so a picture is repeated. A story file
asks for a single frame with `seconds: 0.1`.
"""

import math

import numpy as np
from absl import logging
from jaxtyping import Float32
from PIL import ExifTags, Image

from mask2dit_jax.errors import UserError
from mask2dit_jax.media.transforms import fit_frames, resized_shape
from mask2dit_jax.media.video_reader import VideoInfo, probe, read_frames
from mask2dit_jax.story.story import Scene, is_picture

_MUCH = 0.4  # share of a picture that may be cropped without a warning
_TURNS = {  # by EXIF's orientation
    **{2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM},
    **{5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE},
    8: Image.Transpose.ROTATE_90,
}
_LONG = 0.5  # seconds of a clip that may be left out without a warning
_FAST = 0.05  # relative change of a clip's speed that is allowed without a warning


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
        return _warn_of_loss(path, _read_picture(path).shape[:2], size)
    info = probe(path)
    used = _frames(scene, info, num_frames, fps)
    if info.num_frames < used.stop:
        raise UserError(
            f"{path}: {info.num_frames} frames are too few; {num_frames} frames at {fps:g} a second"
            f"{f' from second {scene.start:g} on' if scene.start else ''} need {used.stop} of its "
            f"{float(info.fps):g} a second; give a longer clip, fewer `seconds` or num_frames, or a picture"
        )
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
        return np.repeat(fit_frames(_read_picture(path)[None], size), num_frames, axis=0)
    return fit_frames(read_frames(path, _frames(scene, probe(path), num_frames, fps)), size)


def _frames(scene: Scene, info: VideoInfo, num_frames: int, fps: int | float) -> range:
    """Return which frames of the clip are the scene: evenly spaced ones, as in training."""
    start, stride = round(scene.start * info.fps), max(1, round(info.fps / fps))
    return range(start, start + (num_frames - 1) * stride + 1, stride)


def _read_picture(path: str) -> np.ndarray:
    """Read a picture upright, with 8 bits, and on white where it is transparent."""
    try:
        with Image.open(path) as image:
            return np.asarray(_plain(_upright(image)))
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file; correct the path of the given scene") from error
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:  # Pillow's words for damage
        raise UserError(f"{path}: damaged or not a picture; give a png, jpg or webp file") from error


def _upright(image: Image.Image) -> Image.Image:
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation)
    except Exception:  # whatever is wrong with the EXIF, the pixels are fine
        return image
    return image.transpose(_TURNS[orientation]) if orientation in _TURNS else image


def _plain(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image) / 257).round().astype(np.uint8))
    if image.has_transparency_data:
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
    return image.convert("RGB")


def _warn_of_length(path: str, info: VideoInfo, used: range, fps: int | float) -> None:
    left_out = float((info.num_frames - used.stop) / info.fps)
    if not used.start and left_out > _LONG:
        logging.warning(
            "%s: the first %.1f s of its %.1f s are the scene; `start: %.1f` in a story file takes the last",
            *(path, info.duration - left_out, info.duration, math.floor(10 * left_out) / 10),
        )
    speed = fps * used.step / float(info.fps)
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
