"""The released transformers by shape alone: every key has a parameter, and the full-size step traces."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from mask2dit_jax.diffusion.schedule import NoiseSchedule, ScheduleConfig
from mask2dit_jax.errors import UserError
from mask2dit_jax.models.cogvideox import port_table
from mask2dit_jax.models.dit import DiT, DiTConfig
from mask2dit_jax.models.port_rules import export, flatten, plan
from mask2dit_jax.training.optimizer import OptimizerConfig, make_optimizer
from mask2dit_jax.training.step import Objective, init_state, make_train_step

CONFIGS = {"2b": DiTConfig.cogvideox_2b(), "5b": DiTConfig.cogvideox_5b()}


def manifest(size: str) -> dict[str, tuple[int, ...]]:
    path = Path(__file__).parents[1] / "manifests" / f"transformer_{size}.json"
    return {key: tuple(shape) for key, shape in json.loads(path.read_text()).items()}


def abstract_model(config: DiTConfig, **kwargs):
    return nnx.split(nnx.eval_shape(lambda: DiT(config, rngs=nnx.Rngs(0), **kwargs)))


@pytest.mark.parametrize("size", CONFIGS)
def test_every_key_is_a_parameter_and_back(size):
    config, shapes = CONFIGS[size], manifest(size)
    _, state = abstract_model(config)
    slots = plan(port_table(config), shapes, state)
    assert slots.keys() == shapes.keys()
    assert {slot.path for slot in slots.values()} == flatten(state).keys()
    assert {key: shape for key, shape, _ in export(port_table(config), state)} == shapes


@pytest.mark.parametrize(("change", "message"), [
    (lambda s: s.pop("transformer_blocks.7.ff.net.2.bias"), r"'transformer_blocks\.7\.ff\.net\.2\.bias' is missing"),
    (lambda s: s.update({"ofs_embedding.weight": (1,)}), r"'ofs_embedding\.weight' is not one this model knows"),
    (lambda s: s.update({"proj_out.weight": (64, 9)}), r"'proj_out\.weight' has shape \(64, 9\), .* \(64, 1920\)"),
    (lambda s: s.update({"transformer_blocks.30.norm1.norm.weight": (1920,)}), r"blocks\.30\.norm1\.norm\.weight'"),
])  # fmt: skip
def test_misfits_are_named(change, message):
    shapes = manifest("2b")
    change(shapes)
    _, state = abstract_model(CONFIGS["2b"])
    with pytest.raises(UserError, match=message):
        plan(port_table(CONFIGS["2b"]), shapes, state)


@pytest.mark.parametrize("size", CONFIGS)
def test_full_size_train_step_traces(size):
    """Trace 3 x 49 x 480 x 720 in bf16 with fp32 parameters through the step that also trains the tiny model."""
    config = DiTConfig(**{**vars(CONFIGS[size]), "remat": "full"})
    graph, params = abstract_model(config, dtype=jnp.bfloat16)
    layout = config.layout((13, 13, 13), 60, 90)
    assert layout.num_tokens == 53_328
    objective = Objective(NoiseSchedule(ScheduleConfig.cogvideox_5b()), layout, 0.7, condition_probability=0.5)
    optimizer = make_optimizer(OptimizerConfig())
    state = jax.eval_shape(lambda p: init_state(p, optimizer), params)
    latents = jax.ShapeDtypeStruct((1, 39, 60, 90, 16), jnp.float32)
    batch = {"mean": latents, "logvar": latents, "text": jax.ShapeDtypeStruct((1, 3, 226, 4096), jnp.float32)}
    step = make_train_step(graph, optimizer, objective, 0)
    new_state, metrics = jax.eval_shape(step, state, batch)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), new_state) == jax.tree.map(lambda x: (x.shape, x.dtype), state)
    assert metrics["loss"].shape == ()
