"""Stories from Python: what `sample` does, without files.

    weights = Pretrained.open("workdir/sft")
    engine = StoryEngine(weights, config)
    for scene in engine.generate(engine.plan(Story.from_prompts(prompts))):
        write_video(f"scene_{scene.number + 1}.mp4", scene.frames(), config.fps)

Data flows one way: a story file becomes a story and then a plan (`story/`), the engine turns the plan into scenes, and
the caller keeps them (`story/folder.py` on disk).
"""

import dataclasses
import functools
import hashlib
import math
from collections.abc import Iterable, Iterator, MutableMapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import UInt8

from mask2dit_jax.axes import Array, NpFloats
from mask2dit_jax.config import SampleConfig
from mask2dit_jax.diffusion.samplers import Sampler
from mask2dit_jax.diffusion.schedule import NoiseSchedule
from mask2dit_jax.layout import SceneLayout
from mask2dit_jax.media.transforms import LARGE_LOSS
from mask2dit_jax.models.backbone import TransformerConfig
from mask2dit_jax.models.registry import CodecConfig, backbone_of
from mask2dit_jax.models.sizes import scene_layout, with_run_settings
from mask2dit_jax.parallel.abstract import count_in_words
from mask2dit_jax.parallel.mesh import check_tokens, describe_mesh, make_mesh, sizes_for_any_length
from mask2dit_jax.pretrained.encoders import TextEncoder, VideoCodec
from mask2dit_jax.pretrained.pretrained import FROZEN, Pretrained
from mask2dit_jax.pretrained.tokenizer import Cut, cut_prompts
from mask2dit_jax.sampling.memory import SamplingMemory
from mask2dit_jax.sampling.window import Progress, SamplingConfig, WindowSampler, generate_windows, no_progress
from mask2dit_jax.story.given import check_given, read_given
from mask2dit_jax.story.plan import StoryPlan
from mask2dit_jax.story.store import fingerprints
from mask2dit_jax.story.story import Story
from mask2dit_jax.story.windows import Window

Latents = MutableMapping  # scene number -> (f h w c); unparameterised, or beartype would read a value to check its type


def sampling_config(config: SampleConfig) -> SamplingConfig:
    """Return how windows are generated according to a run config."""
    return SamplingConfig(config.sampler, config.guidance, config.guidance_scale, config.condition)


def sampling_mesh(
    config: SampleConfig, model: TransformerConfig, vae: CodecConfig, devices: Sequence[jax.Device]
) -> Mesh:
    """Return a mesh of one host's devices. It also takes stories whose scenes are longer or shorter than the config's.

    Args:
        config: the run config.
        model: sizes of the transformer.
        vae: sizes of the VAE.
        devices: of one host.
    """
    layout, copies = scene_layout(config, model, vae), 1 + sampling_config(config).guided
    parts = layout.text_tokens, math.prod(layout.grid)
    asked = dataclasses.asdict(config.mesh)
    return make_mesh(sizes_for_any_length(asked, len(devices), copies, parts, model.num_heads), devices)


@dataclasses.dataclass(frozen=True)
class FinishedScene:
    """A scene whose latents are done.

    Attributes:
        number: of the scene in its story, from 0.
    """

    number: int
    _engine: "StoryEngine"
    _latents: Latents

    @property
    def latents(self) -> NpFloats["f h w c"]:
        """The clean, scaled latents, read from where `StoryEngine.generate` put them."""
        return self._latents[self.number]

    def frames(self) -> Iterator[UInt8[np.ndarray, "_h _w 3"]]:
        """Decode the scene frame by frame; see `StoryEngine.decode`."""
        return self._engine.decode(self.latents)


