"""Training runs: they repeat, they go on where they stopped, one stage starts from the other."""

import re

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from mask2dit_jax.pretrained.stored_checkpoint import find, read_record
from tests.training.test_events import read_events

RATE = 1e-3


def sft(commands, workdir, dataset, init_from, **fields):
    rate = {"optimizer__warmup_steps": 0, "optimizer__learning_rate": RATE, "optimizer__decay_steps": 1000}
    fields = {"checkpoint_every": 2, **rate, **fields}
    flags = commands.train_flags("sft", workdir, dataset.json, init_from=init_from, **fields)
    return commands.succeed("train", *flags).stderr


def read(workdir, step: int) -> dict:
    folder = workdir / "checkpoints" / str(step)
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    with ocp.StandardCheckpointer() as checkpointer:

        def restore(item):
            stored = checkpointer.metadata(folder / item).item_metadata
            target = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), stored)
            return checkpointer.restore(folder / item, target)

        return {item: restore(item) for item in ("params", "ema", "train") if (folder / item).exists()}


def assert_same(a: dict, b: dict):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def differ(a: dict, b: dict) -> bool:
    return any(not np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


def scalars(workdir) -> dict[str, dict[int, float]]:
    found = {}
    for step, value in read_events(workdir):
        found.setdefault(value.tag, {})[step] = value.simple_value
    return found


@pytest.fixture(scope="module")
def straight(commands, dataset, pretrain_workdir, tmp_path_factory):
    """The workdir and the log of four steps of SFT."""
    workdir = tmp_path_factory.mktemp("runs") / "straight"
    return workdir, sft(commands, workdir, dataset, pretrain_workdir, num_steps=4)


def test_sft_starts_from_the_pretraining(straight, pretrain_workdir):
    workdir, log = straight
    assert f"start: parameters of {pretrain_workdir / 'checkpoints' / '2'}" in log
    assert f"done: step 4, checkpoints in {workdir}" in log
    first, later = read(pretrain_workdir, 2)["params"], read(workdir, 2)["params"]
    steps = [np.abs(a - b).max() for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(later), strict=True)]
    assert 0 < max(steps) <= 2.1 * RATE  # two steps of AdamW: each moves a parameter by the learning rate at most


def test_a_run_that_stopped_goes_on_as_if_it_had_not(commands, dataset, pretrain_workdir, straight, tmp_path):
    workdir = tmp_path / "stopped"
    sft(commands, workdir, dataset, pretrain_workdir, num_steps=2)
    assert_same(read(workdir, 2), read(straight[0], 2))
    log = sft(commands, workdir, dataset, "nowhere", num_steps=4)
    assert f"start: resuming step 2 of {workdir / 'checkpoints'}" in log
    assert_same(read(workdir, 4), read(straight[0], 4))
    assert differ(read(workdir, 2), read(workdir, 4))
    log = sft(commands, workdir, dataset, pretrain_workdir, num_steps=4)
    assert "start: resuming step 4" in log


def test_a_run_with_another_batch_size_counts_the_samples_it_saw(commands, dataset, pretrain_workdir, tmp_path):
    workdir = tmp_path / "sizes"
    for num_steps, size in ((2, 2), (3, 4), (4, 1)):
        log = sft(commands, workdir, dataset, pretrain_workdir, num_steps=num_steps, global_batch_size=size)
    assert read_record(find(workdir))["samples_seen"] == 2 * 2 + 4 + 1
    assert "data: going on after 8 samples" in log


def test_a_cosine_that_follows_num_steps_learns_to_the_new_end(commands, dataset, pretrain_workdir, tmp_path):
    """Made longer after its end, a run goes on at the rate of the longer cosine, and the log says so."""
    workdir = tmp_path / "longer"
    for num_steps in (2, 4):
        log = sft(commands, workdir, dataset, pretrain_workdir, num_steps=num_steps, optimizer__decay_steps=0)
    assert "the cosine ends at step 4, not 2: it goes on at 0.0005" in log
    assert differ(read(workdir, 2)["params"], read(workdir, 4)["params"])
    rates = scalars(workdir)["learning_rate"]
    np.testing.assert_allclose([rates[n] for n in (1, 2, 3, 4)], RATE * np.array([0.5, 0, 0.146447, 0]), atol=1e-9)
    log = sft(commands, workdir, dataset, pretrain_workdir, num_steps=3, optimizer__decay_steps=0)
    assert "step 4 is done and num_steps=3: nothing is left to train" in log
    assert "done: step 4" in log


@pytest.mark.slow
def test_another_seed_is_another_run(commands, dataset, pretrain_workdir, straight, tmp_path):
    sft(commands, tmp_path / "other", dataset, pretrain_workdir, num_steps=2, seed=1, log_every=3)
    assert differ(read(tmp_path / "other", 2), read(straight[0], 2))
    assert sorted(scalars(tmp_path / "other")["loss"]) == [2]  # the last window is short, not lost


def test_every_step_is_logged(straight, pretrain_workdir):
    found = scalars(straight[0])
    assert {"loss", "grad_norm", "learning_rate", "steps_per_second"} < found.keys()
    assert found.keys() & {"loss_fixed", "loss_extension"}
    assert sorted(found["loss"]) == [1, 2, 3, 4]
    assert all(0 < loss < 10 for loss in found["loss"].values())
    assert found["learning_rate"][4] == pytest.approx(RATE, rel=1e-3)  # its cosine has hardly begun
    assert "loss_extension" not in scalars(pretrain_workdir)  # no conditional mask there


def test_the_log_begins_with_what_runs_on_what(straight):
    """The config stands in the checkpoint's record and in TensorBoard, not in the log."""
    workdir, log = straight
    assert "learning_rate" not in log
    assert re.search(
        rf"sft-tiny in {workdir}\ndevices: \d x cpu.*\nmodel: CogVideoXTransformer3DModel, [\d.]+ K parameters, "
        r"[\d.]+ K trained, mask v2, attention dense\n"
        r"a step: 2 samples x 3 scenes, 2 x \d+ = \d+ tokens\n",
        log,
    )
    assert "compiling:" in log
    texts = [value.tensor.string_val[0].decode() for _, value in read_events(workdir) if value.tag.startswith("config")]
    assert len(texts) == 1
    assert "learning_rate: 0.001" in texts[0]


def test_the_record_holds_the_model_and_the_config(straight):
    record = read_record(find(straight[0]))
    assert record["pretrained"] == "tiny"
    assert record["config"]["num_steps"] == 4
    assert (record["model"]["num_layers"], record["model"]["attn_msk_version"]) == (2, 2)


def test_only_the_newest_checkpoints_are_kept(straight):
    assert sorted(path.name for path in (straight[0] / "checkpoints").iterdir()) == ["2", "4"]
