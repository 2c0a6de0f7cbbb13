"""What people read or script against: the configs, and the commands in the README and the Makefile."""

import dataclasses
import importlib.util
import json
import re
import shlex
import subprocess

import pytest
from ml_collections.config_flags import config_flags

from configs import common, slices, tiny
from mask2dit_jax.config import KINDS, TrainConfig, changes, read_config
from mask2dit_jax.curate.demo import DEMO_CAPTIONS
from mask2dit_jax.models.dit import DiTConfig
from mask2dit_jax.story.file import read_story
from tests.mains.process import ROOT

STAGES = tuple(KINDS)


def load_config(name: str):
    """As --config=NAME does, locked."""
    return config_flags.ConfigFileFlagParser("config").parse(str(ROOT / name))


@pytest.mark.parametrize("preset", common.PRESETS)
@pytest.mark.parametrize("stage", STAGES)
def test_configs(stage, preset):
    raw = load_config(f"configs/{stage}.py:{preset}")
    assert raw.is_locked
    config = read_config(raw, KINDS[stage], "a main")
    assert config.kind == stage
    if stage == "sample":
        return
    assert config.data.kind == {"pretrain": "csv", "sft": "json"}[stage]
    assert config.condition_probability == {"pretrain": 0, "sft": 0.5}[stage]
    sizes = DiTConfig(**dataclasses.asdict(config.model))
    named = {"2b": DiTConfig.cogvideox_2b, "5b": DiTConfig.cogvideox_5b}
    assert preset not in named or sizes == named[preset]()


@pytest.mark.parametrize(
    ("stage", "name", "size"),
    [*(("sft", *key) for key in slices.TRAINING), *(("sample", *key) for key in slices.SAMPLING)],
)
def test_settings_of_slices(stage, name, size):
    config, plain = load_config(f"configs/{stage}.py:{size},{name}"), load_config(f"configs/{stage}.py:{size}")
    wanted = {"sft": slices.TRAINING, "sample": slices.SAMPLING}[stage][name, size]
    kind = KINDS[stage]
    changed = changes(plain.to_dict(), read_config(config, kind, "a main"))
    assert {change.partition(" ")[0] for change in changed} == set(wanted)
    assert name in slices.SLICES


def test_the_recipe_of_the_paper():
    config = read_config(load_config("configs/sft.py:5b"), TrainConfig, "train")
    optimizer = config.optimizer
    assert (optimizer.learning_rate, optimizer.weight_decay, optimizer.clip_norm) == (1e-5, 3e-2, 0.05)
    assert (config.num_scenes, config.num_frames, config.height, config.width) == (3, 49, 480, 720)
    assert (config.num_steps, config.global_batch_size) == (10_000, 8)


def test_the_story_of_the_demo_is_its_captions():
    captions = json.loads(DEMO_CAPTIONS.read_text())["bikes"]
    assert tuple(captions[str(number)] for number in range(1, 6)) == tiny.STORY


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
    """No config of the full size has weights of its own, and `train` no data."""
    full_size = re.compile(r"mask2dit_jax\.(train|sample) (?!.*:(tiny|desk)\b)")
    commands = [line for line in in_pages(*PAGES) if full_size.search(line)]
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