class StoryEngine:
    """Makes stories with one set of weights and settings, on the devices of this process.

    Weights are loaded when they are first needed. The text encoder, the largest model, is freed as soon as it has
    embedded the prompts. Prompt embeddings and compiled programs are kept from one story to the next.

    Attributes:
        model: sizes of the transformer, run as the config says.
        vae: sizes of the VAE.
        sampling: how windows are generated.
        mesh: of this process's devices; with several processes, each makes its own stories.
    """

    def __init__(self, pretrained: Pretrained, config: SampleConfig, *, prompt_cache: epath.PathLike | None = None):
        """Read the configs of all models and check that they fit together; no weights are read.

        Args:
            pretrained: the weights.
            config: settings of the run.
            prompt_cache: folder that keeps prompt embeddings for later runs; None keeps them in memory only.

        Raises:
            UserError: a component is missing, or components and settings do not fit together.
        """
        self._pretrained, self._config, self._prompt_cache = pretrained, config, prompt_cache
        self.vae = pretrained.vae.config
        self._text_config = pretrained.text_encoder.config
        self.model = with_run_settings(pretrained.transformer.config(), config)
        pretrained.check_fits(self.model)
        self.sampling = sampling_config(config)
        self._dtype = jnp.dtype(config.compute_dtype)
        self._schedule = NoiseSchedule(pretrained.schedule)
        Sampler(self.sampling.sampler, self._schedule)  # refuses a number of steps that the schedule does not have
        for name in FROZEN:
            getattr(pretrained, name).require_weights("copy them there, or give another --config.pretrained")
        self._size = config.height, config.width
        self._latent_size = tuple(side // self.vae.spatial_compression_ratio for side in self._size)
        self.mesh = sampling_mesh(config, self.model, self.vae, jax.local_devices())
        self._texts: dict[str, np.ndarray] = {}

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(h w c) of a latent frame."""
        return *self._latent_size, self.model.latent_channels

    def layout(self, frames: Sequence[int]) -> SceneLayout:
        """Return the layout of scenes with the given numbers of latent frames.

        Raises:
            UserError: the model has no positions for them, or their tokens do not divide over the mesh.
        """
        layout = self.model.layout(tuple(frames), *self._latent_size)
        self.model.check_positions(layout)
        check_tokens(layout.num_tokens, self.mesh)
        return layout

    def plan(self, story: Story) -> StoryPlan:
        """Decide how a story is made, before any weights are loaded.

        Raises:
            UserError: the story cannot be made, for example because a given clip is too short.
        """
        config = self._config
        story.check_length(config.max_scenes)
        plan = StoryPlan.make(
            story,
            window=config.num_scenes,
            anchor=config.anchor,
            fps=config.fps,
            default_frames=config.num_frames,
            per_latent=self.vae.temporal_compression_ratio,
            count=self._cut,
            layout=self.layout,
            guided=self.sampling.guided,
            trained_frames=self.model.sample_frames,
        )
        given = zip(story.scenes[: story.num_given], plan.frames, strict=False)
        lost = [check_given(scene, frames, config.fps, self._size) for scene, frames in given]
        cropped = tuple(number for number, share in enumerate(lost) if share > LARGE_LOSS)
        return dataclasses.replace(plan, cropped=cropped)

    def describe(self, plan: StoryPlan) -> str:
        """Return the plan as a table to read, with the memory it takes."""
        memory = SamplingMemory.of(
            self.model,
            self.vae,
            self._text_config,
            max(plan.layouts, key=lambda layout: layout.num_tokens),
            dtype=self._dtype,
            copies=1 + self.sampling.guided,
            latent_bytes=4 * sum(plan.latent_frames) * math.prod(self.latent_shape),
        )
        return plan.table(*self._size, self.sampling.sampler.num_steps, memory.lines(self.mesh.size))

    def summary(self) -> str:
        """Return the devices and the model, a line each."""
        backbone = backbone_of(self.model)
        params = nnx.state(backbone.memoryless(self.model))
        return "\n".join(
            (
                f"devices: {describe_mesh(self.mesh)}",
                f"model: {backbone.class_names[0]} of {self._pretrained.transformer}, {count_in_words(params)} "
                f"parameters, mask {self.model.mask}, attention {self.model.attention}",
            )
        )

    @functools.cached_property
    def weights(self) -> dict[str, str]:
        """Fingerprint of each component. Other weights, or another noise schedule, make another story."""
        return {
            "transformer": self._pretrained.transformer.fingerprint(),
            "text_encoder": self._pretrained.fingerprint("text_encoder", "tokenizer"),
            "vae": self._pretrained.fingerprint("vae"),
            "scheduler": hashlib.sha256(repr(self._schedule).encode()).hexdigest()[:16],
        }

    def fingerprints(self, plan: StoryPlan, seed: int) -> list[str]:
        """Return a hash of everything that decides the latents of each scene; see `story.store.fingerprints`."""
        config, weights, common = self._config, self.weights, {"seed": seed, "compute_dtype": self._dtype.name}
        settings = {
            **common,
            "weights": {name: weights[name] for name in ("transformer", "text_encoder", "scheduler")},
            "latents": [*self.latent_shape, self.vae.temporal_compression_ratio],
            **{name: getattr(config, name) for name in ("mask", "condition", "guidance", "guidance_scale")},
            "sampler": dataclasses.asdict(self.sampling.sampler),
        }
        return fingerprints(plan, settings, {**common, "vae": weights["vae"], "size": self._size})

    @property
    def display(self) -> str:
        """Everything that decides how latents become frames, in words."""
        return f"VAE {self.weights['vae']}, {self._config.decode_chunking}, {self._config.fps} frames a second"

    def embed(self, plans: Iterable[StoryPlan]) -> None:
        """Embed the prompts of several stories, so that the text encoder is loaded once for all of them."""
        asked = [text for plan in plans for text in plan.texts]
        texts = [text for text in dict.fromkeys(asked) if text not in self._texts]
        if texts:
            encoder = TextEncoder(self._pretrained, self.model.text_tokens, self._dtype, self._prompt_cache)
            self._texts.update(zip(texts, encoder(texts), strict=True))

    def generate(
        self,
        plan: StoryPlan,
        seed: int | None = None,
        *,
        latents: Latents | None = None,
        progress: Progress = no_progress,
    ) -> Iterator[FinishedScene]:
        """Make the scenes of a story, and yield each as soon as its latents are done.

        Given scenes come first. A window's new scenes are done together.

        Args:
            plan: of the story.
            seed: decides the story, together with plan and weights; the config's if not given.
            latents: finished scenes by number, (f h w c) each. Scenes that are there are not made again, and new ones
                are added: `StoryLatents` keeps them on disk, so that a story can be resumed. None keeps them in memory.
            progress: wraps what takes long, given its description; `tqdm` is one.

        Raises:
            UserError: weights or a given clip cannot be read, or the latents are not finite.
        """
        latents = {} if latents is None else latents
        key = jax.random.key(self._config.seed if seed is None else seed)
        num_given, windows = plan.story.num_given, plan.windows
        self._encode_given(plan, key, latents, progress)
        yield from (FinishedScene(number, self, latents) for number in range(num_given))
        if not all(number in latents for number in range(num_given, len(plan.frames))):
            windows = self._generate_windows(plan, key, latents, progress)
        for window in windows:
            yield from (FinishedScene(number, self, latents) for number in window.new)

    def decode(self, latents: NpFloats["f h w c"]) -> Iterator[UInt8[np.ndarray, "_h _w 3"]]:
        """Decode clean, scaled latents of one scene, frame by frame.

        The devices decode the next chunk of frames while the caller uses this one.
        """
        for chunk in self._codec.decode_chunks(latents):
            yield from chunk

    def _generate_windows(self, plan: StoryPlan, key: Array, latents: Latents, progress: Progress) -> Iterator[Window]:
        self.embed([plan])
        scenes = plan.story.scenes
        text = np.stack([self._texts[scene.prompt] for scene in scenes])
        negative = np.stack([self._texts[scene.negative] for scene in scenes]) if plan.guided else text
        return generate_windows(
            self._sampler,
            text[None],
            negative[None],
            windows=plan.windows,
            frames=plan.latent_frames,
            scene_layout=self.layout,
            latent_shape=self.latent_shape,
            key=key,
            latents=[latents],
            progress=progress,
        )

    def _encode_given(self, plan: StoryPlan, key: Array, latents: Latents, progress: Progress) -> None:
        """Encode one scene at a time, because the frames of a scene are large."""
        key = jax.random.fold_in(key, 2**31 - 1)
        missing = [number for number in range(plan.story.num_given) if number not in latents]
        for number in progress(missing, "encoding given scenes") if missing else ():
            pixels = read_given(plan.story.scenes[number], plan.frames[number], plan.fps, self._size)
            latents[number] = np.asarray(self._codec.sample(pixels, jax.random.fold_in(key, number)))

    def _cut(self, texts: Sequence[str]) -> list[Cut]:
        """Return how much of each text the text encoder sees."""
        return cut_prompts(self._pretrained.tokenizer, texts, self.model.text_tokens)

    @functools.cached_property
    def _codec(self) -> VideoCodec:
        return VideoCodec(self._pretrained, self._dtype, self._config.decode_chunking)

    @functools.cached_property
    def _sampler(self) -> WindowSampler:
        """The transformer's parameters have the dtype of the computation, and each is loaded onto its devices."""
        graph, abstract = backbone_of(self.model).abstract(self.model, self._dtype, self.mesh)
        params = self._pretrained.transformer.load(abstract)
        return WindowSampler(graph, params, self._schedule, self.sampling, self.mesh)
