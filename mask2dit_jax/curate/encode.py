"""Encoding clips once: decode, transform, encode; and filling the latent cache with what comes out."""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
from absl import logging
from tqdm import tqdm

from mask2dit_jax.data.frames import FrameChoices, PretrainSampling, SftSampling
from mask2dit_jax.data.latent_cache import CacheSettings, EncodedClip, LatentCache
from mask2dit_jax.data.skipped import Skipped
from mask2dit_jax.data.sources import Clip
from mask2dit_jax.errors import UserError
from mask2dit_jax.media.transforms import fit_frames
from mask2dit_jax.media.video_reader import probe, read_frames


@dataclasses.dataclass(frozen=True)
class Encoders:
    """The frozen encoders as functions.

    Attributes:
        video: (f h w 3) in [-1, 1] -> posterior mean and logvar (f h w c), unscaled.
        text: n captions -> (n t x).
    """

    video: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]
    text: Callable[[Sequence[str]], np.ndarray]


@dataclasses.dataclass(frozen=True)
class Encoded:
    """What became of the clips: `usable` ones are in the cache; `num_new` of them were not before."""

    usable: tuple[Clip, ...]
    num_new: int


def encode_clips(clips: Sequence[Clip], cache: LatentCache, encoders: Encoders, skipped: Skipped) -> Encoded:
    """Brings every clip into the cache that is not there yet; a run that was killed goes on where it stopped.

    Args:
        clips: may name a clip more than once; it is encoded once.
        skipped: takes down the clips that cannot be used.

    Raises:
        UserError: too many clips cannot be used; the cache cannot be written.
    """
    usable, num_new = [], 0
    with tqdm(list(dict.fromkeys(clips)), desc="encoding clips", unit="clip") as progress:
        for clip in progress:
            if not cache.has(clip):
                try:
                    encoded = encode_clip(clip, cache.settings, encoders)
                except UserError as error:
                    skipped.add(clip.name, str(error))
                    progress.set_postfix(new=num_new, skipped=len(skipped))
                    continue
                cache.write(clip, encoded)
                num_new += 1
            usable.append(clip)
            progress.set_postfix(new=num_new, skipped=len(skipped))
    return Encoded(tuple(usable), num_new)


def frame_choices(clip: Clip, sampling: PretrainSampling | SftSampling) -> FrameChoices:
    """Which frames of the clip training may take, by what is really in its file.

    Raises:
        UserError: the video cannot be read, or is too short (TooShort).
    """
    num_frames = probe(clip.path).num_frames
    if num_frames != clip.num_frames:
        logging.warning("%s holds %d frames, the data file says %d", clip.path, num_frames, clip.num_frames)
    return sampling.choices(num_frames)


def encode_clip(clip: Clip, settings: CacheSettings, encoders: Encoders) -> EncodedClip:
    """All variants of a clip. Raises UserError as `frame_choices`, or if a frame cannot be decoded."""
    choices = frame_choices(clip, settings.sampling)
    starts = [settings.start(clip, variant, choices) for variant in range(settings.variants)]
    moments = []
    for start in starts:  # one variant at a time: a clip's frames at full size are large
        frames = read_frames(clip.path, choices.indices(start))
        moments.append(encoders.video(fit_frames(frames, settings.size)))
    return EncodedClip(
        mean=np.stack([mean for mean, _ in moments]).astype(np.float32),
        logvar=np.stack([logvar for _, logvar in moments]).astype(np.float32),
        text=np.asarray(encoders.text([clip.caption])[0], np.float32),
        starts=np.array(starts, np.int32),
        strides=np.full(len(starts), choices.stride, np.int32),
    )
