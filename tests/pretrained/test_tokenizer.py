"""Prompts to token ids: against the sentencepiece library, cut and padded, and the assets of the tiny preset."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
from absl import logging
from transformers import AutoTokenizer

import mask2dit_jax
from mask2dit_jax.errors import UserError
from mask2dit_jax.pretrained.tokenizer import cut_prompts, load_tokenizer, tokenize

TINY = Path(mask2dit_jax.__file__).parent / "assets/tiny/tokenizer"
PROMPTS = [
    "A mountain biker in a red jersey races down a dusty forest trail.",
    'Actor1 (man, grey coat) opens door #3; "who\'s there?" - 100% of $5 & {x}|[y]\\ @home ~^_`<b>=+*/!',
    "  spaces,\ttabs\nand  newlines  ",
    "Accents and signs: café, naïve “quoted” … ½ ﬁne",
    "日本語",
    "",
]


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(TINY)


@pytest.fixture
def folder(tmp_path):
    return Path(shutil.copytree(TINY, tmp_path / "tokenizer"))


@pytest.fixture
def warnings(monkeypatch):
    lines = []
    monkeypatch.setattr(logging, "warning", lambda message, *args: lines.append(message % args))
    return lines


def expected_ids(prompt: str, folder: Path = TINY) -> list[int]:
    return [*sentencepiece.SentencePieceProcessor(model_file=str(folder / "spiece.model")).encode(prompt), 1]


@pytest.mark.parametrize("prompt", PROMPTS)
def test_ids_are_those_of_sentencepiece(tokenizer, prompt, warnings):
    ids = expected_ids(prompt)
    row = tokenize(tokenizer, [prompt], 120)
    assert row.shape == (1, 120)
    assert row.dtype == np.int32
    assert row[0].tolist() == ids + [0] * (120 - len(ids))
    assert [cut.tokens for cut in cut_prompts(tokenizer, [prompt], 226)] == [len(ids)]
    assert not warnings


def test_equals_the_call_of_the_official_pipeline(tokenizer):
    official = AutoTokenizer.from_pretrained(TINY, local_files_only=True)
    options = {"padding": "max_length", "max_length": 20, "truncation": True, "add_special_tokens": True}
    expected = official(PROMPTS, **options).input_ids
    np.testing.assert_array_equal(tokenize(tokenizer, PROMPTS, 20), expected)


def test_default_length(tokenizer):
    assert tokenize(tokenizer, PROMPTS[:2]).shape == (2, 226)


def test_a_long_prompt_is_cut_with_one_warning_that_names_the_words(tokenizer, warnings):
    prompts = ["A cat sleeps.", "A dog runs. " * 3 + "Suddenly the moon explodes over Kyoto"]
    whole = expected_ids(prompts[1])
    moon = cut_prompts(tokenizer, ["A dog runs. " * 3 + "Suddenly"], 226)[0].tokens
    rows = tokenize(tokenizer, prompts, moon)
    assert rows[1].tolist() == [*whole[: moon - 1], 1]
    assert rows[0].tolist() == (expected_ids(prompts[0]) + [0] * moon)[:moon]
    assert len(warnings) == 1
    assert f"prompt of {len(whole)} tokens is cut to {moon}: 'the moon explodes over Kyoto' is lost" in warnings[0]


def test_a_prompt_that_just_fits_is_not_cut(tokenizer, warnings):
    length = len(expected_ids(PROMPTS[0]))
    assert tokenize(tokenizer, PROMPTS[:1], length)[0].tolist() == expected_ids(PROMPTS[0])
    assert not warnings
    tokenize(tokenizer, PROMPTS[:1], length - 1)
    assert len(warnings) == 1


def test_plain_english_is_never_unknown(tokenizer):
    printable = "".join(map(chr, range(33, 127)))
    assert 2 not in tokenize(tokenizer, [printable, *printable], 226)


@pytest.mark.parametrize("kept", [["spiece.model"], ["spiece.model", "tokenizer_config.json"]])
def test_the_vocabulary_alone_is_enough(folder, kept):
    for path in folder.iterdir():
        if path.name not in kept:
            path.unlink()
    assert tokenize(load_tokenizer(folder), PROMPTS[:1], 60)[0].tolist()[:9] == expected_ids(PROMPTS[0])[:9]


def test_tokenizer_json_does_as_well(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)  # what transformers 5 writes
    assert not (tmp_path / "spiece.model").exists()
    np.testing.assert_array_equal(tokenize(load_tokenizer(tmp_path), PROMPTS, 60), tokenize(tokenizer, PROMPTS, 60))


def test_missing_folder(tmp_path):
    with pytest.raises(UserError, match=r"nowhere holds no spiece.model; copy tokenizer/"):
        load_tokenizer(tmp_path / "nowhere")


@pytest.mark.parametrize("damage", [b"", b"<html>404</html>", TINY.joinpath("spiece.model").read_bytes()[:100_000]])
def test_damaged_vocabulary(folder, damage):
    (folder / "spiece.model").write_bytes(damage)
    with pytest.raises(UserError, match=r"spiece.model is no SentencePiece vocabulary") as caught:
        load_tokenizer(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["tokenizer_config.json", "tokenizer.json"])
def test_damaged_settings(folder, name):
    (folder / name).write_text('{"eos_')
    with pytest.raises(UserError, match=r"tokenizer folder .* is damaged"):
        load_tokenizer(folder)


def test_sentinels_follow_the_pieces(tokenizer):
    added = json.loads((TINY / "added_tokens.json").read_text())
    assert added["<extra_id_99>"] == 512
    assert tokenizer.convert_tokens_to_ids(list(added)) == list(added.values())


WITHOUT_TORCH = """
import importlib.util
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *more: None if name.partition(".")[0] == "torch" else find(name, *more)
import {module}
import transformers
assert not transformers.utils.is_torch_available()
"""


@pytest.mark.parametrize("module", ["mask2dit_jax.pretrained.tokenizer", "mask2dit_jax.pretrained.pretrained"])
def test_nothing_is_said_of_a_pytorch_that_nobody_needs(module):
    code = WITHOUT_TORCH.format(module=module)
    finished = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "PyTorch" not in finished.stdout + finished.stderr
