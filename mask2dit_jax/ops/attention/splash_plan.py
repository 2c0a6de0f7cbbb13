"""The arrangement of tokens in blocks for a block-sparse attention kernel, and the blocks that the kernel computes.

A kernel that skips whole blocks wastes work in two places: in the padding up to whole blocks, and in blocks that
contain both allowed and forbidden pairs. Both depend on the positions of the tokens. Therefore the tokens of each shard
are moved before the kernel runs. They are put into groups, each of which starts at a block boundary. Three groupings

    one       all tokens in their original order             (suits v5, which skips nothing)
    kinds     T1 | T2 | .. | V1 V2 ..                        (suits v2: a scene's queries skip the other texts)
    scenes    T1 V1 | T2 V2 | ..                             (suits v1: no block spans two scenes)

are tried for queries and for keys with every block size that fits, and the cheapest combination is chosen. All of this
is NumPy on segments, not on pairs of tokens, and takes about half a second at full size.
"""

import dataclasses
import functools
import itertools
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from mask2dit_jax.axes import NpBools, NpInts
from mask2dit_jax.layout import SceneLayout
from mask2dit_jax.ops.attention.permute import Move, Moves
from mask2dit_jax.ops.masks import allowed_pairs, segment_allows

LANES = 128  # blocks are multiples of a TPU register's width
# Maximum number of logits in a block. The dq kernel keeps four fp32 arrays of that size at once, and XLA gives a kernel
# 16 MiB of VMEM by default on v5e and v5p.
MAX_BLOCK_PAIRS = 512 * 1024
MAX_BLOCK = 2048
# Overheads of a block, expressed in pairs: STEP_PAIRS per block (0.35 us, where a pair takes 2.6 ps on a v5e) and
# LOAD_PAIRS per query or key loaded. These are estimates; their effect is that blocks are large and not thin.
STEP_PAIRS = 128 * 1024
LOAD_PAIRS = 128
# Executed over allowed pairs below which only the cost decides (v1 has three times as many borders to pay for).
ALLOWED_WASTE = {"v1": 1.15}
ALLOWED_WASTE_ELSE = 1.05


class TokenRun(NamedTuple):
    """Tokens [start, stop) of a shard, placed from position `at` on."""

    start: int
    stop: int
    at: int


