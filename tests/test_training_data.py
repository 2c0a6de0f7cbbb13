"""The two ways to the same batches: videos encoded inside the job, and a latent data set made before."""

import dataclasses
import itertools
import shutil
from pathlib import Path

import numpy as np
import pytest
from absl import logging

from configs import pretrain, sft
from mask2dit_jax import build_data, training_data
from mask2dit_jax.config import TrainConfig, read_config
from mask2dit_jax.curate.encode import Encoders
from mask2dit_jax.data.sources import Group, write_pretrain_csv, write_sft_json
from mask2dit_jax.errors import UserError
from mask2dit_jax.io import paths
from mask2dit_jax.pretrained.pretrained import Pretrained
from mask2dit_jax.training import setup
from mask2dit_jax.training_data import open_training_data
from tests.data.clips import make_clip

TINY = paths.ASSETS / "tiny"
STAGES = {"pretrain": (pretrain, "pretrain.csv"), "sft": (sft, "sft.json")}


def configure(stage, path, **data):
    config = STAGES[stage][0].get_config("tiny")
    config.update({"num_frames": 5, "height": 32, "width": 48, "num_scenes": 2, "pretrained": str(TINY)})
    config.data.update({"path": str(path), "clip_variants": 3, "max_stride": 2, "max_skipped_share": 0.3, **data})
    return read_config(config, TrainConfig, "train")


def model_of(config):
    pretrained = Pretrained.open(config.pretrained)
    return setup.model_from_scratch(config, pretrained.vae.config, pretrained.text_encoder.config)


def open_data(config):
    return open_training_data(config, Pretrained.open(config.pretrained), model_of(config))


def take(data, count=6, start=0, rows=range(4), seed=3):
    return list(itertools.islice(data.batches(start, rows, 4, seed), count))


def encode_video(pixels):
    """Stands in for the VAE of the package, whose sizes it has: what a latent is depends on what its pixels show."""
    mean = pixels.mean((1, 2, 3))[::4].reshape(2, 1, 1, 1) * np.linspace(1, 2, 8 * 12 * 16).reshape(8, 12, 16)
    return mean, np.sin(mean)


def encode_text(captions):
    return np.stack([np.random.default_rng(len(caption)).standard_normal((48, 64)) for caption in captions])


@pytest.fixture(scope="module", autouse=True)
def encoders():
    """The real ones take long to compile; tests/mains/test_damaged_data.py takes both ways with them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training_data, "load_encoders", lambda *_: Encoders(encode_video, encode_text))
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Six clips in two groups, one of them too short; in both formats, and their latents."""
    folder = tmp_path_factory.mktemp("data")
    clips = [make_clip(folder, f"{n}.mp4", count=4 if n == 2 else 16 + n, caption="clip" + n * "!") for n in range(6)]
    write_pretrain_csv(folder / "pretrain.csv", clips)
    write_sft_json(folder / "sft.json", [Group("a", tuple(clips[:4])), Group("b", tuple(clips[4:]))])
    for stage, (_, name) in STAGES.items():
        build_data.encode(configure(stage, ""), str(folder / name), str(folder / f"{stage}_latents"))
    return folder


@pytest.mark.parametrize("stage", STAGES)
def test_the_same_batches_both_ways(folder, stage):
    online = open_data(configure(stage, folder / STAGES[stage][1], cache=str(folder / "cache")))
    stored = open_data(configure(stage, folder / f"{stage}_latents"))
    assert list(online.skipped) == list(stored.skipped) == ["2.mp4"]
    assert online.skipped["2.mp4"] == stored.skipped["2.mp4"]
    assert online.num_samples == stored.num_samples == {"pretrain": 5, "sft": 2}[stage]
    for ours, theirs in zip(take(stored), take(online), strict=True):
        np.testing.assert_array_equal(ours["mean"], theirs["mean"])
        np.testing.assert_array_equal(ours["logvar"], theirs["logvar"])
        np.testing.assert_allclose(ours["text"], theirs["text"], rtol=2**-8, atol=0)
        assert {array.dtype for array in ours.values()} == {np.dtype(np.float32)}
        assert ours["text"].shape == (4, 2, 48, 64)
    resumed, part = take(stored, 2, start=4), take(stored, 2, start=4, rows=[1, 3])
    for whole, again, rows in zip(take(stored)[4:], resumed, part, strict=True):
        for name in whole:
            np.testing.assert_array_equal(whole[name], again[name])
            np.testing.assert_array_equal(whole[name][[1, 3]], rows[name])


