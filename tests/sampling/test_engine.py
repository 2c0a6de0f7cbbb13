"""Stories from Python: scenes come as soon as they are done, and what is done is neither made nor read again."""

import dataclasses

import jax
import numpy as np
import pytest
from flax import nnx

from configs.sample import get_config
from mask2dit_jax.config import SampleConfig, SamplerConfig, read_config
from mask2dit_jax.media.video_writer import write_video
from mask2dit_jax.models.dit import DiT, DiTConfig
from mask2dit_jax.pretrained.pretrained import Pretrained
from mask2dit_jax.pretrained.stored_checkpoint import save_params
from mask2dit_jax.sampling import engine as engine_module
from mask2dit_jax.sampling.engine import StoryEngine
from mask2dit_jax.story.store import StoryLatents
from mask2dit_jax.story.story import Story

SIZE = HEIGHT, WIDTH = 32, 48
PROMPTS = ["a red picture", "a green picture", "a blue picture", "a grey picture"]
FIELDS = {"height": HEIGHT, "width": WIDTH, "num_frames": 5, "attention": "dense", "guidance_scale": 2.0}
CONFIG = dataclasses.replace(
    read_config(get_config("tiny"), SampleConfig), **FIELDS, sampler=SamplerConfig(num_steps=2)
)


@pytest.fixture(autouse=True)
def one_device(monkeypatch):
    devices = jax.devices()[:1]
    monkeypatch.setattr(jax, "local_devices", lambda: devices)


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """A transformer of random numbers."""
    tiny = Pretrained.open("tiny")
    channels, width = tiny.vae.config.latent_channels, tiny.text_encoder.config.width
    model = DiTConfig(2, 16, 1, channels, time_embed_dim=16, text_embed_dim=width, text_tokens=48, sample_frames=5)
    params = nnx.state(DiT(model, rngs=nnx.Rngs(0)))
    params = jax.tree.map(lambda x: x + 0.1 * np.sin(np.arange(x.size, dtype=np.float32)).reshape(x.shape), params)
    folder = tmp_path_factory.mktemp("run")
    save_params(folder, params, {"model": model.to_json(), "pretrained": "tiny"})
    return folder


@pytest.fixture(scope="module")
def weights(workdir) -> Pretrained:
    return Pretrained.open(workdir)


@pytest.fixture
def engine(weights) -> StoryEngine:
    return StoryEngine(weights, CONFIG)


def test_scenes_come_as_soon_as_they_are_done(engine):
    latents, story = {}, Story.from_prompts(PROMPTS, "bad")
    scenes = engine.generate(engine.plan(story), latents=latents)
    first = next(scenes)
    assert (first.number, sorted(latents)) == (0, [0, 1, 2])  # the first window, and nothing after it
    assert first.latents is latents[0]
    frames = np.stack(list(first.frames()))
    assert (frames.shape, frames.dtype) == ((5, *SIZE, 3), np.uint8)
    assert [scene.number for scene in scenes] == [1, 2, 3]
    assert sorted(latents) == [0, 1, 2, 3]


def test_a_finished_story_reads_neither_weights_nor_latents(engine, weights, tmp_path, monkeypatch):
    plan = engine.plan(Story.from_prompts(PROMPTS, "bad"))
    stored = StoryLatents(tmp_path, engine.fingerprints(plan, 3))
    made = {scene.number: scene.latents for scene in engine.generate(plan, 3, latents=stored)}
    for kind in ("TextEncoder", "VideoCodec", "WindowSampler"):
        monkeypatch.delattr(engine_module, kind)
    reads, read = [], StoryLatents.__getitem__
    monkeypatch.setattr(StoryLatents, "__getitem__", lambda self, scene: (reads.append(scene), read(self, scene))[1])
    again = StoryEngine(weights, CONFIG)
    scenes = list(again.generate(plan, 3, latents=StoryLatents(tmp_path, again.fingerprints(plan, 3))))
    assert [scene.number for scene in scenes] == [0, 1, 2, 3]
    assert reads == []
    for scene in scenes:
        np.testing.assert_array_equal(scene.latents, made[scene.number])


def test_given_scenes_come_first_and_encoding_needs_no_transformer(engine, tmp_path, monkeypatch):
    write_video(tmp_path / "clip.mp4", np.full((5, *SIZE, 3), 90, np.uint8), CONFIG.fps)
    story = Story.from_prompts(PROMPTS, "bad", given=(str(tmp_path / "clip.mp4"),))
    reports = []
    scenes = engine.generate(engine.plan(story), progress=lambda steps, what: (reports.append(what), steps)[1])
    first = next(scenes)
    assert first.number == 0
    assert reports == ["encoding given scenes"]
    assert np.abs(np.stack(list(first.frames())).astype(int) - 90).mean() < 30
    assert [scene.number for scene in scenes] == [1, 2, 3]
    assert reports[1:] == ["scene 2, 3", "scene 4"]


def test_prompts_of_several_stories_are_embedded_at_once(engine, monkeypatch):
    plans = [engine.plan(Story.from_prompts(prompts, "bad")) for prompts in (PROMPTS[:2], PROMPTS[1:3])]
    encoders, make = [], engine_module.TextEncoder
    monkeypatch.setattr(engine_module, "TextEncoder", lambda *args: (encoders.append(args), make(*args))[1])
    engine.embed(plans)
    for plan in plans:
        assert len(list(engine.generate(plan))) == 2
    assert len(encoders) == 1
