"""The transformer against the authors' code, layer by layer, and against the live diffusers class."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import CogVideoXTransformer3DModel
from flax import nnx

from mask2dit_jax.models.cogvideox import port_table
from mask2dit_jax.models.dit import DiT, DiTConfig
from mask2dit_jax.ops import positions
from mask2dit_jax.ops.masks import dense_mask
from tests.parity.cases import assert_close, cases, load, to_channels_last

TOLERANCE = 5e-5


def case_model(case, **overrides) -> DiT:
    config = DiTConfig.from_json(case.config["model"] | overrides)
    return load(lambda: DiT(config, rngs=nnx.Rngs(0)), port_table(config), case.weights(case.config["weights"]))


def case_layout(case, config: DiTConfig, hidden):
    n = case.config["case"]["n_scenes"]
    frames, _, height, width = hidden.shape[1:]
    return config.layout((frames // n,) * n, height, width)


def case_timesteps(arrays, num_scenes: int, clip_idx: int | None):
    """Return timesteps, (b, s): the conditional one for every scene but clip_idx, if there is one."""
    timesteps = np.repeat(arrays["timestep"][:, None], num_scenes, axis=1)
    if clip_idx is not None:
        others = np.arange(num_scenes) != clip_idx
        timesteps[:, others] = arrays["timestep_conditioning"].reshape(-1, 1)
    return jnp.asarray(timesteps)


def case_text(arrays, layout):
    text = arrays["encoder_hidden_states"]
    return jnp.asarray(text.reshape(len(text), layout.num_scenes, layout.text_tokens, -1))


@pytest.mark.parametrize("attention", ["dense", "grouped"])
@pytest.mark.parametrize("case", cases("transformer_"))
def test_equals_the_authors_model(case, attention):
    model = case_model(case)
    model = load_with_attention(model, attention)
    arrays = case.arrays
    layout = case_layout(case, model.config, arrays["hidden_states"])
    clip_idx = case.config["case"].get("clip_idx")
    out, inner = jax.jit(functools.partial(DiT.__call__, layout=layout, intermediates=True))(
        model,
        to_channels_last(arrays["hidden_states"]),
        case_text(arrays, layout),
        case_timesteps(arrays, layout.num_scenes, clip_idx),
    )
    start = layout.num_text_tokens
    if "dbg_temb" in arrays:
        target = -1 if clip_idx is None else clip_idx
        assert_close(inner["time"][:, target], arrays["dbg_temb"], TOLERANCE)
    if "dbg_temb_conditioning" in arrays:
        assert_close(inner["time"][:1, 0 if clip_idx else -1], arrays["dbg_temb_conditioning"], TOLERANCE)
    if "dbg_patch_embed" in arrays:
        assert_close(inner["embedded"], arrays["dbg_patch_embed"], TOLERANCE)
    for name in sorted(a for a in arrays if a.startswith("dbg_block")):
        block = inner["blocks"][int(name.removeprefix("dbg_block").split("_")[0])]
        assert_close(block[:, :start] if name.endswith("encoder") else block[:, start:], arrays[name], TOLERANCE)
    assert_close(out, to_channels_last(arrays["output"]), TOLERANCE)


def load_with_attention(model, attention):
    """Run the same parameters with another implementation of attention."""
    config = dataclasses.replace(model.config, attention=attention)
    graph, _ = nnx.split(nnx.eval_shape(lambda: DiT(config, rngs=nnx.Rngs(0))))
    return nnx.merge(graph, nnx.state(model))


@pytest.mark.parametrize("case", [c for c in cases("transformer_") if "output_clip_idx0" in c.values[0].arrays])
def test_any_scene_may_be_the_one_denoised(case):
    model, arrays = case_model(case), case.arrays
    layout = case_layout(case, model.config, arrays["hidden_states"])
    timesteps = case_timesteps(arrays, layout.num_scenes, clip_idx=0)
    hidden, text = to_channels_last(arrays["hidden_states"]), case_text(arrays, layout)
    assert_close(model(hidden, text, timesteps, layout=layout), to_channels_last(arrays["output_clip_idx0"]), TOLERANCE)


@pytest.mark.parametrize("case", [c for c in cases("transformer_") if "short_output" in c.values[0].arrays])
def test_scenes_shorter_than_the_position_table(case):
    model, arrays = case_model(case), case.arrays
    layout = case_layout(case, model.config, arrays["short_hidden_states"])
    timesteps = case_timesteps(arrays, layout.num_scenes, None)
    hidden, text = to_channels_last(arrays["short_hidden_states"]), case_text(arrays, layout)
    assert_close(model(hidden, text, timesteps, layout=layout), to_channels_last(arrays["short_output"]), TOLERANCE)


@pytest.mark.parametrize("case", cases("transformer_"))
def test_positions_equal_the_authors_tables(case):
    config, arrays = DiTConfig.from_json(case.config["model"]), case.arrays
    layout = case_layout(case, config, arrays["hidden_states"])
    if config.rope:
        cos, sin = (
            t[layout.num_text_tokens :] for t in positions.rope_table(layout, config.base_grid, config.head_dim)
        )
        assert_close(np.repeat(cos, 2, axis=-1), arrays["image_rotary_cos"], TOLERANCE)
        assert_close(np.repeat(sin, 2, axis=-1), arrays["image_rotary_sin"], TOLERANCE)
        return
    tables = {"": arrays["hidden_states"], "short_": arrays.get("short_hidden_states")}
    for prefix, hidden in tables.items():
        expected = arrays.get(f"{prefix}pos_embedding_interpolated")
        if expected is None:
            continue
        layout = case_layout(case, config, hidden)
        assert_close(sincos(config, layout), expected[0, layout.num_text_tokens :], TOLERANCE)


def sincos(config, layout):
    return positions.sincos_table(
        layout,
        (config.base_frames, *config.base_grid),
        config.width,
        config.spatial_interpolation_scale,
        config.temporal_interpolation_scale,
    )


@pytest.mark.parametrize("case", [c for c in cases("transformer_") if "attn_mask_bool" in c.values[0].arrays])
def test_dense_mask_equals_the_authors(case):
    config = DiTConfig.from_json(case.config["model"])
    layout = case_layout(case, config, case.arrays["hidden_states"])
    np.testing.assert_array_equal(dense_mask(config.mask, layout), case.arrays["attn_mask_bool"].astype(bool))


@pytest.mark.parametrize("case", cases("rope_tables"))
def test_rope_tables(case):
    for row in case.config["rows"]:
        grid, base = tuple(row["grid_hw"]), tuple(row["base_hw"])
        assert positions.crop_region(grid, base) == tuple(map(tuple, row["crops_coords"]))
        layout = DiTConfig(1, 16, 1).layout((row["temporal_size"],), grid[0] * 2, grid[1] * 2)
        angles = positions.rope_angles(layout, base, row["head_dim"])
        assert_close(np.repeat(jnp.cos(angles), 2, -1), case.arrays[f"cos_{row['index']}"], TOLERANCE)
        assert_close(np.repeat(jnp.sin(angles), 2, -1), case.arrays[f"sin_{row['index']}"], TOLERANCE)


def random_diffusers_model(**overrides):
    torch.manual_seed(0)
    reference = CogVideoXTransformer3DModel(
        **{
            "num_attention_heads": 3,
            "attention_head_dim": 16,
            "in_channels": 4,
            "out_channels": 4,
            "time_embed_dim": 24,
            "text_embed_dim": 20,
            "num_layers": 3,
            "sample_width": 12,
            "sample_height": 8,
            "sample_frames": 9,
            "max_text_seq_length": 7,
            "use_rotary_positional_embeddings": True,
        }
        | overrides
    ).eval()
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter.normal_(0, 0.2)
    return reference


CONFIGS = [
    {},
    {"num_attention_heads": 2, "attention_head_dim": 32, "num_layers": 1, "time_embed_dim": 40},
    {"use_rotary_positional_embeddings": False, "attention_head_dim": 32},
    {"use_rotary_positional_embeddings": False, "attention_bias": False, "spatial_interpolation_scale": 1.5},
]


@pytest.mark.parametrize("overrides", CONFIGS, ids=lambda o: ",".join(o) or "default")
def test_equals_live_diffusers_on_one_scene(overrides):
    reference = random_diffusers_model(**overrides)
    config = DiTConfig.from_json(reference.config)
    tensors = {k: v.numpy() for k, v in reference.state_dict().items() if not k.endswith("pos_embedding")}
    model = load(lambda: DiT(config, rngs=nnx.Rngs(0)), port_table(config), tensors)
    layout = config.layout((3,), 8, 12)
    rng = np.random.default_rng(1)
    latents = rng.normal(size=(2, 3, 4, 8, 12)).astype(np.float32)
    text = rng.normal(size=(2, config.text_tokens, config.text_embed_dim)).astype(np.float32)
    timesteps = np.array([[3], [981]])
    rope = None
    if config.rope:
        cos, sin = positions.rope_table(layout, config.base_grid, config.head_dim)
        rope = tuple(torch.tensor(np.repeat(t[config.text_tokens :], 2, -1)) for t in (cos, sin))
    with torch.no_grad():
        expected = reference(
            torch.tensor(latents), torch.tensor(text), torch.tensor(timesteps[:, 0]), image_rotary_emb=rope
        ).sample
    actual = model(to_channels_last(latents), jnp.asarray(text)[:, None], jnp.asarray(timesteps), layout=layout)
    assert_close(actual, to_channels_last(expected.numpy()), TOLERANCE)


@pytest.mark.slow
def test_bfloat16_stays_close_to_float32():
    reference = random_diffusers_model(num_attention_heads=4)
    config = DiTConfig.from_json(reference.config)
    tensors = {k: v.numpy() for k, v in reference.state_dict().items()}
    model = load(lambda: DiT(config, rngs=nnx.Rngs(0)), port_table(config), tensors)
    graph, _ = nnx.split(nnx.eval_shape(lambda: DiT(config, rngs=nnx.Rngs(0), dtype=jnp.bfloat16)))
    low = nnx.merge(graph, nnx.state(model))
    layout = config.layout((3, 2, 3), 8, 12)
    keys = jax.random.split(jax.random.key(0), 2)
    inputs = (
        jax.random.normal(keys[0], (1, 8, 8, 12, 4)),
        jax.random.normal(keys[1], (1, 3, config.text_tokens, config.text_embed_dim)),
        jnp.array([[0, 0, 500]]),
    )
    full, half = model(*inputs, layout=layout), low(*inputs, layout=layout)
    assert half.dtype == jnp.bfloat16
    relative = jnp.linalg.norm(half.astype(jnp.float32) - full) / jnp.linalg.norm(full)
    assert relative < 2e-2, f"bf16 is {relative:.1e} away from fp32"
