"""A storyboard while training: the prompts of a fixed sample, drawn with the weights of the moment."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from etils import epath
from flax import nnx
from PIL import Image

from mask2dit_jax.diffusion.samplers import Sampler, SamplerConfig
from mask2dit_jax.media.storyboard import StoryboardScene, write_storyboard
from mask2dit_jax.parallel import sharding
from mask2dit_jax.pretrained.encoders import VideoCodec
from mask2dit_jax.sampling.window import make_denoise_step
from mask2dit_jax.training.events import EventFile
from mask2dit_jax.training.program import TrainProgram


class Preview:
    """Samples on the mesh that trains, in one program; the VAE is loaded when the first storyboard is due.

    Without guidance, whose other half would cost as much again: it shows how training goes, not the best there is.
    """

    def __init__(self, program: TrainProgram, pretrained, num_steps: int, workdir, events: EventFile | None):
        """`events` is None on processes that write nothing: they sample along, and neither decode nor write."""
        self._program, self._num_steps, self._events = program, num_steps, events
        self._pretrained, self._folder = pretrained, epath.Path(workdir) / "samples"

    def __call__(self, step: int, params: nnx.State, text) -> None:
        """Writes WORKDIR/samples/step_N.png. text: (b s t x) on the mesh; the first sample is drawn."""
        latents = self._sample(params, text)
        if self._events is None:
            return
        latents = np.asarray(latents)
        parts = self._program.objective.layout.frame_slices
        scenes = [StoryboardScene("", self._codec.decode(latents[part])) for part in parts]
        try:
            self._write(step, scenes)
        except Exception as error:  # of a disk or of a bucket; no picture is worth the run it is about
            logging.warning("the storyboard of step %d is left out: %s", step, error)

    def _write(self, step: int, scenes: list[StoryboardScene]) -> None:
        path = self._folder / f"step_{step:06d}.png"
        write_storyboard(path, scenes)
        with path.open("rb") as file:
            self._events.add_image("storyboard", np.asarray(Image.open(file).convert("RGB")), step)

    @functools.cached_property
    def _codec(self) -> VideoCodec:
        return VideoCodec(self._pretrained, self._program.dtype)

    @functools.cached_property
    def _sample(self):
        program, layout = self._program, self._program.objective.layout
        sampler = Sampler(SamplerConfig(num_steps=self._num_steps), program.objective.schedule)
        denoise = make_denoise_step(program.graph, sampler, guided=False)
        shape = (1, *program.abstract_batch["mean"].shape[1:])
        is_known = jnp.zeros(layout.num_scenes, bool)

        def sample(params, text):
            key = jax.random.key(program.seed)  # the same noise every time, so that storyboards can be compared
            noise = jax.random.normal(key, shape)

            def body(_, carry):
                state, x = carry
                return denoise(params, state, x, noise, text[:1], is_known, jnp.float32(1), key, layout=layout)

            return jax.lax.fori_loop(0, self._num_steps, body, (sampler.init(noise), noise))[1][0]

        return jax.jit(sample, out_shardings=sharding.replicated(program.mesh))
