"""The T5 table against the key list of the real checkpoint."""

import json
from pathlib import Path

import numpy as np
from flax import nnx

from mask2dit_jax.models.port_rules import export, flatten, plan
from mask2dit_jax.models.t5 import PORT_TABLE, T5Config, T5Encoder

_SHAPES = json.loads((Path(__file__).parents[1] / "manifests/t5.json").read_text())
MANIFEST = {key: tuple(shape) for key, shape in _SHAPES.items()}
EMBEDDING_NAMES = ("shared.weight", "encoder.embed_tokens.weight")


def xxl_state():
    return nnx.state(nnx.eval_shape(lambda: T5Encoder(T5Config.xxl(), rngs=nnx.Rngs(0))))


def test_every_key_of_xxl_has_its_parameter():
    state = xxl_state()
    slots = plan(PORT_TABLE, MANIFEST, state)
    assert MANIFEST.keys() - slots.keys() == {EMBEDDING_NAMES[1]}  # the second name of one tensor
    stacked = {slot.path for slot in slots.values() if slot.layer is not None}
    assert all(flatten(state)[path].shape[0] == T5Config.xxl().num_layers for path in stacked)
    assert sum(np.prod(leaf.shape, dtype=np.int64) for leaf in flatten(state).values()) == sum(
        np.prod(MANIFEST[key], dtype=np.int64) for key in slots
    )


def test_either_name_of_the_embedding_is_enough():
    for name in EMBEDDING_NAMES:
        slots = plan(PORT_TABLE, {key: shape for key, shape in MANIFEST.items() if key != name}, xxl_state())
        assert len(slots) == len(MANIFEST) - 1


def test_export_writes_the_keys_of_the_manifest():
    exported = {key: shape for key, shape, _ in export(PORT_TABLE, xxl_state())}
    assert exported == {key: shape for key, shape in MANIFEST.items() if key != EMBEDDING_NAMES[1]}
