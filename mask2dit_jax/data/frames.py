"""Which frames of a clip are used: the rules of the authors' two training stages.

Both rules lead to `FrameChoices`: so many frames, a fixed stride apart, from a start drawn uniformly from a range.
"""

import dataclasses

import numpy as np
from absl import logging

from mask2dit_jax.data.sources import Clip, printable
from mask2dit_jax.errors import UserError
from mask2dit_jax.media.video_reader import probe


class TooShort(UserError):
    """A clip has too few frames: nothing is broken, but these settings cannot use it."""


@dataclasses.dataclass(frozen=True)
class FrameChoices:
    """Every way to take `count` frames, `stride` apart, from one clip: one for each of `starts`."""

    count: int
    stride: int
    starts: range

    def draw(self, rng: np.random.Generator) -> int:
        """Draw one of `starts`, all equally likely."""
        return self.starts[rng.integers(len(self.starts))]

    def indices(self, start: int) -> range:
        """Return the numbers of the frames taken from `start` on."""
        return range(start, start + self.stride * self.count, self.stride)


@dataclasses.dataclass(frozen=True)
class SftSampling:
    """SFT: the largest stride in [min_stride, max_stride] with which `num_frames` fit into the whole clip."""

    num_frames: int
    min_stride: int = 1
    max_stride: int = 3

    def choices(self, clip_frames: int) -> FrameChoices:
        """Return the choices that a clip of `clip_frames` frames leaves.

        Raises:
            TooShort: the clip is too short for the smallest stride (the authors' code returns None).
        """
        for stride in range(self.max_stride, self.min_stride - 1, -1):
            room = clip_frames - 1 - (self.num_frames - 1) * stride
            if room >= 0:
                return FrameChoices(self.num_frames, stride, range(room + 1))
        raise TooShort(
            f"a clip of {clip_frames} frames is too short: {self.num_frames} frames at stride {self.min_stride} need "
            f"{(self.num_frames - 1) * self.min_stride + 1}; use a longer clip or fewer frames"
        )


@dataclasses.dataclass(frozen=True)
class PretrainSampling:
    """Pretraining: a fixed stride inside the middle of a clip, `drop_start` to `drop_end` of its length.

    The arithmetic is that of the authors' code, with its rounding, so that the same clips are kept and the same frames
    can be drawn: 0.95 - 0.05 is a little less than 0.9 in floating point and loses a frame at exact multiples, and the
    first start is 5 % of the first 95 %.
    """

    num_frames: int
    stride: int = 3
    drop_start: float = 0.05
    drop_end: float = 0.95

    def choices(self, clip_frames: int) -> FrameChoices:
        """Return the choices that a clip of `clip_frames` frames leaves.

        Raises:
            TooShort: the middle of the clip is too short (the authors' code hard-codes 49 frames in its filter).
        """
        fitting = self.fitting_frames(clip_frames)
        if fitting < self.num_frames:
            raise TooShort(
                f"a clip of {clip_frames} frames is too short: its middle ({self.drop_start:.0%} to "
                f"{self.drop_end:.0%}) holds {fitting} of {self.num_frames} frames at stride {self.stride}; use a "
                "longer clip, fewer frames or a smaller stride"
            )
        return self.shortened_choices(clip_frames)

    def fitting_frames(self, clip_frames: int) -> int:
        """Return how many frames, `stride` apart, fit into the middle of the clip."""
        return int(clip_frames * (self.drop_end - self.drop_start) // self.stride)

    def shortened_choices(self, clip_frames: int) -> FrameChoices:
        """Return the choices with fewer frames where `num_frames` do not fit.

        Raises:
            TooShort: not one frame fits.
        """
        count = min(self.num_frames, self.fitting_frames(clip_frames))
        last_frame = int(self.drop_end * clip_frames)
        span = (count - 1) * self.stride + 1
        first = int(self.drop_start * last_frame) if last_frame != span else 0
        starts = range(first, last_frame - span + 1)
        if count < 1 or not starts:
            raise TooShort(f"a clip of {clip_frames} frames has no room for one frame at stride {self.stride}")
        return FrameChoices(count, self.stride, starts)


def frame_choices(clip: Clip, sampling: PretrainSampling | SftSampling, all_frames: bool = False) -> FrameChoices:
    """Return which frames of the clip training may take, by the number of frames that its video really holds.

    Args:
        clip: the clip.
        sampling: the rule; its strides count frames whatever their times are, as in the authors' code.
        all_frames: whether to decode every frame, so that damage between key frames is found too.

    Raises:
        UserError: the video cannot be read, or is too short (TooShort).
    """
    num_frames = probe(clip.path, all_frames).num_frames
    if num_frames != clip.num_frames:
        name = printable(str(clip.path))
        logging.warning("%s holds %d frames, the data file says %d", name, num_frames, clip.num_frames)
    return sampling.choices(num_frames)
