"""The loss, its inputs and its gradients against the authors' training step."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mask2dit_jax.diffusion.schedule import NoiseSchedule, ScheduleConfig
from mask2dit_jax.models.cogvideox import port_table
from mask2dit_jax.models.dit import DiT, DiTConfig
from mask2dit_jax.models.port_rules import export
from mask2dit_jax.training.step import Objective, denoising_loss
from tests.parity.cases import assert_close, cases, load, to_channels_last

TOLERANCE = 5e-5
GRADIENT_TOLERANCE = 1e-4  # of the largest entry


@pytest.mark.parametrize("case", cases("loss_"))
def test_loss_and_gradients(case):
    arrays, setting = case.arrays, case.config["case"]
    config = DiTConfig.from_json(case.config["model"])
    model = load(lambda: DiT(config, rngs=nnx.Rngs(0)), port_table(config), case.weights(case.config["weights"]))
    n, frames = setting["n_scenes"], setting["latent_frames_per_scene"]
    layout = config.layout((frames,) * n, *arrays["latents"].shape[3:])
    objective = Objective(NoiseSchedule(ScheduleConfig.from_json(case.config["scheduler"])), layout, scaling_factor=1.0)
    is_known = np.zeros((len(arrays["latents"]), n), bool)
    if setting["clip_idx"] is not None:
        is_known[:, np.arange(n) != setting["clip_idx"]] = True
    text = jnp.asarray(arrays["prompt_embeds"].reshape(len(is_known), n, layout.text_tokens, -1))
    graph, params = nnx.split(model)

    def loss_fn(params):
        return denoising_loss(
            nnx.merge(graph, params),
            objective,
            to_channels_last(arrays["latents"]),
            text,
            to_channels_last(arrays["noise"]),
            jnp.asarray(arrays["timesteps"]),
            jnp.asarray(is_known),
        )

    (loss, aux), grads = jax.jit(jax.value_and_grad(loss_fn, has_aux=True))(params)
    assert_close(aux["noisy"], to_channels_last(arrays["noisy_latents"]), TOLERANCE)
    assert_close(aux["prediction"], to_channels_last(arrays["noise_pred"]), TOLERANCE)
    target = arrays["target"]  # of the last scene only in an extension sample
    assert_close(aux["target"][:, -target.shape[1] :], to_channels_last(target), TOLERANCE)
    assert_close(loss, arrays["loss"], TOLERANCE)
    torch_grads = {key: read for key, _, read in export(port_table(config), grads)}
    for name in (a for a in arrays if a.startswith("grad.")):
        expected = arrays[name]
        actual = torch_grads[name.removeprefix("grad.")]()
        assert_close(actual, expected, GRADIENT_TOLERANCE * np.abs(expected).max())
    for key, norm in case.config["grad_norms"].items():
        assert np.linalg.norm(torch_grads[key]()) == pytest.approx(norm, rel=1e-4, abs=1e-6), key


@functools.cache
def gradients(attention: str, remat: str) -> list[jax.Array]:
    config = DiTConfig(2, 16, 3, 4, time_embed_dim=16, text_embed_dim=8, text_tokens=5, remat=remat,
                       attention=attention)  # fmt: skip
    graph, params = nnx.split(DiT(config, rngs=nnx.Rngs(0)))
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    params = tree.unflatten([0.2 * jax.random.normal(k, x.shape) for k, x in zip(keys, leaves, strict=True)])
    run = functools.partial(DiT.__call__, layout=config.layout((2, 1, 3), 4, 6))
    latents = jax.random.normal(jax.random.key(2), (1, 6, 4, 6, 4))
    text = jax.random.normal(jax.random.key(3), (1, 3, 5, 8))
    time = jnp.array([[0, 0, 700]])
    loss = jax.jit(jax.grad(lambda p: jnp.square(run(nnx.merge(graph, p), latents, text, time)).mean()))
    return jax.tree.leaves(loss(params))


@pytest.mark.parametrize("remat", ["full", "dots"])
@pytest.mark.parametrize("attention", ["dense", "grouped"])
@pytest.mark.slow
def test_rematerialisation_changes_no_gradient(remat, attention):
    for a, b in zip(gradients(attention, "none"), gradients(attention, remat), strict=True):
        assert_close(a, b, 1e-6 * max(1.0, float(np.abs(a).max())))
