"""The tiny text encoder and tokenizer that ship: their recipe makes them, transformers reads them, captions differ."""

import os
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import sentencepiece
import torch
from flax import nnx
from safetensors.numpy import load_file
from transformers import AutoTokenizer, T5EncoderModel

import mask2dit_jax
from mask2dit_jax.models.t5 import PORT_TABLE, T5Config, T5Encoder
from mask2dit_jax.pretrained.safetensors import load_state, open_weights, read_json
from mask2dit_jax.pretrained.tokenizer import cut_prompts, load_tokenizer, tokenize

ROOT = Path(mask2dit_jax.__file__).parents[1]
TINY = ROOT / "mask2dit_jax/assets/tiny"
CAPTIONS = (ROOT / "experiments/recipes/tiny_captions.txt").read_text().splitlines()[::8]


@pytest.fixture(scope="module")
def encoder():
    config = T5Config.from_json(read_json(TINY / "text_encoder/config.json"))
    assert config == T5Config.tiny()
    graph, state = nnx.split(nnx.eval_shape(lambda: T5Encoder(config, rngs=nnx.Rngs(0))))
    return nnx.jit(nnx.merge(graph, load_state(PORT_TABLE, open_weights(TINY / "text_encoder"), state)))


def test_transformers_agrees(encoder):
    tokenizer = AutoTokenizer.from_pretrained(TINY / "tokenizer", local_files_only=True)
    reference, info = T5EncoderModel.from_pretrained(
        TINY / "text_encoder", local_files_only=True, output_loading_info=True
    )
    assert not any(info.values()), info
    ids = tokenizer(CAPTIONS, padding="max_length", max_length=64, truncation=True, return_tensors="pt").input_ids
    with torch.no_grad():
        expected = reference(ids).last_hidden_state.numpy()
    ours = tokenize(load_tokenizer(TINY / "tokenizer"), CAPTIONS, 64)
    np.testing.assert_array_equal(ours, ids.numpy())
    np.testing.assert_allclose(encoder(jnp.asarray(ours)), expected, atol=5e-5)


@pytest.mark.parametrize("max_tokens", [64, 226])
def test_captions_differ_clearly(encoder, max_tokens):
    embeddings = np.asarray(encoder(jnp.asarray(tokenize(load_tokenizer(TINY / "tokenizer"), CAPTIONS, max_tokens))))
    assert 0.9 < embeddings.std() < 1.1
    flat = embeddings.reshape(len(CAPTIONS), -1)
    flat = flat / np.linalg.norm(flat, axis=1, keepdims=True)
    similarities = (flat @ flat.T)[~np.eye(len(CAPTIONS), dtype=bool)]
    assert similarities.mean() < 0.2
    assert similarities.max() < 0.8


def test_two_tokens_a_word():
    counts = [cut.tokens for cut in cut_prompts(load_tokenizer(TINY / "tokenizer"), CAPTIONS, 226)]
    assert sum(counts) / sum(len(caption.split()) for caption in CAPTIONS) < 2.2


def test_the_recipe_makes_what_ships(tmp_path):
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(ROOT / "experiments/recipes/tiny_text.py"), f"--output={tmp_path}"]
    subprocess.run(command, env=environment, check=True, capture_output=True)
    assert _names(tmp_path) == {name for name in _names(TINY) if name.startswith(("tokenizer/", "text_encoder/"))}
    for name in (name for name in _names(tmp_path) if name.endswith(".json")):
        assert (tmp_path / name).read_text() == (TINY / name).read_text()
    assert _pieces(tmp_path) == _pieces(TINY)
    # Not bit for bit: the last bit of a random normal number depends on the CPU.
    made, shipped = (load_file(folder / "text_encoder/model.safetensors") for folder in (tmp_path, TINY))
    assert made.keys() == shipped.keys()
    for key in made:
        np.testing.assert_allclose(made[key], shipped[key], atol=1e-6, err_msg=key)
    assert sum((tmp_path / name).stat().st_size for name in _names(tmp_path)) < 10**6


def _names(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def _pieces(folder: Path) -> list[str]:
    model = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer/spiece.model"))
    return [model.id_to_piece(i) for i in range(model.get_piece_size())]
