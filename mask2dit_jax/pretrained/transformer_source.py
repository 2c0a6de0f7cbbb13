"""Where a transformer is stored: in one of our checkpoints, or in the transformer folder of a diffusers directory."""

import dataclasses
import hashlib
import json

import jax
from etils import epath
from flax import nnx
from jax.sharding import NamedSharding, SingleDeviceSharding

from mask2dit_jax.errors import UserError
from mask2dit_jax.models import lora
from mask2dit_jax.models.backbone import TransformerConfig
from mask2dit_jax.models.port_rules import flatten
from mask2dit_jax.models.registry import backbone_of, read_transformer_config
from mask2dit_jax.parallel import sharding
from mask2dit_jax.pretrained import directory as port
from mask2dit_jax.pretrained import stored_checkpoint

WEIGHTS = ("auto", "ema", "params")


@dataclasses.dataclass(frozen=True)
class TransformerSource:
    """Stored parameters of one transformer. Adapters of a LoRA run are merged into the weights they adapt.

    Attributes:
        folder: of one checkpoint, or the directory that holds transformer/.
        is_checkpoint: whether it is a checkpoint.
        is_ema: whether these are the moving average of the parameters.
    """

    folder: epath.Path
    is_checkpoint: bool
    is_ema: bool = False

    @classmethod
    def find(cls, path: epath.PathLike, weights: str = "auto") -> "TransformerSource | None":
        """Look for a transformer; None if there is none.

        Args:
            path: a workdir, a checkpoint or a diffusers directory.
            weights: "ema", "params", or "auto", the moving average where there is one.

        Raises:
            UserError: the average is asked for, and the checkpoint has none.
        """
        if stored_checkpoint.has_checkpoint(path):
            folder = stored_checkpoint.find(path)
            has_ema = (folder / "ema").exists()
            if weights == "ema" and not has_ema:
                raise UserError(
                    f"checkpoint {folder} holds no moving average; train with --config.ema_decay, or use weights=params"
                )
            return cls(folder, is_checkpoint=True, is_ema=has_ema and weights != "params")
        if port.has_weights(path, "transformer"):
            return cls(epath.Path(path), is_checkpoint=False)
        return None

    @classmethod
    def require(cls, path: epath.PathLike, weights: str = "auto") -> "TransformerSource":
        """Look for a transformer as `find` does. Raises UserError if there is none."""
        source = cls.find(path, weights)
        if source is None:
            raise UserError(
                f"there are no transformer weights in {path}; give a training workdir, one of its checkpoints, "
                "or a diffusers directory that holds transformer/"
            )
        return source

    def config(self) -> TransformerConfig:
        """Read the config; its class is the backbone's that the stored `_class_name` means."""
        if self.is_checkpoint:
            return read_transformer_config(stored_checkpoint.read_record(self.folder)["model"])
        return port.load_config(self.folder, "transformer")

    def fingerprint(self) -> str:
        """Return a hash that tells these weights from others: of the content of all files that are read.

        Of a checkpoint's record, only the model's config and its adapters count. The rest does not change the weights.
        """
        if not self.is_checkpoint:
            return port.fingerprint(self.folder, ("transformer",))
        record = stored_checkpoint.read_record(self.folder)
        items = ("params", "ema")[: 1 + self.is_ema]
        files = [file for item in items for file in port.stored_files(self.folder / item)]
        read = json.dumps([record["model"], record.get("lora"), port.hash_files(self.folder, files)], sort_keys=True)
        return hashlib.sha256(read.encode()).hexdigest()[:16]

    def load(self, abstract: nnx.State) -> nnx.State:
        """Load the parameters with the dtypes and shardings of `abstract`."""
        if self.is_checkpoint:
            return self._load_checkpoint(abstract)
        placed = jax.tree.leaves(abstract)[0].sharding is not None
        shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract) if placed else None
        dtypes = {path: leaf.dtype for path, leaf in flatten(abstract).items()}  # frozen parameters may have another
        return port.load_component(self.folder, "transformer", self.config(), dtype=dtypes, shardings=shardings)

    def stored(self) -> nnx.State:
        """Load the parameters with their stored dtypes onto the first device, whatever mesh wrote them."""
        if not self.is_checkpoint:
            return port.load_component(self.folder, "transformer", self.config())
        abstract = nnx.state(port.COMPONENTS["transformer"].module(self.config()))
        place = SingleDeviceSharding(jax.local_devices()[0])
        abstract = sharding.placed(abstract, jax.tree.map(lambda _: place, abstract))
        dtypes = flatten(stored_checkpoint.stored_shapes(self.folder, self._with_adapters(abstract)))
        return self.load(_mapped(abstract, lambda name, leaf: leaf.update(dtype=dtypes[name].dtype)))

    def _load_checkpoint(self, abstract: nnx.State) -> nnx.State:
        abstract, averaged = self._with_adapters(abstract), set()
        if self.is_ema:
            averaged = stored_checkpoint.stored_names(self.folder, "ema")
        trained, others = nnx.split_state(abstract, lambda path, _: ".".join(path) in averaged, ...)
        if not averaged:
            params = stored_checkpoint.load_params(self.folder, abstract)
        elif not jax.tree.leaves(others):
            params = stored_checkpoint.load_params(self.folder, trained, "ema")
        else:  # parameters that did not train have no average
            params = stored_checkpoint.load_params(self.folder, abstract)
            params = nnx.merge_state(params, stored_checkpoint.load_params(self.folder, trained, "ema"))
        adapters = self._adapters()
        return lora.merge(params, adapters) if adapters else params

    def _adapters(self) -> lora.LoRAConfig | None:
        fields = stored_checkpoint.read_record(self.folder).get("lora")
        return lora.LoRAConfig(**fields) if fields else None

    def _with_adapters(self, abstract: nnx.State) -> nnx.State:
        """Return `abstract`, of the plain model, with the adapters that the checkpoint holds beside it."""
        adapted = self._adapters()
        if adapted is None:
            return abstract
        config = dataclasses.replace(self.config(), lora=adapted)
        backbone = backbone_of(config)
        adapters = lora.adapters_of(nnx.state(backbone.memoryless(config)))
        place = jax.tree.leaves(abstract)[0].sharding
        if isinstance(place, NamedSharding):
            shardings = sharding.parameter_shardings(adapters, place.mesh, backbone.sharding_table)
            adapters = sharding.placed(adapters, shardings)
        elif place is not None:
            adapters = sharding.placed(adapters, jax.tree.map(lambda _: place, adapters))
        return nnx.merge_state(abstract, adapters)

    def __str__(self):
        """Name the folder, and say whether it is the moving average."""
        return f"{self.folder}{' (moving average)' if self.is_ema else ''}"


def _mapped(state: nnx.State, change) -> nnx.State:
    return jax.tree_util.tree_map_with_path(lambda path, leaf: change(sharding.name_of(path), leaf), state)
