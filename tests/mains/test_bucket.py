"""Runs whose workdir, start and output are in a bucket, as on a pod: through gcsfs and tensorstore to a server here."""

import re

import pytest

from tests.gcs_server import serve
from tests.mains.conftest import PROMPTS, SMALL, settings
from tests.mains.process import Finished

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def bucket():
    with serve() as server:
        yield server


@pytest.fixture(scope="module")
def run(commands, bucket):
    def run(main: str, *arguments) -> Finished:
        finished = commands(main, *arguments, **bucket.environment)
        assert finished.code == 0, finished.stderr
        return finished

    return run


@pytest.fixture(scope="module")
def trained(commands, run, dataset):
    """Three steps, the third of them by a second run."""

    def train(stage, workdir, data, **fields):
        return run("train", *commands.train_flags(stage, workdir, data, checkpoint_every=1, **fields)).stderr

    train("pretrain", "gs://bucket/pretrain", dataset.csv, num_steps=2)
    return train, train("pretrain", "gs://bucket/pretrain", dataset.csv, num_steps=3, ema_decay=0.9)


def steps(bucket, workdir: str) -> set[str]:
    folder = f"{workdir}/checkpoints/"
    return {name.removeprefix(folder).partition("/")[0] for name in bucket.objects if name.startswith(folder)}


def test_a_run_goes_on_from_its_checkpoints(bucket, trained):
    assert "gs://bucket/pretrain/checkpoints/2" in trained[1]
    assert steps(bucket, "pretrain") == {"2", "3"}  # the newest two are kept
    assert any(name.startswith("pretrain/events.") for name in bucket.objects)


def test_the_next_stage_starts_there(bucket, trained, dataset):
    train, _ = trained
    log = train("sft", "gs://bucket/sft", dataset.json, init_from="gs://bucket/pretrain", num_steps=1)
    assert "gs://bucket/pretrain/checkpoints/3" in log
    assert steps(bucket, "sft") == {"1"}


def test_a_story_is_made_from_it_and_written_there(run, bucket, trained):
    fields = settings(prompts=PROMPTS, checkpoint="gs://bucket/pretrain", sampler__num_steps=2, attention="dense")
    flags = ["--config=configs/sample.py:tiny", "--output=gs://bucket/story", *SMALL, *fields]
    printed = run("sample", *flags).stdout
    assert "gs://bucket/story/story.mp4" in printed
    made = {name.removeprefix("story/") for name in bucket.objects if name.startswith("story/")}
    assert {"story.mp4", "scene_04.mp4", "latents/scene_04.npz", "index.html", "storyboard.png", "run.json"} <= made
    before = dict(bucket.objects)
    assert "finished already: scenes 1-4" in run("sample", *flags).stderr
    latents = [name for name in made if name.startswith("latents/")]
    assert all(bucket.objects[f"story/{name}"] is before[f"story/{name}"] for name in latents)


def test_weights_are_ported_from_it(run, trained, tmp_path):
    run("port_weights", "--from=gs://bucket/pretrain", f"--to={tmp_path / 'diffusers'}")
    assert list((tmp_path / "diffusers" / "transformer").glob("*.safetensors"))


def test_a_worker_checks_both_ways_into_it(run, bucket):
    flags = ["--bucket=gs://bucket/runs", "--min_memory_gib=0.1", "--min_disk_gib=0.1"]
    assert "gs://bucket/runs is readable and writable" in run("self_check", *flags).stdout
    assert not [name for name in bucket.objects if name.startswith("runs/")]


def test_a_worker_whose_checkpoints_would_not_get_there(commands, bucket, monkeypatch):
    monkeypatch.setattr(bucket, "refused", "tensorstore")
    flags = ["--bucket=gs://bucket/runs", "--min_memory_gib=0.1", "--min_disk_gib=0.1"]
    finished = commands("self_check", *flags, **bucket.environment)
    assert finished.code == 1
    assert re.search("FAILED +bucket .*PERMISSION_DENIED.*This account may not write", finished.stdout)
