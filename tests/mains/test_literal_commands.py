"""The commands that the project is named for work as they stand, from any folder."""

import os
import subprocess
import sys

import pytest

from tests.mains.conftest import SMALL, settings


@pytest.fixture(scope="module")
def in_an_empty_folder(tmp_path_factory):
    """What each command prints in a folder without configs/, and the folder afterwards; they run side by side."""
    folder = tmp_path_factory.mktemp("empty")
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    started = {
        config: subprocess.Popen(
            [sys.executable, "-m", f"mask2dit_jax.{main}", f"--config=configs/{config}.py"],
            cwd=folder,
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        for config, main in (("pretrain", "train"), ("sft", "train"), ("sample", "sample"))
    }
    return {config: process.communicate()[1].splitlines()[-1] for config, process in started.items()}, folder


@pytest.mark.parametrize("config", ["pretrain", "sft"])
def test_training_asks_for_weights_and_data_in_one_line_and_writes_nothing(in_an_empty_folder, config):
    lines, folder = in_an_empty_folder
    assert lines[config].startswith("error: this run needs weights: --config.pretrained=DIR")
    assert "and data: --config.data.path=FILE" in lines[config]
    assert not list(folder.iterdir())


def test_sampling_asks_for_weights_and_a_story_in_one_line_and_writes_nothing(in_an_empty_folder):
    lines, folder = in_an_empty_folder
    assert lines["sample"].startswith("error: this run needs weights: --config.pretrained=DIR")
    assert "and a story: --story=FILE" in lines["sample"]
    assert not list(folder.iterdir())


def test_with_weights_and_data_the_literal_command_trains(commands, diffusers_directory, dataset, tmp_path):
    """The 5B recipe, with weights of a real layout in tiny sizes."""
    small = settings(
        pretrained=diffusers_directory,
        data__path=dataset.json,
        data__cache=tmp_path / "cache",
        data__clip_variants=1,
        data__max_stride=2,
        compute_dtype="float32",
        global_batch_size=1,
        num_steps=1,
    )
    commands.succeed("train", "--config=configs/sft.py", f"--workdir={tmp_path / 'run'}", *SMALL, *small)
    assert (tmp_path / "run" / "checkpoints" / "1" / "params").exists()
