"""The VAE against the authors' code in every chunking, and against the live diffusers class."""

import json
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLCogVideoX
from flax import nnx

from mask2dit_jax.models import port_rules as port
from mask2dit_jax.models.port_vae import TABLE
from mask2dit_jax.models.vae import VAE, VAEConfig
from tests.parity.cases import assert_close, cases, load

TOLERANCE = 5e-5
MANIFEST = Path(__file__).parents[1] / "manifests" / "vae.json"


@nnx.jit
def encode(vae, pixels):
    posterior = vae.encode(pixels)
    return posterior.mean, posterior.logvar


decode = nnx.jit(lambda vae, latents, chunking: vae.decode(latents, chunking), static_argnames="chunking")


def to_channels_last(x) -> jax.Array:
    """Return (b, c, f, h, w), the reference's layout of pixels and latents, as (b, f, h, w, c)."""
    return jnp.asarray(np.asarray(x).transpose(0, 2, 3, 4, 1))


def arrays_like(pattern: str) -> list:
    """Return (case, m.group(1)) for every array of every case that matches."""
    return [
        pytest.param(case, match.group(1), id=f"{case}-{match.group(0)}")
        for (case,) in (parameter.values for parameter in cases("vae"))
        for match in (re.fullmatch(pattern, name) for name in case.arrays)
        if match
    ]


def case_model(case, **kwargs) -> VAE:
    config = VAEConfig.from_json(case.config["model"])
    return load(lambda: VAE(config, rngs=nnx.Rngs(0), **kwargs), TABLE, case.weights(case.config["weights"]))


@pytest.mark.parametrize(("case", "clip"), arrays_like(r"(enc\w+)_input"))
def test_encodes_as_the_authors_do(case, clip):
    mean, logvar = encode(case_model(case), to_channels_last(case.arrays[f"{clip}_input"]))
    assert_close(mean, to_channels_last(case.arrays[f"{clip}_mean"]), TOLERANCE)
    assert_close(logvar, to_channels_last(case.arrays[f"{clip}_logvar"]), TOLERANCE)


@pytest.mark.parametrize(("case", "clip"), arrays_like(r"(dec\w+)_output"))
def test_decodes_as_the_authors_do(case, clip):
    out = decode(case_model(case), to_channels_last(case.arrays[f"{clip}_latents"]), chunking="mask2dit")
    assert_close(out, to_channels_last(case.arrays[f"{clip}_output"]), TOLERANCE)


@pytest.mark.parametrize(("case", "clip"), arrays_like(r"(dec\w+)_output_auto_split"))
@pytest.mark.slow
def test_decodes_as_the_authors_do_with_auto_split(case, clip):
    out = decode(case_model(case), to_channels_last(case.arrays[f"{clip}_latents"]), chunking="diffusers")
    assert_close(out, to_channels_last(case.arrays[f"{clip}_output_auto_split"]), TOLERANCE)


@pytest.mark.parametrize("case", cases("vae"))
@pytest.mark.slow
def test_bfloat16_stays_close(case):
    pixels = to_channels_last(next(v for k, v in sorted(case.arrays.items()) if k.startswith("enc") and "input" in k))
    full, half = case_model(case), case_model(case, dtype=jnp.bfloat16)
    mean, _ = encode(full, pixels)
    assert relative(encode(half, pixels)[0], mean) < 2e-2
    assert relative(decode(half, mean, chunking="mask2dit"), decode(full, mean, chunking="mask2dit")) < 2e-2


def relative(actual, expected) -> float:
    return float(jnp.linalg.norm(actual - expected) / jnp.linalg.norm(expected))


