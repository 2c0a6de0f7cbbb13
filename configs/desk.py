"""What the `desk` preset changes of `tiny`: the paper's findings in minutes on two CPU cores, see docs/desk.md.

    python experiments/desk --finding=table2 --output=desk

makes the data (desk/world) and runs the mains with these values.
"""

MODEL = {
    "num_heads": 2,
    "head_dim": 32,
    "num_layers": 3,
    "time_embed_dim": 64,
    "text_tokens": 3,  # "red left" and its end
    "sample_height": 4,
    "sample_width": 4,
    "sample_frames": 2,
    "temporal_compression": 1,
}
COMMON = {
    "pretrained": "desk/world/pretrained",
    "attention": "dense",  # 33 tokens: one small product beats many smaller ones
    "num_frames": 2,
    "height": 4,
    "width": 4,
}
TRAINING = {
    "global_batch_size": 32,
    "checkpoint_every": 800,
    "keep_checkpoints": 1,
    "log_every": 50,
    "num_steps": 800,
    "init_from": "",
}
OPTIMIZER = {"learning_rate": 5e-3, "decay_steps": 800, "warmup_steps": 30}
DATA = {"cache": "desk/world/cache", "max_stride": 1}
SAMPLING = {
    "checkpoint": "desk/runs/table2-v2-0",
    "prompts": ("red left", "white up", "yellow down", "black right", "red up"),
    "condition": "clean",
}


def adapted(config):
    """The config with the preset's values, if that is its preset."""
    if config.preset != "desk":
        return config
    config.update(COMMON)
    if "num_steps" in config:
        config.update(TRAINING)
        config.model.update(MODEL)
        config.optimizer.update(OPTIMIZER)
        config.data.update(DATA, path=f"desk/world/{'stories.json' if config.data.kind == 'sft' else 'pretrain.csv'}")
    if "prompts" in config:
        config.update(SAMPLING)
        config.sampler.num_steps = 20
    return config
