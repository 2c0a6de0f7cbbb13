"""What the VAE promises beyond numerical parity: chunks, causality, shapes, errors."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mask2dit_jax.errors import UserError
from mask2dit_jax.models import causal_conv
from mask2dit_jax.models.causal_conv import _conv_3d, _conv_by_taps, _conv_over_channels
from mask2dit_jax.models.vae import VAE, Posterior, VAEConfig
from mask2dit_jax.parallel.abstract import memoryless

TINY = VAEConfig(block_out_channels=(4, 4, 8), latent_channels=2, layers_per_block=1, norm_num_groups=2)


@pytest.fixture(scope="module")
def vae():
    return VAE(TINY, rngs=nnx.Rngs(0))


encode = nnx.jit(lambda vae, pixels: vae.encode(pixels).mean)
decode = nnx.jit(lambda vae, latents, chunking: vae.decode(latents, chunking), static_argnames="chunking")


@pytest.mark.parametrize("convolve", [_conv_by_taps, _conv_over_channels], ids=["cpu", "gpu"])
def test_the_convolution_of_each_platform_equals_the_3d_convolution(convolve):
    x, kernel = (
        jax.random.normal(jax.random.key(0), (2, 5, 6, 7, 4)),
        jax.random.normal(jax.random.key(1), (3, 3, 3, 4, 5)),
    )
    np.testing.assert_allclose(convolve(x, kernel), _conv_3d(x, kernel), atol=1e-5)


def pixels(frames, height=8, width=8, batch=1):
    return jax.random.uniform(jax.random.key(1), (batch, frames, height, width, 3), minval=-1)


one_chunk = nnx.jit(lambda coder, x, cache: coder(x, cache))


def by_hand(coder, x, edges):
    """Run the chunks x[edges[i]:edges[i+1]] in turn, each with the cache of the one before."""
    outs, cache = [], None
    for start, stop in itertools.pairwise(edges):
        out, cache = one_chunk(coder, x[:, start:stop], cache)
        outs.append(out)
    return jnp.concatenate(outs, axis=1)


def test_encode_chunks_are_eight_frames_and_the_first_takes_the_remainder(vae):
    clip = pixels(29)
    moments = by_hand(vae.encoder, clip, [0, 13, 21, 29])
    np.testing.assert_allclose(encode(vae, clip), moments[..., : TINY.latent_channels], atol=1e-5)


@pytest.mark.parametrize(
    ("chunking", "latents", "edges", "frames"),
    [
        ("mask2dit", 1, [0, 1], 1),
        ("mask2dit", 6, [0, 1, 3, 5, 6], 21),  # a lone last latent is four frames as well
        ("mask2dit", 7, [0, 1, 3, 5, 7], 25),
        ("diffusers", 1, [0, 1], 1),
        ("diffusers", 4, [0, 2, 4], 16),  # an even count has no lone first frame
        ("diffusers", 7, [0, 3, 5, 7], 25),
    ],
)
def test_decode_chunks(vae, chunking, latents, edges, frames):
    z = jax.random.normal(jax.random.key(2), (1, latents, 2, 2, 2))
    out = decode(vae, z, chunking=chunking)
    assert out.shape == (1, frames, 8, 8, 3)
    np.testing.assert_allclose(out, by_hand(vae.decoder, z, edges), atol=1e-5)


def test_the_first_frame_is_decoded_from_the_first_latent_alone(vae):
    z = jax.random.normal(jax.random.key(2), (1, 3, 2, 2, 2))
    np.testing.assert_allclose(
        decode(vae, z, chunking="mask2dit")[:, :1], decode(vae, z[:, :1], chunking="mask2dit"), atol=1e-5
    )


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(("name", "first", "rest"), [("encoder", 9, 8), ("decoder", 1, 2), ("decoder", 3, 2)])
def test_caches_keep_shape_and_type_from_chunk_to_chunk(dtype, name, first, rest):
    def caches():
        coder = getattr(VAE(TINY, rngs=nnx.Rngs(0), dtype=dtype), name)
        channels = TINY.in_channels if name == "encoder" else TINY.latent_channels
        _, cache = coder(jnp.zeros((1, first, 8, 8, channels), dtype), None)
        return cache, coder(jnp.zeros((1, rest, 8, 8, channels), dtype), cache)[1]

    cache, again = jax.eval_shape(caches)
    assert cache == again
    assert all(leaf.dtype == dtype and leaf.shape[1] == 2 for leaf in jax.tree.leaves(cache))


def test_clips_of_a_batch_do_not_see_each_other(vae):
    clips = pixels(9, batch=2)
    np.testing.assert_allclose(encode(vae, clips)[1:], encode(vae, clips[1:]), atol=1e-5)


@pytest.mark.slow
def test_full_size_shapes_by_eval_shape_alone():
    def round_trip(clip):
        vae = VAE(VAEConfig.cogvideox_5b(), rngs=nnx.Rngs(0), dtype=jnp.bfloat16)
        posterior = vae.encode(clip)
        return posterior, [vae.decode(posterior.mean, chunking) for chunking in ("mask2dit", "diffusers")]

    clip = jax.ShapeDtypeStruct((1, 49, 480, 720, 3), jnp.float32)
    posterior, decoded = jax.eval_shape(round_trip, clip)
    assert posterior.mean.shape == posterior.logvar.shape == (1, 13, 60, 90, 16)
    assert posterior.mean.dtype == jnp.float32
    assert decoded == [clip, clip]


def test_posterior_sample_is_the_keys_noise_scaled_and_shifted():
    posterior = Posterior(jnp.full((1, 2, 3, 4, 5), 2.0), jnp.full((1, 2, 3, 4, 5), np.log(0.25)))
    noise = jax.random.normal(jax.random.key(3), (1, 2, 3, 4, 5))
    np.testing.assert_allclose(posterior.sample(jax.random.key(3)), 2.0 + 0.5 * noise, rtol=1e-6)


def test_logvar_is_clamped(vae):
    graph, state = nnx.split(vae)
    state.encoder.conv_out.bias[...] = jnp.array([0.0, 0.0, 1e3, -1e3])
    logvar = nnx.merge(graph, state).encode(pixels(1)).logvar
    np.testing.assert_array_equal(logvar[..., 0], 20.0)
    np.testing.assert_array_equal(logvar[..., 1], -30.0)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((1, 7, 8, 8, 3), "4k . 1 frames"),
        ((1, 10, 8, 8, 3), "4k . 1 frames"),
        ((1, 0, 8, 8, 3), "4k . 1 frames"),
        ((1, 9, 8, 6, 3), "multiples of 4, not 8 x 6"),
        ((1, 9, 10, 8, 3), "multiples of 4, not 10 x 8"),
    ],
)
def test_clips_that_do_not_fit_are_refused(vae, shape, message):
    with pytest.raises(UserError, match=message):
        vae.encode(jnp.zeros(shape))


def test_unknown_chunking_and_empty_latents_are_refused(vae):
    with pytest.raises(UserError, match="'official' does not exist; choose one of mask2dit, diffusers"):
        vae.decode(jnp.zeros((1, 1, 2, 2, 2)), "official")
    with pytest.raises(UserError, match="0 latent frames"):
        vae.decode(jnp.zeros((1, 0, 2, 2, 2)))


def test_config_round_trip():
    config = dataclasses.replace(TINY, scaling_factor=0.9, temporal_compression_ratio=2)
    assert VAEConfig.from_json(config.to_json() | {"force_upcast": True, "_diffusers_version": "0.30.3"}) == config


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("use_quant_conv", True),
        ("use_post_quant_conv", True),
        ("invert_scale_latents", True),
        ("shift_factor", 0.1),
        ("latents_mean", [0.0]),
        ("act_fn", "gelu"),
        ("down_block_types", ["DownEncoderBlock2D"]),
        ("temporal_compression_ratio", 3),
        ("norm_num_groups", 3),
    ],
)
def test_settings_that_are_another_function_are_refused(key, value):
    with pytest.raises(UserError, match=key):
        VAEConfig.from_json(TINY.to_json() | {key: value})


@pytest.mark.slow
def test_large_chunks_go_frame_by_frame_and_are_the_same(monkeypatch):
    """This form saves memory on a CPU at full size."""
    graph, params = nnx.split(VAE(TINY, rngs=nnx.Rngs(0)))

    def both(clip):
        posterior = VAE.encode(nnx.merge(graph, params), clip)
        return posterior.mean, VAE.decode(nnx.merge(graph, params), posterior.mean)

    clip = pixels(13)
    at_once = jax.jit(both)(clip)
    monkeypatch.setattr(causal_conv, "LARGE", 1)
    by_frame = jax.jit(lambda clip: both(clip))(clip)
    for ours, wanted in zip(by_frame, at_once, strict=True):
        np.testing.assert_allclose(ours, wanted, atol=float(jnp.abs(wanted).max()) * 1e-5)


def test_a_large_chunk_in_bfloat16_is_nowhere_whole_in_float32(monkeypatch):
    """XLA would widen it before every loop over its frames, at 1.6 of 5.8 GB for 8 frames of 480 x 720."""
    monkeypatch.setattr(causal_conv, "LARGE", 1)
    narrow = jnp.bfloat16
    graph, params = nnx.split(memoryless(VAE, TINY, dtype=narrow, param_dtype=narrow))

    def decode(params, latents, cache):
        return VAE.decode_chunk(nnx.merge(graph, params), latents, cache)

    latents = jax.ShapeDtypeStruct((1, 2, 6, 9, TINY.latent_channels), jnp.float32)
    _, cache = jax.eval_shape(decode, params, latents, None)
    program = jax.jit(decode).lower(params, latents, cache).compile().as_text()
    loops = [line for line in program.splitlines() if " while(" in line and "[1,8,24,36," in line]
    assert loops
    assert not [line for line in loops if "f32[1,8,24,36," in line]
