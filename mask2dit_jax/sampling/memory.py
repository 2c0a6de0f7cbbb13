"""The memory that sampling needs, computed from sizes alone."""

import dataclasses

import jax
import numpy as np

from mask2dit_jax.layout import SceneLayout
from mask2dit_jax.models.backbone import TransformerConfig
from mask2dit_jax.models.t5 import T5Config
from mask2dit_jax.models.vae import VAEConfig
from mask2dit_jax.pretrained.directory import COMPONENTS

_GIB = 2**30


@dataclasses.dataclass(frozen=True)
class SamplingMemory:
    """Bytes over all devices together.

    Activations are the largest that a block of the transformer holds at once: two copies of the residual stream and the
    hidden units of its feed-forward layer. The workspace of attention and of the VAE, and whatever XLA adds, are not
    counted; `train_compile` reports what a program really takes on a TPU.

    Attributes:
        text_encoder: its parameters.
        transformer: its parameters.
        vae: its parameters.
        activations: of the largest window.
        latents_on_disk: of a whole story.
    """

    text_encoder: int
    transformer: int
    vae: int
    activations: int
    latents_on_disk: int

    @classmethod
    def of(
        cls,
        model: TransformerConfig,
        vae: VAEConfig,
        text_encoder: T5Config,
        layout: SceneLayout,
        *,
        dtype,
        copies: int,
        latent_bytes: int,
    ) -> "SamplingMemory":
        """Compute the memory from sizes.

        Args:
            model: sizes of the transformer.
            vae: sizes of the VAE.
            text_encoder: sizes of the text encoder.
            layout: of the largest window.
            dtype: of parameters and activations.
            copies: predictions made at once, 2 with guidance.
            latent_bytes: of a whole story.
        """
        size = np.dtype(dtype).itemsize
        return cls(
            size * _parameters("text_encoder", text_encoder),
            size * _parameters("transformer", model),
            size * _parameters("vae", vae),
            copies * layout.num_tokens * model.activation_width * size,
            latent_bytes,
        )

    def lines(self, num_devices: int) -> list[str]:
        """Describe the memory of one device. Everything but the VAE's parameters is spread over the devices."""
        text_encoder, transformer, activations = (
            value / num_devices for value in (self.text_encoder, self.transformer, self.activations)
        )
        return [
            f"memory per device ({num_devices}), at least: {_size(text_encoder)} for the text encoder, then freed;",
            f"  {_size(transformer + self.vae + activations)} for transformer {_size(transformer)}, "
            f"VAE {_size(self.vae)} and activations {_size(activations)}; not counted: workspace of attention and VAE",
            f"latents on disk: {_size(self.latents_on_disk)}",
        ]


def _parameters(name: str, config) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(COMPONENTS[name].module(config)))


def _size(num_bytes: int | float) -> str:
    return f"{num_bytes / _GIB:.2f} GiB" if num_bytes >= _GIB / 10 else f"{num_bytes / 2**20:.1f} MiB"
