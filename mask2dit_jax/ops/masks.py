"""The symmetric binary attention masks v1..v5 (paper, section 3.2 and Fig. 2), one predicate each.

A predicate says whether a query may attend to a key, given the scene and the kind (text or video) of both. The masks
of two scenes with one text and one video token each, in the order T1 T2 V1 V2 (rows are queries, # = may attend):

         v1       v2       v3       v4       v5
    T1   #.#.     #.#.     ###.     #.##     ####
    T2   .#.#     .#.#     ##.#     .###     ####
    V1   #.#.     #.##     #.##     ####     ####
    V2   .#.#     .###     .###     ####     ####

v1 treats the n scenes as independent text-video pairs, v2 is the default, and v5 masks nothing. The dense bias, the
grouped form and the kernels are all derived from these predicates.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool

from mask2dit_jax.errors import UserError
from mask2dit_jax.layout import SceneLayout, Segment


class Side(NamedTuple):
    """Scene and kind of the tokens on one side of a pair. Scalars, or arrays that broadcast against the other side."""

    scene: Any
    is_text: Any


def _same_scene(q: Side, k: Side):
    return q.scene == k.scene


def _both_video(q: Side, k: Side):
    return ~q.is_text & ~k.is_text


def _both_text(q: Side, k: Side):
    return q.is_text & k.is_text


Predicate = Callable[[Side, Side], Any]

PREDICATES: dict[str, Predicate] = {
    "v1": _same_scene,
    "v2": lambda q, k: _same_scene(q, k) | _both_video(q, k),
    "v3": lambda q, k: _same_scene(q, k) | _both_video(q, k) | _both_text(q, k),
    "v4": lambda q, k: _same_scene(q, k) | ~_both_text(q, k),
    "v5": lambda q, k: (q.scene == q.scene) & (k.scene == k.scene),
}


def predicate(mask: str) -> Predicate:
    """Return the predicate of mask "v1" to "v5".

    Raises:
        UserError: There is no such mask.
    """
    if mask not in PREDICATES:
        raise UserError(f"mask {mask!r} does not exist; choose one of {', '.join(PREDICATES)}")
    return PREDICATES[mask]


def dense_mask(mask: str, layout: SceneLayout) -> Bool[np.ndarray, "l l"]:
    """Return the whole mask, with queries as rows and keys as columns.

    Its size is quadratic in the number of tokens, so only dense attention and the tests use it.
    """
    scene, is_text = layout.token_scenes, layout.token_is_text
    return predicate(mask)(Side(scene[:, None], is_text[:, None]), Side(scene[None, :], is_text[None, :]))


def segment_allows(mask: str, query: Segment, key: Segment) -> bool:
    """Return whether the tokens of segment `query` may attend to those of segment `key`."""
    sides = (Side(np.asarray(s.scene), np.asarray(s.is_text)) for s in (query, key))
    return bool(predicate(mask)(*sides))


def key_runs(mask: str, layout: SceneLayout, query: Segment) -> tuple[slice, ...]:
    """Return the keys that a query segment may attend to, as the fewest runs of tokens of one kind (text or video).

    No run crosses the end of the texts, so that the run of all video keys is the same slice for every scene and needs
    no copy.
    """
    runs = []
    for key in layout.segments:
        if not segment_allows(mask, query, key):
            continue
        if runs and runs[-1].stop == key.start != layout.num_text_tokens:
            runs[-1] = slice(runs[-1].start, key.stop)
        else:
            runs.append(slice(key.start, key.stop))
    return tuple(runs)


def allowed_pairs(mask: str, layout: SceneLayout) -> int:
    """Return the number of (query, key) pairs of tokens that the mask allows."""
    segments = layout.segments
    return sum(
        (query.stop - query.start) * (key.stop - key.start)
        for query in segments
        for key in segments
        if segment_allows(mask, query, key)
    )
