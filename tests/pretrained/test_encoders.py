"""The frozen encoders: a VAE that streams, on one device and cut into tiles, and prompts that are embedded once."""

import functools
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mask2dit_jax.errors import UserError
from mask2dit_jax.io.paths import ASSETS
from mask2dit_jax.models.vae import VAE, VAEConfig
from mask2dit_jax.parallel.mesh import local_mesh
from mask2dit_jax.pretrained import directory, encoders
from mask2dit_jax.pretrained.directory import save_diffusers
from mask2dit_jax.pretrained.encoders import TextEncoder, VideoCodec, to_uint8
from mask2dit_jax.pretrained.pretrained import Pretrained

TINY = ASSETS / "tiny"

# Two levels, of which one halves the frame rate: a latent is two frames.
VAE_CONFIG = VAEConfig(
    block_out_channels=(4, 8), latent_channels=4, layers_per_block=1, norm_num_groups=2, temporal_compression_ratio=2
)
GRAPH, PARAMS = nnx.split(VAE(VAE_CONFIG, rngs=nnx.Rngs(0)))


@pytest.fixture(scope="module")
def make_codec(tmp_path_factory):
    """(chunking, number of devices) -> codec; made once each."""
    folder = tmp_path_factory.mktemp("pretrained")
    save_diffusers(folder, "vae", VAE_CONFIG, PARAMS)

    @functools.cache
    def make(chunking: str = "mask2dit", devices: int = 1) -> VideoCodec:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(encoders, "local_mesh", lambda tiles: local_mesh(tiles, jax.devices()[:devices]))
            return VideoCodec(Pretrained.open(folder), np.float32, chunking)

    return make


def latents(frames: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal((frames, 8, 4, 4), np.float32)


def of_the_whole_clip(method, x, **static):
    return jax.jit(lambda params, x: method(nnx.merge(GRAPH, params), x, **static))(PARAMS, x[None])


@pytest.mark.parametrize(
    ("chunking", "devices", "lengths"),
    [("mask2dit", 1, [1, 4, 4, 2]), ("diffusers", 1, [5, 4]), ("mask2dit", 4, [1, 4])],
)
@pytest.mark.slow
def test_chunks_are_the_whole_clip(make_codec, chunking, devices, lengths):
    codec, z = make_codec(chunking, devices), latents(-(-sum(lengths) // 2))
    chunks = list(codec.decode_chunks(z))
    assert [len(chunk) for chunk in chunks] == lengths
    streamed = np.concatenate(chunks)
    whole = to_uint8(of_the_whole_clip(VAE.decode, z / VAE_CONFIG.scaling_factor, chunking=chunking)[0])
    off = np.abs(streamed.astype(int) - np.asarray(whole).astype(int))
    assert off.max() <= 1  # where fp32 falls on the edge of two bytes
    assert off.mean() < 1e-3
    np.testing.assert_array_equal(codec.decode(z), streamed)


def test_a_posterior_is_made_in_chunks_too(make_codec):
    clip = np.random.default_rng(1).uniform(-1, 1, (17, 16, 8, 3)).astype(np.float32)
    whole = of_the_whole_clip(VAE.encode, clip)
    mean, logvar = make_codec().encode(clip)
    np.testing.assert_allclose(mean, whole.mean[0], atol=2e-5)
    np.testing.assert_allclose(logvar, whole.logvar[0], atol=2e-5)


def test_the_next_chunk_is_under_way_before_one_is_handed_over(make_codec, monkeypatch):
    codec, started = make_codec(), []
    run = codec._decode
    monkeypatch.setattr(codec, "_decode", lambda *args: (started.append(len(args[1])), run(*args))[1])
    counts = [len(started) for _ in codec.decode_chunks(latents(6))]
    assert started == [1, 2, 2, 1]
    assert counts == [2, 3, 4, 4]
    assert run._cache_size() == 3  # equal chunks share a program


def test_nothing_to_decode_is_refused(make_codec):
    with pytest.raises(UserError, match="0 latent frames"):
        make_codec().decode_chunks(latents(0))


# Prompts


@pytest.fixture
def loads(monkeypatch) -> list:
    """Components whose weights are read."""
    read, names = directory.load_component, []
    monkeypatch.setattr(
        directory, "load_component", lambda folder, name, *a, **k: (names.append(name), read(folder, name, *a, **k))[1]
    )
    return names


def embed(cache, prompts=("a fox", "an owl"), pretrained=TINY, text_tokens=8, dtype=jnp.float32):
    return TextEncoder(Pretrained.open(pretrained), text_tokens, dtype, cache)(prompts)


def test_prompts_known_need_no_text_encoder(tmp_path, loads):
    first = embed(tmp_path)
    assert loads == ["text_encoder"]
    np.testing.assert_array_equal(first, embed(None))
    loads.clear()
    np.testing.assert_array_equal(embed(tmp_path, ("an owl", "a fox")), first[::-1])
    assert loads == []
    embed(tmp_path, ("a fox", "a newt"))
    assert loads == ["text_encoder"]


def test_what_changes_an_embedding_is_told_apart(tmp_path, loads):
    other = tmp_path / "other"
    shutil.copytree(TINY, other)
    weights = bytearray((other / "text_encoder" / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (other / "text_encoder" / "model.safetensors").write_bytes(weights)
    embed(tmp_path / "cache")
    embed(tmp_path / "cache", text_tokens=9)
    embed(tmp_path / "cache", dtype=jnp.bfloat16)
    embed(tmp_path / "cache", pretrained=other)
    assert len(loads) == 4


@pytest.mark.parametrize("damage", [lambda data: data[:-40], lambda data: b"", lambda data: b"\x93NUMPY" + bytes(200)])
def test_damaged_embeddings_are_made_again(tmp_path, loads, damage):
    first = embed(tmp_path)
    files = list(tmp_path.rglob("*.npy"))
    assert len(files) == 2
    files[0].write_bytes(damage(files[0].read_bytes()))
    np.testing.assert_array_equal(embed(tmp_path), first)
    loads.clear()
    embed(tmp_path)
    assert loads == []


def test_embeddings_of_numbers_that_are_none_are_made_again(tmp_path):
    first = embed(tmp_path)
    for file in tmp_path.rglob("*.npy"):
        np.save(file, np.full((8, 64), np.nan, np.float32))
    np.testing.assert_array_equal(embed(tmp_path), first)


def test_a_cache_that_cannot_be_written_costs_nothing(tmp_path):
    (tmp_path / "file").write_text("no folder")
    assert embed(tmp_path / "file").shape == (2, 8, 64)
