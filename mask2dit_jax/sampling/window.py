"""Windows of scenes: the one denoising loop, and the one loop over the windows of stories.

The first window is generated together, then the story grows by one scene at a time (paper, section 3.3). Every further
scene is generated with finished scenes as its context (`story/windows.py` says which), so a window never grows. The
latents of finished scenes are passed to the next window as they are. They are not decoded and encoded again, so
nothing drifts for that reason.
"""

import copy
import dataclasses
from collections.abc import Callable, Iterable, Iterator, MutableMapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from flax import nnx
from jax.sharding import Mesh

from mask2dit_jax.axes import Array, Floats, NpFloats
from mask2dit_jax.diffusion import conditioning
from mask2dit_jax.diffusion.guidance import guidance_scales, guide
from mask2dit_jax.diffusion.samplers import Sampler, SamplerConfig
from mask2dit_jax.diffusion.schedule import NoiseSchedule
from mask2dit_jax.errors import UserError
from mask2dit_jax.layout import SceneLayout
from mask2dit_jax.models.backbone import TransformerConfig
from mask2dit_jax.parallel import sharding
from mask2dit_jax.parallel.mesh import make_mesh
from mask2dit_jax.story.plan import in_words
from mask2dit_jax.story.windows import Window

Progress = Callable[[Iterable[Any], str], Iterable[Any]]  # wraps steps, given their description; `tqdm` is one


def no_progress(steps: Iterable[Any], description: str) -> Iterable[Any]:
    """Report nothing."""
    return steps


@dataclasses.dataclass(frozen=True)
class SamplingConfig:
    """How windows are generated.

    Attributes:
        sampler: kind and number of steps.
        guidance, guidance_scale: see `diffusion.guidance`. A static scale of 1 makes no unconditional pass.
        condition: whether known scenes are shown "noised" at t = 0, as in the authors' code, or "clean".
    """

    sampler: SamplerConfig
    guidance: str = "static"
    guidance_scale: float = 6.0
    condition: str = "noised"

    def __post_init__(self):
        """Check the condition."""
        conditioning.check_condition(self.condition)

    @property
    def guided(self) -> bool:
        """Whether each step makes an unconditional prediction as well."""
        return self.guidance != "static" or self.guidance_scale != 1