def random_reference(**overrides) -> AutoencoderKLCogVideoX:
    """Make a diffusers VAE in which every parameter is random, norms and biases included."""
    torch.manual_seed(0)
    config = {
        "block_out_channels": (8, 16, 16, 24),
        "down_block_types": ("CogVideoXDownBlock3D",) * 4,
        "up_block_types": ("CogVideoXUpBlock3D",) * 4,
        "layers_per_block": 1,
        "latent_channels": 4,
        "norm_num_groups": 4,
    }
    reference = AutoencoderKLCogVideoX(**config | overrides).eval()
    with torch.no_grad():
        for name, parameter in reference.named_parameters():
            spread = 1 / np.sqrt(np.prod(parameter.shape[1:])) if parameter.ndim > 1 else 0.3
            parameter.normal_(
                1.0 if "norm" in name and name.endswith("weight") and parameter.ndim == 1 else 0.0, spread
            )
    return reference


CONFIGS = {
    "four levels, scanned chunks": ({}, 25, (16, 24)),
    "three levels, two layers, wide": (
        {
            "block_out_channels": (8, 12, 32),
            "down_block_types": ("CogVideoXDownBlock3D",) * 3,
            "up_block_types": ("CogVideoXUpBlock3D",) * 3,
            "layers_per_block": 2,
            "latent_channels": 6,
            "norm_num_groups": 2,
        },
        9,
        (12, 8),
    ),
    "frames halved once, norm_eps seen": ({"temporal_compression_ratio": 2, "norm_eps": 1e-2}, 9, (16, 16)),
}


@pytest.mark.parametrize("setting", CONFIGS)
@pytest.mark.slow
def test_equals_live_diffusers(setting):
    overrides, frames, size = CONFIGS[setting]
    reference = random_reference(**overrides)
    tensors = {key: value.numpy() for key, value in reference.state_dict().items()}
    config = VAEConfig.from_json(reference.config)
    vae = load(lambda: VAE(config, rngs=nnx.Rngs(0)), TABLE, tensors)
    pixels = torch.rand(2, 3, frames, *size, generator=torch.Generator().manual_seed(1)) * 2 - 1
    with torch.no_grad():
        posterior = reference.encode(pixels).latent_dist
        decoded = reference.decode(posterior.mean).sample
    mean, logvar = encode(vae, to_channels_last(pixels))
    assert_close(mean, to_channels_last(posterior.mean), TOLERANCE)
    assert_close(logvar, to_channels_last(posterior.logvar), TOLERANCE)
    out = decode(vae, to_channels_last(posterior.mean), chunking="diffusers")
    assert_close(out, to_channels_last(decoded), TOLERANCE)


def test_export_gives_back_every_tensor():
    reference = random_reference()
    tensors = {key: value.numpy() for key, value in reference.state_dict().items()}
    vae = load(lambda: VAE(VAEConfig.from_json(reference.config), rngs=nnx.Rngs(0)), TABLE, tensors)
    exported = {key: read() for key, _, read in port.export(TABLE, nnx.state(vae, nnx.Param))}
    assert exported.keys() == tensors.keys()
    for key, tensor in tensors.items():
        np.testing.assert_array_equal(exported[key], tensor, err_msg=key)


def test_written_config_is_read_by_diffusers_as_the_same_model():
    config = VAEConfig.cogvideox_5b()
    with torch.device("meta"):
        reference = AutoencoderKLCogVideoX.from_config(config.to_json())
    assert VAEConfig.from_json(reference.config) == config
    assert {k: list(v.shape) for k, v in reference.state_dict().items()} == json.loads(MANIFEST.read_text())


@pytest.mark.parametrize("config", [VAEConfig.cogvideox_2b(), VAEConfig.cogvideox_5b()], ids=["2b", "5b"])
def test_table_maps_the_real_checkpoint(config):
    shapes = {key: tuple(shape) for key, shape in json.loads(MANIFEST.read_text()).items()}
    state = nnx.state(nnx.eval_shape(lambda: VAE(config, rngs=nnx.Rngs(0))), nnx.Param)
    assert port.plan(TABLE, shapes, state).keys() == shapes.keys()
    assert {key: shape for key, shape, _ in port.export(TABLE, state)} == shapes
