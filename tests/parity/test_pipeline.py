"""The whole pipeline against the authors': prompts, the denoising loop with guidance, extension, decoding."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mask2dit_jax.diffusion.samplers import Sampler, SamplerConfig
from mask2dit_jax.diffusion.schedule import NoiseSchedule, ScheduleConfig
from mask2dit_jax.layout import SceneLayout
from mask2dit_jax.models import cogvideox, port_vae, t5
from mask2dit_jax.models.dit import DiT, DiTConfig
from mask2dit_jax.models.t5 import T5Config, T5Encoder
from mask2dit_jax.models.vae import VAE, VAEConfig
from mask2dit_jax.sampling.window import SamplingConfig, WindowSampler, generate_windows
from mask2dit_jax.story.windows import plan_windows
from tests.parity.cases import assert_close, cases, load, to_channels_last

TOLERANCE = 5e-5
PIPELINE_TOLERANCE = 5e-4


class Pipeline:
    """All components of one case, and its settings."""

    def __init__(self, case):
        raw, weights = case.config, {name: case.weights(path) for name, path in case.config["weights"].items()}
        self.setting, self.arrays = raw["case"], case.arrays
        dit_config, vae_config = DiTConfig.from_json(raw["transformer"]), VAEConfig.from_json(raw["vae"])
        t5_config = T5Config.from_json(raw["text_encoder"])
        self.transformer = load(
            lambda: DiT(dit_config, rngs=nnx.Rngs(0)), cogvideox.port_table(dit_config), weights["transformer"]
        )
        self.vae = load(lambda: VAE(vae_config, rngs=nnx.Rngs(0)), port_vae.TABLE, weights["vae"])
        self.text_encoder = load(lambda: T5Encoder(t5_config, rngs=nnx.Rngs(0)), t5.PORT_TABLE, weights["text_encoder"])
        self.schedule = NoiseSchedule(ScheduleConfig.from_json(raw["scheduler"]))
        n, space = self.setting["n_scenes"], vae_config.spatial_compression_ratio
        size = self.setting["height"] // space, self.setting["width"] // space
        self.layout = dit_config.layout((self.setting["latent_frames_per_scene"],) * n, *size)

    def prompt_embeds(self, name: str):
        """Return (1 s t x): the same negative prompt for every scene."""
        ids = jnp.asarray(self.arrays[f"{name}_ids"]).reshape(-1, self.layout.text_tokens)
        embeds = jax.jit(T5Encoder.__call__)(self.text_encoder, ids)
        return jnp.broadcast_to(embeds, (self.layout.num_scenes, *embeds.shape[1:]))[None]

    def text(self, name: str) -> np.ndarray:
        """Return (b s t x), as stories store it."""
        return np.asarray(self.prompt_embeds(name))

    def run(self, noise, given=(), condition_noise=None):
        """Sample a story of one window; check the latents of every step and the decoded frames at the end.

        Args:
            noise: that the scenes to generate start from, (1 f h w c).
            given: clean latents of the first scenes.
            condition_noise: noise of the given scenes at t = 0.
        """
        config = SamplingConfig(
            SamplerConfig("ddim", self.setting["steps"]),
            "dynamic" if self.setting["use_dynamic_cfg"] else "static",
            self.setting["guidance_scale"],
        )
        sampler = GoldenNoise(*nnx.split(self.transformer), self.schedule, config)
        sampler.noise, sampler.condition_noise = noise, condition_noise
        num_scenes = self.layout.num_scenes
        latents = dict(enumerate(given))
        story = generate_windows(
            sampler,
            self.text("prompt"),
            self.text("negative_prompt"),
            windows=plan_windows(num_scenes, num_scenes, len(given)),
            frames=self.layout.frames,
            scene_layout=lambda frames: SceneLayout(tuple(frames), self.layout.grid, self.layout.text_tokens),
            latent_shape=noise.shape[2:],
            key=jax.random.key(0),
            latents=[latents],
        )
        (window,) = story
        steps, result = sampler.steps, sampler.steps[-1]
        for scene in window.new:
            np.testing.assert_array_equal(latents[scene], result[0, self.layout.frame_slices[scene]])
        for actual, expected in zip(steps, self.arrays["latents_steps"], strict=True):
            assert_close(actual, to_channels_last(expected), PIPELINE_TOLERANCE)
        assert_close(result, to_channels_last(self.arrays["latents_final"]), PIPELINE_TOLERANCE)
        decode = jax.jit(VAE.decode)
        scenes = [
            decode(self.vae, result[:, part] / self.vae.config.scaling_factor) for part in self.layout.frame_slices
        ]
        frames = jnp.concatenate(scenes, axis=1)
        assert_close(frames, self.arrays["frames_raw"].transpose(0, 2, 3, 4, 1), PIPELINE_TOLERANCE)
        in_unit_range = jnp.clip(frames / 2 + 0.5, 0, 1)
        assert_close(in_unit_range, self.arrays["frames"].transpose(0, 2, 3, 4, 1), PIPELINE_TOLERANCE)


class GoldenNoise(WindowSampler):
    """A sampler whose noise comes from the fixtures."""

    def conditions(self, latents, key):
        return self._schedule.add_noise(latents, self.condition_noise, jnp.zeros(latents.shape[:2], jnp.int32))

    def __call__(self, latents, *args, **kwargs):
        self.steps = []
        known = latents[:, : latents.shape[1] - self.noise.shape[1]]
        return super().__call__(
            jnp.concatenate([known, self.noise], axis=1), *args, on_step=self.steps.append, **kwargs
        )


@pytest.mark.parametrize("case", cases("pipeline_"))
def test_prompts_and_timesteps(case):
    pipeline = Pipeline(case)
    for name in ("prompt", "negative_prompt"):
        expected = pipeline.arrays[f"{name}_embeds"]
        assert_close(pipeline.prompt_embeds(name).reshape(expected.shape), expected, TOLERANCE)
    sampler = Sampler(SamplerConfig("ddim", pipeline.setting["steps"]), pipeline.schedule)
    np.testing.assert_array_equal(sampler.timesteps, pipeline.arrays["timesteps"])


@pytest.mark.parametrize("case", cases("pipeline_fixed"))
def test_fixed_scenes(case):
    pipeline = Pipeline(case)
    pipeline.run(to_channels_last(pipeline.arrays["latents_init"]))


@pytest.mark.parametrize("case", cases("pipeline_extend"))
def test_extension(case):
    pipeline = Pipeline(case)
    arrays, num_known = pipeline.arrays, pipeline.setting["n_conditional"]
    clips = arrays["video_conds"][:, 0].transpose(0, 1, 3, 4, 2)
    encode = jax.jit(VAE.encode)
    posteriors = [encode(pipeline.vae, clip[None]) for clip in clips]
    for number, posterior in enumerate(posteriors):
        assert_close(posterior.mean, arrays["cond_mean"][number].transpose(0, 2, 3, 4, 1), TOLERANCE)
        assert_close(posterior.logvar, arrays["cond_logvar"][number].transpose(0, 2, 3, 4, 1), TOLERANCE)
    drawn = [
        p.mean + jnp.exp(0.5 * p.logvar) * eps
        for p, eps in zip(posteriors, arrays["cond_eps"].transpose(0, 1, 3, 4, 5, 2), strict=True)
    ]
    clean = jnp.concatenate(drawn, axis=1) * pipeline.vae.config.scaling_factor
    assert_close(clean, to_channels_last(arrays["cond_latents_clean"]), TOLERANCE)
    zero = jnp.zeros(clean.shape[:2], jnp.int32)
    noised = pipeline.schedule.add_noise(clean, to_channels_last(arrays["cond_noise"]), zero)
    assert_close(noised, to_channels_last(arrays["cond_latents_noised"]), TOLERANCE)
    given = [np.asarray(clean[0, part]) for part in pipeline.layout.frame_slices[:num_known]]
    pipeline.run(to_channels_last(arrays["latents_init"]), given, to_channels_last(arrays["cond_noise"]))
