"""Configs: what they hold, what they refuse before anything is read, and what they ask for."""

import dataclasses
import inspect
import re

import numpy as np
import pytest

from configs import common, sample, sft
from mask2dit_jax import config as config_module
from mask2dit_jax.config import RunConfig, SampleConfig, Section, TrainConfig, changes, read_config
from mask2dit_jax.diffusion.guidance import guidance_scales
from mask2dit_jax.errors import UserError
from mask2dit_jax.models.dit import REMAT_POLICIES
from mask2dit_jax.ops.attention.api import IMPLEMENTATIONS
from mask2dit_jax.ops.masks import PREDICATES
from mask2dit_jax.training.optimizer import learning_rate


def tiny_sft(**fields) -> TrainConfig:
    config = sft.get_config("tiny")
    config.update_from_flattened_dict(fields)
    return read_config(config, TrainConfig, "train")


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"accumulate_steps": 0}, "accumulate_steps=0 must be at least 1"),
        ({"max_skipped_updates": 0}, "max_skipped_updates=0 must be at least 1"),
        ({"keep_every": -1}, "keep_every=-1 must be at least 0"),
        ({"sample_every": -1}, "sample_every=-1 must be at least 0"),
        ({"lora.rank": -1}, "lora.rank=-1 must be at least 0"),
        ({"lora.alpha": 0.0}, r"lora.alpha=0.0 must be above 0"),
        ({"profile_steps": (5, 4)}, r"profile_steps=\(5, 4\) must be a first and a last step"),
        ({"profile_steps": (5,)}, "must be a first and a last step"),
        ({"trainable": (1,)}, "trainable.*holds 1, which is no text"),
        ({"scene_frames": (9, 9, 9)}, "scene_frames holds 9; give the pixel frames of num_scenes=3 scenes"),
        ({"scene_frames": ((9, 9),)}, r"scene_frames holds \(9, 9\)"),
        ({"scene_frames": ((9, 9, 17),)}, "scene_frames: 17 must be from 1 to num_frames=9"),
        ({"scene_frames": ((9, 9, 5),)}, "scene_frames: 5 is not of the form 8k .* nearest is 1"),
        ({"optimizer.decay_steps": 50}, "optimizer.decay_steps=50 must be more than optimizer.warmup_steps=50"),
        ({"optimizer.clip_norm": -1.0}, "optimizer.clip_norm=-1.0 must be at least 0, which never clips"),
        (
            {"num_steps": 1006, "optimizer.decay_steps": 1000},
            "num_steps=1006 is beyond optimizer.decay_steps=1000, from where the learning rate is 0; raise decay_steps",
        ),
        ({"optimizer.decay_steps": -1}, "optimizer.decay_steps=-1 must be at least 0, which is num_steps"),
        ({"data.min_stride": 4}, "data.min_stride=4 is more than data.max_stride=3"),
        ({"remat": "some"}, "remat 'some' does not exist; choose one of none, full, attention, dots"),
        ({"compute_dtype": "float16"}, "compute_dtype 'float16' is not supported .*black video"),
    ],
)
def test_a_bad_value_is_named_with_its_field(fields, told):
    with pytest.raises(UserError, match=told):
        tiny_sft(**fields)


def test_the_length_that_is_stored_is_always_allowed():
    """A scene of 5 frames is no part of a longer one, but it is one of 5."""
    tiny_sft(num_frames=5, scene_frames=((5, 5, 5), (1, 5, 5)))


@pytest.mark.parametrize("num_steps", [51, 1000, 2000])
def test_a_cosine_ends_with_the_run(num_steps):
    config = tiny_sft(num_steps=num_steps)
    rate = learning_rate(config.scheduled_optimizer)
    assert rate(num_steps) == 0 < rate(num_steps - 1)
    assert not config.remarks()


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"num_steps": 500, "optimizer.decay_steps": 1000}, "num_steps=500 ends before optimizer.decay_steps=1000"),
        ({"num_steps": 50}, "num_steps=50 ends within optimizer.warmup_steps=50"),
        ({"num_steps": 20, "optimizer.schedule": "constant"}, "num_steps=20 ends within optimizer.warmup_steps=50"),
    ],
)
def test_a_run_that_is_short_for_its_schedule_says_so(fields, told):
    (remark,) = tiny_sft(**fields).remarks()
    assert remark.startswith(told)


