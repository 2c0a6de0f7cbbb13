"""Stories: scenes are carried from window to window untouched, whatever their lengths, and resumed bit for bit."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mask2dit_jax.diffusion.samplers import SamplerConfig
from mask2dit_jax.diffusion.schedule import NoiseSchedule, ScheduleConfig
from mask2dit_jax.errors import UserError
from mask2dit_jax.models.cogvideox import SHARDING
from mask2dit_jax.models.dit import DiT, DiTConfig
from mask2dit_jax.ops import positions
from mask2dit_jax.parallel import sharding
from mask2dit_jax.parallel.mesh import make_mesh
from mask2dit_jax.sampling.window import SamplingConfig, WindowSampler, generate_windows
from mask2dit_jax.story.windows import plan_windows

CONFIG = DiTConfig(2, 16, 1, 4, time_embed_dim=16, text_embed_dim=8, text_tokens=5, sample_height=4, sample_width=6,
                   sample_frames=9)  # fmt: skip
SHAPE = (2, 4, 6, 4)  # (f h w c) of a scene


@functools.cache
def random_model(**changes):
    graph, params = nnx.split(DiT(dataclasses.replace(CONFIG, **changes), rngs=nnx.Rngs(0)))
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(7), len(leaves))
    values = [0.2 * jax.random.normal(key, leaf.shape) for key, leaf in zip(keys, leaves, strict=True)]
    return graph, tree.unflatten(values)


class RecordingSampler(WindowSampler):
    """Keeps what every window was given and what came out of it."""

    def __init__(self, mesh=None, **settings):
        graph, params = random_model(**{name: settings.pop(name) for name in ("attention", "mask") if name in settings})
        if mesh:
            params = jax.device_put(params, sharding.parameter_shardings(params, mesh, SHARDING))
        super().__init__(
            graph,
            params,
            NoiseSchedule(ScheduleConfig.cogvideox_5b()),
            SamplingConfig(SamplerConfig(settings.pop("kind", "ddim"), 3), **settings),
            mesh,
        )
        self.windows = []

    def __call__(self, latents, *args, **kwargs):
        result = super().__call__(latents, *args, **kwargs)
        self.windows.append((latents, args[2], result))
        return result


@functools.cache
def _compiled(**settings):
    return RecordingSampler(**settings)


def recording(**settings) -> RecordingSampler:
    """A sampler that has seen nothing; its programs are those of the tests before."""
    sampler = _compiled(**settings)
    sampler.windows = []
    return sampler


def story(sampler, num_scenes=5, seed=0, given=(), frames=(), anchor=False, latents=None):
    """Latents of the scenes that are generated."""
    text = np.asarray(jax.random.normal(jax.random.key(1), (num_scenes + 1, 5, 8)))
    latents = {} if latents is None else latents
    latents.update(enumerate(map(np.asarray, given)))
    windows = plan_windows(num_scenes, 3, len(given), anchor=anchor)
    made = generate_windows(
        sampler, text[None, 1:], np.repeat(text[None, :1], num_scenes, 1),
        windows=windows, frames=frames or [2] * num_scenes,
        scene_layout=lambda frames: CONFIG.layout(tuple(frames), 4, 6), latent_shape=SHAPE[1:],
        key=jax.random.key(seed), latents=[latents],
    )  # fmt: skip
    return {scene: latents[scene] for window in made for scene in window.new}


def test_scenes_are_carried_bit_for_bit():
    sampler = recording(condition="clean")
    scenes = story(sampler)
    assert sorted(scenes) == [0, 1, 2, 3, 4]
    for number, (seen, is_known, result) in enumerate(sampler.windows[1:], start=1):
        np.testing.assert_array_equal(is_known, [True, True, False])
        context = jnp.concatenate([scenes[number], scenes[number + 1]])
        np.testing.assert_array_equal(seen[0, :4], context)
        np.testing.assert_array_equal(result[0, :4], context)


def test_noised_condition_is_what_the_model_sees_and_clean_latents_are_what_is_carried():
    sampler = recording(condition="noised")
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
    first, again, other = (story(recording(kind=kind), seed=seed) for seed in (0, 0, 1))
    for scene in first:
        np.testing.assert_array_equal(first[scene], again[scene])
        assert np.abs(first[scene] - other[scene]).max() > 0.1


def test_given_scenes_are_the_context_and_are_not_generated():
    given = [jax.random.normal(jax.random.key(seed), SHAPE) for seed in (5, 6)]
    sampler = recording(condition="clean")
    scenes = story(sampler, num_scenes=3, given=given)
    assert list(scenes) == [2]
    np.testing.assert_array_equal(sampler.windows[0][0][0, :4], jnp.concatenate(given))


def test_guidance_of_one_needs_no_unconditional_pass():
    """A static scale of 1 is the conditional prediction: half the work for the same latents."""
    plain = story(recording(guidance_scale=1.0), num_scenes=3)
    almost = story(recording(guidance_scale=1.0000001), num_scenes=3)
    for scene in plain:
        np.testing.assert_allclose(plain[scene], almost[scene], atol=1e-4)


def test_equal_scenes_are_what_they_were_before_scenes_could_differ():
    """The numbers of a story: keys, noise and texts of every window, written out."""
    text = jax.random.normal(jax.random.key(1), (6, 5, 8))
    sampler, latents = recording(guidance_scale=3.0), []
    for start, stop, num_known in ((0, 3, 0), (1, 4, 2), (2, 5, 2)):
        keys = jax.random.split(jax.random.fold_in(jax.random.key(0), start + num_known), 3)
        noise = jax.random.normal(keys[0], ((3 - num_known) * 2, *SHAPE[1:]))[None]
        known = latents[start : start + num_known]
        seen = sampler.conditions(jnp.concatenate(known)[None], keys[1]) if known else noise[:, :0]
        window_text = text[None, 1 + start : 1 + stop]
        result = sampler(
            jnp.concatenate([seen, noise], axis=1), window_text, jnp.broadcast_to(text[0], window_text.shape),
            np.arange(3) < num_known, layout=CONFIG.layout((2, 2, 2), 4, 6), key=keys[2],
        )  # fmt: skip
        latents += [result[0, 2 * scene : 2 * scene + 2] for scene in range(num_known, 3)]
    scenes = story(recording(guidance_scale=3.0))
    for scene, expected in enumerate(latents):
        np.testing.assert_array_equal(scenes[scene], expected)


@pytest.mark.parametrize("attention", ["grouped", "splash"])
def test_scenes_of_unequal_length_against_the_oracle(attention):
    """Through each attention and through the dense one, in which every pair of tokens has its bias."""
    frames = [1, 3, 2]
    ours = story(recording(attention=attention), num_scenes=3, frames=frames)
    assert [len(ours[scene]) for scene in range(3)] == frames
    for scene, expected in unequal_scenes_by_the_oracle().items():
        np.testing.assert_allclose(ours[scene], expected, atol=1e-5)


@functools.cache
def unequal_scenes_by_the_oracle():
    return story(recording(attention="dense"), num_scenes=3, frames=[1, 3, 2])


def test_positions_of_unequal_scenes_run_on():
    """The positions of a window do not depend on where its scenes are cut."""
    equal, unequal = (CONFIG.layout(frames, 4, 6) for frames in ((2, 2, 2), (1, 2, 3)))
    np.testing.assert_array_equal(*(positions.rope_angles(layout, (2, 3), 16) for layout in (equal, unequal)))
    tables = (positions.sincos_table(layout, (3, 2, 3), 32, 1.0, 1.0) for layout in (equal, unequal))
    np.testing.assert_array_equal(*tables)
    with pytest.raises(UserError, match="longer than the 3 per scene"):
        positions.check_table(CONFIG.layout((4, 4, 2), 4, 6), 3)


@pytest.mark.parametrize("frames", [(2,) * 12, (1, 2) * 6])
def test_a_long_story(frames):
    """Twelve scenes from a window of three.

    Nothing grows with the story but the latents themselves, each window sees the scenes before it as they came out, and
    programs are compiled for the layouts alone.
    """
    sampler = RecordingSampler(condition="clean")
    scenes = story(sampler, num_scenes=12, frames=frames)
    assert len(sampler.windows) == 10
    for number, (seen, is_known, result) in enumerate(sampler.windows[1:], start=1):
        np.testing.assert_array_equal(is_known, [True, True, False])
        context = np.concatenate([scenes[number], scenes[number + 1]])
        np.testing.assert_array_equal(seen[0, : len(context)], context)
        np.testing.assert_array_equal(result[0, : len(context)], context)
    assert sampler._step._cache_size() == len({frames[n : n + 3] for n in range(10)})


def test_every_mesh_tells_the_same_story():
    """Guidance over samples, heads over tensor: with the context carried from window to window."""
    mesh = make_mesh({"fsdp": 2, "tensor": 2}, jax.devices()[:4])
    scenes = story(RecordingSampler(mesh, guidance_scale=3.0), num_scenes=4)
    for scene, expected in story(recording(guidance_scale=3.0), num_scenes=4).items():
        np.testing.assert_allclose(scenes[scene], expected, atol=2e-5)


def test_an_anchor_keeps_the_first_scene_in_every_window():
    sampler = recording(condition="clean")
    scenes = story(sampler, num_scenes=6, anchor=True)
    for number, (seen, _, _) in enumerate(sampler.windows[1:], start=1):
        np.testing.assert_array_equal(seen[0, :4], np.concatenate([scenes[0], scenes[number + 1]]))


def test_one_given_scene_of_a_window_of_three():
    """The rest of the window is generated together around it."""
    given = [jax.random.normal(jax.random.key(5), SHAPE)]
    sampler = recording(condition="clean")
    scenes = story(sampler, num_scenes=4, given=given)
    assert list(scenes) == [1, 2, 3]
    seen, is_known, _ = sampler.windows[0]
    np.testing.assert_array_equal(is_known, [True, False, False])
    np.testing.assert_array_equal(seen[0, :2], given[0])


def test_a_story_goes_on_where_it_stopped():
    whole, latents = story(recording()), {}
    story(recording(), num_scenes=3, latents=latents)
    sampler = recording()
    resumed = story(sampler, latents=latents)
    assert len(sampler.windows) == 2
    for scene in whole:
        np.testing.assert_array_equal(whole[scene], resumed[scene])


def test_every_scene_has_its_own_negative_prompt():
    """Guidance leads scene 1 away from another text, and scene 1 alone changes what it says to the others."""
    text, negative = (np.array(jax.random.normal(jax.random.key(seed), (3, 5, 8))) for seed in (1, 2))
    made = []
    for change in (0, 1):
        negative[0] += change
        sampler, latents = recording(guidance_scale=3.0, mask="v1"), {}
        list(generate_windows(
            sampler, text[None], negative[None], windows=plan_windows(3, 3), frames=[2] * 3, latent_shape=SHAPE[1:],
            scene_layout=lambda frames: CONFIG.layout(tuple(frames), 4, 6), key=jax.random.key(0), latents=[latents],
        ))  # fmt: skip
        made.append(latents)
    assert np.abs(made[0][0] - made[1][0]).max() > 0.01
    np.testing.assert_array_equal(made[0][2], made[1][2])  # under mask v1 nothing passes from scene to scene


def test_latents_that_are_no_numbers_are_not_kept():
    """The first window is; the second, whose scene 5 cannot be computed, ends the story."""

    class Broken(RecordingSampler):
        def __call__(self, latents, *args, **kwargs):
            result = super().__call__(latents, *args, **kwargs)
            return result if len(self.windows) < 3 else result * np.nan

    latents = {}
    with pytest.raises(UserError, match=r"scene 5: the latents are NaN or infinite and are not kept; look for damage"):
        story(Broken(), latents=latents)
    assert sorted(latents) == [0, 1, 2, 3]
