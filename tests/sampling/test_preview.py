"""The storyboard of a training run: what does not work costs a picture and not the run."""

import types

import jax.numpy as jnp
import numpy as np
from etils import epath
from flax import nnx

from mask2dit_jax.sampling.preview import Preview


def make(**parts) -> Preview:
    layout = types.SimpleNamespace(frame_slices=[slice(0, 1), slice(1, 2)])
    preview = Preview.__new__(Preview)
    vars(preview).update(
        _program=types.SimpleNamespace(objective=types.SimpleNamespace(layout=layout)),
        _sample=lambda params, text: np.zeros((2, 4, 6, 3)),
        _codec=types.SimpleNamespace(decode=lambda latents: np.zeros((5, 32, 48, 3), np.uint8)),
        **parts,
    )
    return preview


def test_a_storyboard_that_cannot_be_written_ends_no_run(tmp_path, caplog):
    (tmp_path / "samples").write_text("a file where the folder should be")
    preview = make(_folder=epath.Path(tmp_path) / "samples", _events=object())
    preview(5, nnx.State({}), jnp.zeros((1, 2, 6, 8)), ["one", "two"])
    assert "no storyboard for step 5: cannot write" in caplog.text


def test_a_storyboard_has_its_prompts(monkeypatch):
    drawn, events = [], types.SimpleNamespace(add_image=lambda *_: None)
    preview = make(_write=lambda step, scenes: drawn.extend(scenes), _events=events)
    preview(5, nnx.State({}), jnp.zeros((1, 2, 6, 8)), ["a red picture", "a green one"])
    assert [scene.prompt for scene in drawn] == ["a red picture", "a green one"]
