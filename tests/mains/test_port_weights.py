"""Weights there and back: nothing is lost, and diffusers computes with an export what we compute."""

import dataclasses
import filecmp
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLCogVideoX, CogVideoXPipeline, CogVideoXTransformer3DModel
from flax import nnx
from safetensors.numpy import load_file
from transformers import T5EncoderModel, T5Tokenizer

from configs import common
from mask2dit_jax.config import TrainConfig, read_config
from mask2dit_jax.diffusion.samplers import SamplerConfig
from mask2dit_jax.diffusion.schedule import NoiseSchedule
from mask2dit_jax.errors import UserError
from mask2dit_jax.models import sizes as scene_sizes
from mask2dit_jax.models.cogvideox import COGVIDEOX
from mask2dit_jax.models.dit import DiT
from mask2dit_jax.models.t5 import T5Encoder
from mask2dit_jax.models.vae import VAE
from mask2dit_jax.ops import positions
from mask2dit_jax.pretrained import directory as port
from mask2dit_jax.pretrained.encoders import TextEncoder, VideoCodec
from mask2dit_jax.pretrained.pretrained import Pretrained
from mask2dit_jax.pretrained.transformer_source import TransformerSource
from mask2dit_jax.sampling.window import SamplingConfig, WindowSampler
from tests.mains.conftest import HEIGHT, PROMPTS, SMALL, TINY, WIDTH, settings
from tests.mains.test_sample import frames
from tests.parity.cases import assert_close

TOLERANCE = 5e-5
COMPONENTS = ("transformer", "vae", "text_encoder")


def tensors(folder) -> dict[str, np.ndarray]:
    return {key: value for file in folder.glob("*.safetensors") for key, value in load_file(file).items()}


@pytest.fixture(scope="module")
def authors(diffusers_directory, tmp_path_factory):
    """As the authors release: the mask's variant stands in the transformer's config."""
    folder = shutil.copytree(diffusers_directory, tmp_path_factory.mktemp("authors") / "model")
    path = folder / "transformer" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"attn_msk_version": 4}))
    return folder


