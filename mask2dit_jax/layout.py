"""The SceneLayout, the only place that knows which scene a token or a latent frame belongs to."""

import dataclasses
import itertools
from collections.abc import Iterator

import numpy as np
from jaxtyping import Bool, Int

from mask2dit_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Segment:
    """The text tokens or the video tokens of one scene, [start, stop) of the sequence.

    A mask is constant over each pair of segments.
    """

    scene: int
    is_text: bool
    start: int
    stop: int


@dataclasses.dataclass(frozen=True)
class SceneLayout:
    """The shape of a multi-scene video.

    A layout is static: it is hashable, and all of its arrays are NumPy. Tokens are ordered
    `[T_1 .. T_n ; V_1 .. V_n]` (paper, section 3.2). Scenes may differ in length.

    Attributes:
        frames: Number of latent frames of each scene.
        grid: Rows and columns of tokens in a latent frame (latent height / patch, latent width / patch).
        text_tokens: Number of text tokens of each scene, including padding.

    Raises:
        UserError: There is no scene, or a part of the layout is empty.
    """

    frames: tuple[int, ...]
    grid: tuple[int, int]
    text_tokens: int

    def __post_init__(self):
        """Refuse an empty layout."""
        if not self.frames or min(self.frames) < 1 or min(self.grid) < 1 or self.text_tokens < 1:
            raise UserError(f"a scene layout needs at least one scene, and none of its parts may be empty: {self}")

    @classmethod
    def of_equal_scenes(cls, num_scenes: int, frames: int, grid: tuple[int, int], text_tokens: int) -> "SceneLayout":
        """Build the layout of `num_scenes` scenes of `frames` latent frames each."""
        return cls((frames,) * num_scenes, tuple(grid), text_tokens)

    @property
    def num_scenes(self) -> int:
        """Number of scenes."""
        return len(self.frames)

    @property
    def num_frames(self) -> int:
        """Number of latent frames of all scenes together."""
        return sum(self.frames)

    @property
    def tokens_per_frame(self) -> int:
        """Number of video tokens in a latent frame."""
        return self.grid[0] * self.grid[1]

    @property
    def num_text_tokens(self) -> int:
        """Number of text tokens of all scenes together, which is the index of the first video token."""
        return self.num_scenes * self.text_tokens

    @property
    def num_tokens(self) -> int:
        """Number of text and video tokens together."""
        return self.num_text_tokens + self.num_frames * self.tokens_per_frame

    @property
    def frame_slices(self) -> tuple[slice, ...]:
        """The latent frames of each scene, as slices of the `f` axis."""
        stops = tuple(itertools.accumulate(self.frames))
        return tuple(slice(stop - length, stop) for stop, length in zip(stops, self.frames, strict=True))

    @property
    def frame_scenes(self) -> Int[np.ndarray, " f"]:
        """The index of each latent frame's scene."""
        return np.repeat(np.arange(self.num_scenes, dtype=np.int32), self.frames)

    @property
    def segments(self) -> tuple[Segment, ...]:
        """The 2n segments in token order: the texts of all scenes, then their videos."""
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
        """The index of each token's scene."""
        return np.concatenate([np.full(s.stop - s.start, s.scene, np.int32) for s in self.segments])

    @property
    def token_is_text(self) -> Bool[np.ndarray, " l"]:
        """Whether each token is a text token."""
        return np.arange(self.num_tokens) < self.num_text_tokens
