r"""Stage 1, pretraining: n unrelated single-scene clips make one sample. The attention mask alone, no conditional mask.

    python -m mask2dit_jax.train --config=configs/pretrain.py \
        --config.pretrained=CogVideoX-5b --config.data.path=pretrain.csv

The 5B recipe: 10,000 steps of 8 videos of 3 x 49 frames at 480 x 720 (paper, section 4.1; its authors used 8 GPUs).

Hardware: v5p-128, or v5e-64 and larger (docs/tpu.md). Hours: 10,000 steps take at least 13 on v5p-128 by the compiler's
lower bound of 4.7 s a step, and about twice that by its own schedule; no run of this size has been timed. To expect
after this stage, from the paper's Table 5: scenes that follow their own prompts, and little consistency between them.

`:tiny` is what `make demo` runs: 200 steps, one minute on two CPU cores.
"""

from configs.common import make_config


def get_config(preset: str = ""):
    """Return the pretraining config of a preset (and slice), see common.py."""
    return make_config("pretrain", preset, {"condition_probability": 0.0, "data.kind": "csv"})
