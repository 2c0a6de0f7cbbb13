"""The identity of weights is the content of the files that are read, not sizes, ends or stray files."""

import json
import os
import shutil

import jax
import numpy as np
import pytest
from etils import epath
from flax import nnx
from safetensors.numpy import load_file, save_file

from mask2dit_jax.errors import UserError
from mask2dit_jax.models.dit import DiT
from mask2dit_jax.pretrained import directory
from mask2dit_jax.pretrained.former_fingerprint import former_fingerprint
from mask2dit_jax.pretrained.pretrained import TINY
from mask2dit_jax.pretrained.stored_checkpoint import save_params
from mask2dit_jax.pretrained.tokenizer import load_tokenizer, tokenize
from mask2dit_jax.pretrained.transformer_source import TransformerSource
from tests.pretrained.test_pretrained import MODEL

NAMES = ("vae", "text_encoder", "tokenizer")
STRAY = (".DS_Store", "Thumbs.db", ".config.json.swp", "config.json~", "README.md", "desktop.ini")


@pytest.fixture
def copy(tmp_path):
    return epath.Path(shutil.copytree(TINY, tmp_path / "copy"))


def identity(folder) -> str:
    return directory.fingerprint(folder, NAMES)


def flip(path, place: int) -> None:
    """Change one byte in place; size and modification time stay."""
    before = os.stat(path)
    content = bytearray(epath.Path(path).read_bytes())
    content[place] ^= 1
    with open(path, "r+b") as file:
        file.write(content)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def test_a_copy_is_the_same(copy):
    assert identity(copy) == identity(TINY)


@pytest.mark.parametrize("name", NAMES)
def test_files_that_are_not_read_change_nothing(copy, name):
    for stray in STRAY:
        (copy / name / stray).write_text("stray")
    (copy / name / "notes").mkdir()
    (copy / name / "notes" / "a.txt").write_text("stray")
    assert identity(copy) == identity(TINY)


def test_weights_that_differ_in_the_middle_only_are_others(copy):
    folder = copy / "transformer"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    weights = {name: np.zeros((300, 1024), np.float32) for name in "abc"}  # 1.2 MB each: the ends are equal
    path = folder / "diffusion_pytorch_model.safetensors"
    save_file(weights, path)
    first = directory.fingerprint(copy, ["transformer"])
    save_file(weights | {"b": weights["b"] + 1}, path)
    assert directory.fingerprint(copy, ["transformer"]) != first


def test_a_byte_in_the_middle_of_the_vae_is_seen(copy):
    first = identity(copy)
    (path,) = (copy / "vae").glob("*.safetensors")
    flip(path, path.stat().length // 2)
    assert identity(copy) != first


def test_the_shards_that_the_index_names_count_and_no_other(copy):
    (path,) = (copy / "vae").glob("*.safetensors")
    tensors = load_file(path)
    path.unlink()
    keys = sorted(tensors)
    shards = {"one.safetensors": keys[::2], "two.safetensors": keys[1::2]}
    for name, part in shards.items():
        save_file({key: tensors[key] for key in part}, copy / "vae" / name)
    index = {"weight_map": {key: name for name, part in shards.items() for key in part}}
    (copy / "vae" / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    first = identity(copy)
    (copy / "vae" / "three.safetensors").write_bytes(b"an older download")
    assert identity(copy) == first
    flip(copy / "vae" / "two.safetensors", -1)
    assert identity(copy) != first
    (copy / "vae" / "two.safetensors").unlink()
    with pytest.raises(UserError, match=r"shard 'two.safetensors', named by .*, is missing; download it"):
        identity(copy)


def test_another_config_makes_another_encoder(copy):
    first = identity(copy)
    path = copy / "vae" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"scaling_factor": 0.5}))
    assert identity(copy) != first


@pytest.fixture
def ported(copy):
    """The tiny VAE in our own layout, beside the text encoder and the tokenizer as they were."""
    before = directory.origin(copy / "vae")
    config = directory.load_config(copy, "vae")
    params = directory.load_component(copy, "vae", config)
    shutil.rmtree(copy / "vae")
    directory.save_component(copy, "vae", config, params, before)
    return copy


def test_a_ported_component_keeps_its_origin_until_its_config_changes(ported):
    assert identity(ported) == identity(TINY)
    path = ported / "vae" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"scaling_factor": 0.5}))
    assert identity(ported) != identity(TINY)


def test_an_origin_that_an_older_version_wrote_is_valid(ported):
    (ported / "vae" / "origin.txt").write_text("8fe4c0ffee-bfloat16")
    assert directory.origin(ported / "vae") == "8fe4c0ffee-bfloat16"


def test_an_origin_belongs_to_the_ported_parameters_only(ported):
    """Weights that were put in their place have nothing to do with it."""
    shutil.rmtree(ported / "vae" / "params")
    for path in (TINY / "vae").iterdir():
        shutil.copyfile(path, ported / "vae" / path.name)
    assert (ported / "vae" / "origin.txt").exists()
    assert identity(ported) == identity(TINY)


def test_without_an_origin_the_parameters_count(ported):
    (ported / "vae" / "origin.txt").unlink()
    first = identity(ported)
    (ported / "vae" / "params" / ".DS_Store").write_text("stray")
    (ported / "vae" / "params" / "Thumbs.db").write_text("stray")
    (ported / "vae" / "model.safetensors").write_text("not read beside params/")
    assert identity(ported) == first
    largest = max(directory.stored_files(ported / "vae" / "params"), key=lambda path: path.stat().length)
    flip(largest, largest.stat().length // 2)
    assert identity(ported) != first


def test_a_stray_vocabulary_is_not_loaded(copy):
    (copy / "tokenizer" / "tokenizer.model").write_text("transformers would prefer this one")
    ours, theirs = (tokenize(load_tokenizer(folder / "tokenizer"), ["a fox"], 8) for folder in (copy, TINY))
    np.testing.assert_array_equal(ours, theirs)


def checkpoint(folder, change=None, **record) -> epath.Path:
    params = nnx.state(DiT(MODEL, rngs=nnx.Rngs(0)))
    if change:
        params = jax.tree.map(change, params)
    save_params(folder, params, {"model": MODEL.to_json(), "pretrained": "tiny", **record})
    return epath.Path(folder) / "checkpoints" / "0"


def test_a_checkpoint_is_its_parameters_and_what_is_read_of_its_record(tmp_path):
    folder = checkpoint(tmp_path / "run")
    first = TransformerSource.require(folder).fingerprint()
    moved = shutil.copytree(folder, tmp_path / "moved")
    (moved / "params" / ".DS_Store").write_text("stray")
    record = moved / "record" / "metadata"
    written = json.loads(record.read_text())
    record.write_text(json.dumps(written | {"pretrained": "/elsewhere"}))
    assert TransformerSource.require(moved).fingerprint() == first
    record.write_text(json.dumps(written | {"lora": {"rank": 4, "alpha": 8.0}}))
    assert TransformerSource.require(moved).fingerprint() != first
    other = checkpoint(tmp_path / "other", change=lambda leaf: leaf + 1)
    assert TransformerSource.require(other).fingerprint() != first


def test_the_former_fingerprint_is_what_it_was():
    """Data sets on people's disks have this one."""
    assert former_fingerprint(TINY, NAMES) == "8fe4115bcc8484f6"
