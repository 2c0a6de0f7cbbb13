"""What the command lines of these tests share: four short videos, their data files, a model trained for two steps."""

import dataclasses
import fcntl
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLCogVideoX, CogVideoXTransformer3DModel
from transformers import T5Config, T5EncoderModel

from mask2dit_jax.data.sources import Clip, Group, write_pretrain_csv, write_sft_json
from mask2dit_jax.io.paths import ASSETS
from mask2dit_jax.media.video_writer import write_video
from tests.mains import process
from tests.xla_flags import XLA_FLAGS

COLOURS = {"red": (200, 40, 40), "green": (40, 160, 40), "blue": (40, 40, 200), "grey": (120, 120, 120)}
PROMPTS = tuple(f"a {colour} picture" for colour in COLOURS)
FRAMES, HEIGHT, WIDTH, FPS = 20, 32, 48, 8


def settings(**fields: object) -> tuple[str, ...]:
    """Flags that set fields of the config; "__" stands for the dot of a nested one."""
    return tuple(f"--config.{name.replace('__', '.')}={value}" for name, value in fields.items())


# As small as the VAE allows.
SMALL = settings(height=HEIGHT, width=WIDTH, num_frames=5)
SMALL_RUN = SMALL + settings(
    attention="dense",
    model__num_heads=2,
    model__head_dim=16,
    model__num_layers=2,
    model__time_embed_dim=16,
    data__clip_variants=2,
    data__max_stride=2,
    global_batch_size=2,
    num_steps=2,
    log_every=1,
    optimizer__learning_rate=1e-3,
)


@dataclasses.dataclass(frozen=True)
class Commands:
    """Runs the mains as a user does; they share compiled programs and encoded clips."""

    shared: Path
    compiled: Path
    failing: process.Shared

    def __call__(self, main: str, *arguments: object, **environment: str) -> process.Finished:
        """Run a main in a process of its own."""
        return process.run(self.shared, main, tuple(map(str, arguments)), environment)

    def succeed(self, main: str, *arguments: object) -> process.Finished:
        """Run a main in a process of its own, to exit code 0."""
        finished = self(main, *arguments)
        assert finished.code == 0, finished.stderr
        return finished

    def fail(self, main: str, *arguments: object) -> str:
        """Return the one line that tells a user what is wrong; nothing of Python shows.

        All command lines that fail share a process.
        """
        return error_line(self.failing.run(main, tuple(map(str, arguments))))

    def fail_alone(self, main: str, *arguments: object, **environment: str) -> str:
        """As `fail`, in a process of its own."""
        return error_line(self(main, *arguments, **environment))

    def train_flags(self, stage: str, workdir: Path, data: Path, *more: str, **fields: object) -> tuple[object, ...]:
        return (
            *(f"--config=configs/{stage}.py:tiny", f"--workdir={workdir}", *SMALL_RUN),
            *settings(**{"data__path": data, "data__cache": self.shared / "cache", "init_from": "", **fields}),
            *more,
        )


def error_line(finished: process.Finished) -> str:
    """Return the last line of stderr, after checking that it alone reports an error, with exit code 1."""
    assert finished.code == 1, (finished.code, finished.stderr)
    assert "Traceback" not in finished.stderr + finished.stdout
    *before, line = finished.stderr.removesuffix("\n").split("\n")
    assert line.startswith("error: "), finished.stderr
    assert not [other for other in before if "error" in other.lower()], finished.stderr
    return line


@pytest.fixture(scope="session")
def commands(tmp_path_factory) -> Iterator[Commands]:
    shared, compiled = tmp_path_factory.mktemp("shared"), of_all_workers(tmp_path_factory) / "compiled"
    with pytest.MonkeyPatch.context() as environment:
        set_environment(environment, shared, compiled)
    failing = process.Shared(tmp_path_factory.mktemp("failing"))
    yield Commands(shared, compiled, failing)
    failing.close()


def of_all_workers(tmp_path_factory) -> Path:
    """Return the temporary folder that the test processes of this session have in common."""
    base = tmp_path_factory.getbasetemp()
    return base.parent if "PYTEST_XDIST_WORKER" in os.environ else base


def made_once(folder: Path, make: Callable[[Path], None]) -> Path:
    """Return `folder`, which the first test process that asks for it makes while the others wait."""
    with folder.with_suffix(".lock").open("a+") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        lock.seek(0)
        if not lock.read():
            shutil.rmtree(folder, ignore_errors=True)
            make(folder)
            lock.write("made")
    return folder


