"""A training run as XLA sees it: one step, its inputs, and where everything lies on the mesh.

`train` runs the step on the devices at hand. `train_compile` compiles the same step for devices that are elsewhere.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.typing import DTypeLike

from mask2dit_jax.axes import Array
from mask2dit_jax.errors import UserError
from mask2dit_jax.layout import SceneLayout
from mask2dit_jax.models import lora
from mask2dit_jax.models.backbone import Backbone, TransformerConfig
from mask2dit_jax.models.registry import backbone_of
from mask2dit_jax.parallel import sharding
from mask2dit_jax.parallel.abstract import count_in_words
from mask2dit_jax.parallel.mesh import check_batch, check_tokens, describe_mesh
from mask2dit_jax.training import trainable
from mask2dit_jax.training.optimizer import OptimizerConfig, make_optimizer
from mask2dit_jax.training.step import Objective, TrainState, UpdateConfig, init_state, make_train_step
from mask2dit_jax.training.validation import make_validation

AbstractBatch = dict[str, jax.ShapeDtypeStruct]


@dataclasses.dataclass(frozen=True)
class TrainProgram:
    """What is trained, how, and on which mesh.

    Attributes:
        mesh: the devices.
        model: config of the transformer.
        objective: the loss and the layout of a sample.
        optimizer: settings of AdamW.
        global_batch_size: samples of a step, over all devices.
        seed: of parameters that start from scratch, and of everything that a step draws.
        dtype: of the computation.
        param_dtype: of trained parameters and of the optimiser's moments.
        frozen_dtype: of parameters that do not train; None means `param_dtype`.
        update: accumulation, moving average, and which parameters train.
        stored_layout: layout of the samples in the data; those of `objective.layout` are cut from them.
    """

    mesh: Mesh
    model: TransformerConfig
    objective: Objective
    optimizer: OptimizerConfig
    global_batch_size: int
    seed: int = 0
    dtype: DTypeLike = jnp.bfloat16
    param_dtype: DTypeLike = jnp.float32
    frozen_dtype: DTypeLike | None = None
    update: UpdateConfig = dataclasses.field(default_factory=UpdateConfig)
    stored_layout: SceneLayout | None = None

    def __post_init__(self):
        """Check that the parts fit together.

        Raises:
            UserError: the batch or the tokens of a sample do not divide over the mesh, a pattern of `update.trainable`
                matches nothing, or the backbone has no adapters for `model.lora`.
        """
        if self.model.lora and not self.backbone.supports_lora:
            raise UserError(f"{self.backbone.class_names[0]} has no LoRA adapters; set --config.lora.rank=0")
        check_batch(self.global_batch_size, self.mesh, self.update.accumulate_steps)
        check_tokens(self.objective.layout.num_tokens, self.mesh)
        trainable.check_patterns(self._split_model[1], self.update.trainable)

    @property
    def backbone(self) -> Backbone:
        """The backbone that trains."""
        return backbone_of(self.model)

    @functools.cached_property
    def _split_model(self) -> tuple[nnx.GraphDef, nnx.State]:
        kwargs = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        return nnx.split(self.backbone.memoryless(self.model, **kwargs))

    @property
    def abstract_params(self) -> nnx.State:
        """Shape, dtype and sharding of every parameter, adapters included."""
        trained, frozen = trainable.split(self._split_model[1], self.update.trainable)
        frozen_dtype = self.frozen_dtype or self.param_dtype
        frozen = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, frozen_dtype), frozen)
        params = trainable.join(trained, frozen)
        return sharding.placed(params, sharding.parameter_shardings(params, self.mesh, self.backbone.sharding_table))

    @functools.cached_property
    def abstract_state(self) -> TrainState:
        """Shape, dtype and sharding of the whole state, which a checkpoint is restored onto."""
        state = jax.eval_shape(self._init_state, self.abstract_params)
        return sharding.placed(state, sharding.parameter_shardings(state, self.mesh, self.backbone.sharding_table))

    @functools.cached_property
    def abstract_batch(self) -> AbstractBatch:
        """Shape, dtype and sharding of a global batch."""
        layout, model = self.objective.layout, self.model
        height, width = (side * model.patch_size for side in layout.grid)
        shapes = dict.fromkeys(("mean", "logvar"), (layout.num_frames, height, width, model.latent_channels))
        shapes["text"] = (layout.num_scenes, layout.text_tokens, model.text_embed_dim)
        place = NamedSharding(self.mesh, sharding.SAMPLES)
        return {
            name: jax.ShapeDtypeStruct((self.global_batch_size, *shape), jnp.float32, sharding=place)
            for name, shape in shapes.items()
        }

    @functools.cached_property
    def step(self):
        """The jitted `train_step(state, batch) -> (state, metrics)`; it donates the state."""
        graph, optimizer = self._split_model[0], make_optimizer(self.optimizer)
        train_step = make_train_step(graph, optimizer, self.objective, self.seed, self.update)
        shardings = jax.tree.map(lambda x: x.sharding, self.abstract_state)
        return jax.jit(train_step, donate_argnums=0, out_shardings=(shardings, sharding.replicated(self.mesh)))

    def lower(self, platform: str) -> jax.stages.Lowered:
        """Lower the step for the devices of the mesh, which may be those of a topology."""
        with jax.set_mesh(self.mesh):
            return self.step.trace(self.abstract_state, self.abstract_batch).lower(lowering_platforms=(platform,))

    @functools.cached_property
    def validate(self):
        """The jitted `validate(params, batch) -> losses` of `training.validation`."""
        run = make_validation(self._split_model[0], self.objective, self.seed)
        return jax.jit(run, out_shardings=sharding.replicated(self.mesh))

    @functools.cached_property
    def flops(self) -> float:
        """FLOPs that a step needs, over all chips."""
        leaves = nnx.to_flat_state(self._split_model[1])
        sizes = {path: leaf.size for path, leaf in leaves if path[-1] == "kernel"}
        trained = sum(size for path, size in sizes.items() if trainable.is_trained(path, self.update.trainable))
        share = trained / sum(sizes.values())
        return self.global_batch_size * self.backbone.training_flops(self.model, self.objective.layout, share)

    def summary(self) -> str:
        """Return the devices, the model and the size of a step, a line each."""
        trained, _ = trainable.split(self.abstract_params, self.update.trainable)
        tokens = self.objective.layout.num_tokens
        return "\n".join(
            (
                f"devices: {describe_mesh(self.mesh)}",
                f"model: {self.backbone.class_names[0]}, {count_in_words(self.abstract_params)} parameters, "
                f"{count_in_words(trained)} trained, mask {self.model.mask}, attention {self.model.attention}",
                f"a step: {self.global_batch_size} samples x {self.objective.layout.num_scenes} scenes, "
                f"{self.global_batch_size} x {tokens:,} = {self.global_batch_size * tokens:,} tokens",
            )
        )

    @property
    def graph(self) -> nnx.GraphDef:
        """The graph of the transformer, to be merged with its parameters."""
        return self._split_model[0]

    def random_params(self) -> nnx.State:
        """Make the parameters of a run from scratch, each on its own devices; they are the same on every mesh."""
        return self._random(lambda params: params)

    def adapted(self, params: nnx.State) -> nnx.State:
        """Return `params` of the plain model together with new adapters, if the model has any."""
        return trainable.join(params, self._random(lora.adapters_of)) if self.model.lora else params

    @property
    def abstract_plain(self) -> nnx.State:
        """Shape, dtype and sharding of every parameter but the adapters, as stored weights have them."""
        return lora.without_adapters(self.abstract_params)

    def _random(self, choose) -> nnx.State:
        abstract = choose(self.abstract_params)

        def init():
            model = self.backbone.module(self.model, rngs=nnx.Rngs(self.seed), param_dtype=self.param_dtype)
            params = choose(nnx.state(model))
            return jax.tree.map(lambda x, wanted: x.astype(wanted.dtype), params, abstract)

        return jax.jit(init, out_shardings=jax.tree.map(lambda x: x.sharding, abstract))()

    def start(self, params: nnx.State) -> TrainState:
        """Return the state of step 0; donates `params`."""
        shardings = jax.tree.map(lambda x: x.sharding, self.abstract_state)
        return jax.jit(self._init_state, out_shardings=shardings, donate_argnums=0)(params)

    def _init_state(self, params: nnx.State) -> TrainState:
        return init_state(params, make_optimizer(self.optimizer), self.update)


def local_rows(abstract: AbstractBatch) -> list[int]:
    """Return the rows of a global batch that this process's devices need; processes along `context` need the same."""
    whole = jax.tree.leaves(abstract)[0]
    indices = whole.sharding.addressable_devices_indices_map(whole.shape).values()
    return sorted({row for index in indices for row in range(whole.shape[0])[index[0]]})


def global_batch(batch: dict[str, np.ndarray], abstract: AbstractBatch, rows: list[int]) -> dict[str, Array]:
    """Make the global arrays of a batch.

    Args:
        batch: the rows that this process has read.
        abstract: shape, dtype and sharding of the global batch.
        rows: their numbers in the global batch, from `local_rows`.
    """

    def place(read, whole):
        def shard(index):
            return read[[rows.index(row) for row in range(whole.shape[0])[index[0]]]]

        return jax.make_array_from_callback(whole.shape, whole.sharding, shard)

    return jax.tree.map(place, batch, abstract)
