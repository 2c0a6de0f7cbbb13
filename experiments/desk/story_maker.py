"""Many stories at once from one trained model: windows of `story.windows`, with a story a row of the batch."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from experiments.desk.readers import Frames
from experiments.desk.world import TEXT_TOKENS, WorldStory, render
from mask2dit_jax.axes import Array, Floats
from mask2dit_jax.diffusion.samplers import SamplerConfig
from mask2dit_jax.diffusion.schedule import NoiseSchedule
from mask2dit_jax.models.registry import backbone_of
from mask2dit_jax.parallel.mesh import make_mesh
from mask2dit_jax.pretrained import directory as port
from mask2dit_jax.pretrained.encoders import TextEncoder, VideoCodec
from mask2dit_jax.pretrained.transformer_source import TransformerSource
from mask2dit_jax.sampling.window import SamplingConfig, WindowSampler
from mask2dit_jax.story.windows import plan_windows

WINDOW = 3
NUM_STEPS = 20


@dataclasses.dataclass(frozen=True)
class Protocol:
    """How stories are sampled.

    Attributes:
        name: of the file that keeps them.
        num_known: scenes of the world itself that a story starts from; 0, or at least `WINDOW - 1`.
        condition: known scenes are shown "clean" or "noised" at t = 0.
        reencode: finished scenes go through pixels (8 bits) before they become context, as if they came from a file.
        scene_frames: latent frames of each scene; (): what the model was trained with.
    """

    name: str = "fixed"
    num_known: int = 0
    num_scenes: int = WINDOW
    condition: str = "clean"
    reencode: bool = False
    scene_frames: tuple[int, ...] = ()


class StoryMaker:
    """A trained transformer with its frozen components."""

    def __init__(self, workdir: Path, pretrained: Path, condition: str = "clean"):
        source = TransformerSource.require(workdir)
        self.model = dataclasses.replace(source.config(), attention="dense")
        mesh = make_mesh(devices=jax.devices()[:1])
        graph, abstract = backbone_of(self.model).abstract(self.model, jnp.float32, mesh)
        schedule = NoiseSchedule(port.load_schedule(pretrained))
        config = SamplingConfig(SamplerConfig(num_steps=NUM_STEPS), guidance_scale=1.0, condition=condition)
        self._sampler = WindowSampler(graph, source.load(abstract), schedule, config, mesh)
        self._text = TextEncoder(pretrained, TEXT_TOKENS, jnp.float32)
        self._codec = VideoCodec(pretrained, jnp.float32)

    def __call__(self, stories: Sequence[WorldStory], protocol: Protocol) -> list[Frames]:
        """Samples a story for the prompts of each of `stories` (all of `protocol.num_scenes` scenes).

        Returns:
            The first scene of every story, the second of every story, and so on. The scenes that are given are there
            too, as they came.
        """
        text, key = self.embed(stories), jax.random.key(0)
        lengths = protocol.scene_frames or (self.model.base_frames,) * protocol.num_scenes
        scenes = []
        if protocol.num_known:
            given = self.encode([story[: protocol.num_known] for story in stories])
            scenes = jnp.split(given, protocol.num_known, axis=1)
        for window in plan_windows(protocol.num_scenes, WINDOW, protocol.num_known):
            known = [self._recoded(scenes[i]) if protocol.reencode else scenes[i] for i in window.known]
            frames = tuple(lengths[i] for i in window.scenes)
            window_key = jax.random.fold_in(key, window.new[0])
            scenes += self._sample(known, text[:, np.array(window.scenes)], frames, window_key)
        return [np.stack([self._codec.decode(latents) for latents in scene]) for scene in scenes]

    def embed(self, stories: Sequence[WorldStory]) -> Floats["n s t x"]:
        """The prompts of each story."""
        prompts = list({scene.said.caption: None for story in stories for scene in story})
        embedded = dict(zip(prompts, self._text(prompts), strict=True))
        return jnp.asarray(np.stack([[embedded[scene.said.caption] for scene in story] for story in stories]))

    def encode(self, stories: Sequence[WorldStory]) -> Floats["n f h w c"]:
        """What the world shows of each story, its scenes one after the other: scaled latents."""
        return self._to_latents([np.concatenate([render(scene) for scene in story]) for story in stories])

    def _sample(
        self, known: list[Floats["n _f h w c"]], text: Floats["n s t x"], frames: tuple[int, ...], key: Array
    ) -> list[Floats["n _f h w c"]]:
        """The new scenes of one window whose scenes have so many frames."""
        start_key, condition_key, step_key = jax.random.split(key, 3)
        num_scenes, (height, width) = text.shape[1], self._codec.config.sample_latents
        layout = self.model.layout(frames, height, width)
        shape = (len(text), sum(frames[len(known) :]), height, width, self.model.latent_channels)
        parts = [jax.random.normal(start_key, shape)]
        if known:
            parts.insert(0, self._sampler.conditions(jnp.concatenate(known, axis=1), condition_key))
        is_known = np.arange(num_scenes) < len(known)
        latents = jnp.concatenate(parts, axis=1)
        latents = self._sampler(latents, text, jnp.zeros_like(text), is_known, layout=layout, key=step_key)
        return [latents[:, part] for part in layout.frame_slices[len(known) :]]

    def _recoded(self, latents: Floats["n f h w c"]) -> Floats["n f h w c"]:
        return self._to_latents([self._codec.decode(z) for z in latents])

    def _to_latents(self, videos: Sequence[np.ndarray]) -> Floats["n f h w c"]:
        key = jax.random.key(0)  # the lossless codec's posterior has no spread
        return jnp.stack([self._codec.sample(np.float32(video) / 127.5 - 1, key) for video in videos])
