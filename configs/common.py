"""What the stages share: model sizes, video sizes, encoders, precision.

Every config file takes a preset, `configs/sft.py:5b`, after a comma the slice of TPUs that it is to run on,
`configs/sft.py:5b,v5e-64` (see slices.py), and any field can be set on the command line, `--config.num_steps=100`.

    tiny  trains on two CPU cores in minutes; its VAE, text encoder and tokenizer ship with the package
    desk  the paper's findings on two CPU cores, in a world of 4 x 4 pixels; see desk.py
    2b    CogVideoX-2b sizes: sin-cos positions, snr shift 3
    5b    CogVideoX-5b sizes: rotary positions; the sizes of the released Mask2DiT
"""

from ml_collections import ConfigDict

PRESETS = ("tiny", "desk", "2b", "5b")
SMALL = ("tiny", "desk")  # desk starts from the values of tiny; desk.py has what it changes

NEGATIVE_PROMPT = (
    "The video is not of a high quality, it has a low resolution. Watermark present in each frame. The background is "
    "solid. Strange body and strange trajectory. Distortion. "
)

# The demo's shots, word for word as in its training data.
TINY_STORY = (
    "From straight above, the long white roof of a bus slides along a grey street.",
    "Actor1 (a man in a dark suit) cycles between gleaming dark cars, then a TAXI sign slides past.",
    "Actor2 (a cyclist in black with a helmet) waits on a bicycle beside a dark van with red lights.",
    "A parked bicycle leans on a green railing beside a wide street of brick houses.",
    "Actor3 (a man in black trousers) walks past an old bicycle that leans on a grey wall.",
)


def model(preset: str) -> ConfigDict:
    """Sizes of the transformer when it is trained from scratch; pretrained weights bring their own.

    What the VAE and the text encoder of `pretrained` decide is not said here.
    """
    if preset in SMALL:
        return ConfigDict(
            {
                "num_heads": 2,
                "head_dim": 64,
                "num_layers": 3,
                "time_embed_dim": 128,
                "text_tokens": 48,
                "sample_height": 12,  # latent rows and columns of 48 x 80 pixels: the tiny VAE halves them only twice
                "sample_width": 20,
                "sample_frames": 9,
            }
        )
    heads, layers, rope = {"2b": (30, 30, False), "5b": (48, 42, True)}[preset]
    return ConfigDict({"num_heads": heads, "head_dim": 64, "num_layers": layers, "rope": rope})


def common(preset: str) -> ConfigDict:
    """The fields of every stage."""
    if preset not in PRESETS:
        raise ValueError(f"preset {preset!r} does not exist; append one of {', '.join(f':{p}' for p in PRESETS)}")
    tiny = preset in SMALL
    return ConfigDict(
        {
            "preset": preset,
            "seed": 0,
            # A diffusers directory, or a workdir that port_weights made: VAE, text encoder, tokenizer, scheduler, and
            # the transformer if it is there. "tiny" names the encoders that ship with the package.
            "pretrained": "tiny" if tiny else "",
            "mask": "v2",  # v1..v5
            "attention": "auto",  # splash on TPU, grouped elsewhere; see ops/attention.py
            # Devices along each axis (parallel/mesh.py); 0: chosen from the number of devices and the batch.
            "mesh": {"data": 0, "fsdp": 0, "context": 0, "tensor": 0},
            "compute_dtype": "float32" if tiny else "bfloat16",
            "num_scenes": 3,  # of a training sample, and of the window when sampling
            "num_frames": 9 if tiny else 49,  # pixel frames of a scene, 4k + 1
            "height": 48 if tiny else 480,
            "width": 80 if tiny else 720,
            # Known scenes are shown "clean" or "noised" at t = 0.
            "condition": "clean",
        }
    )


def training(preset: str) -> ConfigDict:
    """The fields of both training stages: the recipe of the paper's section 4.1, except for `tiny`.

    pretrain.py and sft.py set those in which the stages differ.
    """
    config = common(preset)
    tiny = preset in SMALL
    config.update(
        {
            # Parameters to start from: a workdir or one of its checkpoints. Else those of `pretrained`, else random.
            "init_from": "",
            "model": model(preset),  # of a transformer trained from scratch; stored weights bring their own sizes
            "num_steps": 10_000,
            "global_batch_size": 6 if tiny else 8,
            "checkpoint_every": 200 if tiny else 500,
            "keep_checkpoints": 2,  # of the newest,
            "keep_every": 0,  # and those of steps that are a multiple of this; 0: no others
            "log_every": 10,
            "validate_every": 0 if tiny else 500,  # steps between validation losses; 0: never
            "sample_every": 0,  # steps between storyboards in WORKDIR/samples; 0: never
            "sample_steps": 10,  # denoising steps of such a storyboard
            "profile_steps": (),  # first and last step of a profiler trace in WORKDIR/profile
            # Pixel frames of the scenes, num_frames at most and 8k + 1; each step draws one of several such choices:
            # ((49, 49, 49), (25, 49, 25)). (): every scene has num_frames.
            "scene_frames": (),
            "accumulate_steps": 1,  # parts that a batch goes through the model in, where it is too large at once
            "ema_decay": 0.0,  # of the moving average of the parameters, such as 0.9999; 0: none
            "max_skipped_updates": 10,  # in a row, because loss or gradient are not finite; then the run stops
            "trainable": (),  # regular expressions over parameter paths, such as (".*attn.*",); (): all train
            # Adapters on attention and feed-forward; all else is frozen but for what `trainable` names. rank 0: none.
            "lora": {"rank": 0, "alpha": 16.0},
            "remat": "dots" if tiny else "attention",
            "param_dtype": "float32",
            "frozen_dtype": "",  # of parameters that do not train; empty: param_dtype
            "optimizer": {
                "learning_rate": 2e-3 if tiny else 1e-5,
                "schedule": "cosine" if tiny else "constant",
                "warmup_steps": 50 if tiny else 100,
                "decay_steps": 0,  # of "cosine"
                "b1": 0.9,
                "b2": 0.99 if tiny else 0.999,
                "eps": 1e-10,
                "weight_decay": 0.0 if tiny else 3e-2,
                "clip_norm": 1.0 if tiny else 0.05,
            },
            "data": {
                "kind": "",  # "pretrain" (csv of single clips) or "sft" (json of groups)
                "path": "",  # that csv or json, or a folder of latents: build_data --encode
                "cache": "data/cache",  # latents and text embeddings of a csv or json, computed once
                "clip_variants": 1 if tiny else 8,  # cached choices of frames for each clip
                "max_stride": 3,
                "min_stride": 1,
                # Clips that cannot be used are left out, each with its reason in the log; if they are more than this
                # share of all, the run stops. Of a handful of clips each is wanted.
                "max_skipped_share": 0.0 if tiny else 0.05,
            },
        }
    )
    return config
