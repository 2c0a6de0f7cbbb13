"""Filling the latent cache: decode, transform and encode every clip once."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from absl import logging
from tqdm import tqdm

from mask2dit_jax.data.cache import CacheSettings, EncodedClip, LatentCache
from mask2dit_jax.data.sampling import TooShort
from mask2dit_jax.data.sources import Clip
from mask2dit_jax.data.transforms import fit_frames
from mask2dit_jax.data.video import probe, read_frames
from mask2dit_jax.errors import UserError

# (f h w 3) in [-1, 1] -> posterior mean and logvar (f h w c), unscaled
EncodeVideo = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]
# n captions -> (n t x)
EncodeText = Callable[[Sequence[str]], np.ndarray]


@dataclasses.dataclass(frozen=True)
class Encoded:
    """What became of the clips: `usable` ones are in the cache; `skipped` maps the names of the others to a reason."""

    usable: tuple[Clip, ...]
    num_new: int
    skipped: Mapping[str, str]


def encode_clips(
    clips: Sequence[Clip],
    cache: LatentCache,
    encode_video: EncodeVideo,
    encode_text: EncodeText,
    *,
    skip_damaged: bool,
) -> Encoded:
    """Brings every clip into the cache that is not there yet; a run that was killed goes on where it stopped.

    A clip too short for the frames wanted is skipped with a warning, as in the authors' filter.

    Args:
        clips: may name a clip more than once; it is encoded once.
        skip_damaged: skip unreadable videos too, instead of stopping at the first.

    Raises:
        UserError: a video cannot be read (unless `skip_damaged`); no clip is usable; the cache cannot be written.
    """
    usable, skipped, num_new = [], {}, 0
    with tqdm(list(dict.fromkeys(clips)), desc="encoding clips", unit="clip") as progress:
        for clip in progress:
            if not cache.has(clip):
                try:
                    encoded = _encode(clip, cache.settings, encode_video, encode_text)
                except UserError as error:
                    if not (skip_damaged or isinstance(error, TooShort)):
                        raise
                    logging.warning("clip %s is skipped: %s", clip.name, error)
                    skipped[clip.name] = str(error)
                    progress.set_postfix(new=num_new, skipped=len(skipped))
                    continue
                cache.write(clip, encoded)
                num_new += 1
            usable.append(clip)
            progress.set_postfix(new=num_new, skipped=len(skipped))
    if not usable:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in list(skipped.items())[:3])
        raise UserError(f"none of {len(clips)} clips can be used ({reasons})")
    return Encoded(tuple(usable), num_new, skipped)


def _encode(clip: Clip, settings: CacheSettings, encode_video: EncodeVideo, encode_text: EncodeText) -> EncodedClip:
    num_frames = probe(clip.path).num_frames
    if num_frames != clip.num_frames:
        logging.warning("%s holds %d frames, the data file says %d", clip.path, num_frames, clip.num_frames)
    choices = settings.sampling.choices(num_frames)
    starts = [settings.start(clip, variant, choices) for variant in range(settings.variants)]
    moments = []
    for start in starts:  # one variant at a time: a clip's frames at full size are large
        frames = read_frames(clip.path, choices.indices(start))
        moments.append(encode_video(fit_frames(frames, settings.size)))
    return EncodedClip(
        mean=np.stack([mean for mean, _ in moments]).astype(np.float32),
        logvar=np.stack([logvar for _, logvar in moments]).astype(np.float32),
        text=np.asarray(encode_text([clip.caption])[0], np.float32),
        starts=np.array(starts, np.int32),
        strides=np.full(len(starts), choices.stride, np.int32),
    )
