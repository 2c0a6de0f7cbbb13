"""Videos and data files with faults, through training and sampling: named in one line, or left out with a warning."""

import dataclasses
import json
import re

import pytest

from mask2dit_jax.data.sources import Group, write_sft_json
from tests.mains.conftest import PROMPTS, SMALL, Dataset, make_clip, settings


def truncate(path):
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) * 2 // 3])


def replace_by_pdf(path):
    path.write_bytes(b"%PDF-1.7\n1 0 obj\n<< /Type /Catalog >>\nendobj\n%%EOF\n")


def warnings(stderr: str) -> list[str]:
    return [line for line in re.split(r"[\r\n]", stderr) if re.match(r"W\d{4} ", line)]


@pytest.fixture
def clips(tmp_path):
    return [make_clip(tmp_path, f"clip{number}", f"picture {number}") for number in range(4)]


FAULTS = [
    (lambda path: path.unlink(), "no video at"),
    (truncate, "truncated"),
    (replace_by_pdf, "not a video"),
    (lambda path: path.write_bytes(b""), "empty"),
]


@pytest.mark.parametrize(
    ("stage", "damage", "told"), [("pretrain", *fault) for fault in FAULTS] + [("sft", *FAULTS[1])]
)
def test_damaged_video(commands, tmp_path, clips, stage, damage, told):
    dataset = Dataset.write(tmp_path, clips)
    damage(clips[2].path)
    data = dataset.csv if stage == "pretrain" else dataset.json
    line = commands.fail("train", *commands.train_flags(stage, tmp_path / "run", data))
    assert str(clips[2].path) in line
    assert told in line
    assert "remove" in line


@pytest.mark.slow
def test_damaged_videos_can_be_skipped(commands, tmp_path, clips):
    dataset = Dataset.write(tmp_path, [*clips, make_clip(tmp_path, "short", "a short picture", count=4)])
    truncate(clips[2].path)
    flags = commands.train_flags("pretrain", tmp_path / "run", dataset.csv, data__max_skipped_share=0.4, num_steps=1)
    skipped = warnings(commands.succeed("train", *flags).stderr)
    assert any("clip2.mp4 is skipped" in line and "truncated" in line for line in skipped)
    assert any("short.mp4 is skipped: a clip of 4 frames is too short" in line for line in skipped)
    line = commands.fail("train", *flags, "--config.data.max_skipped_share=0.3")
    assert "2 of 5 items cannot be used, more than data.max_skipped_share=0.3 (clip2.mp4: " in line


def test_clips_all_too_short(commands, tmp_path):
    dataset = Dataset.write(tmp_path, [make_clip(tmp_path, f"short{i}", f"picture {i}", count=4) for i in range(3)])
    line = commands.fail("train", *commands.train_flags("pretrain", tmp_path / "run", dataset.csv))
    assert "1 of 3 items cannot be used, more than data.max_skipped_share=0 (short0.mp4: a clip of 4 frames is" in line
    assert "use a longer clip" in line


def test_fewer_clips_than_scenes(commands, tmp_path, clips):
    dataset = Dataset.write(tmp_path, clips[:2])
    line = commands.fail("train", *commands.train_flags("pretrain", tmp_path / "run", dataset.csv))
    assert "2 usable clips are too few for num_scenes=3; add clips or lower num_scenes" in line


@pytest.mark.slow
def test_groups_with_too_few_scenes(commands, tmp_path, clips):
    groups = [Group("long", tuple(clips)), Group("pair", tuple(clips[:2]))]
    write_sft_json(tmp_path / "sft.json", groups)
    flags = commands.train_flags("sft", tmp_path / "run", tmp_path / "sft.json", num_steps=1)
    skipped = warnings(commands.succeed("train", *flags).stderr)
    assert any("group pair is skipped: it has no 3 consecutive usable shots (2 shots" in line for line in skipped)
    write_sft_json(tmp_path / "sft.json", groups[1:])
    line = commands.fail("train", *flags)
    assert "none of 1 groups (pair) has 3 consecutive usable shots; add longer groups or lower num_scenes" in line


