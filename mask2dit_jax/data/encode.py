"""From clips to latents: decode, transform, encode; all variants of a clip for the store, or one at each visit."""

import dataclasses
import functools
from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Float32, Int32, UInt8

from mask2dit_jax.data.frames import FrameChoices, frame_choices
from mask2dit_jax.data.latents import LatentSettings, SceneRecords, StoredClip, UnreadableScene
from mask2dit_jax.data.sources import Clip, Group
from mask2dit_jax.errors import UserError
from mask2dit_jax.media.transforms import resize_frames, scale_pixels
from mask2dit_jax.media.video_reader import read_frames

EncodeVideo = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]


@dataclasses.dataclass(frozen=True)
class Encoders:
    """The frozen encoders as functions.

    Attributes:
        video: (f h w 3) in [-1, 1] -> posterior mean and logvar (f h w c), unscaled.
        text: n captions -> (n t x).
    """

    video: EncodeVideo
    text: Callable[[Sequence[str]], np.ndarray]


@dataclasses.dataclass(frozen=True)
class EncodedClip:
    """All variants of one clip.

    Attributes:
        mean: of the VAE's posterior, unscaled; None if no frames are stored.
        logvar: of the same.
        text: embedding of the caption.
        starts: first frame of each variant.
        strides: frames from one that is used to the next.
    """

    mean: Float32[np.ndarray, "v f h w c"] | None
    logvar: Float32[np.ndarray, "v f h w c"] | None
    text: Float32[np.ndarray, "t x"]
    starts: Int32[np.ndarray, " v"]
    strides: Int32[np.ndarray, " v"]


def encode_clip(clip: Clip, settings: LatentSettings, encoders: Encoders) -> EncodedClip:
    """Encode the frames of every variant, and the caption.

    Raises:
        UserError: the video cannot be read or is too short, or a frame cannot be decoded.
    """
    # A damaged clip is left out, whatever part of it would be drawn, just as build_data --check_all_frames says.
    choices = frame_choices(clip, settings.sampling, all_frames=settings.variants > 0)
    starts = [settings.start(clip, variant, choices) for variant in range(settings.variants)]
    # One variant at a time, because a clip's frames at full size are large.
    moments = [encoders.video(scale_pixels(_pixels(clip, settings, choices, start))) for start in starts]
    mean, logvar = (
        (np.stack(part).astype(np.float32) for part in zip(*moments, strict=True)) if moments else (None,) * 2
    )
    return EncodedClip(
        mean,
        logvar,
        text=np.asarray(encoders.text([clip.caption])[0], np.float32),
        starts=np.array(starts, np.int32),
        strides=np.full(len(starts), choices.stride, np.int32),
    )


class FreshScenes:
    """Scenes whose frames are drawn anew at each visit, as in the authors' code; their embeddings are stored.

    `read` decodes a video and may run in any thread. `encode` runs the VAE and belongs to the thread that dispatches
    the training steps: programs that two threads send to the same devices may wait for each other for ever.
    """

    variants = 2**31  # so many seeds of a start; any two visits of a clip hardly ever draw the same one

    def __init__(self, texts: SceneRecords, clips: Sequence[Clip], settings: LatentSettings, encode_video: EncodeVideo):
        """Join the stored embeddings with the videos.

        Args:
            texts: a data set without frames (`LatentSettings.variants` is 0).
            clips: the usable clips, in the order of `texts.clips`.
            settings: the settings of `texts`.
            encode_video: see `Encoders`.
        """
        self._texts, self._videos, self._settings, self._encode_video = texts, tuple(clips), settings, encode_video
        self._choices = functools.cache(lambda clip: frame_choices(clip, settings.sampling))

    @property
    def clips(self) -> tuple[StoredClip, ...]:
        """The usable clips, in the order of the data file."""
        return self._texts.clips

    @property
    def groups(self) -> tuple[Group, ...]:
        """The groups of shots; none if the data file lists single clips."""
        return self._texts.groups

    def read(self, clip: StoredClip, variant: int) -> dict[str, np.ndarray]:
        """Decode the frames of one visit.

        Args:
            clip: one of `clips`.
            variant: seed of the first frame.

        Returns:
            `pixels` (f h w 3) as 8 bits, `text` (t x) in bf16, and `caption`, bytes in UTF-8.

        Raises:
            UnreadableScene: the video or the stored embedding cannot be read.
        """
        video = self._videos[clip.number]
        try:
            choices = self._choices(video)
            pixels = _pixels(video, self._settings, choices, self._settings.start(video, variant, choices))
        except UserError as error:
            raise UnreadableScene(clip.name, str(error)) from error
        return {"pixels": pixels, **self._texts.read(clip, 0)}

    def encode(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Replace the `pixels` (b f h w 3) of a batch, its scenes one after another along f, by `mean` and `logvar`."""
        num_samples, num_scenes = batch["text"].shape[:2]
        scenes = batch["pixels"].reshape(num_samples * num_scenes, -1, *batch["pixels"].shape[2:])
        moments = zip(*(self._encode_video(scale_pixels(scene)) for scene in scenes), strict=True)
        mean, logvar = (np.stack(part).astype(np.float32) for part in moments)
        latents = {name: x.reshape(num_samples, -1, *x.shape[2:]) for name, x in (("mean", mean), ("logvar", logvar))}
        return {**latents, "text": batch["text"]}


def _pixels(clip: Clip, settings: LatentSettings, choices: FrameChoices, start: int) -> UInt8[np.ndarray, "f h w 3"]:
    frames = read_frames(clip.path, choices.indices(start))
    try:
        return resize_frames(frames, settings.size, settings.fit)
    except (ValueError, MemoryError) as error:  # Pillow's words for a picture of absurd proportions
        height, width = frames.shape[1:3]
        raise UserError(f"{clip.path}: its {width} x {height} pixels cannot be resized ({error}); remove it") from error