def test_latents_need_neither_videos_nor_encoders(folder, tmp_path, monkeypatch, caplog):
    def must_not(*_):
        raise AssertionError("encoders are loaded")

    monkeypatch.setattr(training_data, "load_encoders", must_not)
    latents = shutil.copytree(folder / "sft_latents", tmp_path / "latents")
    bare = shutil.copytree(TINY, tmp_path / "bare", ignore=shutil.ignore_patterns("*.safetensors"))
    config = configure("sft", latents)
    with_weights = take(open_data(config))
    config = dataclasses.replace(config, pretrained=str(bare))
    caplog.set_level(logging.INFO)
    for ours, theirs in zip(take(open_data(config)), with_weights, strict=True):
        np.testing.assert_array_equal(ours["mean"], theirs["mean"])
    assert "has no encoder weights: it is not checked that" in caplog.text


def test_another_seed_draws_from_the_same_latents(folder):
    config = configure("sft", folder / "sft_latents")
    config = dataclasses.replace(config, seed=7)
    ours, theirs = take(open_data(config), seed=7), take(open_data(config), seed=3)
    assert any(not np.array_equal(one["mean"], other["mean"]) for one, other in zip(ours, theirs, strict=True))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"num_frames": 9}, "sampling.num_frames 5, not 9"),
        ({"height": 48, "width": 80}, r"size \[32, 48\], not \[48, 80\]"),
        ({"compute_dtype": "bfloat16"}, "compute_dtype float32, not bfloat16"),
        ({"data": {"clip_variants": 1}}, "variants 3, not 1"),
        ({"data": {"kind": "csv"}}, "sampling.rule SftSampling, not PretrainSampling"),
    ],
)
def test_latents_made_in_another_way_are_refused(folder, change, told):
    config = configure("sft", folder / "sft_latents")
    data = dataclasses.replace(config.data, **change.get("data", {}))
    config = dataclasses.replace(config, **{**change, "data": data})
    with pytest.raises(UserError, match=f"sft_latents was made with .*{told}"):
        open_data(config)


def test_latents_of_other_encoders_are_refused(folder, tmp_path):
    other = shutil.copytree(TINY, tmp_path / "other")
    weights = other / "vae" / "diffusion_pytorch_model.safetensors"
    raw = bytearray(weights.read_bytes())
    raw[-1] ^= 1
    weights.write_bytes(raw)
    config = configure("sft", folder / "sft_latents")
    config = dataclasses.replace(config, pretrained=str(other))
    with pytest.raises(UserError, match=r"made with encoders [0-9a-f]{16}, not [0-9a-f]{16}; set"):
        open_data(config)


@pytest.mark.parametrize("stage", STAGES)
def test_too_many_clips_that_cannot_be_used(folder, stage):
    for path in (folder / STAGES[stage][1], folder / f"{stage}_latents"):
        config = configure(stage, path, max_skipped_share=0.1, cache=str(folder / "cache"))
        with pytest.raises(
            UserError, match=r"1 of 6 items cannot be used, more than data.max_skipped_share=0.1 \(2.mp4"
        ):
            open_data(config)


def test_unreadable_records_are_replaced_named_and_gathered(folder, tmp_path):
    latents = Path(shutil.copytree(folder / "pretrain_latents", tmp_path / "latents"))
    shard = sorted(latents.glob("*array_record*"))[3]
    raw = bytearray(shard.read_bytes())
    raw[1000:3000] = bytes(2000)
    shard.write_bytes(raw)
    data = open_data(configure("pretrain", latents, max_skipped_share=0.4))
    batches = take(data, 12)
    assert set(data.skipped) == {"2.mp4", "3.mp4"}
    assert "cannot be read (Corrupted" in data.skipped["3.mp4"]
    assert data.gather_skipped() == dict(data.skipped)
    for whole, part in zip(batches, take(data, 12, rows=[2]), strict=True):
        np.testing.assert_array_equal(whole["mean"][[2]], part["mean"])
    strict = open_data(configure("pretrain", latents, max_skipped_share=0.2))
    with pytest.raises(UserError, match="2 of 6 items cannot be used"):
        take(strict, 12)


def test_no_data():
    with pytest.raises(UserError, match=r"no data: set --config\.data\.path"):
        open_data(configure("sft", ""))
