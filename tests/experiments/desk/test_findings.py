"""Findings as data: which runs, with which settings; and the pictures of a table."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from configs import pretrain, sample, sft
from experiments.desk import plots
from experiments.desk.desk_data import CODEC
from experiments.desk.findings import FINDINGS
from experiments.desk.world import NUM_FRAMES, SIDE, TEXT_TOKENS, draw_stories, render
from mask2dit_jax.config import RunConfig, read_config
from mask2dit_jax.models import sizes as scene_sizes


@pytest.mark.parametrize("finding", FINDINGS.values(), ids=FINDINGS)
def test_a_finding_compares_runs_of_the_same_seeds(finding):
    assert all([run.seed for run in arm.runs] == [0, 1, 2] for arm in finding.arms)
    names = [run.name for run in finding.runs]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("finding", FINDINGS.values(), ids=FINDINGS)
def test_its_commands_set_fields_that_the_configs_have(finding):
    fields = {"sft": sft.get_config("desk"), "pretrain": pretrain.get_config("desk")}
    for run in finding.runs:
        for flag in run.command(Path("desk")):
            if not flag.startswith("--config."):
                continue
            config = fields[run.stage]
            for part in flag.removeprefix("--config.").partition("=")[0].split("."):
                assert part in config, (run.name, flag)
                config = config[part]


def test_the_preset_fits_the_world():
    for module in (sft, pretrain, sample):
        config = read_config(module.get_config("desk"), RunConfig)
        assert (config.height, config.width, config.num_frames) == (SIDE, SIDE, NUM_FRAMES)
        scene_sizes.check_sizes(config, CODEC, patch_size=2)
    model = sft.get_config("desk").model
    assert model.text_tokens == TEXT_TOKENS
    assert (model.sample_height, model.sample_width) == CODEC.sample_latents


@pytest.mark.parametrize("num_scenes", [3, 12])
def test_a_table_is_drawn(tmp_path, num_scenes):
    arm = {"visual": 60.0, "visual_interval": [50, 70], "semantic": 90.0, "semantic_interval": [85, 95]}
    arm |= {"matrix": np.eye(num_scenes) * 100, "agreement_with_first": [100] * num_scenes}
    plots.plot_table({"claim": "one and two", "arms": {"one": arm, "two": arm}}, tmp_path / "table.png")
    assert min(Image.open(tmp_path / "table.png").size) > 300


def test_a_sampled_story_is_drawn(tmp_path):
    story = draw_stories(0, 1)[0]
    plots.draw_story(tmp_path / "story.png", story, [render(scene) for scene in story], num_known=2)
    assert min(Image.open(tmp_path / "story.png").size) > 300
