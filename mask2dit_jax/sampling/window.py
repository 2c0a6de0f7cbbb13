"""Generating one window of scenes: the denoising loop, in which some scenes may be known already."""

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from mask2dit_jax.axes import Array, Floats
from mask2dit_jax.diffusion import conditioning
from mask2dit_jax.diffusion.guidance import guidance_scales, guide
from mask2dit_jax.diffusion.samplers import Sampler, SamplerConfig
from mask2dit_jax.diffusion.schedule import NoiseSchedule
from mask2dit_jax.layout import SceneLayout
from mask2dit_jax.models.backbone import TransformerConfig
from mask2dit_jax.parallel import sharding
from mask2dit_jax.parallel.mesh import make_mesh


@dataclasses.dataclass(frozen=True)
class SamplingConfig:
    """How windows are generated.

    Attributes:
        guidance, guidance_scale: see `diffusion.guidance`. A static scale of 1 makes no unconditional pass.
        condition: known scenes are shown "noised" at t = 0 (as the released model was sampled) or "clean".
    """

    sampler: SamplerConfig
    guidance: str = "static"
    guidance_scale: float = 6.0
    condition: str = "noised"

    def __post_init__(self):
        conditioning.check_condition(self.condition)

    @property
    def guided(self) -> bool:
        return self.guidance != "static" or self.guidance_scale != 1


class WindowSampler:
    """Denoises windows of scenes. Each layout of scenes is compiled once, however many windows and seeds follow."""

    def __init__(
        self,
        graph: nnx.GraphDef,
        params: nnx.State,
        schedule: NoiseSchedule,
        config: SamplingConfig,
        mesh: Mesh | None = None,
    ):
        """The parameters lie on `mesh` (the first device alone if not given); for `lower` they may be abstract."""
        self._params, self._config, self._schedule = params, config, schedule
        self._mesh = mesh or make_mesh(devices=jax.devices()[:1])
        self._sampler = Sampler(config.sampler, schedule)
        self._scales = guidance_scales(config.guidance, config.guidance_scale, self._sampler.timesteps)
        self._step = jax.jit(make_denoise_step(graph, self._sampler, guided=config.guided), static_argnames="layout")

    @property
    def num_steps(self) -> int:
        return self._config.sampler.num_steps

    def conditions(self, latents: Floats["b f h w c"], key: Array) -> Floats["b f h w c"]:
        """Known latents as the denoiser is to see them: clean, or noised at t = 0.

        That noise has the precision of the model: in bfloat16, as the release is run, the 5B schedule has none.
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
        progress: Callable[[Iterable[Any]], Iterable[Any]] = iter,
        on_step: Callable[[Array], None] = lambda latents: None,
    ) -> Floats["b f h w c"]:
        """Latents of all scenes, those of the known ones as they came.

        Args:
            latents: of known scenes what the model is to be shown (`conditions`), of the others standard normal noise.
            is_known: (s), the scenes that are held fixed and have t = 0.
            key: of the noise that a stochastic sampler adds.
            progress: wraps the steps, e.g. tqdm.
            on_step: called with the latents after every step.
        """
        text = jnp.concatenate([negative_text, text]) if self._config.guided else text
        # What jit sees must not differ from step to step or from window to window, or it compiles again.
        place = sharding.replicated(self._mesh)
        state, latents, text, key = jax.device_put((self._sampler.init(latents), latents, text, key), place)
        x = latents
        with jax.set_mesh(self._mesh):
            for step in progress(range(self.num_steps)):
                scale = np.float32(self._scales[step])
                state, x = self._step(self._params, state, x, latents, text, is_known, scale, key, layout=layout)
                on_step(x.block_until_ready())  # a step takes seconds; a progress bar that runs ahead would lie
        return x

    def lower(self, model: TransformerConfig, layout: SceneLayout, platform: str) -> jax.stages.Lowered:
        """One step of the loop for one story, to be compiled for the devices of the mesh."""
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


def make_denoise_step(graph: nnx.GraphDef, sampler: Sampler, *, guided: bool):
    """One step of the loop, to be jitted with `layout` static; the step number and the guidance scale are data."""

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
