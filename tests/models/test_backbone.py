"""Another backbone is one file and one line: the package ports, trains and samples the one that is defined here."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from einops import rearrange
from flax import nnx
from safetensors.numpy import load_file

from mask2dit_jax.config import LoRAConfig, OptimizerConfig, SampleConfig, SamplerConfig, TrainConfig
from mask2dit_jax.diffusion.schedule import NoiseSchedule, ScheduleConfig
from mask2dit_jax.errors import UserError
from mask2dit_jax.layout import SceneLayout
from mask2dit_jax.models import registry
from mask2dit_jax.models.backbone import Backbone, TransformerConfig
from mask2dit_jax.models.cogvideox import COGVIDEOX
from mask2dit_jax.models.port_rules import LINEAR, Rule, flatten
from mask2dit_jax.models.t5 import T5Config
from mask2dit_jax.models.vae import VAEConfig
from mask2dit_jax.parallel.mesh import TENSOR, WEIGHTS, make_mesh
from mask2dit_jax.parallel.sharding import P
from mask2dit_jax.pretrained import stored_checkpoint
from mask2dit_jax.pretrained.directory import save_diffusers
from mask2dit_jax.pretrained.pretrained import Pretrained
from mask2dit_jax.pretrained.transformer_source import TransformerSource
from mask2dit_jax.sampling.engine import StoryEngine
from mask2dit_jax.story.story import Scene, Story
from mask2dit_jax.training import setup
from mask2dit_jax.training.program import TrainProgram, global_batch
from mask2dit_jax.training.step import Objective

# What the file of another backbone would hold.


@dataclasses.dataclass(frozen=True)
class MixerConfig:
    """Tokens of one scene see each other's mean, and no token sees another scene."""

    width: int = 16
    latent_channels: int = 16
    patch_size: int = 2
    text_embed_dim: int = 64
    text_tokens: int = 6
    sample_frames: int = 49
    num_heads: int = 1
    head_dim: int = 16
    sample_frames: int = 5
    mask: str = "v2"
    attention: str = "auto"
    remat: str = "none"
    lora: LoRAConfig | None = None

    @property
    def activation_width(self):
        return 2 * self.width

    def layout(self, frames, height, width):
        return SceneLayout(tuple(frames), (height // self.patch_size, width // self.patch_size), self.text_tokens)

    def check_positions(self, layout):
        pass

    @classmethod
    def from_json(cls, raw):
        return cls(width=raw["width"])

    def to_json(self):
        return {"_class_name": "Mixer3DModel", "width": self.width}


class Mixer(nnx.Module):
    def __init__(self, config, *, rngs, dtype=jnp.float32, param_dtype=jnp.float32):
        kwargs = {"rngs": rngs, "dtype": dtype, "param_dtype": param_dtype}
        self.config = config
        patch_dim = config.patch_size**2 * config.latent_channels
        self.patch, self.text = (nnx.Linear(x, config.width, **kwargs) for x in (patch_dim, config.text_embed_dim))
        self.out = nnx.Linear(config.width, patch_dim, **kwargs)

    def __call__(self, latents, text, timesteps, *, layout):
        p = self.config.patch_size
        x = self.patch(rearrange(latents, "b f (h p) (w q) c -> b f h w (p q c)", p=p, q=p))
        scene = self.text(text.mean(axis=2)) + timesteps[..., None] / 1000
        means = jnp.stack([x[:, part].mean(axis=(1, 2, 3)) for part in layout.frame_slices], axis=1)
        x = jax.nn.silu(x + (scene + means)[:, layout.frame_scenes, None, None])
        return rearrange(self.out(x), "b f h w (p q c) -> b f (h p) (w q) c", p=p, q=p)


def port_table(config):
    return tuple(
        rule
        for name in ("patch", "text", "out")
        for rule in (Rule(f"{name}_proj.weight", f"{name}.kernel", LINEAR), Rule(f"{name}_proj.bias", f"{name}.bias"))
    )


MIXER = Backbone(
    class_names=("Mixer3DModel",),
    module=Mixer,
    config=MixerConfig,
    port_table=port_table,
    sharding_table=((r".*\.kernel", P(WEIGHTS, TENSOR)), (r".*\.bias", P())),
    sizes={"small": MixerConfig},
    matmul_flops=lambda config, layout: 4 * layout.num_frames * layout.tokens_per_frame * 64 * config.width,
    attention_flops=lambda config, layout: 0,
)

# What the rest of the package does with it.

CONFIG = MixerConfig()
LAYOUT = CONFIG.layout((1, 2, 1), 4, 4)
SCHEDULE = NoiseSchedule(ScheduleConfig.cogvideox_5b())


@pytest.fixture(autouse=True)
def _registered(monkeypatch):
    """Add the one line, for as long as a test runs."""
    monkeypatch.setitem(registry.BACKBONES, "Mixer3DModel", MIXER)


@pytest.fixture(scope="module")
def params():
    return nnx.state(Mixer(CONFIG, rngs=nnx.Rngs(0)))


def mesh_of(**sizes):
    return make_mesh(sizes, jax.devices()[: np.prod(list(sizes.values()))])


def assert_same(ours, theirs):
    assert flatten(ours).keys() == flatten(theirs).keys()
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)


def test_its_config_is_one_of_a_transformer():
    assert isinstance(CONFIG, TransformerConfig)
    assert registry.backbone_of(CONFIG) is MIXER


def test_it_is_ported_both_ways(params, tmp_path):
    save_diffusers(tmp_path, "transformer", CONFIG, params)
    tensors = load_file(tmp_path / "transformer" / "diffusion_pytorch_model.safetensors")
    assert tensors["patch_proj.weight"].shape == (CONFIG.width, 64)
    assert json.loads((tmp_path / "transformer" / "config.json").read_text())["_class_name"] == "Mixer3DModel"
    source = TransformerSource.require(tmp_path)
    assert source.config() == CONFIG
    assert_same(source.stored(), params)


def test_it_is_read_from_a_checkpoint(params, tmp_path):
    stored_checkpoint.save_params(tmp_path, params, {"model": CONFIG.to_json(), "pretrained": "tiny"})
    source = TransformerSource.require(tmp_path)
    assert source.config() == CONFIG
    assert_same(source.stored(), params)


def test_it_trains_a_step_on_a_mesh_as_a_config_says(params, tmp_path):
    config = TrainConfig(
        num_scenes=3,
        num_frames=5,
        height=32,
        width=32,
        global_batch_size=2,
        compute_dtype="float32",
        optimizer=OptimizerConfig(warmup_steps=0, learning_rate=1e-2),
    )
    save_diffusers(tmp_path, "transformer", CONFIG, params)
    source, vae = TransformerSource.require(tmp_path), VAEConfig.cogvideox_5b()
    model = setup.stored_model(source, setup.model_from_scratch(config, vae, T5Config.tiny()), config)
    assert type(model) is MixerConfig
    program = setup.train_program(config, mesh_of(fsdp=2, context=1, tensor=2), model, vae, SCHEDULE.config)
    assert program.flops == 2 * 3 * MIXER.matmul_flops(CONFIG, program.objective.layout)
    rng = np.random.default_rng(0)
    batch = {name: rng.standard_normal(x.shape, np.float32) for name, x in program.abstract_batch.items()}
    with jax.set_mesh(program.mesh):
        state = program.start(source.load(program.abstract_params))
        assert state.params["patch"]["kernel"].sharding.spec == P(("fsdp", "context"), "tensor")
        state, metrics = program.step(state, global_batch(batch, program.abstract_batch, [0, 1]))
    assert np.isfinite(metrics["loss"])
    assert metrics["is_updated"]
    changed = jax.tree.map(lambda ours, theirs: bool((np.asarray(ours) != theirs).any()), state.params, params)
    assert all(jax.tree.leaves(changed))


def test_it_samples_a_story(params, tmp_path):
    stored_checkpoint.save_params(tmp_path, params, {"model": CONFIG.to_json(), "pretrained": "tiny"})
    config = SampleConfig(
        num_scenes=2,
        num_frames=5,
        height=32,
        width=32,
        compute_dtype="float32",
        sampler=SamplerConfig(num_steps=2),
    )
    engine = StoryEngine(Pretrained.open(tmp_path), config)
    assert type(engine.model) is MixerConfig
    story = Story("story", "Three scenes", tuple(Scene(prompt) for prompt in ("a fox", "a bear", "a hare")))
    plan = engine.plan(story)
    assert "for transformer" in engine.describe(plan)
    scenes = list(engine.generate(plan))
    assert [scene.number for scene in scenes] == [0, 1, 2]
    assert all(scene.latents.shape == (2, 8, 8, 16) and np.isfinite(scene.latents).all() for scene in scenes)


def test_adapters_that_it_does_not_have_are_refused():
    model = dataclasses.replace(CONFIG, lora=LoRAConfig(2, 2.0))
    objective = Objective(SCHEDULE, LAYOUT, 1.0)
    with pytest.raises(UserError, match=r"Mixer3DModel has no LoRA adapters; set --config\.lora\.rank=0"):
        TrainProgram(mesh_of(fsdp=1), model, objective, OptimizerConfig(), 1)


def test_another_prediction_type_is_refused():
    with pytest.raises(ValueError, match=r"predicts 'epsilon'.*take 'v_prediction'; convert it"):
        dataclasses.replace(MIXER, prediction_type="epsilon")


@pytest.mark.parametrize(("read", "known"), [
    (registry.read_transformer_config, "CogVideoXTransformer3DModel"),
    (registry.read_codec_config, "AutoencoderKLCogVideoX, SpaceToDepth"),
])  # fmt: skip
def test_an_unknown_class_is_named(read, known):
    with pytest.raises(UserError, match=rf"_class_name 'Other' is not supported; use weights of one of {known}"):
        read({"_class_name": "Other"})


@pytest.mark.parametrize("name", COGVIDEOX.class_names)
def test_cogvideox_is_known_by_the_names_of_diffusers_and_of_the_authors_code(name):
    raw = COGVIDEOX.sizes["5b"]().to_json() | {"_class_name": name}
    assert registry.read_transformer_config(raw) == COGVIDEOX.sizes["5b"]()