def test_a_run_within_its_warm_up_is_the_beginning_of_a_longer_one():
    short, long = (learning_rate(tiny_sft(num_steps=n).scheduled_optimizer) for n in (5, 1000))
    assert [float(short(n)) for n in range(6)] == [float(long(n)) for n in range(6)]


def test_a_resumed_run_names_what_changed():
    config = tiny_sft()
    before = dataclasses.asdict(config) | {"seed": 7, "lora": {"rank": 4, "alpha": 16.0}, "trainable": []}
    assert sorted(changes(before, config)) == ["lora.rank 0, not 4", "seed 0, not 7"]


def test_a_config_of_another_main_is_refused():
    with pytest.raises(UserError, match="of kind 'sample'; train takes one of kind pretrain or sft"):
        read_config(sample.get_config("tiny"), TrainConfig, "train")
    assert isinstance(read_config(sample.get_config("tiny"), RunConfig, "train_compile"), SampleConfig)


def test_a_config_that_lacks_a_field_is_refused():
    fields = sft.get_config("tiny").to_dict()
    del fields["optimizer"]["eps"]
    with pytest.raises(UserError, match=r"optimizer\.eps"):
        read_config(fields, TrainConfig, "train")


def test_everything_that_is_missing_is_asked_for_at_once():
    config = read_config(sft.get_config(), TrainConfig, "train")
    with pytest.raises(UserError, match=r"--config.pretrained=DIR.*; and data: --config.data.path=FILE"):
        config.require("pretrained", "data.path")
    tiny_sft().require("pretrained", "data.path")


def test_without_a_preset_a_config_is_the_5b_recipe():
    config, named = (read_config(sft.get_config(preset), TrainConfig, "train") for preset in ("", "5b"))
    assert config == named == TrainConfig(kind="sft")
    assert config.name == "sft"
    assert read_config(sft.get_config(",v5p-8"), TrainConfig, "train").global_batch_size == 4
    assert tiny_sft().name == "sft-tiny"


def test_the_choices_are_those_of_the_code():
    assert tuple(PREDICATES) == config_module.MASKS
    assert sorted(("auto", *IMPLEMENTATIONS)) == sorted(config_module.ATTENTION)
    assert tuple(REMAT_POLICIES) == config_module.REMAT
    for kind in config_module.GUIDANCE:
        assert len(guidance_scales(kind, 6.0, np.array([999, 499]))) == 2


def sections() -> list[type[Section]]:
    return [
        kind
        for _, kind in inspect.getmembers(config_module, inspect.isclass)
        if issubclass(kind, Section) and kind is not Section
    ]


@pytest.mark.parametrize("kind", sections())
def test_every_field_has_a_comment(kind):
    """On its line or above it; a field that is itself a section has its class's docstring."""
    lines = inspect.getsource(kind).splitlines()
    for name, of in inspect.get_annotations(kind).items():
        at = next((i for i, line in enumerate(lines) if re.match(rf"    {name}: ", line)), None)
        if at is None or name == "PREFIX" or (isinstance(of, type) and issubclass(of, Section)):
            continue
        assert "  # " in lines[at] or lines[at - 1].strip().startswith("#"), f"{kind.__name__}.{name}"


@pytest.mark.parametrize("preset", common.PRESETS)
@pytest.mark.parametrize("kind", config_module.KINDS)
def test_presets_change_fields_that_are_there(kind, preset):
    read_config(common.make_config(kind, preset, {}), config_module.KINDS[kind], "a main")
