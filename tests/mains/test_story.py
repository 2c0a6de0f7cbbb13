"""Story files through the real program: what comes out, that runs go on, and that faults lose nothing."""

import json
import re
import shutil

import jax
import numpy as np
import pytest
from PIL import Image

from mask2dit_jax.io.paths import ASSETS
from mask2dit_jax.media.video_reader import probe
from mask2dit_jax.media.video_writer import write_video
from tests.mains.conftest import FPS, HEIGHT, SMALL, WIDTH, moving_square, settings
from tests.mains.test_bad_data import replace_by_pdf
from tests.mains.test_processes import train_together
from tests.mains.test_sample import frames

STORY = """\
title: <Colours> & shapes
actors:
  Actor1: a white square
scenes:
  - given: blue.png
    prompt: Nothing but blue.
  - Actor1 moves over red.
  - Actor1 moves over green, and Actor1 stops.
  - Actor1 rests.
"""


def flags(checkpoint, output, *more, **fields):
    fields = {"checkpoint": checkpoint, "sampler__num_steps": 2, "attention": "dense", "condition": "clean", **fields}
    return ["--config=configs/sample.py:tiny", f"--output={output}", *SMALL, *settings(**fields), *map(str, more)]


def write(folder, text=STORY, name="story.yaml"):
    Image.new("RGB", (60, 40), (40, 40, 200)).save(folder / "blue.png")
    (folder / name).write_text(text)
    return f"--story={folder / name}"


def latents(output) -> dict[str, np.ndarray]:
    return {path.name: np.load(path)["latents"] for path in sorted((output / "latents").iterdir())}


def written(output) -> dict[str, int]:
    """When each latent was written last."""
    return {path.name: path.stat().st_mtime_ns for path in (output / "latents").iterdir()}


@pytest.fixture(scope="module")
def story(commands, pretrain_workdir, tmp_path_factory):
    folder = tmp_path_factory.mktemp("story")
    finished = commands.succeed("sample", *flags(pretrain_workdir, folder / "out", write(folder)))
    return folder, folder / "out", finished


def test_a_story_from_a_still(story):
    _, output, finished = story
    info = probe(output / "story.mp4")
    assert (info.num_frames, info.height, info.width, info.fps) == (20, HEIGHT, WIDTH, FPS)
    still = frames(output / "scene_01.mp4").astype(int)
    assert len(still) == 5
    assert np.abs(still - (40, 40, 200)).mean() < 40  # encoded and decoded, it is still itself
    assert re.search(r"1 +0.62 +5 +2 +\d+ of 48  given: .*blue.png\n", finished.stdout)
    assert re.search(r"3 +0.62 +5 +2 +\d+ of 48  together: scenes 2-3, from scene 1\n", finished.stdout)
    assert "the picture" in finished.stdout
    run = json.loads((output / "run.json").read_text())
    square = "Actor1 (a white square)"
    assert run["story"]["scenes"][2]["prompt"] == f"{square} moves over green, and {square} stops."
    assert {"jax", "mask2dit_jax"} <= run["versions"].keys()
    assert len(run["weights"]["transformer"]) == 16
    for scene in run["scenes"]:
        assert 0 < scene["mean"] < 1
        assert scene["drift"]["latent_std"] == pytest.approx(scene["latent_std"] - run["scenes"][0]["latent_std"])


def test_the_page_opens_from_disk(story):
    _, output, _ = story
    page = (output / "index.html").read_text()
    assert re.findall(r'src="([^"]+)"', page) == ["story.mp4", *(f"scene_{n:02d}.mp4" for n in range(1, 5))]
    assert all((output / source).exists() for source in re.findall(r'src="([^"]+)"', page))
    assert not re.findall(r"https?:|<script|<link|@import|url\(", page)
    assert "<h1>&lt;Colours&gt; &amp; shapes</h1>" in page
    assert "Actor1 (a white square) rests." in page


def copied(story, tmp_path):
    """The folder of the story file, and a copy of what it was made into."""
    return story[0], shutil.copytree(story[1], tmp_path / "out")