@dataclasses.dataclass(frozen=True)
class Arrangement:
    """The positions of the tokens of each of several equal shards.

    Attributes:
        layout: Scenes of the tokens.
        block: Size of a block in tokens.
        width: Tokens of a shard before the arrangement.
        length: Tokens of a shard after it, including padding. A multiple of `block`.
        shards: The runs of each shard, ordered by `at`. Gaps between them are padding.
    """

    layout: SceneLayout
    block: int
    width: int
    length: int
    shards: tuple[tuple[TokenRun, ...], ...]

    def moves(self) -> Moves:
        """Return the moves of a shard's tokens to their positions."""
        return self._moves(lambda run: Move(run.start, run.at, run.stop - run.start), self.length)

    def moves_back(self) -> Moves:
        """Return the moves that undo `moves`."""
        return self._moves(lambda run: Move(run.at, run.start, run.stop - run.start), self.width)

    def _moves(self, of_run, length: int) -> Moves:
        return Moves(tuple(tuple(map(of_run, runs)) for runs in self.shards), length)

    def segments(self) -> NpInts["shard length"]:
        """Return the index of the segment at each position, -1 for padding."""
        out = np.full((len(self.shards), self.length), -1, np.int32)
        for shard, segment, start, stop in self._pieces():
            out[shard, start:stop] = segment
        return out

    def segments_of_blocks(self) -> NpBools["shard block segment"]:
        """Return whether each block holds tokens of each segment."""
        out = np.zeros((len(self.shards), self.length // self.block, len(self.layout.segments)), bool)
        for shard, segment, start, stop in self._pieces():
            out[shard, start // self.block : -(-stop // self.block), segment] = True
        return out

    def _pieces(self) -> Iterator[tuple[int, int, int, int]]:
        """Yield (shard, segment, first position, position after the last) of each run of tokens of one segment."""
        for shard, runs in enumerate(self.shards):
            for run in runs:
                shift = run.at - run.start - shard * self.width  # from token to position
                first, last = run.at - shift, run.at - shift + run.stop - run.start
                for index, segment in enumerate(self.layout.segments):
                    start, stop = max(first, segment.start), min(last, segment.stop)
                    if start < stop:
                        yield shard, index, start + shift, stop + shift


@dataclasses.dataclass(frozen=True, eq=False)
class Plan:
    """The work of each device: its queries against all keys.

    Attributes:
        queries: Arrangement of the queries, in one or more shards.
        keys: Arrangement of the keys, in one shard.
        visits: The blocks that the kernel computes, for each shard of the queries.
        allowed_pairs: Number of token pairs that the mask allows, in all shards together.
    """

    queries: Arrangement
    keys: Arrangement
    visits: NpBools["shard qblock kblock"]
    allowed_pairs: int

    @property
    def executed_pairs(self) -> int:
        """Pairs that the busiest shard computes, for which the others wait."""
        return int(self.visits.sum(axis=(1, 2)).max()) * self.queries.block * self.keys.block

    @property
    def ideal_pairs(self) -> float:
        """Pairs per shard if the allowed pairs were spread evenly and nothing else were computed."""
        return self.allowed_pairs / len(self.queries.shards)

    @property
    def occupancy(self) -> float:
        """Executed pairs divided by ideal pairs. 1 means that no work is wasted."""
        return self.executed_pairs / self.ideal_pairs


@functools.lru_cache(maxsize=64)
def make_plan(mask: str, layout: SceneLayout, shards: int = 1) -> Plan:
    """Return the cheapest plan for queries in `shards` equal shards, each against all keys."""
    tokens = -(-layout.num_tokens // shards) * shards
    allowed = allowed_segments(mask, layout)
    pairs_allowed = allowed_pairs(mask, layout)
    target = ALLOWED_WASTE.get(mask, ALLOWED_WASTE_ELSE)

    @functools.cache
    def arrangements(num_shards: int, block: int):
        width = tokens // num_shards
        made = [_arrange(layout, groups, tokens, num_shards, block) for groups in _groupings(layout)]
        return [(a, a.segments_of_blocks()) for a in made] if block <= max(LANES, width) else []

    def candidates():
        sizes = range(LANES, MAX_BLOCK + 1, LANES)
        for block_q, block_k in itertools.product(sizes, sizes):
            if block_q * block_k <= MAX_BLOCK_PAIRS:
                yield from itertools.product(arrangements(shards, block_q), arrangements(1, block_k))

    def cost(candidate):
        (queries, q_segments), (keys, k_segments) = candidate
        blocks = _visits(q_segments, allowed, k_segments[0]).sum(axis=(1, 2)).max()
        pairs = queries.block * keys.block
        occupancy = blocks * pairs * shards / pairs_allowed
        # Each further run is another copy of the shard's queries. A nearly equal plan without it is better.
        extra_runs = max(map(len, queries.shards)) - 1 if shards > 1 else 0
        block_cost = pairs + STEP_PAIRS + LOAD_PAIRS * (queries.block + keys.block)
        return max(occupancy, target), blocks * block_cost * (1 + 0.01 * extra_runs)

    (queries, q_segments), (keys, k_segments) = min(candidates(), key=cost)
    visits = _visits(q_segments, allowed, k_segments[0])
    return Plan(queries, keys, visits, pairs_allowed)


def allowed_segments(mask: str, layout: SceneLayout) -> NpBools["segment segment"]:
    """Return whether each segment (row, as query) may attend to each segment (column, as key)."""
    return np.array([[segment_allows(mask, q, k) for k in layout.segments] for q in layout.segments])


def _visits(q_segments, allowed, k_segments) -> NpBools["shard qblock kblock"]:
    """Return the blocks that hold an allowed pair.

    Queries that are all padding visit one block, which gives them finite values.
    """
    visits = (q_segments.astype(np.float32) @ allowed @ k_segments.T.astype(np.float32)) > 0
    visits[:, :, 0] |= ~visits.any(axis=-1)
    return visits


def _groupings(layout: SceneLayout) -> Iterator[list[list[tuple[int, int]]]]:
    """Yield the groupings "one", "kinds" and "scenes" of the module docstring, as groups of token ranges.

    The last range of each ends at the layout's last token.
    """
    n, text, total = layout.num_scenes, layout.num_text_tokens, layout.num_tokens
    spans = [(segment.start, segment.stop) for segment in layout.segments]
    yield [[(0, total)]]
    yield [*([span] for span in spans[:n]), [(text, total)]]
    yield [[spans[scene], spans[n + scene]] for scene in range(n)]


def _arrange(layout: SceneLayout, groups, tokens: int, num_shards: int, block: int) -> Arrangement:
    """Arrange the tokens in groups. Tokens past the layout's end, which pad the sequence, go with the last."""
    groups = [*groups[:-1], [*groups[-1][:-1], (groups[-1][-1][0], tokens)]]
    width = tokens // num_shards
    shards = [_runs(groups, shard * width, width, block) for shard in range(num_shards)]
    used = max(runs[-1].at + runs[-1].stop - runs[-1].start for runs in shards)
    return Arrangement(layout, block, width, -(-used // block) * block, tuple(shards))


def _runs(groups, first: int, width: int, block: int) -> tuple[TokenRun, ...]:
    """Return the runs of the shard that holds tokens [first, first + width)."""
    runs, at = [], 0
    for group in groups:
        at = -(-at // block) * block
        for start, stop in group:
            start, stop = max(start, first), min(stop, first + width)
            if start < stop:
                runs.append(TokenRun(start - first, stop - first, at))
                at += stop - start
    return tuple(runs)
