"""Stored checkpoints are found from any path that means them, read bit for bit, and their faults are named."""

import shutil

import jax
import jax.numpy as jnp
import pytest

from mask2dit_jax.errors import UserError
from mask2dit_jax.models.dit import DiTConfig
from mask2dit_jax.pretrained import stored_checkpoint
from tests.training.saved_run import CONFIG, RECORD, abstract, assert_same, make_state, save_run


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    return save_run(tmp_path_factory.mktemp("run"))


def test_parameters_are_found_from_workdir_and_step(workdir):
    steps = workdir / "checkpoints"
    for path, step in ((workdir, 3), (steps, 3), (steps / "3", 3), (steps / "2", 2)):
        assert stored_checkpoint.has_checkpoint(path)
        folder = stored_checkpoint.find(path)
        assert folder == steps / str(step)
        params = make_state(step).params
        assert_same(stored_checkpoint.load_params(folder, abstract(params)), params)


def test_a_relative_path_will_do(workdir, monkeypatch):
    """Orbax wants absolute ones; people type others."""
    monkeypatch.chdir(workdir.parent)
    params = make_state().params
    folder = stored_checkpoint.find(workdir.name)
    assert not folder.is_absolute()
    assert stored_checkpoint.load_params(folder, abstract(params)).keys() == params.keys()
    assert stored_checkpoint.stored_names(folder, "params")


def test_parameters_come_in_the_type_that_is_asked_for(workdir):
    params = make_state(3).params
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    loaded = stored_checkpoint.load_params(stored_checkpoint.find(workdir), abstract(half))
    assert_same(loaded, half)
    assert {leaf.dtype for leaf in jax.tree.leaves(loaded)} == {jnp.dtype(jnp.bfloat16)}


def test_record(workdir):
    record = stored_checkpoint.read_record(stored_checkpoint.find(workdir))
    assert record == RECORD
    assert DiTConfig.from_json(record["model"]) == CONFIG


def test_nothing_there(tmp_path):
    assert not stored_checkpoint.has_checkpoint(tmp_path)
    assert not stored_checkpoint.has_checkpoint(tmp_path / "nowhere")
    with pytest.raises(UserError, match=f"there is no checkpoint in {tmp_path}; give a training workdir"):
        stored_checkpoint.find(tmp_path)


def test_a_model_of_other_sizes(workdir):
    larger = DiTConfig(2, 32, 1, 4, time_embed_dim=16, text_embed_dim=8, text_tokens=5)
    with pytest.raises(UserError, match="checkpoints/3 is of a model of other sizes"):
        stored_checkpoint.load_params(stored_checkpoint.find(workdir), abstract(make_state(config=larger).params))


def test_damaged_record(tmp_path):
    stored_checkpoint.save_params(tmp_path, make_state().params, RECORD)
    folder = stored_checkpoint.find(tmp_path)
    (folder / "record" / "metadata").write_text("{")
    with pytest.raises(UserError, match=r"is damaged: .*metadata is missing or no JSON"):
        stored_checkpoint.read_record(folder)


def test_a_checkpoint_being_written_to_a_bucket_is_not_the_newest(workdir, tmp_path, monkeypatch):
    """Nothing is renamed there: Orbax takes a folder for whole when a last file says so."""
    run = shutil.copytree(workdir, tmp_path / "run")
    whole = {"2"}
    monkeypatch.setattr(stored_checkpoint.ocp.utils, "is_checkpoint_finalized", lambda folder: folder.name in whole)
    assert stored_checkpoint.find(run).name == "2"
    whole.clear()
    assert not stored_checkpoint.has_checkpoint(run)
