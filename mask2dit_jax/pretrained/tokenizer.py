"""Tokenize prompts as CogVideoX does: add an end token, cut or pad to a fixed length, use no attention mask."""

import dataclasses
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import sentencepiece
from absl import logging
from etils import epath
from jaxtyping import Int32

from mask2dit_jax.errors import UserError

# transformers warns as it is imported that it found no PyTorch. Only its tokenizer is used, here and nowhere else.
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
from transformers import T5Tokenizer

MAX_TOKENS = 226  # a scene's text tokens in every released CogVideoX
_FILES = ("spiece.model", "tokenizer.json", "tokenizer_config.json", "added_tokens.json", "special_tokens_map.json")


def tokenizer_files(folder: str | os.PathLike) -> list[epath.Path]:
    """Return the files of a `tokenizer/` folder, local or gs://, that decide the tokens of a text."""
    return [path for name in _FILES if (path := epath.Path(folder) / name).exists()]


def load_tokenizer(folder: str | os.PathLike) -> T5Tokenizer:
    """Load the `tokenizer/` of a diffusers directory, from a disk or a bucket.

    CogVideoX repositories hold `spiece.model`. A `tokenizer.json` is read where there is one.

    Raises:
        UserError: the folder is missing or damaged.
    """
    # transformers opens local files only, and in a folder that holds others it may take one for the vocabulary.
    with tempfile.TemporaryDirectory() as local:
        for file in tokenizer_files(folder):
            file.copy(epath.Path(local) / file.name)
        return _load_tokenizer(Path(local), folder)


def _load_tokenizer(local: Path, folder: str | os.PathLike) -> T5Tokenizer:
    vocabulary = local / "spiece.model"
    # Without this check, transformers uses an empty vocabulary for a missing file, and guesses for a damaged one.
    if vocabulary.exists():
        _check_vocabulary(vocabulary, folder)
    elif not (local / "tokenizer.json").exists():
        raise UserError(f"tokenizer folder {folder} holds no spiece.model; copy tokenizer/ from the model's repository")
    try:
        return T5Tokenizer.from_pretrained(local, local_files_only=True)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"tokenizer folder {folder} is damaged ({_first_line(error)}); copy it again") from error


def _check_vocabulary(path: Path, folder: str | os.PathLike):
    try:
        sentencepiece.SentencePieceProcessor(model_file=str(path))
    except (RuntimeError, OSError) as error:
        raise UserError(
            f"{folder}/{path.name} is no SentencePiece vocabulary ({_first_line(error)}); copy it again"
        ) from error


def _first_line(error: BaseException) -> str:
    return str(error).partition("\n")[0]


@dataclasses.dataclass(frozen=True)
class Cut:
    """How much of a text a scene has room for.

    Attributes:
        tokens: number of tokens of the text, the end token included.
        limit: number of tokens that a scene has room for.
        lost: the words beyond the limit.
    """

    tokens: int
    limit: int
    lost: str


def cut_prompts(tokenizer: T5Tokenizer, prompts: Sequence[str], max_tokens: int) -> list[Cut]:
    """Return how `tokenize` would cut the prompts."""
    cuts = []
    for ids in _encode(tokenizer, prompts):
        lost = tokenizer.decode(ids[max_tokens - 1 : -1], skip_special_tokens=True) if len(ids) > max_tokens else ""
        cuts.append(Cut(len(ids), max_tokens, shorten(lost)))
    return cuts


def shorten(text: str, most: int = 300) -> str:
    """Return the beginning and the end of a text that is too long to read."""
    if len(text) <= most:
        return text
    half = most // 2
    return f"{text[:half].rstrip()} [{len(text) - 2 * half} characters] {text[-half:].lstrip()}"


def tokenize(tokenizer: T5Tokenizer, prompts: Sequence[str], max_tokens: int = MAX_TOKENS) -> Int32[np.ndarray, "n t"]:
    """Return the token ids of each prompt, padded to `max_tokens`. Logs a warning for every prompt that is cut."""
    padded = np.full((len(prompts), max_tokens), tokenizer.pad_token_id, np.int32)
    for row, prompt, ids in zip(padded, prompts, _encode(tokenizer, prompts), strict=True):
        if len(ids) > max_tokens:
            kept, lost = ids[: max_tokens - 1], tokenizer.decode(ids[max_tokens - 1 : -1], skip_special_tokens=True)
            logging.warning(
                "prompt of %d tokens is cut to %d: %r is lost from %r",
                *(len(ids), max_tokens, shorten(lost), shorten(prompt)),
            )
            ids = [*kept, tokenizer.eos_token_id]
        row[: len(ids)] = ids
    return padded


def _encode(tokenizer, prompts) -> list[list[int]]:
    return tokenizer(list(prompts), truncation=False, padding=False, verbose=False).input_ids
