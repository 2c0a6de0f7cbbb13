"""A key that is absent from a config.json means what it means to the class that wrote the file."""

import inspect

import pytest
from diffusers import AutoencoderKLCogVideoX, CogVideoXDDIMScheduler, CogVideoXDPMScheduler, CogVideoXTransformer3DModel
from transformers import T5Config as TransformersT5Config

from mask2dit_jax.diffusion.schedule import ScheduleConfig
from mask2dit_jax.errors import UserError
from mask2dit_jax.models import dit, t5
from mask2dit_jax.models.dit import DiTConfig
from mask2dit_jax.models.t5 import T5Config
from mask2dit_jax.models.vae import VAEConfig
from mask2dit_jax.pretrained.safetensors import read_json


def defaults_of(kind) -> dict:
    return {name: parameter.default for name, parameter in inspect.signature(kind.__init__).parameters.items()}


def without(raw: dict, key: str) -> dict:
    return {name: value for name, value in raw.items() if name != key}


@pytest.mark.parametrize("key", dit._JSON_NAMES.values())
def test_of_the_transformer(key):
    raw = DiTConfig.cogvideox_5b().to_json()
    default = defaults_of(CogVideoXTransformer3DModel)[key]
    assert DiTConfig.from_json(without(raw, key)).to_json() == raw | {key: default}


def test_no_rotary_key_means_sincos_positions():
    raw = DiTConfig.cogvideox_5b().to_json()
    assert not DiTConfig.from_json(without(raw, "use_rotary_positional_embeddings")).rope


VAE_KEYS = [key for key in VAEConfig().to_json() if key not in ("_class_name", "down_block_types", "up_block_types")]


@pytest.mark.parametrize("key", VAE_KEYS)
def test_of_the_vae(key):
    raw = VAEConfig.cogvideox_5b().to_json()
    default = defaults_of(AutoencoderKLCogVideoX)[key]
    default = list(default) if isinstance(default, tuple) else default
    assert VAEConfig.from_json(without(raw, key)).to_json() == raw | {key: default}


@pytest.mark.parametrize("kind", [CogVideoXDDIMScheduler, CogVideoXDPMScheduler])
@pytest.mark.parametrize("key", ["num_train_timesteps", "beta_start", "beta_end", "rescale_betas_zero_snr",
                                 "snr_shift_scale", "set_alpha_to_one"])  # fmt: skip
def test_of_the_scheduler(kind, key):
    raw = ScheduleConfig.cogvideox_5b().to_json()
    default = defaults_of(kind)[key]
    assert ScheduleConfig.from_json(without(raw, key)).to_json() == raw | {key: default}


@pytest.mark.parametrize("key", ["beta_schedule", "prediction_type", "timestep_spacing", "trained_betas"])
def test_formulas_of_the_scheduler(key):
    """Where diffusers' default is a formula that is not implemented, an absent key is refused."""
    raw = ScheduleConfig.cogvideox_5b().to_json()
    if defaults_of(CogVideoXDDIMScheduler)[key] == raw[key]:
        assert ScheduleConfig.from_json(without(raw, key)).to_json() == raw
    else:
        with pytest.raises(UserError, match=key):
            ScheduleConfig.from_json(without(raw, key))


@pytest.mark.parametrize("key", t5._JSON_NAMES.values())
def test_of_the_text_encoder(key):
    raw = T5Config.xxl().to_json()
    default = getattr(TransformersT5Config(), key)
    assert T5Config.from_json(without(raw, key)).to_json() == raw | {key: default}


@pytest.mark.parametrize(
    ("read", "raw", "told"),
    [
        (DiTConfig.from_json, {"num_layers": None}, "num_layers=None is not a whole number"),
        (DiTConfig.from_json, {"num_layers": "30"}, "num_layers='30' is not a whole number"),
        (DiTConfig.from_json, {"use_rotary_positional_embeddings": 1}, "=1 is not true or false"),
        (DiTConfig.from_json, {"norm_eps": float("nan")}, "norm_eps=nan is not a number"),
        (
            DiTConfig.from_json,
            {"num_layers": 2, "attn_msk_version": 9},
            "attn_msk_version=9 is not one of 1, 2, 3, 4, 5",
        ),
        (DiTConfig.from_json, {}, "it holds no size; is it a CogVideoX transformer"),
        (VAEConfig.from_json, {"scaling_factor": None}, "scaling_factor=None is not a number"),
        (VAEConfig.from_json, {"block_out_channels": "128"}, "block_out_channels='128' is not a list"),
        (VAEConfig.from_json, {}, "it holds no size; is this the config.json of a VAE"),
        (ScheduleConfig.from_json, {"_class_name": "DDIMScheduler"}, "'DDIMScheduler' is not supported.*no SNR shift"),
        (
            T5Config.from_json,
            {"feed_forward_proj": "gated-gelu", "d_model": None},
            "d_model=None is not a whole number",
        ),
    ],
)
def test_what_is_no_such_value_is_one_line(read, raw, told):
    with pytest.raises(UserError, match=told):
        read(raw)


def test_a_byte_order_mark_in_front_is_no_fault(tmp_path):
    """Some editors write it."""
    (tmp_path / "config.json").write_text('{"num_layers": 2}', encoding="utf-8-sig")
    assert read_json(tmp_path / "config.json") == {"num_layers": 2}
