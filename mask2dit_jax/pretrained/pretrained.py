"""Opening stored weights: one object for a diffusers directory, a ported workdir or the workdir of a training run."""

import functools

from etils import epath
from flax import nnx

from mask2dit_jax.diffusion.schedule import ScheduleConfig
from mask2dit_jax.errors import UserError
from mask2dit_jax.io.paths import ASSETS
from mask2dit_jax.models.backbone import TransformerConfig
from mask2dit_jax.pretrained import directory, stored_checkpoint
from mask2dit_jax.pretrained.tokenizer import T5Tokenizer, load_tokenizer
from mask2dit_jax.pretrained.transformer_source import TransformerSource

TINY = ASSETS / "tiny"  # the directory that ships with the package
FROZEN = ("vae", "text_encoder")


class StoredComponent:
    """One frozen component of a directory. Its config is read once, its weights each time they are asked for."""

    def __init__(self, folder: epath.PathLike, name: str):
        """Remember where the component is, and read nothing.

        Args:
            folder: the directory that holds the component's folder.
            name: a key of `directory.COMPONENTS`.
        """
        self._folder, self.name = epath.Path(folder), name

    @functools.cached_property
    def config(self):
        """The component's config.

        Raises:
            UserError: the directory or its config.json is missing or damaged.
        """
        return directory.load_config(self._folder, self.name)

    @property
    def has_weights(self) -> bool:
        """Whether the folder holds weights in either layout."""
        return directory.has_weights(self._folder, self.name)

    def require_weights(self, why: str) -> None:
        """Raise UserError if the component has parameters and its folder holds none; `why` ends the message."""
        if directory.has_parameters(self.name, self.config) and not self.has_weights:
            raise UserError(f"{self._folder}/{self.name} holds no weights; {why}")

    def load(self, *, dtype=None, shardings=None) -> nnx.State:
        """Load the parameters; see `directory.load_component`."""
        return directory.load_component(self._folder, self.name, self.config, dtype=dtype, shardings=shardings)


class Pretrained:
    """All that sampling and training load: transformer, VAE, text encoder, tokenizer and noise schedule.

    Nothing is read before it is needed, and every config is read once.

    Attributes:
        folder: directory of the frozen components; it need not exist until one of them is needed.
        vae, text_encoder: the frozen components.
    """

    def __init__(self, folder: epath.PathLike, transformer: epath.PathLike, weights: str = "auto"):
        """Combine two places; `Pretrained.open` finds them.

        Args:
            folder: directory of the frozen components.
            transformer: a training workdir, one of its checkpoints, or a directory that holds transformer/.
            weights: "ema", "params", or "auto", the moving average where a checkpoint has one.
        """
        self.folder = epath.Path(folder)
        self._transformer_folder, self._weights = epath.Path(transformer), weights
        self.vae, self.text_encoder = (StoredComponent(self.folder, name) for name in FROZEN)

    @classmethod
    def open(cls, path: epath.PathLike, *, checkpoint: epath.PathLike = "", weights: str = "auto") -> "Pretrained":
        """Find the components that a path stands for.

        Args:
            path: a diffusers directory, a workdir that port_weights made, or the workdir or a checkpoint of a training
                run, which takes its frozen components from the directory that its record names. "tiny" is the
                directory that ships with the package.
            checkpoint: workdir or checkpoint of the transformer, if it is not that of `path`.
            weights: see `__init__`.

        Raises:
            UserError: no path is given, or a checkpoint is damaged.
        """
        if not str(path):
            raise UserError(
                "no pretrained weights: set --config.pretrained=DIR to a diffusers directory of CogVideoX or Mask2DiT"
            )
        path = epath.Path(TINY if str(path) == "tiny" else path)
        return cls(_frozen_folder(path), checkpoint if str(checkpoint) else path, weights)

    @functools.cached_property
    def transformer(self) -> TransformerSource:
        """The stored transformer. Raises UserError if there is none."""
        return TransformerSource.require(self._transformer_folder, self._weights)

    def find_transformer(self) -> TransformerSource | None:
        """Return the stored transformer, or None if there is none and a run starts from scratch."""
        return TransformerSource.find(self._transformer_folder, self._weights)

    @functools.cached_property
    def tokenizer(self) -> T5Tokenizer:
        """The tokenizer of the text encoder. Raises UserError if it is missing or damaged."""
        return load_tokenizer(f"{self.folder}/tokenizer")

    @functools.cached_property
    def schedule(self) -> ScheduleConfig:
        """The noise schedule that the weights were trained with."""
        return directory.load_schedule(self.folder)

    def fingerprint(self, *names: str) -> str:
        """Hash frozen components, such as "vae" and "tokenizer"; see `directory.fingerprint`."""
        return directory.fingerprint(self.folder, names)

    def check_fits(self, model: TransformerConfig) -> None:
        """Raise UserError if the transformer `model` was made for another VAE or text encoder."""
        for what, ours, theirs in (
            ("latent channels", model.latent_channels, self.vae.config.latent_channels),
            ("wide text embeddings", model.text_embed_dim, self.text_encoder.config.width),
        ):
            if ours != theirs:
                raise UserError(
                    f"the transformer takes {ours} {what}, {self} makes {theirs}; "
                    "set --config.pretrained to the directory that it was trained with"
                )

    def __str__(self):
        """Name the directory of the frozen components."""
        return str(self.folder)


def _frozen_folder(path: epath.Path) -> epath.Path:
    """Return the directory of the frozen components: `path`, or the one that the record of its checkpoint names."""
    if any((path / name).exists() for name in FROZEN) or not stored_checkpoint.has_checkpoint(path):
        return path
    recorded = stored_checkpoint.read_record(stored_checkpoint.find(path)).get("pretrained", "")
    if recorded in ("", str(path)):
        return path
    return Pretrained.open(recorded).folder
