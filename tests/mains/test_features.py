"""Runs with everything switched on: what they write, that they resume, and what becomes of their weights."""

import jax
import numpy as np
import pytest
import torch
from diffusers import CogVideoXTransformer3DModel
from PIL import Image
from safetensors.numpy import load_file

from mask2dit_jax.pretrained.stored_checkpoint import find, read_record
from tests.mains.conftest import PROMPTS, SMALL, settings
from tests.mains.test_train import assert_same, differ, read, scalars

ALL = {
    "init_from": "",
    "checkpoint_every": 2,
    "optimizer__warmup_steps": 0,
    "optimizer__decay_steps": 1000,  # named, so that a longer run has the same learning rates
    "accumulate_steps": 2,
    "ema_decay": 0.9,
    "scene_frames": ((5, 5, 5), (1, 5, 1)),
    "validate_every": 2,
    "sample_every": 4,
    "sample_steps": 2,
    "profile_steps": (2, 3),
    "seed": 2,  # whose steps 1 to 4 have both layouts
}
LORA = {"lora__rank": 2, "lora__alpha": 64.0, "frozen_dtype": "bfloat16", "optimizer__warmup_steps": 0}

pytestmark = pytest.mark.slow


def train(commands, workdir, dataset, **fields):
    return commands.succeed("train", *commands.train_flags("sft", workdir, dataset.json, **fields)).stderr


