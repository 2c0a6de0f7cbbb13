"""Stage 1: n unrelated single-scene clips make one sample; the attention mask alone, no conditional mask.

    python -m mask2dit_jax.train --config=configs/pretrain.py:5b --workdir=WORKDIR \\
        --config.pretrained=CogVideoX-5b --config.data.path=pretrain.csv

The paper: 10,000 steps, 8 videos of 3 x 49 frames at 480 x 720 a step. `:tiny` is what `make demo` runs.
"""

from configs import common, desk, slices


def get_config(preset: str = ""):
    preset, _, slice_name = preset.partition(",")
    config = common.training(preset)
    config.data.kind = "pretrain"
    config.data.path = "data/demo/pretrain.csv" if preset == "tiny" else ""
    config.condition_probability = 0.0
    if preset == "tiny":
        config.num_steps = config.optimizer.decay_steps = 200
        config.data.max_stride = 2  # the shortest shot has 30 frames
    return desk.adapted(slices.adapted(config, slice_name))
