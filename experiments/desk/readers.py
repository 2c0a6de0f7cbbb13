"""Measures of sampled stories, which need no network: each scene is read as the nearest scene of the world.

A scene of one frame shows no direction, so only its colour is compared with the prompt.

visual     whether the unsaid properties are the same in all scenes of the story
semantic   whether a scene shows what its own prompt says
matrix     in row i and column j, whether scene i shows what prompt j says
error      the distance of a scene from the true picture, which is fully known in an extension
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, UInt8

from experiments.desk.world import ALL_SCENES, Said, WorldScene, WorldStory, render

Frames = UInt8[np.ndarray, "n _f h w 3"]  # one scene of n stories; scenes may have different lengths


def read_scenes(frames: Frames) -> list[WorldScene]:
    """Return the scene of the world nearest to each of these (by the sum of squares)."""
    length = frames.shape[1]
    known = {_seen(scene, length): render(scene)[:length] for scene in ALL_SCENES}
    templates = np.stack(list(known.values())).reshape(len(known), -1).astype(np.float64)
    flat = frames.reshape(len(frames), -1).astype(np.float64)
    distances = np.square(templates).sum(axis=1) - 2 * flat @ templates.T
    scenes = list(known)
    return [scenes[index] for index in distances.argmin(axis=1)]


def _seen(scene: WorldScene, num_frames: int) -> WorldScene:
    return scene if num_frames > 1 else WorldScene(scene.unsaid, Said(scene.said.colour, None))


def read_stories(scenes: Sequence[Frames]) -> list[WorldStory]:
    """Return the stories, given the frames of their first, second, ... scenes."""
    return list(zip(*map(read_scenes, scenes), strict=True))


@dataclasses.dataclass(frozen=True)
class Reading:
    """The measurements of each story (n) and scene (s).

    Attributes:
        agreement: 1 if a scene has the unsaid properties of the story's first scene, otherwise 0.
        matrix: 1 if scene s shows prompt t, otherwise 0.
        error: RMS difference of a scene from the truth, in grey levels (0..255).
    """

    agreement: Float[np.ndarray, "n s"]
    matrix: Float[np.ndarray, "n s t"]
    error: Float[np.ndarray, "n s"]

    @property
    def visual(self) -> Float[np.ndarray, " n"]:
        """1 if all scenes of a story agree, otherwise 0."""
        return self.agreement.min(axis=1)

    @property
    def semantic(self) -> Float[np.ndarray, " n"]:
        """Share of a story's scenes that show their own prompt."""
        return np.diagonal(self.matrix, axis1=1, axis2=2).mean(axis=1)


def measure_stories(scenes: Sequence[Frames], truth: Sequence[WorldStory]) -> Reading:
    """Measure stories that were sampled from the prompts of `truth`.

    Args:
        scenes: Frames of all stories' first, second, ... scenes.
        truth: The stories as they should be.
    """
    found = read_stories(scenes)
    agreement = [[scene.unsaid == story[0].unsaid for scene in story] for story in found]
    matrix = [
        [[scene.said.shows(prompt.said) for prompt in told] for scene in story]
        for story, told in zip(found, truth, strict=True)
    ]
    error = np.stack([_error(frames, told) for frames, told in zip(scenes, zip(*truth, strict=True), strict=True)], 1)
    return Reading(np.array(agreement, np.float64), np.array(matrix, np.float64), error)


def _error(frames: Frames, truth: Sequence[WorldScene]) -> Float[np.ndarray, " n"]:
    wanted = np.stack([render(scene)[: frames.shape[1]] for scene in truth])
    return np.sqrt(np.square(frames.astype(np.float64) - wanted).mean(axis=(1, 2, 3, 4)))
