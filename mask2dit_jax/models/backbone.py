"""What the package needs of a diffusion transformer, whichever it is.

A backbone is one file that defines a config (`TransformerConfig`), a module (`Transformer`) and a `Backbone`, and one
line in `models.registry`. Porting, sharding, training and sampling read that record and name no backbone.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Protocol, runtime_checkable

from mask2dit_jax.axes import Floats, Ints
from mask2dit_jax.config import LoRAConfig
from mask2dit_jax.diffusion.schedule import PREDICTION_TYPE
from mask2dit_jax.layout import SceneLayout
from mask2dit_jax.models.architecture import Architecture

TRAINING_PASSES = 3  # forward passes that a training step costs: values, gradients of inputs, gradients of weights


@runtime_checkable
class TransformerConfig(Protocol):
    """The config of a backbone: a frozen dataclass with at least these fields and methods.

    Attributes:
        latent_channels: channels of a latent frame, as the VAE makes them.
        patch_size: latent rows and columns of one video token.
        text_embed_dim: width of the text encoder's embeddings.
        text_tokens: text tokens of each scene, padding included.
        sample_frames: pixel frames of one scene that the base model was trained with.
        num_heads: attention heads; `mesh.tensor` divides them.
        head_dim: channels of a head.
        sample_frames: pixel frames of one scene that the model was trained with.
        mask: attention mask variant, v1..v5 (ops/masks.py).
        attention: implementation of `ops.attention.api.attend`.
        remat: what the backward pass computes again, "none" for nothing.
        lora: adapters to train; None trains none.
    """

    latent_channels: int
    patch_size: int
    text_embed_dim: int
    text_tokens: int
    sample_frames: int
    num_heads: int
    head_dim: int
    sample_frames: int
    mask: str
    attention: str
    remat: str
    lora: LoRAConfig | None

    @property
    def activation_width(self) -> int:
        """Channels per token that a block holds at once, for estimates of memory."""
        ...

    def layout(self, frames: tuple[int, ...], height: int, width: int) -> SceneLayout:
        """Return the layout of scenes of `frames` latent frames each, at latent height x width.

        Raises:
            UserError: patches do not divide height and width.
        """
        ...

    def check_positions(self, layout: SceneLayout) -> None:
        """Raise UserError if the model has no positions for a layout. Rotary positions take any, tables do not."""
        ...

    def to_json(self) -> dict[str, Any]:
        """Return the config.json of a diffusers directory; `_class_name` is the backbone's."""
        ...


@runtime_checkable
class Transformer(Protocol):
    """The module of a backbone."""

    def __call__(
        self, latents: Floats["b f h w c"], text: Floats["b s t x"], timesteps: Ints["b s"], *, layout: SceneLayout
    ) -> Floats["b f h w c"]:
        """Predict v for the frames of all scenes.

        Args:
            latents: noisy, scaled latents of the scenes, joined along f.
            text: embeddings of each scene's prompt.
            timesteps: timestep of each scene; 0 for scenes that condition the others.
            layout: of the scenes; static under jit.
        """
        ...


@dataclasses.dataclass(frozen=True)
class Backbone(Architecture):
    """A diffusion transformer.

    Attributes:
        sizes: named sizes, such as "5b"; each value makes a config and takes fields to override.
        matmul_flops: FLOPs of one forward pass of one sample of a layout, without attention's products of queries,
            keys and values.
        attention_flops: FLOPs of those products, for the pairs of tokens that the mask allows.
        prediction_type: what the module predicts, as diffusers calls it.
        supports_lora: whether the module builds adapters where its config asks for some.
    """

    sizes: Mapping[str, Callable[..., TransformerConfig]]
    matmul_flops: Callable[[Any, SceneLayout], int]
    attention_flops: Callable[[Any, SceneLayout], int]
    prediction_type: str = PREDICTION_TYPE
    supports_lora: bool = False

    def __post_init__(self):
        """Raise ValueError for a prediction that loss and samplers do not take."""
        if self.prediction_type != PREDICTION_TYPE:
            raise ValueError(
                f"{self.class_names[0]} predicts {self.prediction_type!r}, but loss and samplers take "
                f"{PREDICTION_TYPE!r}; convert it in the module's __call__"
            )

    def training_flops(self, config: TransformerConfig, layout: SceneLayout, trained_share: float = 1.0) -> float:
        """Return the FLOPs of one sample in a training step.

        What rematerialisation computes again is not counted, because the model does not need it.

        Args:
            config: of the model.
            layout: of the sample.
            trained_share: share of the weights, by size, whose gradients the step needs.
        """
        passes = TRAINING_PASSES - 1 + trained_share
        return passes * self.matmul_flops(config, layout) + TRAINING_PASSES * self.attention_flops(config, layout)
