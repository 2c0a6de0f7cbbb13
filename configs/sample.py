r"""Sampling: the first `num_scenes` scenes together, then one at a time with the last n-1 as context.

    python -m mask2dit_jax.sample --config=configs/sample.py --config.pretrained=Mask2DiT --story=story.yaml
    python -m mask2dit_jax.sample --config=configs/sample.py --config.pretrained=CogVideoX-5b \
        --config.checkpoint=runs/sft --config.prompts="('first scene', 'second scene', 'third scene')"

`--plan` prints what would be done and stops. Several stories and seeds: `--story=a.yaml,b.yaml
--config.seeds="(0, 1)"`. The same again: `--repeat=OUT/run.json --output=OTHER`. To extend clips: `given:` in the story
file, or `--config.given="('a.mp4', 'b.png')"`, with a prompt for each given clip or picture before those of new scenes.

50 steps, guidance 6 and 8 frames a second are the settings of the authors' examples.

Hardware: one GPU of 80 GB, or one TPU host. Time: three scenes of 49 frames take 7.3 minutes on an H200, measured part
by part (docs/gpu.md), and at least 3.6 minutes on a v5p host by the compiler's lower bound (docs/tpu.md).

`:tiny` samples the demo's story from `make demo`'s checkpoint in half a minute on two CPU cores.
"""

from configs.common import make_config


def get_config(preset: str = ""):
    """Return the sampling config of a preset (and slice), see common.py."""
    return make_config("sample", preset, {})
