"""A run restores what it saved bit for bit, and damage is named."""

import re
import shutil

import jax
import jax.numpy as jnp
import pytest
from gcsfs.retry import HttpError

from mask2dit_jax.errors import UserError
from mask2dit_jax.pretrained import stored_checkpoint
from mask2dit_jax.training import checkpoint, resume
from mask2dit_jax.training.optimizer import OptimizerConfig, make_optimizer
from mask2dit_jax.training.step import UpdateConfig, init_state
from tests.training.saved_run import (
    CONFIG,
    RECORD,
    abstract,
    assert_same,
    cut_data,
    cut_metadata,
    make_state,
    remove_manifest,
    save_run,
)


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    return save_run(tmp_path_factory.mktemp("run"))


@pytest.mark.parametrize(("record", "seen"), [({}, 3 * 4), ({"samples_seen": 20}, 20)])
def test_samples_seen_are_recorded_or_follow_from_the_one_batch_size(tmp_path, record, seen):
    record = RECORD | {"config": {"global_batch_size": 4}} | record
    with checkpoint.open_manager(tmp_path, keep=1) as manager:
        assert resume.samples_seen(manager, 0) == 0
        checkpoint.save(manager, make_state(3), record)
        manager.wait_until_finished()
        assert resume.samples_seen(manager, 3) == seen


def test_the_newest_state_is_restored(workdir):
    with checkpoint.open_manager(workdir, keep=2) as manager:
        assert_same(resume.restore(manager, abstract(make_state())), make_state(3))
    assert not (workdir / "checkpoints" / "1").exists()


def without_optimizer(params):
    shutil.rmtree(params.parent / "train")


@pytest.mark.parametrize("damage", [remove_manifest, cut_metadata, cut_data, without_optimizer])
def test_damage_is_named_and_the_one_before_used(damage, tmp_path, caplog):
    with checkpoint.open_manager(tmp_path, keep=2) as manager:
        for step in (1, 2):
            checkpoint.save(manager, make_state(step), RECORD)
    folder = stored_checkpoint.find(tmp_path)
    damage(folder / "params")
    if damage is not without_optimizer:
        named = "checkpoints/2 is damaged .*; delete its folder to go on from the one before, or use another"
        with pytest.raises(UserError, match=named):
            stored_checkpoint.load_params(folder, abstract(make_state().params))
    with checkpoint.open_manager(tmp_path, keep=2) as manager:
        resume.set_aside_unreadable(manager)
        assert_same(resume.restore(manager, abstract(make_state())), make_state(1))
        checkpoint.save(manager, make_state(2), RECORD)
    assert re.search(rf"{folder} is damaged \(.+\): it is set aside as damaged-2", caplog.text)
    with checkpoint.open_manager(tmp_path, keep=2) as manager:
        assert_same(resume.restore(manager, abstract(make_state())), make_state(2))


def test_a_storage_that_does_not_answer_is_asked_again(workdir, monkeypatch, caplog):
    answers = iter([HttpError({"code": 503, "message": "busy"}), ValueError("UNAVAILABLE: 503")])
    read = resume.read_item

    def read_item(*args):
        for error in answers:
            raise error
        return read(*args)

    monkeypatch.setattr(resume, "_PAUSES", (0.0, 0.0))
    monkeypatch.setattr(resume, "read_item", read_item)
    with checkpoint.open_manager(workdir, keep=2) as manager:
        assert_same(resume.restore(manager, abstract(make_state())), make_state(3))
    assert caplog.text.count("no answer from the storage") == 2
    assert "damaged" not in caplog.text


@pytest.mark.parametrize("error", [
    TimeoutError("no answer"), PermissionError(13, "Permission denied"), HttpError({"code": 503, "message": "busy"}),
])  # fmt: skip
def test_a_storage_that_never_answers_changes_nothing(workdir, monkeypatch, error):
    def fail(*_):
        raise error

    before = sorted(path.name for path in (workdir / "checkpoints").iterdir())
    monkeypatch.setattr(resume, "_PAUSES", (0.0,))
    for name in ("read_item", "metadata"):
        with monkeypatch.context() as patch, checkpoint.open_manager(workdir, keep=2) as manager:
            patch.setattr(resume, name, fail)
            with pytest.raises(UserError, match=r"checkpoints/3 cannot be read now .* that is no damage"):
                resume.restore(manager, abstract(make_state()))
            if name == "metadata":
                with pytest.raises(UserError, match="cannot be read now"):
                    resume.set_aside_unreadable(manager)
    assert sorted(path.name for path in (workdir / "checkpoints").iterdir()) == before


