"""What the `desk` preset changes of `tiny`: the paper's findings in minutes on two CPU cores, see docs/desk.md.

    python experiments/desk --finding=table2 --output=desk

makes the data (desk/world) and runs the mains with these values.
"""

CHANGES = {
    "all": {
        "pretrained": "desk/world/pretrained",
        "attention": "dense",  # 33 tokens: one small product beats many smaller ones
        "num_frames": 2,
        "height": 4,
        "width": 4,
    },
    "train": {
        "model.head_dim": 32,
        "model.time_embed_dim": 64,
        "model.text_tokens": 3,  # "red left" and its end
        "model.sample_height": 4,
        "model.sample_width": 4,
        "model.sample_frames": 2,
        "model.temporal_compression": 1,
        "num_steps": 800,
        "global_batch_size": 32,
        "checkpoint_every": 800,
        "keep_checkpoints": 1,
        "log_every": 50,
        "optimizer.learning_rate": 5e-3,
        "optimizer.warmup_steps": 30,
        "data.cache": "desk/world/cache",
        "data.max_stride": 1,
    },
    "pretrain": {
        "num_steps": 800,
        "data.path": "desk/world/pretrain.csv",
        "data.max_stride": 1,
    },
    "sft": {
        "num_steps": 800,
        "init_from": "",
        "data.path": "desk/world/stories.json",
    },
    "sample": {
        "checkpoint": "desk/runs/table2-v2-0",
        "prompts": ("red left", "white up", "yellow down", "black right", "red up"),
        "sampler.num_steps": 20,
    },
}
