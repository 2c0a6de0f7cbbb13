"""Stage 2: n consecutive scenes make one sample; with probability 0.5 the last is denoised given the others.

    python -m mask2dit_jax.train --config=configs/sft.py:5b --workdir=WORKDIR \\
        --config.pretrained=CogVideoX-5b --config.init_from=PRETRAIN_WORKDIR --config.data.path=sft.json

The paper: 10,000 steps, 8 videos of 3 x 49 frames at 480 x 720 a step. `:tiny` is what `make demo` runs.
"""

from configs import common, desk, slices


def get_config(preset: str = ""):
    preset, _, slice_name = preset.partition(",")
    config = common.training(preset)
    config.data.kind = "sft"
    config.data.path = "data/demo/sft.json" if preset == "tiny" else ""
    config.condition_probability = 0.5
    if preset == "tiny":
        config.num_steps = config.optimizer.decay_steps = 1000
        config.init_from = "workdir/pretrain"
    return desk.adapted(slices.adapted(config, slice_name))
