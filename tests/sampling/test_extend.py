"""Stories: which windows they are made of, and that scenes are carried from window to window untouched."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mask2dit_jax.diffusion.samplers import SamplerConfig
from mask2dit_jax.diffusion.schedule import NoiseSchedule, ScheduleConfig
from mask2dit_jax.errors import UserError
from mask2dit_jax.models.dit import DiT, DiTConfig
from mask2dit_jax.sampling.extend import Window, generate_story, plan_windows
from mask2dit_jax.sampling.generate import SamplingConfig, WindowSampler

CONFIG = DiTConfig(2, 16, 1, 4, time_embed_dim=16, text_embed_dim=8, text_tokens=5, sample_height=4, sample_width=6,
                   sample_frames=9)  # fmt: skip
SHAPE = (2, 4, 6, 4)  # (f h w c) of a scene


@pytest.mark.parametrize(("prompts", "window", "given", "expected"), [
    (3, 3, 0, [(0, 3, 0)]),
    (5, 3, 0, [(0, 3, 0), (1, 4, 2), (2, 5, 2)]),
    (3, 3, 2, [(0, 3, 2)]),
    (5, 3, 3, [(1, 4, 2), (2, 5, 2)]),
    (3, 2, 0, [(0, 2, 0), (1, 3, 1)]),
    (1, 1, 0, [(0, 1, 0)]),
])  # fmt: skip
def test_plan(prompts, window, given, expected):
    assert plan_windows(prompts, window, given) == [Window(*w) for w in expected]


@pytest.mark.parametrize(("prompts", "window", "given", "message"), [
    (2, 3, 0, "2 prompts are too few for num_scenes=3"),
    (0, 3, 0, "0 prompts are too few for num_scenes=3"),
    (3, 3, 1, "1 given clips are too few: a scene is extended from the 2 before it"),
    (2, 3, 2, "2 prompts for 2 given clips leave nothing to generate"),
    (2, 1, 0, "num_scenes must be at least 2"),
])  # fmt: skip
def test_numbers_that_do_not_fit(prompts, window, given, message):
    with pytest.raises(UserError, match=message):
        plan_windows(prompts, window, given)


@functools.cache
def random_model():
    graph, params = nnx.split(DiT(CONFIG, rngs=nnx.Rngs(0)))
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(7), len(leaves))
    values = [0.2 * jax.random.normal(key, leaf.shape) for key, leaf in zip(keys, leaves, strict=True)]
    return graph, tree.unflatten(values)


class RecordingSampler(WindowSampler):
    """Keeps what every window was given and what came out of it."""

    def __init__(self, **settings):
        super().__init__(
            *random_model(),
            NoiseSchedule(ScheduleConfig.cogvideox_5b()),
            SamplingConfig(SamplerConfig(settings.pop("kind", "ddim"), 3), **settings),
        )
        self.windows = []

    def __call__(self, latents, *args, **kwargs):
        result = super().__call__(latents, *args, **kwargs)
        self.windows.append((latents, args[2], result))
        return result


def story(sampler, num_scenes=5, seed=0, given=()):
    text = jax.random.normal(jax.random.key(1), (num_scenes + 1, 5, 8))
    scenes = generate_story(
        sampler, text[1:], text[0], window=3, scene_layout=lambda frames: CONFIG.layout(tuple(frames), 4, 6),
        scene_shape=SHAPE, key=jax.random.key(seed), given=given,
    )  # fmt: skip
    return dict(scenes)


def test_scenes_are_carried_bit_for_bit():
    sampler = RecordingSampler(condition="clean")
    scenes = story(sampler)
    assert sorted(scenes) == [0, 1, 2, 3, 4]
    for number, (seen, is_known, result) in enumerate(sampler.windows[1:], start=1):
        np.testing.assert_array_equal(is_known, [True, True, False])
        context = jnp.concatenate([scenes[number], scenes[number + 1]])
        np.testing.assert_array_equal(seen[0, :4], context)
        np.testing.assert_array_equal(result[0, :4], context)


def test_noised_condition_is_what_the_model_sees_and_clean_latents_are_what_is_carried():
    sampler = RecordingSampler(condition="noised")
    scenes = story(sampler)
    for number, (seen, _, result) in enumerate(sampler.windows[1:], start=1):
        context = jnp.concatenate([scenes[number], scenes[number + 1]])
        difference = np.abs(seen[0, :4] - np.sqrt(0.99915) * context)
        assert 0.01 < difference.std() < 0.1
        np.testing.assert_array_equal(result[0, :4], seen[0, :4])
    assert np.abs(scenes[1] - sampler.windows[0][2][0, 2:4]).max() == 0


@pytest.mark.parametrize("kind", ["ddim", "dpm"])
def test_one_program_serves_all_windows_and_seeds(kind):
    sampler = RecordingSampler(kind=kind)
    story(sampler)
    story(sampler, seed=1)
    assert sampler._step._cache_size() == 1


@pytest.mark.parametrize("kind", ["ddim", "dpm"])
def test_seeds(kind):
    first, again, other = (story(RecordingSampler(kind=kind), seed=seed) for seed in (0, 0, 1))
    for scene in first:
        np.testing.assert_array_equal(first[scene], again[scene])
        assert np.abs(first[scene] - other[scene]).max() > 0.1


def test_given_scenes_are_the_context_and_are_not_generated():
    given = [jax.random.normal(jax.random.key(seed), SHAPE) for seed in (5, 6)]
    sampler = RecordingSampler(condition="clean")
    scenes = story(sampler, num_scenes=3, given=given)
    assert list(scenes) == [2]
    np.testing.assert_array_equal(sampler.windows[0][0][0, :4], jnp.concatenate(given))


def test_guidance_of_one_needs_no_unconditional_pass():
    """A static scale of 1 is the conditional prediction: half the work for the same latents."""
    plain = story(RecordingSampler(guidance_scale=1.0), num_scenes=3)
    almost = story(RecordingSampler(guidance_scale=1.0000001), num_scenes=3)
    for scene in plain:
        np.testing.assert_allclose(plain[scene], almost[scene], atol=1e-4)
