"""The story world: stories of which everything is known, some of it said in the captions and some never.

A scene is two frames of 4 x 4 pixels. A square stands in the middle of a background, then it has moved.

    said, drawn anew for every scene       the square's colour (4) and the way it moves (4): "red left"
    unsaid, one for the whole story        the background's palette (3) and its pattern (3)

All of it is plain to see: the background has three quarters of the pixels, the square stands out from it in every
palette. And nothing stands out from the rest: palettes are permutations of one triple of channels, all colours are
equally far from grey, patterns have as many light pixels as dark ones. So no choice is easier to hit than another.
"""

import dataclasses
import functools
import itertools

import numpy as np
from jaxtyping import UInt8

SIDE, NUM_FRAMES = 4, 2
_ACTOR, _STEP = 2, 1  # pixels: side of the square, and how far it moves

# In [-1, 1]. The words are single tokens of the tiny preset's vocabulary.
COLOURS = {"red": (1, -1, -1), "yellow": (1, 1, -1), "white": (1, 1, 1), "black": (-1, -1, -1)}
DIRECTIONS = {"up": (-1, 0), "down": (1, 0), "left": (0, -1), "right": (0, 1)}  # rows, columns
PALETTES = {"sea": (-0.5, 0.0, 0.5), "plum": (0.5, -0.5, 0.0), "moss": (0.0, 0.5, -0.5)}
PATTERNS = ("rows", "columns", "checks")
_CONTRAST = 0.35  # of a pattern, added to and taken from the palette's triple

TEXT_TOKENS = 3  # colour, direction, end of text


@dataclasses.dataclass(frozen=True, order=True)
class Unsaid:
    """What holds for a whole story and no caption says."""

    palette: str
    pattern: str


@dataclasses.dataclass(frozen=True, order=True)
class Said:
    """What a scene's caption says of it."""

    colour: str
    direction: str | None  # None: not seen, in a scene of one frame

    @property
    def caption(self) -> str:
        return f"{self.colour} {self.direction}"

    def shows(self, prompt: "Said") -> bool:
        """Whether all that is seen is as `prompt` says."""
        return self.colour == prompt.colour and self.direction in (None, prompt.direction)


@dataclasses.dataclass(frozen=True, order=True)
class WorldScene:
    """The whole truth about one scene."""

    unsaid: Unsaid
    said: Said

    @property
    def name(self) -> str:
        return "-".join((*dataclasses.astuple(self.unsaid), *dataclasses.astuple(self.said)))


WorldStory = tuple[WorldScene, ...]

ALL_UNSAID = tuple(Unsaid(*pair) for pair in itertools.product(PALETTES, PATTERNS))
ALL_SAID = tuple(Said(*pair) for pair in itertools.product(COLOURS, DIRECTIONS))
ALL_SCENES = tuple(WorldScene(*pair) for pair in itertools.product(ALL_UNSAID, ALL_SAID))


@functools.cache
def render(scene: WorldScene) -> UInt8[np.ndarray, "f h w 3"]:
    """The frames of a scene."""
    rows, columns = np.indices((SIDE, SIDE)) % 2
    light = {"rows": rows, "columns": columns, "checks": rows ^ columns}[scene.unsaid.pattern]
    background = np.array(PALETTES[scene.unsaid.palette]) + _CONTRAST * (2 * light[..., None] - 1)
    frames = np.stack([background] * NUM_FRAMES)
    for number, frame in enumerate(frames):
        top, left = ((SIDE - _ACTOR) // 2 + number * _STEP * way for way in DIRECTIONS[scene.said.direction])
        frame[top : top + _ACTOR, left : left + _ACTOR] = COLOURS[scene.said.colour]
    return ((frames + 1) * 127.5).round().astype(np.uint8)


def draw_stories(
    seed: int, count: int, *, num_scenes: int = 3, unrelated: float = 0.0, distinct: bool = False
) -> list[WorldStory]:
    """Stories drawn at random; the same for the same arguments.

    Args:
        unrelated: share of the stories whose scenes have nothing in common, each with an unsaid part of its own.
        distinct: no caption comes twice in a story, so that every prompt can be told from the others (only up to as
            many scenes as there are captions).
    """
    rng = np.random.default_rng([seed, num_scenes])
    stories = []
    for _ in range(count):
        unsaid = rng.choice(len(ALL_UNSAID), num_scenes)
        if rng.random() >= unrelated:
            unsaid[1:] = unsaid[0]
        said = rng.choice(len(ALL_SAID), num_scenes, replace=not distinct)
        stories.append(tuple(WorldScene(ALL_UNSAID[u], ALL_SAID[s]) for u, s in zip(unsaid, said, strict=True)))
    return stories
