"""SceneLayout: the only place that knows which token and which latent frame belongs to which scene."""

import dataclasses
import itertools
from collections.abc import Iterator

import numpy as np
from jaxtyping import Bool, Int

from mask2dit_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Segment:
    """A run of tokens of one kind in one scene; masks are constant over pairs of segments."""

    scene: int
    is_text: bool
    start: int
    stop: int


@dataclasses.dataclass(frozen=True)
class SceneLayout:
    """The shape of a multi-scene video. Static: it is hashable, and every array below is NumPy.

    Tokens are ordered `[T_1 .. T_n ; V_1 .. V_n]` (FACTS of the paper's section 3.2); scenes may have unequal lengths.

    Attributes:
        frames: latent frames of each scene.
        grid: rows and columns of tokens in one latent frame (latent height / patch, latent width / patch).
        text_tokens: text tokens of each scene, padding included.
    """

    frames: tuple[int, ...]
    grid: tuple[int, int]
    text_tokens: int

    def __post_init__(self):
        if not self.frames or min(self.frames) < 1 or min(self.grid) < 1 or self.text_tokens < 1:
            raise UserError(f"a scene layout needs at least one scene, and no part of it may be empty: {self}")

    @classmethod
    def of_equal_scenes(cls, num_scenes: int, frames: int, grid: tuple[int, int], text_tokens: int) -> "SceneLayout":
        return cls((frames,) * num_scenes, tuple(grid), text_tokens)

    @property
    def num_scenes(self) -> int:
        return len(self.frames)

    @property
    def num_frames(self) -> int:
        """Latent frames of all scenes together."""
        return sum(self.frames)

    @property
    def tokens_per_frame(self) -> int:
        return self.grid[0] * self.grid[1]

    @property
    def num_text_tokens(self) -> int:
        """Text tokens of all scenes: where the video tokens start."""
        return self.num_scenes * self.text_tokens

    @property
    def num_tokens(self) -> int:
        return self.num_text_tokens + self.num_frames * self.tokens_per_frame

    @property
    def frame_slices(self) -> tuple[slice, ...]:
        """The latent frames of each scene."""
        stops = tuple(itertools.accumulate(self.frames))
        return tuple(slice(stop - length, stop) for stop, length in zip(stops, self.frames, strict=True))

    @property
    def frame_scenes(self) -> Int[np.ndarray, " f"]:
        """The scene of each latent frame."""
        return np.repeat(np.arange(self.num_scenes, dtype=np.int32), self.frames)

    @property
    def segments(self) -> tuple[Segment, ...]:
        """The 2n query groups of grouped attention, in token order: all texts, then all videos."""
        return tuple(self._segments())

    def _segments(self) -> Iterator[Segment]:
        start = 0
        video_lengths = [frames * self.tokens_per_frame for frames in self.frames]
        for is_text, lengths in ((True, [self.text_tokens] * self.num_scenes), (False, video_lengths)):
            for scene, length in enumerate(lengths):
                yield Segment(scene, is_text, start, start + length)
                start += length

    @property
    def token_scenes(self) -> Int[np.ndarray, " l"]:
        """The scene of each token."""
        return np.concatenate([np.full(s.stop - s.start, s.scene, np.int32) for s in self.segments])

    @property
    def token_is_text(self) -> Bool[np.ndarray, " l"]:
        return np.arange(self.num_tokens) < self.num_text_tokens
