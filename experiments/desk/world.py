"""The story world: stories whose properties are fully known, some stated in the captions and some never stated.

A scene has two frames of 4 x 4 pixels. A square is in the middle of a background, and then it has moved.

    said, drawn for each scene        the square's colour (4) and the direction of its move (4), such as "red left"
    unsaid, the same for a story      the background's palette (3) and pattern (3)

All properties are clearly visible: the background covers three quarters of the pixels, and the square stands out in
every palette. No value is easier to produce than another: palettes are permutations of one triple of channels, all
colours are equally far from grey, and patterns have as many light pixels as dark ones.
"""

import dataclasses
import functools
import itertools

import numpy as np
from jaxtyping import UInt8

SIDE, NUM_FRAMES = 4, 2
_ACTOR, _STEP = 2, 1  # pixels: side of the square, and how far it moves

# Values are in [-1, 1]. Each word is a single token of the tiny preset's vocabulary.
COLOURS = {"red": (1, -1, -1), "yellow": (1, 1, -1), "white": (1, 1, 1), "black": (-1, -1, -1)}
DIRECTIONS = {"up": (-1, 0), "down": (1, 0), "left": (0, -1), "right": (0, 1)}  # rows, columns
PALETTES = {"sea": (-0.5, 0.0, 0.5), "plum": (0.5, -0.5, 0.0), "moss": (0.0, 0.5, -0.5)}
PATTERNS = ("rows", "columns", "checks")
_CONTRAST = 0.35  # a pattern adds it to the palette's triple or subtracts it

TEXT_TOKENS = 3  # colour, direction, end of text


@dataclasses.dataclass(frozen=True, order=True)
class Unsaid:
    """The properties that are the same in a whole story and that no caption states."""

    palette: str
    pattern: str


@dataclasses.dataclass(frozen=True, order=True)
class Said:
    """The properties that a scene's caption states."""

    colour: str
    direction: str | None  # None if a scene of one frame was read, which shows no direction

    @property
    def caption(self) -> str:
        """Caption of the scene, such as "red left"."""
        return f"{self.colour} {self.direction}"

    def shows(self, prompt: "Said") -> bool:
        """Return whether all visible properties are those of `prompt`."""
        return self.colour == prompt.colour and self.direction in (None, prompt.direction)


@dataclasses.dataclass(frozen=True, order=True)
class WorldScene:
    """All properties of one scene."""

    unsaid: Unsaid
    said: Said

    @property
    def name(self) -> str:
        """Name that identifies the scene, for its file."""
        return "-".join((*dataclasses.astuple(self.unsaid), *dataclasses.astuple(self.said)))


WorldStory = tuple[WorldScene, ...]

ALL_UNSAID = tuple(Unsaid(*pair) for pair in itertools.product(PALETTES, PATTERNS))
ALL_SAID = tuple(Said(*pair) for pair in itertools.product(COLOURS, DIRECTIONS))
ALL_SCENES = tuple(WorldScene(*pair) for pair in itertools.product(ALL_UNSAID, ALL_SAID))


@functools.cache
def render(scene: WorldScene) -> UInt8[np.ndarray, "f h w 3"]:
    """Draw the frames of a scene."""
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
    """Draw random stories, which are the same for the same arguments.

    Args:
        seed: Seed of the random numbers.
        count: Number of stories.
        num_scenes: Number of scenes in a story.
        unrelated: Share of the stories whose scenes are unrelated, each with its own unsaid properties.
        distinct: Whether no caption occurs twice in a story. `num_scenes` must then not exceed the number of captions.
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