class WindowSampler:
    """Denoises windows of scenes. Each layout is compiled once, however many windows, seeds and parameters follow."""

    def __init__(
        self,
        graph: nnx.GraphDef,
        params: nnx.State,
        schedule: NoiseSchedule,
        config: SamplingConfig,
        mesh: Mesh | None = None,
    ):
        """Set up the sampler; nothing is compiled yet.

        Args:
            graph: of the transformer.
            params: the transformer's parameters, on `mesh`; they may be abstract for `lower`.
            schedule: noise schedule of the transformer.
            config: how to sample.
            mesh: devices to run on; the first device alone if not given.
        """
        self._params, self._config, self._schedule = params, config, schedule
        self._mesh = mesh or make_mesh(devices=jax.devices()[:1])
        self._sampler = Sampler(config.sampler, schedule)
        self._scales = guidance_scales(config.guidance, config.guidance_scale, self._sampler.timesteps)
        self._step = jax.jit(make_denoise_step(graph, self._sampler, guided=config.guided), static_argnames="layout")
        self._compiled: set[SceneLayout] = set()  # layouts; shared by samplers of other parameters

    def with_params(self, params: nnx.State) -> "WindowSampler":
        """Return a sampler of other parameters, which shares the compiled programs of this one."""
        sampler = copy.copy(self)
        sampler._params = params
        return sampler

    @property
    def num_steps(self) -> int:
        """Number of denoising steps of a window."""
        return self._config.sampler.num_steps

    def conditions(self, latents: Floats["b f h w c"], key: Array) -> Floats["b f h w c"]:
        """Return known latents as the denoiser sees them, clean or noised at t = 0.

        The noise has the precision of the model. In bfloat16, the precision of the authors' code, the 5B schedule
        rounds it to nothing.
        """
        if self._config.condition == "clean":
            return latents
        dtype = jax.tree.leaves(self._params)[0].dtype
        noise = jax.random.normal(key, latents.shape, latents.dtype)
        noised = self._schedule.add_noise(
            latents.astype(dtype), noise.astype(dtype), jnp.zeros(latents.shape[:2], jnp.int32)
        )
        return noised.astype(latents.dtype)

    def __call__(
        self,
        latents: Floats["b f h w c"],
        text: Floats["b s t x"],
        negative_text: Floats["b s t x"],
        is_known: np.ndarray,
        *,
        layout: SceneLayout,
        key: Array,
        steps: Iterable[int] | None = None,
        on_step: Callable[[Array], None] = lambda latents: None,
    ) -> Floats["b f h w c"]:
        """Return the latents of all scenes; those of known scenes are unchanged.

        Args:
            latents: for known scenes, what the model is shown (`conditions`); for the others, standard normal noise.
            text: embeddings of the prompts.
            negative_text: embeddings of the negative prompts; without guidance they are ignored.
            is_known: (s), the scenes that are held fixed at t = 0.
            layout: of the scenes.
            key: decides the noise that a stochastic sampler adds.
            steps: `range(num_steps)`, wrapped in whatever reports progress; None reports nothing.
            on_step: called with the latents after every step.
        """
        text = jnp.concatenate([negative_text, text]) if self._config.guided else text
        # Placement must not change from step to step or from window to window, or jit compiles again.
        place = sharding.replicated(self._mesh)
        state, latents, text, key = jax.device_put((self._sampler.init(latents), latents, text, key), place)
        x = latents
        if layout not in self._compiled:
            logging.info("compiling the denoising step for %s tokens", f"{layout.num_tokens:,}")
            self._compiled.add(layout)
        with jax.set_mesh(self._mesh):
            for step in range(self.num_steps) if steps is None else steps:
                scale = np.float32(self._scales[step])
                state, x = self._step(self._params, state, x, latents, text, is_known, scale, key, layout=layout)
                on_step(x.block_until_ready())  # a step takes seconds; a progress bar that runs ahead would lie
        return x

    def lower(self, model: TransformerConfig, layout: SceneLayout, platform: str) -> jax.stages.Lowered:
        """Lower one step of the loop for one story, ready to be compiled for the devices of the mesh.

        Args:
            model: sizes of the transformer.
            layout: of the window.
            platform: to compile for, such as "tpu".
        """
        place = sharding.replicated(self._mesh)
        height, width = (side * model.patch_size for side in layout.grid)
        latents = jax.ShapeDtypeStruct((1, layout.num_frames, height, width, model.latent_channels), jnp.float32)
        text = (1 + self._config.guided, layout.num_scenes, layout.text_tokens, model.text_embed_dim)
        arrays = (  # in the order of denoise_step
            jax.eval_shape(self._sampler.init, latents),
            latents,
            latents,
            jax.ShapeDtypeStruct(text, jnp.float32),
            jax.ShapeDtypeStruct((layout.num_scenes,), jnp.bool_),
            jax.ShapeDtypeStruct((), jnp.float32),
            jax.eval_shape(lambda: jax.random.key(0)),
        )
        arrays = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), arrays)
        with jax.set_mesh(self._mesh):
            traced = self._step.trace(self._params, *arrays, layout=layout)
            return traced.lower(lowering_platforms=(platform,))


