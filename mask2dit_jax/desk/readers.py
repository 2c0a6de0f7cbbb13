"""Reading a sampled story without any network: every scene is what the nearest picture of the world is.

visual     the unsaid things are the same in all scenes of the story
semantic   a scene shows what its own prompt says
matrix     row i, column j: how often scene i shows what prompt j says
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, UInt8

from mask2dit_jax.desk.world import ALL_SCENES, Scene, Story, render

Stories = UInt8[np.ndarray, "n s f h w 3"]


def read_scenes(frames: UInt8[np.ndarray, "n f h w 3"]) -> list[Scene]:
    """The scene of the world whose frames are nearest to each of these (sum of squares)."""
    templates = np.stack([render(scene) for scene in ALL_SCENES]).reshape(len(ALL_SCENES), -1).astype(np.float64)
    flat = frames.reshape(len(frames), -1).astype(np.float64)
    distances = np.square(templates).sum(axis=1) - 2 * flat @ templates.T
    return [ALL_SCENES[index] for index in distances.argmin(axis=1)]


def read_stories(stories: Stories) -> list[Story]:
    num_scenes = stories.shape[1]
    scenes = read_scenes(stories.reshape(-1, *stories.shape[2:]))
    return [tuple(scenes[start : start + num_scenes]) for start in range(0, len(scenes), num_scenes)]


@dataclasses.dataclass(frozen=True)
class Reading:
    """What was found in each story, to be averaged.

    Attributes:
        agreement: 1 where a scene has the unsaid things of the story's first scene, else 0.
        matrix: 1 where scene i shows prompt j.
    """

    agreement: Float[np.ndarray, "n s"]
    matrix: Float[np.ndarray, "n s t"]

    @property
    def visual(self) -> Float[np.ndarray, " n"]:
        """1 where all scenes of a story agree."""
        return self.agreement.min(axis=1)

    @property
    def semantic(self) -> Float[np.ndarray, " n"]:
        """The share of a story's scenes that show their own prompt."""
        return np.diagonal(self.matrix, axis1=1, axis2=2).mean(axis=1)


def measure(found: Sequence[Story], truth: Sequence[Story]) -> Reading:
    """What was `found` in stories sampled from the prompts of `truth`."""
    agreement = [[scene.unsaid == story[0].unsaid for scene in story] for story in found]
    matrix = [
        [[scene.said == prompt.said for prompt in told] for scene in story]
        for story, told in zip(found, truth, strict=True)
    ]
    return Reading(np.array(agreement, np.float64), np.array(matrix, np.float64))
