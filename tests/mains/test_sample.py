"""Stories from the command line: what is written, that it repeats, and that clips can be carried on."""

import json
import os
import re
import signal
import socket
import time

import numpy as np
import pytest
from PIL import Image

from mask2dit_jax.io.run_hold import folder_held
from mask2dit_jax.media.video_reader import iter_frames, probe
from tests.mains import process
from tests.mains.conftest import COLOURS, FPS, HEIGHT, PROMPTS, SMALL, WIDTH, settings


def sample(commands, output, checkpoint, *more, **fields):
    fields = {"checkpoint": checkpoint, "sampler__num_steps": 2, "prompts": PROMPTS, "attention": "dense", **fields}
    return commands.succeed(
        "sample", "--config=configs/sample.py:tiny", f"--output={output}", *SMALL, *settings(**fields), *more
    )


def frames(path) -> np.ndarray:
    return np.stack(list(iter_frames(path)))


@pytest.fixture(scope="module")
def story(commands, pretrain_workdir, tmp_path_factory):
    """Three scenes and one by extension."""
    output = tmp_path_factory.mktemp("story")
    return output, sample(commands, output, pretrain_workdir)


def test_a_folder_that_a_living_run_holds_is_left_alone(commands, pretrain_workdir, tmp_path):
    """Of one story, and of one of several seeds; a seed that is given twice is one result."""
    output = tmp_path / "out"
    with folder_held(output / "seed_1"):
        given = settings(prompts=PROMPTS, checkpoint=pretrain_workdir, attention="dense", seeds=(0, 1, 0))
        line = commands.fail("sample", "--config=configs/sample.py:tiny", f"--output={output}", *SMALL, *given)
    assert f"{output / 'seed_1'} is in use by process {os.getpid()} on {socket.gethostname()} since" in line
    assert [path.name for path in (output / "seed_1").iterdir()] == [".lock"]


@pytest.mark.slow
def test_ctrl_c_keeps_what_is_complete_and_the_next_start_finishes_it(commands, pretrain_workdir, story, tmp_path):
    output, printed = tmp_path / "out", tmp_path / "printed"
    printed.mkdir()
    fields = {"checkpoint": pretrain_workdir, "sampler__num_steps": 2, "prompts": PROMPTS, "attention": "dense"}
    flags = ("--config=configs/sample.py:tiny", f"--output={output}", *SMALL, *settings(**fields))
    started = process.start(printed, "sample", flags, {})
    while started.exitcode is None and not (output / "latents" / "scene_01.npz").exists():
        time.sleep(0.001)
    os.kill(started.pid, signal.SIGINT)
    finished = process.finish(printed, started)
    assert finished.code == 130, finished.stderr
    assert finished.stderr.splitlines()[-1] == "interrupted: whatever is complete is kept; start again to go on"
    assert "Traceback" not in finished.stderr
    assert not [path for path in output.rglob(".*") if path.name != ".lock"]
    commands.succeed("sample", *flags)
    for path in (story[0] / "latents").iterdir():
        np.testing.assert_array_equal(np.load(output / "latents" / path.name)["latents"], np.load(path)["latents"])


def test_what_is_written(story):
    output, finished = story
    scenes = [f"scene_{number:02d}.mp4" for number in range(1, 5)]
    together = {"story.mp4", "storyboard.png", "index.html", "run.json", "latents", ".lock"}
    assert {path.name for path in output.iterdir()} == {*scenes, *together}
    info = probe(output / "story.mp4")
    assert (info.num_frames, info.height, info.width, info.fps) == (20, HEIGHT, WIDTH, FPS)
    assert {probe(output / scene).num_frames for scene in scenes} == {5}
    assert Image.open(output / "storyboard.png").height > 400
    run = json.loads((output / "run.json").read_text())
    assert tuple(scene["prompt"] for scene in run["story"]["scenes"]) == PROMPTS
    assert (run["seed"], run["config"]["fps"]) == (0, FPS)
    assert [scene["drift"]["mean"] == 0 for scene in run["scenes"]] == [True, False, False, False]
    results = [str(output / name) for name in ("story.mp4", "storyboard.png", "index.html")]
    assert finished.stdout.splitlines()[-3:] == results
    assert "2 windows of up to 3 scenes x 2 steps = 4 denoising steps\n" in finished.stdout
    assert "learning_rate" not in finished.stderr
    assert re.search(r"devices: 1 x cpu\n", finished.stderr)
    assert "is cut" not in finished.stderr  # without guidance nobody reads the negative prompt


def test_the_story_is_its_scenes(story):
    whole = frames(story[0] / "story.mp4").astype(int)
    parts = np.concatenate([frames(story[0] / f"scene_{number:02d}.mp4") for number in range(1, 5)])
    np.testing.assert_array_equal(whole, parts)


def test_report(commands, story, dataset):
    """Two steps of training make no pictures, so a scene looks like any shot; every distance is told all the same."""
    output, _ = story
    finished = commands("evaluate", f"--story={output}", f"--shots={dataset.csv}")
    report = json.loads((output / "evaluation.json").read_text())
    assert [scene["described_shot"] for scene in report["scenes"]] == [clip.name for clip in dataset.clips]
    assert all(scene["distances"].keys() == {clip.name for clip in dataset.clips} for scene in report["scenes"])
    assert report["correct"] == sum(scene["correct"] for scene in report["scenes"])
    assert finished.code == (report["correct"] < 4)


@pytest.mark.slow
def test_a_seed_is_a_story(commands, story, pretrain_workdir, tmp_path):
    """The storyboard holds frames as they were sampled; x264 now and then codes the same ones another way."""
    sample(commands, tmp_path / "again", pretrain_workdir)
    assert (story[0] / "storyboard.png").read_bytes() == (tmp_path / "again" / "storyboard.png").read_bytes()
    assert np.abs(frames(story[0] / "story.mp4") - frames(tmp_path / "again" / "story.mp4").astype(int)).mean() < 1
    sample(commands, tmp_path / "other", pretrain_workdir, seed=1)
    assert np.abs(frames(story[0] / "story.mp4") - frames(tmp_path / "other" / "story.mp4").astype(int)).mean() > 3


def test_clips_are_carried_on(commands, dataset, pretrain_workdir, tmp_path):
    """Guided this time, from known scenes noised at t = 0."""
    given = tuple(str(clip.path) for clip in dataset.clips[:2])
    finished = sample(
        commands, tmp_path, pretrain_workdir, given=given, guidance_scale=6.0, condition="noised", negative_prompt="bad"
    )
    assert len(list(tmp_path.glob("scene_*.mp4"))) == 4
    assert "scene 3:" in finished.stderr
    whole = frames(tmp_path / "story.mp4")
    assert len(whole) == 20
    for number, colour in enumerate(list(COLOURS.values())[:2]):  # encoded and decoded, they are still themselves
        corner = whole[5 * number : 5 * number + 5, -6:, -6:].mean((0, 1, 2))
        assert np.abs(corner - colour).max() < 60
