"""What people read or script against: the configs, and the commands in the README and the Makefile."""

import importlib.util
import json
import re
import shlex
import subprocess

import pytest
from ml_collections.config_flags import config_flags

from configs import common, slices
from mask2dit_jax import config as run_config
from mask2dit_jax.curate.demo import DEMO_CAPTIONS
from mask2dit_jax.diffusion.samplers import SamplerConfig
from mask2dit_jax.models.dit import DiTConfig
from mask2dit_jax.story.file import read_story
from mask2dit_jax.training.optimizer import OptimizerConfig
from tests.mains.process import ROOT

STAGES = {"pretrain": ("train", "num_steps"), "sft": ("train", "num_steps"), "sample": ("sample", "prompts")}


def load_config(name: str):
    """As --config=NAME does, locked."""
    return config_flags.ConfigFileFlagParser("config").parse(str(ROOT / name))


@pytest.mark.parametrize("preset", common.PRESETS)
@pytest.mark.parametrize("stage", STAGES)
def test_configs(stage, preset):
    config = load_config(f"configs/{stage}.py:{preset}")
    assert config.is_locked
    main, own_field = STAGES[stage]
    run_config.check_values(config, main, own_field)
    assert {"seed", "num_scenes", "mask"} <= set(config)
    if main == "sample":
        SamplerConfig(**config.sampler.to_dict())
        return
    assert {"num_steps", "checkpoint_every", "global_batch_size", "condition_probability"} <= set(config)
    assert config.data.kind == stage
    assert config.condition_probability == {"pretrain": 0, "sft": 0.5}[stage]
    OptimizerConfig(**config.optimizer.to_dict())
    sizes = DiTConfig(**config.model.to_dict())
    assert preset in common.SMALL or sizes == {"2b": DiTConfig.cogvideox_2b, "5b": DiTConfig.cogvideox_5b}[preset]()


@pytest.mark.parametrize(
    ("stage", "name", "size"),
    [*(("sft", *key) for key in slices.TRAINING), *(("sample", *key) for key in slices.SAMPLING)],
)
def test_settings_of_slices(stage, name, size):
    config, plain = load_config(f"configs/{stage}.py:{size},{name}"), load_config(f"configs/{stage}.py:{size}")
    wanted = {"sft": slices.TRAINING, "sample": slices.SAMPLING}[stage][name, size]
    assert {field for field in plain if config[field] != plain[field]} == set(wanted)
    assert name in slices.SLICES


def test_the_recipe_of_the_paper():
    config = load_config("configs/sft.py:5b")
    optimizer = OptimizerConfig()
    assert OptimizerConfig(**config.optimizer.to_dict()) == optimizer
    assert (optimizer.learning_rate, optimizer.weight_decay, optimizer.clip_norm) == (1e-5, 3e-2, 0.05)
    assert (config.num_scenes, config.num_frames, config.height, config.width) == (3, 49, 480, 720)
    assert (config.num_steps, config.global_batch_size) == (10_000, 8)


def test_the_story_of_the_demo_is_its_captions():
    captions = json.loads(DEMO_CAPTIONS.read_text())["bikes"]
    assert tuple(captions[str(number)] for number in range(1, 6)) == common.TINY_STORY


def lines_of(page: str) -> list[str]:
    """Of its shell blocks; a line that goes on is one."""
    blocks = re.findall(r"```bash\n(.*?)```", (ROOT / page).read_text(), flags=re.DOTALL)
    return "\n".join(blocks).replace("\\\n", " ").splitlines()


def in_pages(*pages: str) -> list[str]:
    return [line for page in pages for line in lines_of(page) if line.startswith("python -m mask2dit_jax.")]


PAGES = ("README.md", *(str(path.relative_to(ROOT)) for path in sorted((ROOT / "docs").glob("*.md"))))


def for_workers() -> list[str]:
    """What launch/README.md runs on a slice, as the workers run it."""
    script = re.compile(r"(?:SPOT=1 )?launch/(?:run|watch)\.sh ")
    lines = [line for line in lines_of("launch/README.md") if script.match(line)]
    return [script.sub("python -m mask2dit_jax.", line) for line in lines]


def dry_run(target: str) -> str:
    return subprocess.run(
        ["make", "--dry-run", "--always-make", target], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout


def in_makefile() -> list[str]:
    lines = [line for target in ("demo", "desk") for line in dry_run(target).splitlines()]
    return [line.partition("bin/")[2] for line in lines if "-m mask2dit_jax." in line]


@pytest.mark.parametrize("command", [*in_pages(*PAGES), *for_workers(), *in_makefile()])
def test_commands(command):
    """The program, its flags, the config and the fields set in it are all there."""
    _, _, module, *flags = shlex.split(command, comments=True)
    source = importlib.util.find_spec(module).loader.get_source(module)
    config = None
    for flag in flags:
        name, _, value = flag.removeprefix("--").partition("=")
        section, *fields = name.split(".")
        assert re.search(rf'DEFINE_\w+\(\s*"{section}"', source), flag
        if name == "config":
            config = load_config(value)
        holder = config
        for field in fields:
            assert field in holder, flag
            holder = holder[field]


def test_training_on_a_slice_is_given_all_it_needs():
    commands = [command for command in for_workers() if "mask2dit_jax.train " in command]
    assert len(commands) == 2
    for command in commands:
        assert "--config.pretrained=weights/" in command
        assert "--config.data.path=gs://" in command
        assert "--workdir=gs://" in command


def test_what_is_not_tiny_is_given_weights():
    """No preset of the full size has weights of its own, and `train` no data."""
    commands = [line for line in in_pages(*PAGES) if re.search(r"mask2dit_jax\.(train|sample) .*:(2b|5b)", line)]
    assert len(commands) >= 5
    for command in commands:
        assert "--config.pretrained=" in command, command
        assert "mask2dit_jax.train " not in command or "--config.data.path=" in command, command


def stories() -> list[str]:
    readme = re.findall(r"```yaml\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)
    return [*readme, *(path.read_text() for path in sorted((ROOT / "examples").glob("*.yaml")))]


@pytest.mark.parametrize("text", stories())
def test_stories(text, tmp_path):
    """Every scene of a documented story names an actor, and says what it looks like."""
    (tmp_path / "story.yaml").write_text(text)
    story = read_story(tmp_path / "story.yaml")
    assert len(story.scenes) >= 3
    for scene in story.scenes:
        assert "Actor1 (a young fox, red fur, a torn left ear)" in scene.prompt
        assert scene.prompt.startswith("Hand-painted film")


def test_the_readme_shows_the_programs():
    modules = {shlex.split(command)[2] for command in in_pages("README.md")}
    mains = ("build_data", "train", "train_compile", "sample", "evaluate", "port_weights")
    assert modules == {f"mask2dit_jax.{main}" for main in mains}


@pytest.mark.parametrize(
    ("target", "does"),
    [
        ("setup", ["-m venv .venv", '--constraint constraints.txt --editable ".[demo,test]"']),
        ("demo", ["train --config=configs/sft.py:tiny", "sample --config=configs/sample.py:tiny --output=demo"]),
        ("desk", ["experiments/desk --finding=table2 --output=desk"]),
        ("test", ["-m pytest"]),
        ("quick", ["-m pytest", '-m "not slow"']),
        ("lint", ["ruff check", "ruff format --check", "lint-imports"]),
    ],
)
def test_make(target, does):
    assert all(part in dry_run(target) for part in does)
