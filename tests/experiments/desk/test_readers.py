"""The readers score 100 % on the truth and chance on noise, and tell one mistake from another."""

import numpy as np
import pytest

from experiments.desk.readers import measure_stories, read_scenes
from experiments.desk.world import ALL_SAID, ALL_SCENES, ALL_UNSAID, Unsaid, WorldScene, draw_stories, render

TRUTH = draw_stories(5, 3000, distinct=True)


def frames_of(stories, *lengths: int) -> list[np.ndarray]:
    """The scenes of the stories, of so many frames: the first of each story, the second, the third."""
    return [
        np.stack([render(scene)[:length] for scene in scenes])
        for scenes, length in zip(zip(*stories, strict=True), lengths or (2, 2, 2), strict=True)
    ]


def test_every_scene_is_read_as_it_is_also_through_noise():
    frames = np.stack([render(scene) for scene in ALL_SCENES])
    noise = np.random.default_rng(0).normal(0, 25, frames.shape)
    noisy = np.clip(frames + noise, 0, 255).astype(np.uint8)
    assert read_scenes(frames) == list(ALL_SCENES)
    assert read_scenes(noisy) == list(ALL_SCENES)


def test_truth_scores_everything():
    reading = measure_stories(frames_of(TRUTH[:200]), TRUTH[:200])
    assert reading.visual.mean() == reading.semantic.mean() == 1
    np.testing.assert_array_equal(reading.matrix.mean(axis=0), np.eye(3))
    assert reading.error.max() == 0


def test_noise_scores_chance():
    rng = np.random.default_rng(0)
    noise = [rng.integers(0, 256, frames.shape, np.uint8) for frames in frames_of(TRUTH)]
    reading = measure_stories(noise, TRUTH)
    chance_visual, chance_semantic = 1 / len(ALL_UNSAID) ** 2, 1 / len(ALL_SAID)
    spread = 4 * np.sqrt(chance_visual / len(TRUTH))  # of a binomial; no choice of the world is easier to hit
    assert reading.visual.mean() == pytest.approx(chance_visual, abs=spread)
    np.testing.assert_allclose(reading.matrix.mean(axis=0), chance_semantic, atol=4 * np.sqrt(1 / 16 / len(TRUTH)))


def test_one_scene_that_differs_in_one_unsaid_thing_is_no_story():
    story = next(story for story in TRUTH if story[0].unsaid == Unsaid("sea", "rows"))
    for other in (Unsaid("plum", "rows"), Unsaid("sea", "checks")):
        changed = (*story[:2], WorldScene(other, story[2].said))
        reading = measure_stories(frames_of([changed]), [story])
        assert reading.visual.mean() == 0
        assert reading.semantic.mean() == 1


def test_prompts_that_went_to_the_wrong_scenes_show_in_the_matrix():
    shifted = [
        tuple(WorldScene(scene.unsaid, story[i - 1].said) for i, scene in enumerate(story)) for story in TRUTH[:100]
    ]
    reading = measure_stories(frames_of(shifted), TRUTH[:100])
    assert reading.semantic.mean() == 0
    np.testing.assert_array_equal(reading.matrix.mean(axis=0), np.roll(np.eye(3), -1, axis=1))


def test_a_scene_of_one_frame_has_a_colour_and_no_direction():
    """WorldScene 2 is short: it is its prompt's if the colour is, and it agrees if the background does."""
    reading = measure_stories(frames_of(TRUTH, 2, 1, 2), TRUTH)
    assert reading.visual.mean() == reading.semantic.mean() == 1
    same_colour = np.array([[scene.said.colour == story[1].said.colour for scene in story] for story in TRUTH])
    np.testing.assert_array_equal(reading.matrix[:, 1], same_colour)
    same = np.array([[scene.said == story[0].said for scene in story] for story in TRUTH])
    np.testing.assert_array_equal(reading.matrix[:, 0], same)


def test_the_error_is_that_of_the_picture():
    """20 grey levels, up or down, on every pixel of scene 2."""
    scenes = frames_of(TRUTH[:50])
    scenes[1] = np.where(scenes[1] < 128, scenes[1] + 20, scenes[1] - 20).astype(np.uint8)
    np.testing.assert_allclose(measure_stories(scenes, TRUTH[:50]).error, [[0, 20, 0]] * 50)
