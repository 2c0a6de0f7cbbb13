r"""Stage 2, SFT: n consecutive scenes make one sample; with probability 0.5 the last is denoised given the others.

    python -m mask2dit_jax.train --config=configs/sft.py --config.init_from=runs/pretrain \
        --config.pretrained=CogVideoX-5b --config.data.path=sft.json

The 5B recipe: 10,000 steps of 8 videos of 3 x 49 frames at 480 x 720 (paper, section 4.1; its authors used 8 GPUs).

Hardware: v5p-128, or v5e-64 and larger (docs/tpu.md). Hours: 10,000 steps take at least 13 on v5p-128 by the compiler's
lower bound of 4.7 s a step, and about twice that by its own schedule; no run of this size has been timed. To expect,
from the paper's Table 10 (2B, fixed scenes, p = 0.5): a visual consistency of 73.2.

`:tiny` is what `make demo` runs: 1000 steps, four minutes on two CPU cores; `evaluate` then finds 5 of 5 scenes nearest
to their own shot.
"""

from configs.common import make_config


def get_config(preset: str = ""):
    """Return the SFT config of a preset (and slice), see common.py."""
    return make_config("sft", preset, {"condition_probability": 0.5, "data.kind": "json"})
