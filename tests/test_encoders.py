"""The frozen encoders: chunks that stream, on the 8 devices of the tests cut into tiles, and prompts embedded once."""

import functools
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mask2dit_jax import encoders
from mask2dit_jax.encoders import TextEncoder, VideoCodec, to_uint8
from mask2dit_jax.errors import UserError
from mask2dit_jax.models.vae import VAE
from mask2dit_jax.port.pretrained import load_module
from mask2dit_jax.setup_run import ASSETS

TINY = ASSETS / "tiny"
SIZE = (8, 12)  # latent rows and columns


@functools.cache
def codec(chunking: str) -> VideoCodec:
    return VideoCodec(TINY, np.float32, chunking)


def latents(frames: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal((frames, *SIZE, 16), np.float32)


@functools.cache
def whole_clip(method, **static):
    """A method of the VAE, of the whole clip in one program on one device."""
    graph, params = nnx.split(load_module(TINY, "vae", dtype=jnp.float32))
    return functools.partial(jax.jit(lambda params, x: method(nnx.merge(graph, params), x, **static)), params)


@pytest.mark.parametrize(
    ("chunking", "lengths"), [("mask2dit", [1, 8, 8, 4]), ("diffusers", [8, 8, 8]), ("diffusers", [9, 8])]
)
def test_chunks_are_the_whole_clip(chunking, lengths):
    z = latents(-(-sum(lengths) // 4))
    chunks = list(codec(chunking).decode_chunks(z))
    assert [len(chunk) for chunk in chunks] == lengths
    streamed = np.concatenate(chunks)
    whole = to_uint8(whole_clip(VAE.decode, chunking=chunking)(z[None] / codec(chunking).config.scaling_factor)[0])
    off = np.abs(streamed.astype(int) - np.asarray(whole).astype(int))
    assert off.max() <= 1  # where fp32 falls on the edge of two bytes
    assert off.mean() < 1e-3
    np.testing.assert_array_equal(codec(chunking).decode(z), streamed)


def test_a_posterior_is_made_in_chunks_too():
    clip = np.random.default_rng(1).uniform(-1, 1, (25, 4 * SIZE[0], 4 * SIZE[1], 3)).astype(np.float32)
    whole = whole_clip(VAE.encode)(clip[None])
    mean, logvar = codec("mask2dit").encode(clip)
    np.testing.assert_allclose(mean, whole.mean[0], atol=2e-5)
    np.testing.assert_allclose(logvar, whole.logvar[0], atol=2e-5)


def test_the_next_chunk_is_under_way_before_one_is_handed_over(monkeypatch):
    streaming, started = codec("mask2dit"), []
    run = streaming._decode
    monkeypatch.setattr(streaming, "_decode", lambda *args: (started.append(len(args[1])), run(*args))[1])
    counts = [len(started) for _ in streaming.decode_chunks(latents(6))]
    assert started == [1, 2, 2, 1]
    assert counts == [2, 3, 4, 4]


def test_equal_chunks_share_a_program():
    streaming = VideoCodec(TINY, np.float32)
    for _ in streaming.decode_chunks(latents(9)):
        pass
    assert streaming._decode._cache_size() == 2  # the first, and all that follow


def test_nothing_to_decode_is_refused():
    with pytest.raises(UserError, match="0 latent frames"):
        codec("mask2dit").decode_chunks(latents(0))


# Prompts


@pytest.fixture
def loads(monkeypatch) -> list:
    """Components whose weights are read."""
    read, names = encoders.load_params, []
    monkeypatch.setattr(
        encoders, "load_params", lambda folder, name, *a, **k: (names.append(name), read(folder, name, *a, **k))[1]
    )
    return names


def embed(cache, prompts=("a fox", "an owl"), pretrained=TINY, text_tokens=8, dtype=jnp.float32):
    return TextEncoder(pretrained, text_tokens, dtype, cache)(prompts)


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
