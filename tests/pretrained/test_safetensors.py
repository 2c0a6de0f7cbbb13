"""Weight files: round trips, every kind of damage, and one copy of the model in memory."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file
from safetensors.torch import load_file as load_torch_file

from mask2dit_jax.errors import UserError
from mask2dit_jax.models.port_rules import export, flatten
from mask2dit_jax.pretrained import safetensors
from mask2dit_jax.pretrained.safetensors import load_state, open_weights, read_json, save_weights, write_json
from tests.models.toy import TABLE, Toy, abstract_toy

SHARD_BYTES = 500  # the toy has 2.4 KB


@pytest.fixture
def state():
    return nnx.state(Toy())


@pytest.fixture(params=[SHARD_BYTES, 10**6], ids=["sharded", "single"])
def folder(request, tmp_path, state):
    save_weights(TABLE, state, tmp_path, name="model", max_shard_bytes=request.param)
    return tmp_path


@pytest.fixture
def sharded(tmp_path, state):
    save_weights(TABLE, state, tmp_path, name="model", max_shard_bytes=SHARD_BYTES)
    return tmp_path


def torch_tensors(state):
    return {key: read() for key, _, read in export(TABLE, state)}


def assert_same(actual, expected):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for path, leaf in flatten(actual).items():
        np.testing.assert_array_equal(leaf[...], flatten(expected)[path][...], err_msg=path)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# Round trips


def test_round_trip(folder, state):
    loaded = load_state(TABLE, open_weights(folder), abstract_toy())
    assert_same(loaded, state)
    assert all(isinstance(leaf, nnx.Param) for leaf in flatten(loaded).values())


def test_layout_of_the_files(sharded, state):
    index = json.loads((sharded / "model.safetensors.index.json").read_text())
    shards = [name for name in names(sharded) if name.endswith(".safetensors")]
    count = len(shards)
    assert count > 2
    assert shards == [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
    assert index["metadata"] == {"total_size": sum(leaf[...].nbytes for leaf in flatten(state).values())}
    held = {key: shard for shard in shards for key in load_file(sharded / shard)}
    assert held == index["weight_map"]


def test_shards_respect_their_limit(sharded):
    for shard in sharded.glob("*.safetensors"):
        tensors = load_file(shard)
        assert len(tensors) == 1 or sum(tensor.nbytes for tensor in tensors.values()) <= SHARD_BYTES


def test_torch_reads_the_files(folder, state):
    held = {key: tensor for file in folder.glob("*.safetensors") for key, tensor in load_torch_file(file).items()}
    for key, tensor in torch_tensors(state).items():
        np.testing.assert_array_equal(held[key].numpy(), tensor)


def test_bf16_file(tmp_path, state):
    save_weights(TABLE, state, tmp_path, name="diffusion_pytorch_model", dtype=jnp.bfloat16)
    stored = open_weights(tmp_path)
    assert {tensor.dtype for tensor in stored.values()} == {np.dtype(ml_dtypes.bfloat16)}
    kept = load_state(TABLE, stored, abstract_toy())
    assert_same(kept, jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), state))
    widened = load_state(TABLE, stored, abstract_toy(), dtype=jnp.float32)
    assert {leaf.dtype for leaf in flatten(widened).values()} == {np.dtype(np.float32)}
    assert_same(widened, jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16).astype(jnp.float32), state))


def test_layers_of_mixed_types_are_promoted(tmp_path, state):
    tensors = torch_tensors(state)
    tensors["blocks.1.w.bias"] = tensors["blocks.1.w.bias"].astype(np.float16)
    save_file(tensors, tmp_path / "model.safetensors")
    assert_same(load_state(TABLE, open_weights(tmp_path), abstract_toy()), state)


def test_both_names_of_one_tensor(tmp_path, state):
    tensors = torch_tensors(state)
    save_file(tensors | {"tied.weight": tensors["embed.weight"]}, tmp_path / "model.safetensors")
    assert_same(load_state(TABLE, open_weights(tmp_path), abstract_toy()), state)


def test_wide_matrices_are_copied_whole(tmp_path):
    sizes = {"width": 70, "layers": 2, "vocabulary": 200}  # wider than the columns copied at a time
    state = nnx.state(Toy(**sizes))
    save_weights(TABLE, state, tmp_path, name="model")
    assert_same(load_state(TABLE, open_weights(tmp_path), abstract_toy(**sizes)), state)


def test_lazy_reads_of_parts(folder, state):
    stored = open_weights(folder)["blocks.2.w.weight"]
    assert (stored.shape, stored.dtype) == ((12, 6), np.float32)
    np.testing.assert_array_equal(stored.view()[3:5, 2:], state["blocks"]["kernel"][...][2].T[3:5, 2:])


def test_saving_again_replaces_what_was_there(tmp_path, state):
    for shard_bytes in (SHARD_BYTES, 10**6, SHARD_BYTES // 2, SHARD_BYTES):
        save_weights(TABLE, state, tmp_path, name="model", max_shard_bytes=shard_bytes)
        assert_same(load_state(TABLE, open_weights(tmp_path), abstract_toy()), state)
        assert not list(tmp_path.glob("*.tmp"))


def test_an_interrupted_save_leaves_the_earlier_weights(folder, state, monkeypatch):
    before = names(folder)
    _fail_at_the_second_shard(monkeypatch)
    with pytest.raises(UserError, match=r"cannot write weights into .*No space left"):
        save_weights(TABLE, state, folder, name="model", max_shard_bytes=SHARD_BYTES)
    assert names(folder) == before
    assert_same(load_state(TABLE, open_weights(folder), abstract_toy()), state)


def test_an_interrupted_first_save_leaves_nothing(tmp_path, state, monkeypatch):
    _fail_at_the_second_shard(monkeypatch)
    with pytest.raises(UserError, match="No space left"):
        save_weights(TABLE, state, tmp_path, name="model", max_shard_bytes=SHARD_BYTES)
    assert names(tmp_path) == []


def _fail_at_the_second_shard(monkeypatch):
    def save(shard, path, metadata):
        if "00002" in path.name:
            raise OSError(28, "No space left on device")
        save_file(shard, path, metadata=metadata)

    monkeypatch.setattr(safetensors, "save_file", save)


def test_a_folder_that_cannot_be_made(tmp_path, state):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot write weights into .*may you write there"):
        save_weights(TABLE, state, tmp_path / "file" / "model", name="model")


# Damage


def test_missing_folder(tmp_path):
    with pytest.raises(UserError, match="nowhere does not exist"):
        open_weights(tmp_path / "nowhere")


def test_remote_folder():
    with pytest.raises(UserError, match="is remote"):
        open_weights("gs://bucket/vae")


def test_folder_without_safetensors(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(UserError, match=r"holds neither .*\.bin files must be converted"):
        open_weights(tmp_path)


def test_folder_with_two_sets_of_weights(sharded):
    save_file({"a": np.zeros(1)}, sharded / "diffusion_pytorch_model.safetensors")
    with pytest.raises(UserError, match=r"holds both .*; remove all but one"):
        open_weights(sharded)


def test_missing_shard(sharded):
    next(sharded.glob("model-00002*")).unlink()
    with pytest.raises(UserError, match=r"shard 'model-00002-of-.*', named by .*index.json, is missing"):
        open_weights(sharded)


def test_key_that_the_index_promises(sharded):
    index = sharded / "model.safetensors.index.json"
    raw = read_json(index)
    raw["weight_map"]["ghost.weight"] = raw["weight_map"]["embed.weight"]
    write_json(index, raw)
    with pytest.raises(UserError, match=r"'ghost.weight' is not in 'model-.*', where .* promises it"):
        open_weights(sharded)


@pytest.mark.parametrize("text", ["{", '{"metadata": {}}', '{"weight_map": {"a": 3}}', "[]", "\x00\xff"])
def test_damaged_index(sharded, text):
    (sharded / "model.safetensors.index.json").write_text(text, encoding="latin-1")
    with pytest.raises(UserError, match=r"index\.json .*download it again"):
        open_weights(sharded)


@pytest.mark.parametrize("damage", ["one byte short", "header only", "empty", "garbage", "trailing bytes"])
def test_damaged_file(folder, damage):
    path = sorted(folder.glob("*.safetensors"))[0]
    whole = path.read_bytes()
    damaged = {
        "one byte short": whole[:-1],
        "header only": whole[:60],
        "empty": b"",
        "garbage": b"<html>404 not found</html>" * 20,
        "trailing bytes": whole + b"\0",
    }
    path.write_bytes(damaged[damage])
    with pytest.raises(UserError, match=rf"{path.name} is no complete safetensors file .*download it again") as caught:
        open_weights(folder)
    assert "\n" not in str(caught.value)


def test_integer_tensor(tmp_path):
    save_file({"ids": np.arange(3)}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match="tensor 'ids' is of type I64; only"):
        open_weights(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("blocks.1.w.bias"), "vae: tensor 'blocks.1.w.bias' is missing"),
        (lambda t: t.update(extra=np.zeros(2)), "vae: tensor 'extra' is not one this model knows"),
        (lambda t: t.update({"blocks.0.w.bias": np.zeros(5)}), "vae: tensor 'blocks.0.w.bias' has shape"),
    ],
)
def test_strict(tmp_path, state, change, message):
    tensors = torch_tensors(state)
    change(tensors)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=message):
        load_state(TABLE, open_weights(tmp_path), abstract_toy(), what="vae")


def test_config_json(tmp_path):
    path = tmp_path / "config.json"
    with pytest.raises(UserError, match=r"cannot read .*config\.json \(No such file"):
        read_json(path)
    for text in ("{'a': 1}", "3", ""):
        path.write_text(text)
        with pytest.raises(UserError, match=r"config\.json .*download it again"):
            read_json(path)
    write_json(path, {"a": 1})
    assert read_json(path) == {"a": 1}


# Memory and devices: in fresh processes, that nothing else allocates


@pytest.fixture(scope="module")
def big_checkpoint(tmp_path_factory):
    """400 MB in fp32; one stacked parameter is two thirds of it."""
    folder = tmp_path_factory.mktemp("big")
    rng = np.random.default_rng(0)
    tensors = {"embed.weight": rng.random((32000, 1000), np.float32)}
    for layer in range(8):
        tensors[f"blocks.{layer}.w.weight"] = rng.random((6000, 1400), np.float32)
        tensors[f"blocks.{layer}.w.bias"] = rng.random(6000, np.float32)
    save_file(tensors, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize(("dtype", "devices"), [("None", 1), ("bfloat16", 1), ("float32", 4)])
@pytest.mark.slow
def test_one_copy_in_memory(big_checkpoint, dtype, devices):
    script = Path(__file__).parent / "measure_load.py"
    flags = f"--xla_force_host_platform_device_count={devices}"
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
    run = subprocess.run(
        [sys.executable, script, big_checkpoint, dtype], env=environment, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    result = json.loads(run.stdout)
    assert result["shards"] == devices
    assert result["equal"]
    assert result["model_bytes"] > (190e6 if dtype == "bfloat16" else 390e6)
    assert result["peak_bytes"] <= 1.15 * result["model_bytes"], result
