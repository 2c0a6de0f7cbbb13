"""The plan of a story: lengths, tokens, windows, and where every scene comes from."""

import dataclasses

import pytest

from mask2dit_jax.layout import SceneLayout
from mask2dit_jax.pretrained.tokenizer import Cut
from mask2dit_jax.story.plan import StoryPlan, num_frames
from mask2dit_jax.story.story import Scene, Story


@pytest.mark.parametrize(("seconds", "expected"), [
    (6, 49), (6.125, 49), (3, 25), (5.8, 45), (5.9, 49), (0.01, 1), (0.3, 1), (0.5, 5), (60, 481),
])  # fmt: skip
def test_lengths_are_the_nearest_that_the_vae_has(seconds, expected):
    assert num_frames(seconds, 8, 4) == expected


def make_plan(scenes, **settings):
    defaults = {"window": 3, "anchor": False, "fps": 8, "guided": False, "default_frames": 49, "trained_frames": 49}
    return StoryPlan.make(
        Story("story", "A title", tuple(scenes)),
        per_latent=4,
        count=lambda texts: [Cut(len(text), 10, text[10:]) for text in texts],
        layout=lambda frames: SceneLayout(tuple(frames), (2, 3), 10),
        **(defaults | settings),
    )


def test_scenes_of_two_lengths():
    """3 s and 6 s in one story; the same three lengths in a row share a program."""
    plan = make_plan([Scene("a", seconds=6 if number % 2 else 3) for number in range(6)])
    assert plan.frames == (25, 49, 25, 49, 25, 49)
    assert plan.latent_frames == (7, 13, 7, 13, 7, 13)
    assert [layout.frames for layout in plan.layouts] == [(7, 13, 7), (13, 7, 13), (7, 13, 7), (13, 7, 13)]
    table = plan.table(480, 720, 50)
    assert table.startswith("A title: 6 scenes, 27.8 s, 222 frames of 480 x 720 at 8 a second\n")
    assert "4 windows of up to 3 scenes x 50 steps = 200 denoising steps\n" in table
    assert "up to 228 tokens at once; 2 layouts to compile" in table  # 3 x 10 + (13 + 7 + 13) x 6
    assert "scene 1: 3 s become 3.12 s" in table
    assert "longer" not in table
    knows_less = make_plan(plan.story.scenes, trained_frames=25)
    assert "longer than the 25 frames that the model knows: scenes 2, 4, 6" in knows_less.table(480, 720, 50)


def test_where_scenes_come_from():
    plan = make_plan([Scene("a", given="one.mp4"), *map(Scene, "bcdef")], anchor=True)
    assert [plan.origin(number) for number in range(6)] == [
        "given: one.mp4",
        "together: scenes 2-3, from scene 1",
        "together: scenes 2-3, from scene 1",
        "extended from scenes 1, 3",
        "extended from scenes 1, 4",
        "extended from scenes 1, 5",
    ]


def test_what_is_cut_is_said():
    """Of negative prompts too, where they are used."""
    scenes = [Scene("word word word", "bad bad bad bad"), Scene("short", "bad")]
    assert "scene 1: the prompt has 14 tokens, 10 are used; lost: word" in make_plan(scenes).table(8, 8, 1)
    assert "negative" not in make_plan(scenes).table(8, 8, 1)
    assert "scene 1: the negative prompt has 15 tokens" in make_plan(scenes, guided=True).table(8, 8, 1)
    assert "two predictions each" in make_plan(scenes, guided=True).table(8, 8, 1)


def test_given_scenes_that_lose_much_of_their_picture_are_counted():
    plan = make_plan([*(Scene("a", given=f"{n}.mp4") for n in range(2)), Scene("b")])
    assert "cropped" not in plan.table(8, 8, 1)
    cropped = dataclasses.replace(plan, cropped=(1,)).table(8, 8, 1)
    assert "more than a fifth of the picture is cropped in 1 of 2 given scenes: scene 2" in cropped