def set_environment(environment: pytest.MonkeyPatch, shared: Path, compiled: Path) -> None:
    """Starts the server that all mains are forked from, with compiled programs in `compiled`."""
    environment.setenv("JAX_PLATFORMS", "cpu")
    environment.setenv("JAX_COMPILATION_CACHE_DIR", str(compiled))
    environment.setenv("XDG_CACHE_HOME", str(shared / "user"))
    environment.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    environment.setenv("XLA_FLAGS", XLA_FLAGS)
    process.start_server()


def moving_square(colour: tuple[int, int, int], count: int = FRAMES) -> np.ndarray:
    frames = np.full((count, HEIGHT, WIDTH, 3), colour, np.uint8)
    for number, frame in enumerate(frames):
        frame[8:24, number : number + 16] = 255
    return frames


@dataclasses.dataclass(frozen=True)
class Dataset:
    """Data files in `folder`; all clips are one group."""

    folder: Path
    clips: tuple[Clip, ...]

    @property
    def csv(self) -> Path:
        return self.folder / "pretrain.csv"

    @property
    def json(self) -> Path:
        return self.folder / "sft.json"

    @classmethod
    def write(cls, folder: Path, clips: list[Clip]) -> "Dataset":
        dataset = cls(folder, tuple(clips))
        write_pretrain_csv(dataset.csv, clips)
        write_sft_json(dataset.json, [Group("colours", dataset.clips)])
        return dataset


def make_clip(folder: Path, name: str, caption: str, colour=(90, 90, 90), count: int = FRAMES) -> Clip:
    path = folder / f"{name}.mp4"
    write_video(path, moving_square(colour, count), FPS)
    return Clip(path.name, path, caption, count, float(FPS), WIDTH, HEIGHT)


@pytest.fixture(scope="session")
def dataset(tmp_path_factory) -> Dataset:
    return make_dataset(tmp_path_factory.mktemp("data"))


def make_dataset(folder: Path) -> Dataset:
    folder.mkdir(exist_ok=True)
    named = zip(COLOURS.items(), PROMPTS, strict=True)
    return Dataset.write(folder, [make_clip(folder, name, prompt, colour) for (name, colour), prompt in named])


@pytest.fixture(scope="session")
def pretrain_workdir(commands, dataset, tmp_path_factory) -> Path:
    """The workdir of two pretraining steps."""

    def train(workdir: Path) -> None:
        commands.succeed("train", *commands.train_flags("pretrain", workdir, dataset.csv))

    return made_once(of_all_workers(tmp_path_factory) / "pretrain", train)


TINY = ASSETS / "tiny"


@pytest.fixture(scope="session")
def diffusers_directory(tmp_path_factory) -> Path:
    """Random weights of sizes that no preset has, written by diffusers and transformers themselves, in shards."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("diffusers") / "model"
    transformer = CogVideoXTransformer3DModel(
        num_attention_heads=3, attention_head_dim=16, in_channels=8, out_channels=8, num_layers=2, time_embed_dim=24,
        text_embed_dim=20, max_text_seq_length=12, sample_height=4, sample_width=6, sample_frames=5,
        use_rotary_positional_embeddings=True,
    )  # fmt: skip
    vae = AutoencoderKLCogVideoX(
        block_out_channels=(8, 8, 16, 16), norm_num_groups=4, latent_channels=8, layers_per_block=1,
        sample_height=HEIGHT, sample_width=WIDTH, scaling_factor=0.9,
    )  # fmt: skip
    text_encoder = T5EncoderModel(
        T5Config(vocab_size=640, d_model=20, d_ff=24, d_kv=6, num_heads=2, num_layers=2, feed_forward_proj="gated-gelu")
    )
    with torch.no_grad():
        for parameter in transformer.parameters():
            parameter.normal_(0, 0.2)
    transformer.save_pretrained(folder / "transformer", max_shard_size="60KB")
    vae.save_pretrained(folder / "vae", max_shard_size="200KB")
    text_encoder.save_pretrained(folder / "text_encoder", max_shard_size="30KB")
    for name in ("tokenizer", "scheduler"):
        shutil.copytree(TINY / name, folder / name)
    return folder
