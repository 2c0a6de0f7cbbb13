"""What the config alone shows to be wrong is said before anything is read."""

import pytest

from configs import sft
from mask2dit_jax import config as run_config
from mask2dit_jax.errors import UserError


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"accumulate_steps": 0}, "accumulate_steps=0 must be at least 1"),
        ({"max_skipped_updates": 0}, "max_skipped_updates=0 must be at least 1"),
        ({"keep_every": -1}, "keep_every=-1 must be at least 0"),
        ({"sample_every": -1}, "sample_every=-1 must be at least 0"),
        ({"lora.rank": -1}, "lora.rank=-1 must be at least 0"),
        ({"profile_steps": (5, 4)}, r"profile_steps=\(5, 4\) must be a first and a last step"),
        ({"profile_steps": (5,)}, "must be a first and a last step"),
        ({"trainable": (1,)}, "trainable holds 1, which is no text"),
        ({"scene_frames": (9, 9, 9)}, "scene_frames holds 9; give the pixel frames of num_scenes=3 scenes"),
        ({"scene_frames": ((9, 9),)}, r"scene_frames holds \(9, 9\)"),
        ({"scene_frames": ((9, 9, 17),)}, "scene_frames: 17 must be from 1 to num_frames=9"),
        ({"scene_frames": ((9, 9, 5),)}, "scene_frames: 5 is not of the form 8k .* nearest is 1"),
    ],
)
def test_bad_values(fields, told):
    config = sft.get_config("tiny")
    config.update_from_flattened_dict(fields)
    with pytest.raises(UserError, match=told):
        run_config.check_values(config, "train", "num_steps")


def test_the_length_that_is_stored_is_always_allowed():
    """A scene of 5 frames is no part of a longer one, but it is one of 5."""
    config = sft.get_config("tiny")
    config.update_from_flattened_dict({"num_frames": 5, "scene_frames": ((5, 5, 5), (1, 5, 5))})
    run_config.check_values(config, "train", "num_steps")


def test_changes_are_named(caplog):
    config = sft.get_config("tiny")
    before = config.to_dict() | {"seed": 7, "lora": {"rank": 4, "alpha": 16.0}, "trainable": []}
    with caplog.at_level("WARNING"):
        run_config.log_changes(before, config)
    assert "resumed with other settings: lora.rank 0, not 4; seed 0, not 7" in caplog.text.replace("\n", " ")