def test_a_step_that_is_damaged_twice_is_kept_twice(tmp_path):
    for _ in range(2):
        with checkpoint.open_manager(tmp_path, keep=2) as manager:
            if not manager.all_steps():
                checkpoint.save(manager, make_state(1), RECORD)
            checkpoint.save(manager, make_state(2), RECORD)
        cut_metadata(stored_checkpoint.find(tmp_path) / "params")
        with checkpoint.open_manager(tmp_path, keep=2) as manager:
            assert resume.set_aside_unreadable(manager) == 1
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == {"1", "damaged-2", "damaged-2-2"}


def test_a_step_that_was_named_again_is_set_aside_again(tmp_path):
    steps = tmp_path / "checkpoints"
    with checkpoint.open_manager(tmp_path, keep=2) as manager:
        checkpoint.save(manager, make_state(1), RECORD)
        checkpoint.save(manager, make_state(2), RECORD)
    for name in ("damaged-2-2", "damaged-20"):
        shutil.copytree(steps / "2", steps / name)
    cut_metadata(steps / "2" / "params")
    with checkpoint.open_manager(tmp_path, keep=2) as manager:
        assert resume.set_aside_unreadable(manager) == 1
    assert {path.name for path in steps.iterdir()} == {"1", "damaged-2", "damaged-2-2", "damaged-20"}


def test_parameters_alone_can_be_loaded_but_not_resumed(tmp_path):
    params = make_state(1).params
    stored_checkpoint.save_params(
        tmp_path, params, {"model": CONFIG.to_json(), "pretrained": "tiny"}
    )  # as port_weights does
    assert_same(stored_checkpoint.load_params(stored_checkpoint.find(tmp_path), abstract(params)), params)
    with (
        checkpoint.open_manager(tmp_path, keep=1) as manager,
        pytest.raises(UserError, match=f"start one in another workdir with --config.init_from={tmp_path}"),
    ):
        resume.set_aside_unreadable(manager)


def test_every_nth_is_kept_as_well(tmp_path):
    with checkpoint.open_manager(tmp_path, keep=1, keep_every=2, asynchronous=False) as manager:
        for step in (1, 2, 3, 4, 5):
            checkpoint.save(manager, make_state(step), RECORD)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["2", "4", "5"]


def test_what_a_killed_run_left_is_removed(tmp_path):
    half = tmp_path / "checkpoints" / "7.orbax-checkpoint-tmp"
    (half / "params").mkdir(parents=True)
    with checkpoint.open_manager(tmp_path, keep=1) as manager:
        assert resume.set_aside_unreadable(manager) is None
        checkpoint.save(manager, make_state(1), RECORD)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["1"]


def test_an_average_that_was_not_saved_begins_as_the_parameters(tmp_path):
    """An average that was saved is restored, and can be read alone."""
    state = make_state(1)
    averaged = state._replace(ema=jax.tree.map(lambda x: x + 1, state.params))
    with checkpoint.open_manager(tmp_path, keep=2, asynchronous=False) as manager:
        checkpoint.save(manager, state, RECORD)
        assert_same(resume.restore(manager, abstract(averaged)), state._replace(ema=state.params))
        checkpoint.save(manager, averaged._replace(step=jnp.int32(2)), RECORD)
        assert_same(resume.restore(manager, abstract(averaged)).ema, averaged.ema)
        assert resume.restore(manager, abstract(state)).ema is None
    folder = stored_checkpoint.find(tmp_path)
    shutil.rmtree(folder / "params")
    assert_same(stored_checkpoint.load_params(folder, abstract(state.params), "ema"), averaged.ema)


def test_an_optimiser_of_other_parameters(tmp_path):
    """A changed setting is no damage: the checkpoint stays where it is, even if the shapes agree."""
    everything, queries, keys = (
        init_state(make_state().params, make_optimizer(OptimizerConfig()), UpdateConfig(trainable=trainable))
        for trainable in ((), (r".*attn\.query.*",), (r".*attn\.key.*",))
    )
    with checkpoint.open_manager(tmp_path, keep=2, asynchronous=False) as manager:
        for step, (saved, wanted) in enumerate([(everything, queries), (queries, keys)]):
            checkpoint.save(manager, saved._replace(step=jnp.int32(step)), RECORD)
            with pytest.raises(UserError, match=r"train of .* is of an optimiser of other parameters: keep"):
                resume.restore(manager, abstract(wanted))
    assert {path.name for path in (tmp_path / "checkpoints").iterdir() if path.is_dir()} == {"0", "1"}


def test_a_workdir_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"file/run cannot be written .*; choose another"):
        checkpoint.open_manager(tmp_path / "file" / "run", keep=1)