def test_a_run_goes_on_where_it_stopped(commands, story, pretrain_workdir, tmp_path):
    """As after a kill: one scene half written, another without its video."""
    folder, output = copied(story, tmp_path)
    before, times = latents(output), written(output)
    last = output / "latents" / "scene_04.npz"
    last.write_bytes(last.read_bytes()[:5000])
    (output / "scene_02.mp4").unlink()
    finished = commands.succeed("sample", *flags(pretrain_workdir, output, f"--story={folder / 'story.yaml'}"))
    assert "scene 4:" in finished.stderr
    assert "scene 2, 3:" not in finished.stderr
    after = written(output)
    assert [name for name in times if times[name] != after[name]] != list(times)
    assert times["scene_01.npz"] == after["scene_01.npz"]
    for name, values in latents(output).items():
        np.testing.assert_array_equal(values, before[name])
    assert probe(output / "scene_02.mp4").num_frames == 5


def test_an_edited_story_repeats_what_changes(commands, story, pretrain_workdir, tmp_path):
    """Another fourth scene, and a fifth of another length: the first three stay."""
    folder, output = copied(story, tmp_path)
    before = written(output)
    text = STORY.replace("Actor1 rests.", "Actor1 leaves.") + "  - prompt: Actor1 is gone.\n    seconds: 0.1\n"
    finished = commands.succeed("sample", *flags(pretrain_workdir, output, write(folder, text, "edited.yaml")))
    after = written(output)
    assert all(before[name] == after[name] for name in ("scene_02.npz", "scene_03.npz"))
    assert before["scene_04.npz"] != after["scene_04.npz"]
    assert "scene 5: 0.1 s become 0.12 s, the nearest length that the VAE has" in finished.stdout
    assert len(latents(output)["scene_05.npz"]) == 1
    assert probe(output / "story.mp4").num_frames == 21
    unchanged = commands.succeed("sample", *flags(pretrain_workdir, output, f"--story={folder / 'edited.yaml'}"))
    assert "%|" not in unchanged.stderr  # no progress bar: nothing is generated
    assert written(output) == after


@pytest.mark.slow
def test_another_schedule_is_another_story(commands, story, pretrain_workdir, tmp_path):
    """The given scene stays; no weights are read to say so."""
    folder, output = copied(story, tmp_path)
    pretrained = shutil.copytree(ASSETS / "tiny", tmp_path / "pretrained")
    path = pretrained / "scheduler" / "scheduler_config.json"
    asked = flags(pretrain_workdir, output, f"--story={folder / 'story.yaml'}", "--plan", pretrained=pretrained)
    assert "replaced" not in commands.succeed("sample", *asked).stderr
    path.write_text(json.dumps(json.loads(path.read_text()) | {"snr_shift_scale": 2.0}))
    told = commands.succeed("sample", *asked).stderr
    assert "finished already: scene 1\n" in told
    assert "to be replaced: scenes 2-4, made with other settings" in told


def test_the_same_again(commands, story, tmp_path):
    """From run.json alone, bit for bit."""
    commands.succeed("sample", f"--repeat={story[1] / 'run.json'}", f"--output={tmp_path}")
    jax.tree.map(np.testing.assert_array_equal, latents(tmp_path), latents(story[1]))
    assert (tmp_path / "storyboard.png").read_bytes() == (story[1] / "storyboard.png").read_bytes()


@pytest.mark.slow
def test_stories_and_seeds(commands, story, pretrain_workdir, tmp_path):
    folder, _, _ = story
    both = f"{write(tmp_path)},{folder / 'story.yaml'}"
    line = commands.fail("sample", *flags(pretrain_workdir, tmp_path / "out", both))
    assert "two files story" in line
    short = write(tmp_path, "scenes: [one, two, three]", "short.yaml")
    batch = flags(pretrain_workdir, tmp_path / "out", short, seeds=(3, 4))
    commands.succeed("sample", *batch)
    first, second = (latents(tmp_path / "out" / f"seed_{seed}") for seed in (3, 4))
    assert np.abs(first["scene_01.npz"] - second["scene_01.npz"]).max() > 0.1
    before = written(tmp_path / "out" / "seed_3")
    commands.succeed("sample", *batch)
    assert written(tmp_path / "out" / "seed_3") == before


