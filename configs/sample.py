"""Sampling: the first `num_scenes` scenes together, then one at a time with the last n-1 as context.

    python -m mask2dit_jax.sample --config=configs/sample.py:5b --output=OUT --config.pretrained=CogVideoX-5b \\
        --config.checkpoint=SFT_WORKDIR --story=story.yaml
    python -m mask2dit_jax.sample --config=configs/sample.py:5b --output=OUT --config.pretrained=Mask2DiT \\
        --config.prompts="('first scene', 'second scene', 'third scene')"

`--plan` says what would be done and stops. Several stories and seeds: `--story=a.yaml,b.yaml --config.seeds="(0, 1)"`.
The same again: `--repeat=OUT/run.json --output=OTHER`.

Extending clips: `given:` in the story file, or `--config.given="('a.mp4', 'b.png')"`, with a prompt for each given clip
or picture before those of new scenes.
The paper: 50 steps, guidance 6, 8 frames a second. `:tiny` samples the demo's story from `make demo`'s checkpoint.
"""

from configs import common, desk, slices


def get_config(preset: str = ""):
    preset, _, slice_name = preset.partition(",")
    config = common.common(preset)
    tiny = preset in common.SMALL
    config.update(
        {
            "checkpoint": "workdir/sft" if tiny else "",  # a training workdir; empty: the transformer of `pretrained`
            "weights": "auto",  # of the checkpoint: "ema", "params", or "auto", the moving average where there is one
            "prompts": common.TINY_STORY if tiny else (),
            "negative_prompt": common.NEGATIVE_PROMPT,
            "given": (),  # clips or pictures that are the story's first scenes
            "seeds": (),  # several: a result for each; none: that of `seed`
            "anchor": False,  # keeps scene 1 in every window: less drift, one scene less of what came last
            "max_scenes": 100,  # more are taken for a slip
            "fps": 8,
            "sampler": {"kind": "ddim", "num_steps": 50, "previous_timestep": "official"},
            "guidance": "static",
            # The tiny model has seen no negative prompt: guidance would only overshoot.
            "guidance_scale": 1.0 if tiny else 6.0,
            "condition": "clean" if tiny else "noised",
            "decode_chunking": "mask2dit",  # or "diffusers"
        }
    )
    return desk.adapted(slices.adapted(config, slice_name))
