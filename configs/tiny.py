"""What the `tiny` preset changes: a model of 1.7 M parameters that `make demo` trains on two CPU cores.

Its encoders ship with the package. It memorises the demo's six shots: it shows that everything works, not what the
method can do.
"""

# The captions of the demo's shots, word for word as in its training data.
STORY = (
    "From straight above, the long white roof of a bus slides along a grey street.",
    "Actor1 (a man in a dark suit) cycles between gleaming dark cars, then a TAXI sign slides past.",
    "Actor2 (a cyclist in black with a helmet) waits on a bicycle beside a dark van with red lights.",
    "A parked bicycle leans on a green railing beside a wide street of brick houses.",
    "Actor3 (a man in black trousers) walks past an old bicycle that leans on a grey wall.",
)

CHANGES = {
    "all": {
        "pretrained": "tiny",
        "compute_dtype": "float32",
        "num_frames": 9,
        "height": 48,
        "width": 80,
    },
    "train": {
        "model.num_heads": 2,
        "model.num_layers": 3,
        "model.rope": True,
        "model.time_embed_dim": 128,
        "model.text_tokens": 48,
        "model.sample_height": 12,  # latent rows of 48 pixels: the tiny VAE halves them only twice
        "model.sample_width": 20,
        "model.sample_frames": 9,
        "global_batch_size": 6,
        "checkpoint_every": 200,
        "validate_every": 0,
        "remat": "dots",
        "optimizer.learning_rate": 2e-3,
        "optimizer.schedule": "cosine",
        "optimizer.warmup_steps": 50,
        "optimizer.b2": 0.99,
        "optimizer.weight_decay": 0.0,
        "optimizer.clip_norm": 1.0,
        "data.clip_variants": 1,
        "data.max_skipped_share": 0.0,  # of a handful of clips each is wanted
    },
    "pretrain": {
        "num_steps": 200,
        "data.path": "data/demo/pretrain.csv",
        "data.max_stride": 2,  # the shortest shot has 30 frames
    },
    "sft": {
        "num_steps": 1000,
        "init_from": "workdir/pretrain",
        "data.path": "data/demo/sft.json",
    },
    "sample": {
        "checkpoint": "workdir/sft",
        "prompts": STORY,
        "condition": "clean",
        "guidance_scale": 1.0,  # the model has seen no negative prompt: guidance would only overshoot
    },
}