def test_a_long_caption_is_cut_with_a_warning(commands, tmp_path, clips):
    clips[0] = dataclasses.replace(clips[0], caption="word " * 80 + "the very end")
    dataset = Dataset.write(tmp_path, clips)
    flags = commands.train_flags("pretrain", tmp_path / "run", dataset.csv, num_steps=1)
    length, warning = warnings(commands.succeed("train", *flags).stderr)
    assert "num_steps=1 ends within optimizer.warmup_steps=50" in length
    assert re.search(r"prompt of \d+ tokens is cut to 48: '.*the very end' is lost from 'word word", warning)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("fps,width\n8,48\n", "no column height, caption, path, num_frame"),
        ("fps,width,height,caption,path,num_frame\n", "has no rows"),
        ("fps,width,height,caption,path,num_frame\nfast,48,32,a picture,clip0.mp4,20\n", "row 1: fps is 'fast'"),
        ("fps,width,height,caption,path,num_frame\n8,48,32,,clip0.mp4,20\n", "caption is empty"),
    ],
)
def test_faulty_csv(commands, tmp_path, clips, text, told):
    (tmp_path / "bad.csv").write_text(text)
    line = commands.fail("train", *commands.train_flags("pretrain", tmp_path / "run", tmp_path / "bad.csv"))
    assert str(tmp_path / "bad.csv") in line
    assert told in line


def test_sft_reads_no_csv(commands, tmp_path, dataset):
    line = commands.fail("train", *commands.train_flags("sft", tmp_path / "run", dataset.csv))
    assert f"{dataset.csv}: no valid json" in line


@pytest.mark.parametrize(("damage", "told"), FAULTS, ids=["missing", "truncated", "pdf", "empty"])
def test_damaged_clip_to_extend(commands, pretrain_workdir, tmp_path, clips, damage, told):
    damage(clips[1].path)
    fields = settings(checkpoint=pretrain_workdir, prompts=PROMPTS, given=(str(clips[0].path), str(clips[1].path)))
    line = commands.fail("sample", "--config=configs/sample.py:tiny", f"--output={tmp_path / 'out'}", *SMALL, *fields)
    assert str(clips[1].path) in line
    assert told.replace("no video at", "no such file") in line


def test_clip_to_extend_too_short(commands, pretrain_workdir, tmp_path, clips):
    clips[1] = make_clip(tmp_path, "short", "", count=4)
    fields = settings(checkpoint=pretrain_workdir, prompts=PROMPTS, given=(str(clips[0].path), str(clips[1].path)))
    line = commands.fail("sample", "--config=configs/sample.py:tiny", f"--output={tmp_path / 'out'}", *SMALL, *fields)
    assert f"{clips[1].path}: 4 frames are too few" in line
    assert "give a longer clip" in line


def test_videos_to_cut(commands, tmp_path, clips):
    replace_by_pdf(clips[0].path)
    line = commands.fail("build_data", f"--videos={clips[0].path}", f"--output={tmp_path / 'new'}")
    assert f"{clips[0].path}: damaged, truncated or not a video" in line
    line = commands.fail("build_data", f"--videos={clips[1].path}", f"--output={tmp_path / 'new'}", "--min_frames=8")
    assert "no caption for clip1.mp4 shot 1" in line
    assert "add them to the captions file" in line


def test_report(commands, tmp_path, clips):
    dataset = Dataset.write(tmp_path, clips)
    line = commands.fail("evaluate", f"--story={tmp_path}", f"--shots={dataset.csv}")
    assert f"cannot read {tmp_path / 'run.json'}" in line
    run = {
        "config": {"height": 32, "width": 48, "fps": 8},
        "story": {"scenes": [{"prompt": clip.caption} for clip in clips]},
    }
    (tmp_path / "run.json").write_text(json.dumps(run))
    line = commands.fail("evaluate", f"--story={tmp_path}", f"--shots={dataset.csv}")
    assert f"{tmp_path / 'scene_01.mp4'}: no such file" in line
    replace_by_pdf(clips[2].path)
    line = commands.fail("evaluate", f"--story={tmp_path}", f"--shots={dataset.csv}")
    assert f"{clips[2].path}: damaged, truncated or not a video" in line
