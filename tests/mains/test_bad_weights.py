"""Weight directories with faults: the file or the tensor is named, whichever program reads them."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tests.mains.conftest import PROMPTS, SMALL, settings


def last_shard(folder: Path) -> Path:
    return max(folder.glob("*-of-*.safetensors"))


def index(folder: Path) -> Path:
    return next(folder.glob("*.safetensors.index.json"))


def truncate(path: Path):
    path.write_bytes(path.read_bytes()[:-100])


def change_tensors(path: Path, change):
    tensors = load_file(path)
    change(tensors, max(tensors, key=lambda key: tensors[key].size))
    save_file(tensors, path, metadata={"format": "pt"})


def add_tensor(tensors, _):
    tensors["surplus.weight"] = np.zeros(3, np.float32)


def shorten_tensor(tensors, largest):
    tensors[largest] = np.ascontiguousarray(tensors[largest][1:])


def remove_tensor(folder: Path):
    """From its shard and from the index: nothing but the model itself misses it."""
    change_tensors(last_shard(folder), lambda tensors, largest: tensors.pop(largest))
    raw = json.loads(index(folder).read_text())
    raw["weight_map"] = {
        key: shard for key, shard in raw["weight_map"].items()
        if shard != last_shard(folder).name or key in load_file(last_shard(folder))
    }  # fmt: skip
    index(folder).write_text(json.dumps(raw))


@pytest.fixture
def copy(diffusers_directory, tmp_path) -> Path:
    return shutil.copytree(diffusers_directory, tmp_path / "model")


@pytest.mark.parametrize(
    ("component", "damage", "told"),
    [
        ("transformer", lambda folder: last_shard(folder).unlink(), ["shard", "is missing", "download"]),
        ("vae", lambda folder: last_shard(folder).unlink(), ["shard", "is missing", "download"]),
        ("transformer", lambda folder: truncate(last_shard(folder)), ["no complete safetensors file", "download"]),
        ("text_encoder", lambda folder: truncate(last_shard(folder)), ["no complete safetensors file", "download"]),
        ("transformer", lambda folder: truncate(index(folder)), ["index.json is not valid JSON", "download"]),
        ("transformer", lambda folder: (folder / "config.json").unlink(), ["config.json", "complete download?"]),
        ("vae", lambda folder: (folder / "config.json").write_text("{"), ["config.json is not valid JSON", "download"]),
        ("vae", lambda folder: (folder / "config.json").write_text("{}"), ["holds no size", "is this the"]),
        ("text_encoder", lambda folder: (folder / "config.json").write_text("{}"), ["feed_forward_proj", "T5 v1.1"]),
        ("transformer", lambda folder: change_tensors(last_shard(folder), add_tensor), ["'surplus.weight'", "remove"]),
        ("transformer", lambda folder: change_tensors(last_shard(folder), shorten_tensor), ["has shape", "wants"]),
        ("transformer", remove_tensor, ["tensor", "is missing"]),
    ],
)
def test_porting_names_the_fault(commands, copy, tmp_path, component, damage, told):
    damage(copy / component)
    line = commands.fail("port_weights", f"--from={copy}", f"--to={tmp_path / 'workdir'}")
    if "config" not in line or "json" in line:
        assert str(copy / component) in line or component.replace("_", " ") in line.lower()
    assert all(words in line for words in told), line


def test_sampling_names_the_fault(commands, copy, tmp_path):
    def fail(**fields):
        given = settings(pretrained=copy, prompts=PROMPTS, checkpoint="", **fields)
        return commands.fail(
            "sample", "--config=configs/sample.py:tiny", f"--output={tmp_path / 'out'}", *SMALL, *given
        )

    truncate(last_shard(copy / "vae"))
    assert f"{last_shard(copy / 'vae')} is no complete safetensors file" in fail()
    for component in ("vae", "text_encoder"):
        config = (copy / component / "config.json").read_bytes()
        (copy / component).rename(tmp_path / component)
        (copy / component).mkdir()
        (copy / component / "config.json").write_bytes(config)
        assert f"{copy / component} holds no weights; copy them there" in fail()
        shutil.rmtree(copy / component)
        (tmp_path / component).rename(copy / component)
    shutil.rmtree(copy / "tokenizer")
    assert f"tokenizer folder {copy / 'tokenizer'}" in fail()
    shutil.rmtree(copy / "transformer")
    assert f"no transformer weights in {copy}" in fail()


def test_training_names_the_fault(commands, copy, dataset, pretrain_workdir, tmp_path):
    def fail(**fields):
        return commands.fail("train", *commands.train_flags("pretrain", tmp_path / "run", dataset.csv, **fields))

    assert "the transformer takes" in fail(pretrained=copy, init_from=pretrain_workdir)  # another VAE, another T5
    last_shard(copy / "text_encoder").unlink()
    assert f"named by {index(copy / 'text_encoder')}, is missing" in fail(pretrained=copy)
    (copy / "scheduler" / "scheduler_config.json").unlink()
    assert "scheduler_config.json" in fail(pretrained=copy)


def test_a_storyboard_without_a_vae_is_refused_before_the_first_step(commands, copy, dataset, tmp_path):
    """Said before the first step; without storyboards, latents that are there already need no VAE."""
    for file in (copy / "vae").glob("*.safetensors*"):
        file.unlink()
    flags = commands.train_flags("pretrain", tmp_path / "run", dataset.csv, pretrained=copy, sample_every=1)
    line = commands.fail("train", *flags)
    assert f"{copy}/vae holds no weights; storyboards need it; set sample_every=0" in line


def test_a_run_whose_only_checkpoint_is_damaged_does_not_begin_anew(commands, pretrain_workdir, dataset, tmp_path):
    """It is kept under another name, and the run does not begin anew unasked."""
    workdir = shutil.copytree(pretrain_workdir, tmp_path / "run")
    (workdir / "checkpoints" / "2" / "record" / "metadata").write_text("{")
    line = commands.fail("train", *commands.train_flags("pretrain", workdir, dataset.csv))
    assert f"no checkpoint in {workdir / 'checkpoints'} can be read, and all are set aside as damaged-STEP" in line
    assert (workdir / "checkpoints" / "damaged-2" / "params").is_dir()