def generate_windows(
    sampler: WindowSampler,
    text: NpFloats["b n t x"],
    negative_text: NpFloats["b n t x"],
    *,
    windows: Sequence[Window],
    frames: Sequence[int],
    scene_layout: Callable[[Sequence[int]], SceneLayout],
    latent_shape: tuple[int, int, int],
    key: Array,
    latents: Sequence[MutableMapping[int, np.ndarray]],
    progress: Progress = no_progress,
) -> Iterator[Window]:
    """Generate stories of one plan, and yield each window when its new scenes are in `latents`.

    Windows whose new scenes are there from the start are not generated again. The result of a window depends on
    nothing but the key, its texts, its frames and its context, so a story that is resumed later is the same story.

    Args:
        sampler: denoises the windows.
        text: embedding of every scene's prompt, given scenes included; each row of the batch is a story.
        negative_text: embedding of every scene's negative prompt.
        windows: in the order of `plan_windows`.
        frames: latent frames of every scene; they may differ.
        scene_layout: returns the layout of scenes with the given numbers of latent frames.
        latent_shape: (h w c) of a latent frame.
        key: decides the stories. The noise of a window is folded from it and from the window's first new scene.
        latents: for each story, the clean, scaled latents (f h w c) of its finished scenes. New ones are added. Give a
            mapping that keeps them on disk, and memory does not grow with the story.
        progress: wraps the denoising steps of each window.

    Raises:
        UserError: the latents of a window are not finite.
    """
    for window in windows:
        if not all(scene in story for scene in window.new for story in latents):
            layout = scene_layout([frames[scene] for scene in window.scenes])
            known = [np.stack([story[scene] for story in latents]) for scene in window.known]
            texts = (values[:, list(window.scenes)] for values in (text, negative_text))
            window_key = jax.random.fold_in(key, window.new[0])
            steps = progress(range(sampler.num_steps), f"scene {', '.join(str(scene + 1) for scene in window.new)}")
            result = _generate_window(sampler, known, *texts, layout, latent_shape, window_key, steps)
            if not np.isfinite(result).all():
                raise UserError(
                    f"{in_words(window.new)}: the latents are NaN or infinite and are not kept; look for damage in the "
                    "transformer's weights, or compute in float32"
                )
            for scene, part in zip(window.new, layout.frame_slices[len(known) :], strict=True):
                for story, row in zip(latents, result, strict=True):
                    story[scene] = row[part]
        yield window


def _generate_window(
    sampler: WindowSampler,
    known: list[NpFloats["b _f h w c"]],
    text: NpFloats["b s t x"],
    negative_text: NpFloats["b s t x"],
    layout: SceneLayout,
    latent_shape: tuple[int, int, int],
    key: Array,
    steps: Iterable[int],
) -> NpFloats["b f h w c"]:
    """Return the latents of all scenes of a window, of which the first ones are known."""
    start_key, condition_key, step_key = jax.random.split(key, 3)
    num_new = sum(layout.frames[len(known) :])
    parts = [jax.random.normal(start_key, (len(text), num_new, *latent_shape))]
    if known:
        parts.insert(0, sampler.conditions(jnp.concatenate(known, axis=1), condition_key))
    result = sampler(
        jnp.concatenate(parts, axis=1),
        jnp.asarray(text),
        jnp.asarray(negative_text),
        np.arange(layout.num_scenes) < len(known),
        layout=layout,
        key=step_key,
        steps=steps,
    )
    return np.asarray(result)


def make_denoise_step(graph: nnx.GraphDef, sampler: Sampler, *, guided: bool):
    """Return one step of the loop, to be jitted with `layout` static. Step number and guidance scale are traced."""

    def denoise_step(params, state, x, known, text, is_known, scale, key, *, layout: SceneLayout):
        timesteps = jnp.where(is_known, 0, sampler.timestep(state))
        copies = 2 if guided else 1  # [unconditional, conditional], the reference's order
        model = nnx.merge(graph, params)
        per_sample = jnp.broadcast_to(timesteps, (copies * x.shape[0], layout.num_scenes))
        velocity = model(jnp.concatenate([x] * copies), text, per_sample, layout=layout)
        if guided:
            velocity = guide(*jnp.split(velocity.astype(jnp.float32), 2), scale)
        noise = None
        if sampler.uses_noise:
            noise = jax.random.normal(jax.random.fold_in(key, state.step), x.shape)
        state, x, _ = sampler.step(state, velocity, x, noise)
        return state, jnp.where(is_known[layout.frame_scenes][:, None, None, None], known, x)

    return denoise_step
