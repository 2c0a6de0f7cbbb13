"""Makes `mask2dit_jax/assets/tiny/{tokenizer,text_encoder}`, the text side of the tiny preset.

    python experiments/recipes/tiny_text.py [--output=mask2dit_jax/assets/tiny]

This takes a few seconds. The same seed gives the same files. The tokenizer is a SentencePiece unigram vocabulary
trained on tiny_captions.txt, in the file layout of a CogVideoX repository (`spiece.model` and no `tokenizer.json`; pad
0, end 1, unknown 2; 100 sentinel tokens after the pieces). Every printable ASCII character is a piece, so plain English
has no unknown tokens and takes about two tokens per word. The encoder is an untrained T5 v1.1, because a small
transformer needs only a random mixture of the words to tell prompts apart.
"""

import io
import string
from pathlib import Path

import sentencepiece
from absl import app, flags
from flax import nnx

from mask2dit_jax.models.t5 import PORT_TABLE, T5Config, T5Encoder
from mask2dit_jax.pretrained.safetensors import save_weights, write_json

ROOT = Path(__file__).parents[2]
PAD_ID = 0
NUM_PIECES = 512
NUM_SENTINELS = 100  # as in every T5; 612 ids in all, for which T5 rounds its table up to a multiple of 128

_SPECIAL_TOKENS = {"eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}

_OUTPUT = flags.DEFINE_string("output", str(ROOT / "mask2dit_jax/assets/tiny"), "Output folder of both components.")
_SEED = flags.DEFINE_integer("seed", 0, "Seed of the encoder's weights.")


def make_tokenizer(folder: Path):
    """Train the tokenizer and write it to `folder`."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter((ROOT / "experiments/recipes/tiny_captions.txt").read_text().splitlines()),
        model_writer=model,  # a file prefix would be stored in the model, which would then depend on the folder
        model_type="unigram",
        vocab_size=NUM_PIECES,
        character_coverage=1.0,
        required_chars=string.digits + string.ascii_letters + string.punctuation,
        pad_id=PAD_ID,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        num_threads=1,
        minloglevel=2,
    )
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "spiece.model").write_bytes(model.getvalue())
    write_json(folder / "tokenizer_config.json", _tokenizer_config())
    write_json(folder / "special_tokens_map.json", _special_tokens())
    write_json(folder / "added_tokens.json", dict(zip(_sentinels(), _sentinel_ids(), strict=True)))


def _tokenizer_config() -> dict:
    ids = {PAD_ID: "<pad>", 1: "</s>", 2: "<unk>"} | dict(zip(_sentinel_ids(), _sentinels(), strict=True))
    more = {
        "added_tokens_decoder": {str(i): _added_token(ids[i]) for i in sorted(ids)},
        "extra_ids": NUM_SENTINELS,
        "legacy": True,
        "model_max_length": 226,
        "sp_model_kwargs": {},
        "tokenizer_class": "T5Tokenizer",
    }
    return {"additional_special_tokens": _sentinels(), **_SPECIAL_TOKENS, **more}


def _special_tokens() -> dict:
    return {
        "additional_special_tokens": _sentinels(),
        **{role: _added_token(token) for role, token in _SPECIAL_TOKENS.items()},
    }


def _added_token(content: str) -> dict:
    return {
        "content": content,
        "lstrip": False,
        "normalized": False,
        "rstrip": False,
        "single_word": False,
        "special": True,
    }


def _sentinels() -> list[str]:
    return [f"<extra_id_{i}>" for i in range(NUM_SENTINELS)]


def _sentinel_ids() -> range:
    """Return the ids of the sentinels. T5 numbers them downwards from the end."""
    return range(NUM_PIECES + NUM_SENTINELS - 1, NUM_PIECES - 1, -1)


def make_text_encoder(folder: Path, seed: int):
    """Write an untrained encoder to `folder`."""
    config = T5Config.tiny()
    encoder = T5Encoder(config, rngs=nnx.Rngs(seed))
    # Padding is attended to, as in the real encoder, which has learned to cope. With a random vector for it, all
    # captions look the same: the cosine similarity of their embeddings at 226 tokens is 0.93. With zeros it is 0.13.
    table = encoder.token_embedding.embedding
    table[...] = table[...].at[PAD_ID].set(0)
    save_weights(PORT_TABLE, nnx.state(encoder), folder, name="model")
    write_json(folder / "config.json", config.to_json())


def main(_):
    """Write both components."""
    output = Path(_OUTPUT.value)
    make_tokenizer(output / "tokenizer")
    make_text_encoder(output / "text_encoder", _SEED.value)
    print(f"wrote {output / 'tokenizer'} and {output / 'text_encoder'}")


if __name__ == "__main__":
    app.run(main)
