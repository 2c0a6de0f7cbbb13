"""Where a transformer comes from: a checkpoint of ours, or the transformer folder of a diffusers directory."""

import dataclasses

import jax
from etils import epath
from flax import nnx

from mask2dit_jax.errors import UserError
from mask2dit_jax.models.dit import DiTConfig
from mask2dit_jax.port import pretrained as port
from mask2dit_jax.training import checkpoint


@dataclasses.dataclass(frozen=True)
class TransformerSource:
    """Stored parameters of one transformer."""

    folder: epath.Path  # one checkpoint's, or the directory that holds transformer/
    is_checkpoint: bool

    @classmethod
    def find(cls, path: epath.PathLike) -> "TransformerSource | None":
        """Looks into a workdir, a checkpoint or a diffusers directory; None if it has no transformer."""
        if checkpoint.has_checkpoint(path):
            return cls(checkpoint.find(path), is_checkpoint=True)
        if port.has_weights(path, "transformer"):
            return cls(epath.Path(path), is_checkpoint=False)
        return None

    @classmethod
    def require(cls, path: epath.PathLike) -> "TransformerSource":
        source = cls.find(path)
        if source is None:
            raise UserError(
                f"there are no transformer weights in {path}; give a training workdir, one of its checkpoints, "
                "or a diffusers directory that holds transformer/"
            )
        return source

    def config(self) -> DiTConfig:
        if self.is_checkpoint:
            return DiTConfig.from_json(checkpoint.read_record(self.folder)["model"])
        return port.load_config(self.folder, "transformer")

    def load(self, abstract: nnx.State) -> nnx.State:
        """The parameters, in the dtypes and on the shardings of `abstract`."""
        if self.is_checkpoint:
            return checkpoint.load_params(self.folder, abstract)
        leaves = jax.tree.leaves(abstract)
        shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract) if leaves[0].sharding else None
        dtype = leaves[0].dtype  # all parameters share one
        return port.load_params(self.folder, "transformer", self.config(), dtype=dtype, shardings=shardings)

    def __str__(self):
        return str(self.folder)