@pytest.fixture(scope="module")
def straight(commands, dataset, pretrain_workdir, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("features") / "straight"
    train(commands, workdir, dataset, num_steps=4, **ALL)
    return workdir


def test_everything_that_is_switched_on_is_logged(straight):
    found = scalars(straight)
    assert {
        *("loss", "grad_norm", "param_norm", "learning_rate", "steps_per_second", "samples_per_second"),
        *("input_bound_share", "tflops_per_second_a_chip", "skipped_updates", "skipped_items", "validation/loss"),
        *(f"validation/{kind}_t{t}" for kind in ("fixed", "extension") for t in (100, 300, 500, 700, 900)),
    } < found.keys()
    assert sorted(found["loss"]) == [1, 2, 3, 4]
    assert sorted(found["validation/loss"]) == [2, 4]
    buckets = [name for name in found if name.startswith("loss_by_timestep/")]
    assert sum(len(found[name]) for name in buckets) >= 4
    assert 0 < found["input_bound_share"][4] < 1
    assert found["skipped_updates"][4] == found["skipped_items"][4] == 0
    assert found["tflops_per_second_a_chip"][2] > 0


def test_a_storyboard_is_sampled(straight):
    (path,) = (straight / "samples").iterdir()
    assert path.name == "step_000004.png"
    assert Image.open(path).height > 300
    assert "storyboard" in scalars(straight)


def test_a_trace_is_written(straight):
    assert list((straight / "profile").rglob("*.xplane.pb"))


def test_all_of_it_resumes(commands, dataset, straight, tmp_path):
    """The same parameters, the same average, the same validation; other lengths of scenes are drawn than in step 1."""
    train(commands, tmp_path / "run", dataset, num_steps=2, **ALL)
    train(commands, tmp_path / "run", dataset, num_steps=4, **ALL)
    assert_same(read(tmp_path / "run", 4), read(straight, 4))
    ours, theirs = scalars(tmp_path / "run"), scalars(straight)
    assert ours["validation/loss"] == theirs["validation/loss"]
    assert ours["loss"] == theirs["loss"]


def exported(commands, source, target, *more) -> dict[str, np.ndarray]:
    commands.succeed("port_weights", f"--from={source}", f"--to={target}", *more)
    CogVideoXTransformer3DModel.from_pretrained(target / "transformer", torch_dtype=torch.float32)
    return load_file(target / "transformer" / "diffusion_pytorch_model.safetensors")


def test_the_average_is_exported_and_sampled(commands, straight, tmp_path):
    stored = read(straight, 4)
    average, plain = (
        exported(commands, straight, tmp_path / "a"),
        exported(commands, straight, tmp_path / "p", "--weights=params"),
    )
    for found, item in ((average, "ema"), (plain, "params")):
        kernel = stored[item]["blocks"]["mlp"]["up"]["kernel"]
        kernel = jax.tree.leaves(kernel)[0]
        np.testing.assert_array_equal(found["transformer_blocks.1.ff.net.0.proj.weight"], kernel[1].T)
    assert any(np.any(average[key] != plain[key]) for key in plain)


@pytest.fixture(scope="module")
def adapted(commands, dataset, straight, tmp_path_factory):
    """Adapters beside a model that has left its start behind, where zero gates keep gradients from its blocks."""
    workdir = tmp_path_factory.mktemp("lora") / "run"
    for last in (2, 3):
        train(commands, workdir, dataset, init_from=straight, num_steps=last, **LORA)
    return workdir


def test_lora_trains_adapters_only(adapted, straight):
    record = read_record(find(adapted))
    assert record["lora"] == {"rank": 2, "alpha": 64.0}
    base, later = read(straight, 4)["ema"], read(adapted, 3)["params"]
    query, before = later["blocks"]["attn"]["query"], base["blocks"]["attn"]["query"]
    leaf = {name: jax.tree.leaves(query[name])[0] for name in query}
    np.testing.assert_array_equal(leaf["kernel"], jax.tree.leaves(before["kernel"])[0].astype("bfloat16"))
    assert np.any(leaf["lora_b"])
    assert differ(read(adapted, 2)["params"], later)
    count = len(jax.tree.leaves(read(adapted, 3)["train"]["opt_state"]))
    assert count == 2 * 12 + 2  # two moments of A and B beside six kernels, and two counts


def test_lora_is_merged_into_an_export(commands, adapted, straight, tmp_path):
    merged, base = exported(commands, adapted, tmp_path / "m"), exported(commands, straight, tmp_path / "b")
    assert merged.keys() == base.keys()
    moved = {
        key.partition(".1.")[2]
        for key in merged
        if ".1." in key and np.any(merged[key] != base[key].astype("bfloat16"))
    }
    attention = {f"attn1.{name}.weight" for name in ("to_q", "to_k", "to_v", "to_out.0")}
    assert moved == attention | {"ff.net.0.proj.weight", "ff.net.2.weight"}


def test_lora_samples_and_starts_a_next_stage(commands, adapted, dataset, tmp_path):
    fields = {"checkpoint": adapted, "sampler__num_steps": 1, "prompts": PROMPTS[:3], "attention": "dense"}
    flags = ("--config=configs/sample.py:tiny", f"--output={tmp_path / 'story'}", *SMALL, *settings(**fields))
    commands.succeed("sample", *flags)
    assert (tmp_path / "story" / "storyboard.png").exists()
    log = train(commands, tmp_path / "next", dataset, init_from=adapted, num_steps=1)
    assert f"start: parameters of {adapted / 'checkpoints' / '3'}" in log


def test_features_that_do_not_fit_are_refused(commands, dataset, adapted, tmp_path):
    """Adapters of nothing; a rank that is not the run's; an average that is not there."""
    flags = commands.train_flags("sft", tmp_path / "run", dataset.json, **LORA)
    assert "lora adapts weights, and there are none" in commands.fail("train", *flags)
    flags = commands.train_flags("sft", adapted, dataset.json, num_steps=4, **LORA | {"lora__rank": 3})
    line = commands.fail("train", *flags)
    assert "params of" in line
    assert "keep model, trainable and lora as they were" in line
    line = commands.fail("port_weights", f"--from={adapted}", f"--to={tmp_path / 'x'}", "--weights=ema")
    assert "holds no moving average; train with --config.ema_decay" in line


def test_updates_that_are_never_finite_end_the_run(commands, dataset, tmp_path):
    """A learning rate that blows the parameters up: the run stops, and does not write NaN for days."""
    fields = {
        "optimizer__learning_rate": 1e38,
        "optimizer__warmup_steps": 0,
        "num_steps": 200,
        "max_skipped_updates": 3,
    }
    line = commands.fail_alone("train", *commands.train_flags("sft", tmp_path / "run", dataset.json, **fields))
    assert "updates in a row" in line
    assert "lower optimizer.learning_rate" in line
