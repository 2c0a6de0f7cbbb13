"""One object for every place that weights come from: what it finds, that it reads little, and what it refuses."""

import json
import shutil

import pytest
from flax import nnx

from mask2dit_jax.errors import UserError
from mask2dit_jax.models.dit import DiT, DiTConfig
from mask2dit_jax.pretrained import directory
from mask2dit_jax.pretrained.pretrained import TINY, Pretrained
from mask2dit_jax.pretrained.stored_checkpoint import save_params

MODEL = DiTConfig(2, 16, 1, 4, time_embed_dim=16, text_embed_dim=64, text_tokens=6, sample_height=4, sample_width=6)


def write_run(workdir, pretrained, model: DiTConfig = MODEL):
    """Writes the checkpoint of a run that took its frozen components from `pretrained`."""
    params = nnx.state(DiT(model, rngs=nnx.Rngs(0)))
    save_params(workdir, params, {"model": model.to_json(), "pretrained": str(pretrained)})
    return workdir


def test_a_diffusers_directory_without_a_transformer():
    tiny = Pretrained.open("tiny")
    assert tiny.folder == TINY
    assert tiny.find_transformer() is None
    with pytest.raises(UserError, match=r"there are no transformer weights in .*tiny"):
        _ = tiny.transformer
    assert tiny.vae.has_weights
    assert tiny.tokenizer.eos_token_id == 1
    assert tiny.schedule == directory.load_schedule(TINY)
    assert tiny.fingerprint("vae", "tokenizer") == directory.fingerprint(TINY, ("vae", "tokenizer"))


def test_a_run_takes_its_frozen_components_from_where_it_trained_with_them(tmp_path):
    other = shutil.copytree(TINY, tmp_path / "other")
    workdir = write_run(tmp_path / "run", other)
    for path in (workdir, workdir / "checkpoints" / "0"):
        opened = Pretrained.open(path)
        assert opened.folder == other
        assert opened.transformer.config() == MODEL
    second = write_run(tmp_path / "second", workdir)  # a run that was given the workdir of another
    assert Pretrained.open(second).folder == other
    assert Pretrained.open(write_run(tmp_path / "tiny_run", "tiny")).folder == TINY


def test_ported_components_lie_beside_their_checkpoint(tmp_path):
    """Wherever the workdir has been moved since."""
    workdir = write_run(tmp_path / "ported", "/gone")
    shutil.copytree(TINY / "vae", workdir / "vae")
    assert Pretrained.open(workdir).folder == workdir


def test_a_checkpoint_takes_the_place_of_the_directory_s_transformer(tmp_path):
    workdir = write_run(tmp_path / "run", "/gone")
    opened = Pretrained.open("tiny", checkpoint=workdir)
    assert opened.folder == TINY
    assert opened.transformer.config() == MODEL


def test_configs_are_read_once_and_weights_when_they_are_needed(monkeypatch):
    reads = []
    for name in ("read_json", "open_weights"):
        read = getattr(directory, name)
        monkeypatch.setattr(directory, name, lambda path, read=read: (reads.append(path.name), read(path))[1])
    opened = Pretrained.open("tiny")
    assert reads == []
    assert opened.vae.config is opened.vae.config
    opened.check_fits(MODEL_OF_TINY)
    opened.check_fits(MODEL_OF_TINY)
    assert reads == ["config.json", "config.json"]  # of the VAE and the text encoder
    opened.vae.load()
    assert reads[2:] == ["vae"]


MODEL_OF_TINY = DiTConfig(2, 16, 1, Pretrained.open("tiny").vae.config.latent_channels, text_embed_dim=64)


def test_a_transformer_that_was_made_for_other_components():
    with pytest.raises(UserError, match=r"takes 4 latent channels, .*tiny makes \d+; set --config.pretrained"):
        Pretrained.open("tiny").check_fits(MODEL)


def test_faults_are_one_line(tmp_path):
    with pytest.raises(UserError, match=r"no pretrained weights: set --config.pretrained=DIR"):
        Pretrained.open("")
    with pytest.raises(UserError, match=r"pretrained directory .*nowhere does not exist; .* holds vae/"):
        _ = Pretrained.open(tmp_path / "nowhere").vae.config
    bare = tmp_path / "bare"
    (bare / "vae").mkdir(parents=True)
    (bare / "vae" / "config.json").write_text(json.dumps(json.loads((TINY / "vae" / "config.json").read_text())))
    with pytest.raises(UserError, match=r"bare/vae holds no weights; copy them there"):
        Pretrained.open(bare).vae.require_weights("copy them there")
    with pytest.raises(UserError, match="tokenizer"):
        _ = Pretrained.open(bare).tokenizer
