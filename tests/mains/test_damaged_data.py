"""200 clips, of which 16 are damaged, each in another way: checked, encoded, trained with, and exactly those named."""

import re
import shutil

import pytest

from mask2dit_jax.data.sources import printable
from mask2dit_jax.io.paths import ASSETS
from tests.data.odd_clips import write_data_set
from tests.mains.conftest import settings

NUM_CLIPS = 200

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def damaged(tmp_path_factory):
    """The folder of the data file, and what is to be said of each unusable clip."""
    folder = tmp_path_factory.mktemp("damaged")
    rows = write_data_set(folder, NUM_CLIPS)
    return folder, {name_of(row, number): row.fault for number, row in enumerate(rows, 1) if row.fault}


def name_of(row, number):
    """Of a row with too many values nobody knows which is the path."""
    return f"row {number}" if "more values" in row.fault else printable(row.name)


def assert_named(lines, expected):
    """Each of `expected` in one line of "name: reason", and nothing else."""
    named = dict(line.split(": ", 1) for line in lines)
    assert sorted(named) == sorted(expected)
    assert len(lines) == len(expected)
    assert all(fault in named[name] for name, fault in expected.items()), named


def skipped(stderr):
    found = re.findall(r"^W\d{4} .*?\] (.+) is skipped: (.*)$", stderr.replace("\r", "\n"), flags=re.MULTILINE)
    return [f"{name}: {reason}" for name, reason in found]


def flags_of(commands, damaged, workdir, data, share=0.1, **fields):
    fields = {"data__clip_variants": 1, "data__max_skipped_share": share, "num_steps": 2, **fields}
    return commands.train_flags("pretrain", workdir, data, **fields)


def only_config(flags):
    return [flag for flag in flags if not flag.startswith("--workdir")]


@pytest.fixture(scope="module")
def latents(commands, damaged):
    folder, expected = damaged
    flags = only_config(flags_of(commands, damaged, "", ""))
    finished = commands.succeed("build_data", f"--encode={folder}/data.csv", f"--output={folder}/latents", *flags)
    assert f"184 of 200 clips encoded in {folder}/latents, 16 skipped" in finished.stdout
    assert_named(skipped(finished.stderr), expected)
    return folder / "latents"


def test_checked(commands, damaged):
    folder, expected = damaged
    finished = commands("build_data", f"--check={folder}/data.csv", *only_config(flags_of(commands, damaged, "", "")))
    *lines, summary = finished.stdout.splitlines()
    assert_named(lines, expected)
    assert summary == f"184 of 200 clips of {folder}/data.csv can be used"
    assert finished.code == 1
    error = finished.stderr.splitlines()[-1]
    assert error == f"error: 16 of 200 clips of {folder}/data.csv cannot be used; correct or remove them"


def test_trained_with_the_latents(commands, damaged, latents, tmp_path):
    """The encoders are not even there."""
    bare = tmp_path / "bare"
    shutil.copytree(ASSETS / "tiny", bare, ignore=shutil.ignore_patterns("*.safetensors"))
    flags = flags_of(commands, damaged, tmp_path / "run", latents, pretrained=bare)
    finished = commands.succeed("train", *flags)
    assert_named(skipped(finished.stderr), damaged[1])
    assert "done: step 2" in finished.stderr


def test_trained_with_the_videos(commands, damaged, tmp_path):
    folder, expected = damaged
    flags = flags_of(commands, damaged, tmp_path / "run", folder / "data.csv")
    finished = commands.succeed("train", *flags)
    assert_named(skipped(finished.stderr), expected)
    assert "done: step 2" in finished.stderr
    line = commands.fail("train", *flags, *settings(data__max_skipped_share=0.06))
    # The 13th is one too many; the rest is not looked at.
    assert "13 of 200 items cannot be used, more than data.max_skipped_share=0.06 (" in line
    assert "build_data --check lists all" in line
