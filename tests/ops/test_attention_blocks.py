"""Compares the plan of blocks with the dense mask at a small size, and limits its waste at full size."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mask2dit_jax.errors import UserError
from mask2dit_jax.layout import SceneLayout
from mask2dit_jax.ops.attention.permute import Move, Moves, move
from mask2dit_jax.ops.attention.splash import _mask_channels, choose_way, splash_work
from mask2dit_jax.ops.attention.splash_plan import make_plan
from mask2dit_jax.ops.masks import PREDICATES, dense_mask

UNEQUAL = SceneLayout(frames=(3, 1, 5), grid=(7, 13), text_tokens=61)
FULL = SceneLayout.of_equal_scenes(3, 13, (30, 45), 226)


def tokens_at_places(arrangement, shard: int) -> np.ndarray:
    """Return the token at each position, -1 for padding."""
    out = np.full(arrangement.length, -1)
    for run in arrangement.shards[shard]:
        tokens = np.arange(run.start, run.stop) + shard * arrangement.width
        out[run.at : run.at + len(tokens)] = np.where(tokens < arrangement.layout.num_tokens, tokens, -1)
    return out


@pytest.mark.parametrize("shards", [1, 3, 8])
@pytest.mark.parametrize("mask", PREDICATES)
def test_plan_visits_what_the_mask_allows(mask, shards):
    plan = make_plan(mask, UNEQUAL, shards)
    allowed, seen = dense_mask(mask, UNEQUAL), []
    keys = tokens_at_places(plan.keys, 0)
    channels_q, channels_k = _mask_channels(plan, mask)
    for shard in range(shards):
        queries = tokens_at_places(plan.queries, shard)
        real = (queries[:, None] >= 0) & (keys >= 0)
        pairs = real & allowed[queries[:, None], keys]
        blocks = pairs.reshape(-1, plan.queries.block, len(keys) // plan.keys.block, plan.keys.block).any(axis=(1, 3))
        blocks[:, 0] |= ~blocks.any(axis=1)
        np.testing.assert_array_equal(plan.visits[shard], blocks)
        channels = (channels_q[shard] @ channels_k[0].T) == 0
        np.testing.assert_array_equal(channels[queries >= 0], pairs[queries >= 0])
        seen.extend(queries[queries >= 0])
    np.testing.assert_array_equal(np.sort(seen), np.arange(UNEQUAL.num_tokens))
    np.testing.assert_array_equal(np.sort(keys[keys >= 0]), np.arange(UNEQUAL.num_tokens))
    assert plan.allowed_pairs == allowed.sum()


@pytest.mark.parametrize("context", [1, 4, 8, 16])
@pytest.mark.parametrize(("mask", "most"), [("v1", 1.15), ("v2", 1.05), ("v3", 1.05), ("v4", 1.05), ("v5", 1.05)])
def test_waste_at_full_size(mask, most, context):
    for way in ("ulysses", "gather"):
        work = splash_work(mask, FULL, heads=48, head_dim=64, context=context, way=way)
        assert 1 <= work.occupancy <= most
        assert work.forward_executed == pytest.approx(work.occupancy * work.forward_ideal)
        assert work.backward_executed == pytest.approx(work.occupancy * work.backward_ideal * 7 / 4)
        share = dense_pairs(mask) * 48 * 4 * 64 / context
        assert work.forward_ideal == pytest.approx(share)
        assert work.mxu_utilisation == 0.5


def dense_pairs(mask: str) -> int:
    """Count by hand the pairs that the mask allows at full size."""
    text, video = 226, 13 * 30 * 45
    own = 3 * (text + video) ** 2
    other_videos, other_texts, crossed = 6 * video**2, 6 * text**2, 12 * text * video
    v2 = own + other_videos
    v4 = v2 + crossed
    return {"v1": own, "v2": v2, "v3": v2 + other_texts, "v4": v4, "v5": v4 + other_texts}[mask]


def test_unequal_scenes_waste_little_either():
    layout = SceneLayout((13, 5, 9), (30, 45), 226)
    for mask in PREDICATES:
        assert splash_work(mask, layout, heads=48, head_dim=64, context=8).occupancy < 1.1


def test_way_is_ulysses_where_heads_divide():
    assert choose_way("auto", heads=48, context=8, tensor=2) == "ulysses"
    assert choose_way("auto", heads=30, context=4, tensor=1) == "gather"
    with pytest.raises(UserError, match=r"30 heads per tensor shard do not divide over mesh\.context=4"):
        choose_way("ulysses", heads=30, context=4, tensor=1)


def test_moves_that_differ_by_shard():
    """The shards differ in the number and the sizes of their moves."""
    shards = ((Move(0, 0, 2), Move(2, 4, 3)), (Move(0, 1, 5),), (Move(3, 0, 2), Move(0, 3, 3)))
    x = jnp.arange(1.0, 6.0)[None, :, None]
    moved = jax.jit(lambda x, shard: move(x, Moves(shards, 8), shard))
    for shard, moves in enumerate(shards):
        out = moved(x, shard)[0, :, 0]
        for source, target, size in moves:
            np.testing.assert_array_equal(out[target : target + size], x[0, source : source + size, 0])
        alike = move(x, Moves((moves,), 8))[0, :, 0]
        used = np.asarray(alike) != 0
        np.testing.assert_array_equal(out[used], alike[used])
