"""Many stories at once from one trained model: each story is a row of the batch."""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from experiments.desk.readers import Frames
from experiments.desk.world import TEXT_TOKENS, WorldStory, render
from mask2dit_jax.axes import NpFloats
from mask2dit_jax.diffusion.samplers import SamplerConfig
from mask2dit_jax.diffusion.schedule import NoiseSchedule
from mask2dit_jax.models.registry import backbone_of
from mask2dit_jax.parallel.mesh import make_mesh
from mask2dit_jax.pretrained.encoders import TextEncoder, VideoCodec
from mask2dit_jax.pretrained.pretrained import Pretrained
from mask2dit_jax.sampling.window import SamplingConfig, WindowSampler, generate_windows
from mask2dit_jax.story.windows import plan_windows

WINDOW = 3
NUM_STEPS = 20


@dataclasses.dataclass(frozen=True)
class Protocol:
    """How stories are sampled.

    Attributes:
        name: of the file that keeps the stories.
        num_known: number of scenes of the world that a story starts from; 0, or at least `WINDOW - 1`.
        num_scenes: of a story, known ones included.
        condition: whether known scenes are shown "clean" or "noised" at t = 0.
        reencode: whether finished scenes go through 8-bit pixels before they become context, as if read from a file.
        scene_frames: latent frames of each scene; () stands for the length that the model was trained with.
    """

    name: str = "fixed"
    num_known: int = 0
    num_scenes: int = WINDOW
    condition: str = "clean"
    reencode: bool = False
    scene_frames: tuple[int, ...] = ()


class Recoded(dict[int, np.ndarray]):
    """Maps scene numbers to latents, and passes them through pixels whenever they are read as context."""

    def __init__(self, recode: Callable[[np.ndarray], np.ndarray]):
        """Start empty; `recode` decodes and encodes the latents of one scene."""
        self._recode = recode

    def __getitem__(self, scene: int) -> np.ndarray:
        """Return the latents of a scene after a round trip through pixels."""
        return self._recode(super().__getitem__(scene))


class StoryMaker:
    """A trained transformer with its frozen components.

    Attributes:
        model: sizes of the transformer.
    """

    def __init__(self, workdir: Path, pretrained: Path, condition: str = "clean"):
        """Load the transformer.

        Args:
            workdir: of its training run.
            pretrained: directory of the frozen components.
            condition: see `Protocol`.
        """
        opened = Pretrained.open(pretrained, checkpoint=workdir)
        self.model = dataclasses.replace(opened.transformer.config(), attention="dense")
        mesh = make_mesh(devices=jax.devices()[:1])
        graph, abstract = backbone_of(self.model).abstract(self.model, jnp.float32, mesh)
        config = SamplingConfig(SamplerConfig(num_steps=NUM_STEPS), guidance_scale=1.0, condition=condition)
        params = opened.transformer.load(abstract)
        self._sampler = WindowSampler(graph, params, NoiseSchedule(opened.schedule), config, mesh)
        self._text = TextEncoder(opened, TEXT_TOKENS, jnp.float32)
        self._codec = VideoCodec(opened, jnp.float32)

    def __call__(self, stories: Sequence[WorldStory], protocol: Protocol) -> list[Frames]:
        """Sample a story for the prompts of each of `stories`, which have all of `protocol.num_scenes` scenes.

        Returns:
            The first scene of every story, then the second of every story, and so on. Known scenes are included,
            unchanged.
        """
        text = self.embed(stories)
        latents = [Recoded(self._recoded) if protocol.reencode else {} for _ in stories]
        if protocol.num_known:
            given = self.encode([story[: protocol.num_known] for story in stories])
            for row, known in zip(latents, given, strict=True):
                row.update(enumerate(np.split(known, protocol.num_known)))
        windows = generate_windows(
            self._sampler,
            text,
            text,  # without guidance, negative prompts are ignored
            windows=plan_windows(protocol.num_scenes, WINDOW, protocol.num_known),
            frames=protocol.scene_frames or (self.model.base_frames,) * protocol.num_scenes,
            scene_layout=lambda frames: self.model.layout(tuple(frames), *self._codec.config.sample_latents),
            latent_shape=(*self._codec.config.sample_latents, self.model.latent_channels),
            key=jax.random.key(0),
            latents=latents,
        )
        for _ in windows:
            pass
        scenes = zip(*(row.values() for row in latents), strict=True)  # in the order in which they were added
        return [np.stack([self._codec.decode(scene) for scene in rows]) for rows in scenes]

    def embed(self, stories: Sequence[WorldStory]) -> NpFloats["n s t x"]:
        """Embed the prompts of each story."""
        prompts = list({scene.said.caption: None for story in stories for scene in story})
        embedded = dict(zip(prompts, self._text(prompts), strict=True))
        return np.stack([[embedded[scene.said.caption] for scene in story] for story in stories])

    def encode(self, stories: Sequence[WorldStory]) -> NpFloats["n f h w c"]:
        """Return the scaled latents of what the world shows of each story, its scenes one after the other."""
        videos = [np.concatenate([render(scene) for scene in story]) for story in stories]
        return np.stack([self._to_latents(video) for video in videos])

    def _recoded(self, latents: NpFloats["f h w c"]) -> NpFloats["f h w c"]:
        return self._to_latents(self._codec.decode(latents))

    def _to_latents(self, video: np.ndarray) -> NpFloats["f h w c"]:
        key = jax.random.key(0)  # the posterior of the lossless codec has no spread
        return np.asarray(self._codec.sample(np.float32(video) / 127.5 - 1, key))