@pytest.mark.slow
def test_processes_share_the_stories_out(commands, pretrain_workdir, tmp_path):
    names = ("first", "second", "third")
    files = [tmp_path / f"{name}.yaml" for name in names]
    for file in files:
        file.write_text("scenes: [one, two, three]")
    out = tmp_path / "out"
    told = flags(pretrain_workdir, out, f"--story={','.join(map(str, files))}")
    finished = train_together(commands, 2, tmp_path / "processes", told, main="sample")
    assert [process.code for process in finished] == [0, 0], finished
    results = [[line for line in process.stdout.splitlines() if line.endswith("story.mp4")] for process in finished]
    assert results == [[f"{out}/first/story.mp4", f"{out}/third/story.mp4"], [f"{out}/second/story.mp4"]]
    first, second = latents(out / "first"), latents(out / "second")
    jax.tree.map(np.testing.assert_array_equal, first, second)  # the same words and seed
    shutil.rmtree(out / "second")  # now one of them has work to do, and the other reads no weights at all
    finished = train_together(commands, 2, tmp_path / "again", told, main="sample")
    assert [process.code for process in finished] == [0, 0], finished
    jax.tree.map(np.testing.assert_array_equal, latents(out / "second"), second)


def test_a_plan_writes_nothing(commands, pretrain_workdir, tmp_path):
    """A prompt of 10,000 words is a line of the plan; the end of it is not."""
    text = "scenes: [one, two, '" + "word " * 9_999 + "finally']"
    finished = commands.succeed("sample", *flags(pretrain_workdir, tmp_path / "out", write(tmp_path, text), "--plan"))
    assert "3 scenes, 1.9 s, 15 frames of 32 x 48 at 8 a second" in finished.stdout
    (lost,) = re.findall(r"scene 3: the prompt has (\d+) tokens, 48 are used; lost: (.*)", finished.stdout)
    assert int(lost[0]) > 10_000
    assert lost[1].endswith("finally")
    assert len(lost[1]) < 400
    assert "memory per device (1), at least" in finished.stdout
    assert not (tmp_path / "out").exists()
    assert "reading" not in finished.stderr


@pytest.mark.parametrize(("count", "damage", "told"), [
    (20, replace_by_pdf, "damaged, truncated or not a video"),
    (1, lambda path: None, "1 frames are too few; 5 frames at 8 a second need 5"),
    (20, lambda path: path.rename(path.with_suffix(".png")), "damaged or not a picture"),
])  # fmt: skip
def test_clips_that_cannot_be_a_scene(commands, pretrain_workdir, tmp_path, count, damage, told):
    clip = tmp_path / "clip.mp4"
    write_video(clip, moving_square((1, 2, 3), count), FPS)
    damage(clip)
    name = clip.name if clip.exists() else "clip.png"
    story = write(tmp_path, f"scenes:\n  - {{prompt: a, given: {name}}}\n  - b\n")
    line = commands.fail("sample", *flags(pretrain_workdir, tmp_path / "out", story))
    assert str(tmp_path / name) in line
    assert told in line
    assert not (tmp_path / "out").exists()


def test_an_upright_clip_is_cut_with_a_warning(commands, pretrain_workdir, tmp_path):
    write_video(tmp_path / "clip.mp4", np.zeros((5, 96, 32, 3), np.uint8), FPS)
    story = write(tmp_path, "scenes:\n  - {prompt: a, given: clip.mp4}\n  - b\n")
    finished = commands.succeed("sample", *flags(pretrain_workdir, tmp_path / "out", story, "--plan"))
    assert "clip.mp4: only the middle 22 % of its 96 x 32 picture fit into 32 x 48" in finished.stderr
    assert "more than a fifth of the picture is cropped in 1 of 1 given scene: scene 1" in finished.stdout


@pytest.mark.parametrize(("more", "told"), [
    (["--config.given=('a.mp4',)"], "--config.given does not go with --story"),
    (["--config.anchor=True", "--config.num_scenes=2"], "an anchor needs num_scenes of at least 3"),
    (["--config.max_scenes=2"], "4 scenes are more than max_scenes=2"),
    (["--config.sampler.num_steps=2000", "--plan"], "sampling steps must be between 1 and 1000, not 2000"),
])  # fmt: skip
def test_settings_that_do_not_fit(commands, pretrain_workdir, tmp_path, more, told):
    assert told in commands.fail("sample", *flags(pretrain_workdir, tmp_path / "out", write(tmp_path), *more))
