"""Compares the masks with the matrices drawn in the module's docstring, and tests the layout behind them."""

import re

import numpy as np
import pytest

from mask2dit_jax.errors import UserError
from mask2dit_jax.layout import SceneLayout
from mask2dit_jax.ops import masks

UNEQUAL = SceneLayout(frames=(2, 1, 3), grid=(1, 2), text_tokens=3)


def drawn_in_docstring() -> dict[str, np.ndarray]:
    """Parse the five matrices from the module's docstring, with rows T1 T2 V1 V2."""
    rows = re.findall(r"^ +[TV][12] +((?:[#.]{4} *){5})$", masks.__doc__, re.MULTILINE)
    columns = zip(*(row.split() for row in rows), strict=True)
    return {f"v{i}": np.array([[c == "#" for c in row] for row in rows]) for i, rows in enumerate(columns, 1)}


@pytest.mark.parametrize("mask", masks.PREDICATES)
def test_mask_is_the_drawn_one(mask):
    layout = SceneLayout(frames=(1, 1), grid=(1, 1), text_tokens=1)
    np.testing.assert_array_equal(masks.dense_mask(mask, layout), drawn_in_docstring()[mask])


@pytest.mark.parametrize("mask", masks.PREDICATES)
def test_key_runs_cover_exactly_the_allowed_keys(mask):
    dense = masks.dense_mask(mask, UNEQUAL)
    for query in UNEQUAL.segments:
        covered = np.zeros(UNEQUAL.num_tokens, int)
        for run in masks.key_runs(mask, UNEQUAL, query):
            covered[run] += 1
        for row in dense[query.start : query.stop]:
            np.testing.assert_array_equal(covered, row)


def test_video_keys_of_all_scenes_are_one_run():
    """Because every scene's queries use this one slice, grouped attention copies nothing per scene."""
    runs = [masks.key_runs("v2", UNEQUAL, s) for s in UNEQUAL.segments if not s.is_text]
    assert all(r[-1] == slice(UNEQUAL.num_text_tokens, UNEQUAL.num_tokens) for r in runs)


@pytest.mark.parametrize("mask", masks.PREDICATES)
def test_masks_are_symmetric(mask):
    dense = masks.dense_mask(mask, UNEQUAL)
    np.testing.assert_array_equal(dense, dense.T)


def test_unknown_mask_names_the_choices():
    with pytest.raises(UserError, match=r"mask 'v6' does not exist; choose one of v1, v2, v3, v4, v5"):
        masks.dense_mask("v6", UNEQUAL)


def test_layout_of_unequal_scenes():
    assert UNEQUAL.num_frames == 6
    assert UNEQUAL.num_tokens == 3 * 3 + 6 * 2
    assert UNEQUAL.frame_slices == (slice(0, 2), slice(2, 3), slice(3, 6))
    np.testing.assert_array_equal(UNEQUAL.frame_scenes, [0, 0, 1, 2, 2, 2])
    np.testing.assert_array_equal(UNEQUAL.token_scenes, [0] * 3 + [1] * 3 + [2] * 3 + [0] * 4 + [1] * 2 + [2] * 6)
    assert UNEQUAL.token_is_text.sum() == 9


@pytest.mark.parametrize("frames", [(), (1, 0)])
def test_empty_layouts_are_refused(frames):
    with pytest.raises(UserError, match="at least one scene"):
        SceneLayout(frames, (1, 1), 1)
