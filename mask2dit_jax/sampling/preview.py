"""Storyboards while training: the prompts of a fixed sample, drawn with the weights of the moment."""

import functools
from collections.abc import Sequence

import jax
import numpy as np
from absl import logging
from etils import epath
from flax import nnx
from PIL import Image

from mask2dit_jax.axes import Floats
from mask2dit_jax.diffusion.samplers import SamplerConfig
from mask2dit_jax.media.storyboard import StoryboardScene, write_storyboard
from mask2dit_jax.parallel import sharding
from mask2dit_jax.pretrained.encoders import VideoCodec
from mask2dit_jax.pretrained.pretrained import Pretrained
from mask2dit_jax.sampling.window import SamplingConfig, WindowSampler
from mask2dit_jax.training.events import EventFile
from mask2dit_jax.training.program import TrainProgram


class Preview:
    """Samples on the mesh that trains. The VAE is loaded for the first storyboard.

    Samples without guidance, which would cost as much again: a storyboard shows how training goes, not the best that
    the model can do.
    """

    def __init__(
        self, program: TrainProgram, pretrained: Pretrained, num_steps: int, workdir, events: EventFile | None
    ):
        """Load nothing yet.

        Args:
            program: what is trained.
            pretrained: where the VAE is.
            num_steps: denoising steps of a storyboard.
            workdir: of the run; storyboards go to its folder `samples`.
            events: TensorBoard file; None on processes that write nothing. They sample along, because the mesh spans
                all processes, but neither decode nor write.
        """
        self._program, self._num_steps, self._events = program, num_steps, events
        self._pretrained, self._folder = pretrained, epath.Path(workdir) / "samples"

    def __call__(self, step: int, params: nnx.State, text: Floats["b s t x"], prompts: Sequence[str]) -> None:
        """Write WORKDIR/samples/step_N.png.

        Args:
            step: of the training run.
            params: on the mesh.
            text: embeddings of the prompts, on the mesh; those of the first sample are drawn.
            prompts: of the first sample, in words; only the process that writes needs them.
        """
        latents = self._sample(params, text)
        if self._events is None:
            return
        parts = self._program.objective.layout.frame_slices
        scenes = [
            StoryboardScene(prompt, self._codec.decode(latents[part]))
            for prompt, part in zip(prompts, parts, strict=True)
        ]
        try:
            self._write(step, scenes)
        except Exception as error:  # of a disk or a bucket; no picture is worth ending the run for
            logging.warning("no storyboard for step %d: %s", step, error)

    def _write(self, step: int, scenes: list[StoryboardScene]) -> None:
        path = self._folder / f"step_{step:06d}.png"
        write_storyboard(path, scenes)
        with path.open("rb") as file:
            self._events.add_image("storyboard", np.asarray(Image.open(file).convert("RGB")), step)

    @functools.cached_property
    def _codec(self) -> VideoCodec:
        return VideoCodec(self._pretrained, self._program.dtype)

    def _sample(self, params: nnx.State, text: Floats["b s t x"]) -> np.ndarray:
        """Return latents (f h w c). The noise is the same every time, so that storyboards can be compared."""
        layout, key = self._program.objective.layout, jax.random.key(self._program.seed)
        noise = np.asarray(jax.random.normal(key, (1, *self._program.abstract_batch["mean"].shape[1:])))
        text = self._first(text)
        is_known = np.zeros(layout.num_scenes, bool)
        latents = self._sampler.with_params(params)(noise, text, text, is_known, layout=layout, key=key)
        return np.asarray(self._first(latents)[0])

    @functools.cached_property
    def _sampler(self) -> WindowSampler:
        program = self._program
        config = SamplingConfig(SamplerConfig(num_steps=self._num_steps), guidance_scale=1.0)
        return WindowSampler(program.graph, nnx.State({}), program.objective.schedule, config, program.mesh)

    @functools.cached_property
    def _first(self):
        """Return the program that gives every process the first sample of a batch."""
        return jax.jit(lambda batch: batch[:1], out_shardings=sharding.replicated(self._program.mesh))
