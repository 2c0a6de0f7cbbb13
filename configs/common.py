"""How a config is made: the defaults of its kind, then what its stage, its preset and its slice change.

Every file of this folder takes a preset after a colon and, after a comma, the TPU slice that the run is for:
`configs/sft.py:2b`, `configs/sft.py:5b,v5e-64`. Without a preset it is the 5B recipe. Any field can be set on the
command line, `--config.num_steps=100`. Fields, defaults, choices and units: `mask2dit_jax/config.py`.

    5b    CogVideoX-5b sizes: rotary positions; the sizes of the released Mask2DiT
    2b    CogVideoX-2b sizes: sin-cos positions; the sizes of most of the paper's tables
    tiny  trains on two CPU cores in minutes; its VAE, text encoder and tokenizer ship with the package (tiny.py)
    desk  the paper's findings on two CPU cores, in a world of 4 x 4 pixels (desk.py)

A preset is a table: for all kinds, for training, or for one kind, the fields that it changes.
"""

from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from configs import desk, slices, tiny
from mask2dit_jax.config import DEFAULT_PRESET, KINDS, TrainConfig, to_config_dict

Changes = Mapping[str, Mapping[str, Any]]  # for "all", "train", "pretrain", "sft" or "sample": field -> value

TWO_B: Changes = {"train": {"model.num_heads": 30, "model.num_layers": 30, "model.rope": False}}
PRESETS: Mapping[str, tuple[Changes, ...]] = {
    "5b": (),
    "2b": (TWO_B,),
    "tiny": (tiny.CHANGES,),
    "desk": (tiny.CHANGES, desk.CHANGES),
}


def make_config(kind: str, preset: str, stage: Mapping[str, Any]) -> ConfigDict:
    """Build the config of a stage.

    Args:
        kind: "pretrain", "sft" or "sample".
        preset: what follows the colon on the command line: a preset, a slice after a comma, both or neither.
        stage: fields that the stage changes, whatever the preset.
    """
    name, _, slice_name = preset.partition(",")
    name = name or DEFAULT_PRESET
    if name not in PRESETS:
        raise ValueError(f"preset {name!r} does not exist; append one of {', '.join(f':{p}' for p in PRESETS)}")
    config = to_config_dict(KINDS[kind](kind=kind, preset=name))
    config.update_from_flattened_dict(dict(stage))
    groups = ("all", "train", kind) if KINDS[kind] is TrainConfig else ("all", kind)
    for changes in (*PRESETS[name], slices.changes(slice_name, name)):
        for group in groups:
            config.update_from_flattened_dict(dict(changes.get(group, {})))
    return config