@pytest.fixture(scope="module")
def ported(commands, authors, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("ported") / "workdir"
    commands.succeed("port_weights", f"--from={authors}", f"--to={workdir}")
    return workdir


def test_there_and_back_nothing_is_lost(commands, authors, ported, tmp_path):
    finished = commands.succeed("port_weights", f"--from={ported}", f"--to={tmp_path / 'back'}")
    assert all(name in finished.stdout for name in (*COMPONENTS, "tokenizer", "scheduler", "model_index.json"))
    for name in COMPONENTS:
        before, after = tensors(authors / name), tensors(tmp_path / "back" / name)
        assert before.keys() == after.keys()
        for key, value in before.items():
            np.testing.assert_array_equal(after[key], value)
        assert port.load_config(tmp_path / "back", name) == port.load_config(authors, name)
    assert json.loads((tmp_path / "back" / "transformer" / "config.json").read_text())["attn_msk_version"] == 4
    for name in ("tokenizer", "scheduler"):
        files = [path.name for path in (authors / name).iterdir()]
        assert filecmp.cmpfiles(authors / name, tmp_path / "back" / name, files, shallow=False)[0] == files


def test_ported_encoders_pass_for_what_they_were(commands, authors, ported, tmp_path):
    """Latents that were made with the one fit a run with the other; Orbax gives its files other names each time."""
    names = ("vae", "text_encoder", "tokenizer")
    assert port.fingerprint(ported, names) == port.fingerprint(authors, names)
    commands.succeed("port_weights", f"--from={authors}", f"--to={tmp_path / 'half'}", "--dtype=bfloat16")
    assert port.fingerprint(tmp_path / "half", names) != port.fingerprint(authors, names)


def test_an_export_in_bfloat16_is_all_bfloat16(commands, ported, tmp_path):
    commands.succeed("port_weights", f"--from={ported}", f"--to={tmp_path / 'half'}", "--dtype=bfloat16")
    for name in COMPONENTS:
        assert {value.dtype.name for value in tensors(tmp_path / "half" / name).values()} == {"bfloat16"}


@pytest.mark.slow
def test_a_ported_workdir_samples_the_same_as_its_directory(commands, authors, ported, tmp_path):
    for name, pretrained in (("authors", authors), ("ported", ported)):
        fields = settings(
            pretrained=pretrained,
            checkpoint="",
            prompts=PROMPTS[:3],
            sampler__num_steps=1,
            attention="dense",
            mask="v4",
        )
        flags = ("--config=configs/sample.py:tiny", f"--output={tmp_path / name}", *SMALL, *fields)
        assert "mask" not in commands.succeed("sample", *flags).stderr.partition("plan:")[2]
    np.testing.assert_array_equal(frames(tmp_path / "authors" / "story.mp4"), frames(tmp_path / "ported" / "story.mp4"))


def test_weights_made_with_another_mask_are_told_of(authors, caplog):
    model = port.load_config(authors, "transformer")
    config = read_config(common.make_config("sft", "5b", {}), TrainConfig, "train")
    assert scene_sizes.with_run_settings(model, config).mask == "v2"
    assert "made with mask v4, this run uses v2" in caplog.text


@pytest.fixture(scope="module")
def exported(commands, diffusers_directory, dataset, tmp_path_factory):
    """A run that starts from the directory's weights, and its export."""
    folder = tmp_path_factory.mktemp("trained")
    fields = {"pretrained": diffusers_directory, "optimizer__warmup_steps": 0, "num_steps": 1}
    finished = commands.succeed("train", *commands.train_flags("pretrain", folder / "run", dataset.csv, **fields))
    assert f"start: pretrained weights of {diffusers_directory}" in finished.stderr
    commands.succeed("port_weights", f"--from={folder / 'run' / 'checkpoints' / '1'}", f"--to={folder / 'export'}")
    return folder / "run", folder / "export"


@pytest.mark.slow
def test_diffusers_computes_the_same_with_a_trained_transformer(diffusers_directory, exported):
    run, export = exported
    reference = CogVideoXTransformer3DModel.from_pretrained(export / "transformer").eval()
    before = tensors(diffusers_directory / "transformer")
    assert any(not np.array_equal(value, before[key]) for key, value in tensors(export / "transformer").items())
    source = TransformerSource.require(run)
    config = source.config()
    graph, abstract = nnx.split(nnx.eval_shape(lambda: DiT(config, rngs=nnx.Rngs(0))))
    model = nnx.merge(graph, source.load(abstract))
    rng = np.random.default_rng(0)
    latents = rng.normal(size=(1, 2, 4, 6, 8)).astype(np.float32)
    text = rng.normal(size=(1, 1, 12, 20)).astype(np.float32)
    layout = config.layout((2,), 4, 6)
    cos, sin = positions.rope_table(layout, config.base_grid, config.head_dim)
    with torch.no_grad():
        expected = reference(
            torch.tensor(latents.transpose(0, 1, 4, 2, 3)),
            torch.tensor(text[:, 0]),
            torch.tensor([500]),
            image_rotary_emb=tuple(torch.tensor(np.repeat(t[12:], 2, -1)) for t in (cos, sin)),
        ).sample.numpy()
    actual = model(jnp.asarray(latents), jnp.asarray(text), jnp.array([[500]]), layout=layout)
    assert_close(actual, expected.transpose(0, 1, 3, 4, 2), TOLERANCE)


@pytest.mark.slow
def test_diffusers_computes_the_same_with_an_exported_vae(exported):
    reference = AutoencoderKLCogVideoX.from_pretrained(exported[1] / "vae").eval()
    vae = port.load_module(exported[1], "vae", dtype=jnp.float32)
    pixels = np.random.default_rng(0).uniform(-1, 1, (1, 5, HEIGHT, WIDTH, 3)).astype(np.float32)
    with torch.no_grad():
        expected = reference.encode(torch.tensor(pixels.transpose(0, 4, 1, 2, 3))).latent_dist.mean.numpy()
    assert_close(nnx.jit(VAE.encode)(vae, jnp.asarray(pixels)).mean, expected.transpose(0, 2, 3, 4, 1), TOLERANCE)


@pytest.mark.slow
def test_transformers_computes_the_same_with_an_exported_text_encoder(exported):
    reference = T5EncoderModel.from_pretrained(exported[1] / "text_encoder").eval()
    encoder = port.load_module(exported[1], "text_encoder", dtype=jnp.float32)
    ids = np.random.default_rng(0).integers(0, 640, (2, 12))
    with torch.no_grad():
        expected = reference(torch.tensor(ids)).last_hidden_state.numpy()
    assert_close(nnx.jit(T5Encoder.__call__)(encoder, jnp.asarray(ids, jnp.int32)), expected, TOLERANCE)


def test_a_run_with_the_tiny_encoders_is_exported_with_them(commands, pretrain_workdir, tmp_path):
    commands.succeed("port_weights", f"--from={pretrain_workdir}", f"--to={tmp_path / 'export'}")
    for name in ("vae", "text_encoder"):
        before, after = tensors(TINY / name), tensors(tmp_path / "export" / name)
        assert all(np.array_equal(after[key], value) for key, value in before.items() if key in after)
        assert len(after) >= len(before) - 1  # T5's embedding has two names
    CogVideoXTransformer3DModel.from_pretrained(tmp_path / "export" / "transformer")
    AutoencoderKLCogVideoX.from_pretrained(tmp_path / "export" / "vae")
    T5EncoderModel.from_pretrained(tmp_path / "export" / "text_encoder")


def test_diffusers_samples_from_an_export_what_we_sample(exported):
    """One scene, from the same noise: prompts, guidance, scheduler, transformer and decoder together."""
    run, export = exported
    pipeline = CogVideoXPipeline.from_pretrained(export)
    assert isinstance(pipeline.tokenizer, T5Tokenizer)
    pipeline.set_progress_bar_config(disable=True)
    noise = np.random.default_rng(0).normal(size=(1, 2, HEIGHT // 8, WIDTH // 8, 8)).astype(np.float32)
    prompt, negative = PROMPTS[0], "blurred"

    def diffusers(**options):
        latents = torch.tensor(noise.transpose(0, 1, 4, 2, 3))
        size = {"height": HEIGHT, "width": WIDTH, "num_frames": 5}
        tokens = pipeline.transformer.config.max_text_seq_length
        return pipeline(
            prompt, negative, num_inference_steps=2, latents=latents, max_sequence_length=tokens, **size, **options
        ).frames

    pretrained = Pretrained.open(run)
    model = dataclasses.replace(pretrained.transformer.config(), attention="dense")
    graph, abstract = nnx.split(COGVIDEOX.memoryless(model))
    schedule = NoiseSchedule(pretrained.schedule)
    sampler = WindowSampler(
        graph, pretrained.transformer.load(abstract), schedule, SamplingConfig(SamplerConfig("ddim", 2))
    )
    texts = TextEncoder(pretrained, model.text_tokens, jnp.dtype("float32"))([prompt, negative])
    text, negative_text = (jnp.asarray(embedding)[None, None] for embedding in texts)
    layout = model.layout((2,), HEIGHT // 8, WIDTH // 8)
    ours = sampler(jnp.asarray(noise), text, negative_text, np.array([False]), layout=layout, key=jax.random.key(0))
    theirs = diffusers(output_type="latent").numpy().transpose(0, 1, 3, 4, 2)
    assert_close(ours, theirs, TOLERANCE * max(1, np.abs(theirs).max()))
    codec = VideoCodec(pretrained, jnp.dtype("float32"), "diffusers")
    decoded = np.concatenate(list(codec.decode_chunks(np.asarray(ours[0]))))
    np.testing.assert_allclose(decoded, diffusers(output_type="np")[0] * 255, atol=1)


@pytest.mark.parametrize("missing", ["tokenizer/spiece.model", "scheduler/scheduler_config.json", "vae"])
def test_an_export_that_is_no_pipeline_says_so_and_has_no_index(commands, ported, tmp_path, missing):
    workdir = shutil.copytree(ported, tmp_path / "workdir")
    gone = workdir / missing
    shutil.rmtree(gone) if gone.is_dir() else gone.unlink()
    finished = commands.succeed("port_weights", f"--from={workdir}", f"--to={tmp_path / 'export'}")
    (line,) = (line for line in finished.stderr.splitlines() if "missing in the source" in line)
    assert line.endswith(f"so not written: {missing.partition('/')[0]}, nor model_index.json")
    assert not (tmp_path / "export" / "model_index.json").exists()


def test_an_index_names_no_class_that_the_pipeline_does_not_take(exported, tmp_path):
    copy = shutil.copytree(exported[1], tmp_path / "export")
    (copy / "model_index.json").unlink()
    (copy / "vae" / "config.json").write_text('{"_class_name": "SpaceToDepth"}')
    with pytest.raises(UserError, match="CogVideoXPipeline of diffusers takes no SpaceToDepth"):
        port.save_model_index(copy)
    assert not (copy / "model_index.json").exists()
