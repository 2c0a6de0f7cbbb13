"""Positions of video tokens: 3D RoPE (5B) and the interpolated 3D sin-cos table (2B).

Both are sums or products of one small table an axis (frame, row, column), which are NumPy and float64 until the end;
the token-sized arrays are broadcast inside jit, so that no constant of that size is ever compiled in.
The frame index runs on over all scenes (it is not restarted), and text tokens carry no position.
"""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from mask2dit_jax.axes import Floats
from mask2dit_jax.errors import UserError
from mask2dit_jax.layout import SceneLayout

CropRegion = tuple[tuple[int, int], tuple[int, int]]


def crop_region(grid: tuple[int, int], base: tuple[int, int]) -> CropRegion:
    """The region ((top, left), (bottom, right)) of the base grid that `grid` fills when scaled to fit inside it.

    Rounds half to even, as Python does (reference: get_resize_crop_region_for_grid of the authors' pipeline).
    """
    (height, width), (base_height, base_width) = grid, base
    if height / width > base_height / base_width:
        size = base_height, round(base_height / height * width)
    else:
        size = round(base_width / width * height), base_width
    top, left = (round((b - s) / 2.0) for b, s in zip(base, size, strict=True))
    return (top, left), (top + size[0], left + size[1])


def rope_angles(layout: SceneLayout, base: tuple[int, int], head_dim: int) -> Floats["v half"]:
    """Rotation angle of every video token and channel pair (v = video tokens, half = head_dim / 2).

    Channels of a head: 1/4 for the frame, 3/8 for the row, 3/8 for the column. Rows and columns are not integers: the
    grid is stretched over its crop region of the base grid, without the end (reference: get_3d_rotary_pos_embed of
    diffusers 0.30; later versions stop short of the end another way, and differ where the region does not start at 0).
    """
    (top, left), (bottom, right) = crop_region(layout.grid, base)
    rows, columns = layout.grid
    angles = (
        _axis_angles(np.arange(layout.num_frames), head_dim // 4),
        _axis_angles(np.linspace(top, bottom, rows, endpoint=False), head_dim // 8 * 3),
        _axis_angles(np.linspace(left, right, columns, endpoint=False), head_dim // 8 * 3),
    )
    return _over_tokens(*angles).astype(jnp.float32)


def _axis_angles(positions, dim: int) -> Float[np.ndarray, "n half"]:
    return np.outer(positions, 10_000.0 ** -(np.arange(0, dim, 2) / dim))


def _over_tokens(frame, row, column) -> Floats["v d"]:
    """Channels [frame, row, column] of every token of the frames x rows x columns grid, in token order."""
    shape = (len(frame), len(row), len(column))
    tables = (frame[:, None, None], row[None, :, None], column[None, None, :])
    tables = [jnp.broadcast_to(jnp.asarray(t, jnp.float32), (*shape, t.shape[-1])) for t in tables]
    return jnp.concatenate(tables, axis=-1).reshape(np.prod(shape), -1)


def rope_table(layout: SceneLayout, base: tuple[int, int], head_dim: int) -> tuple[Floats["l half"], Floats["l half"]]:
    """cos and sin for every token. Text tokens get cos 1 and sin 0: exactly no rotation."""
    angles = rope_angles(layout, base, head_dim)
    angles = jnp.pad(angles, ((layout.num_text_tokens, 0), (0, 0)))
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x: Floats["b l k m"], table: tuple[Floats["l half"], Floats["l half"]]) -> Floats["b l k m"]:
    """Rotates the interleaved channel pairs (0, 1), (2, 3), ... of every head; in fp32, returned in x's dtype."""
    cos, sin = (t[:, None, :] for t in table)
    pairs = x.astype(jnp.float32).reshape(*x.shape[:-1], -1, 2)
    even, odd = pairs[..., 0], pairs[..., 1]
    rotated = jnp.stack([even * cos - odd * sin, odd * cos + even * sin], axis=-1)
    return rotated.reshape(x.shape).astype(x.dtype)


def sincos_table(
    layout: SceneLayout,
    base: tuple[int, int, int],
    dim: int,
    spatial_scale: float,
    temporal_scale: float,
) -> Floats["v d"]:
    """The 2B position of every video token: the (frames, rows, columns) base table, interpolated linearly.

    Reference: CogVideoXPatchEmbed of the authors' code. The base table of ONE scene is stretched in time over n scenes
    (T0 -> n * T0 positions) and then cut to the frames there are, so the scenes of a layout with shorter scenes do not
    start at multiples of T0. Scenes of unequal length follow each other the same way: positions run on, as those of
    RoPE do, and a scene may be longer than T0 where others are shorter. Channels: 1/4 frame, 3/8 column, 3/8 row.

    Raises:
        UserError: see `check_table`.
    """
    base_frames, base_rows, base_columns = base
    check_table(layout, base_frames)
    stretched = layout.num_scenes * base_frames
    frame = _interpolate(_axis_sincos(np.arange(base_frames) / temporal_scale, dim // 4), stretched)
    column = _interpolate(_axis_sincos(np.arange(base_columns) / spatial_scale, dim // 8 * 3), layout.grid[1])
    row = _interpolate(_axis_sincos(np.arange(base_rows) / spatial_scale, dim // 8 * 3), layout.grid[0])
    return _frame_column_row(frame[: layout.num_frames], column, row)


def check_table(layout: SceneLayout, base_frames: int) -> None:
    """Raises UserError if the scenes together are longer than n times the base's: the table has no such position."""
    if layout.num_frames > layout.num_scenes * base_frames:
        raise UserError(
            f"scenes of {layout.frames} latent frames are longer than the {base_frames} a scene that this model's "
            "position table has (sample_frames of its config.json); use shorter scenes or a RoPE model"
        )


def _frame_column_row(frame, column, row) -> Floats["v d"]:
    """Token order is frame, row, column, but the channels of the column come before those of the row."""
    tokens = _over_tokens(frame, row, column)
    split = (frame.shape[-1], frame.shape[-1] + row.shape[-1])
    return jnp.concatenate([tokens[:, : split[0]], tokens[:, split[1] :], tokens[:, split[0] : split[1]]], axis=-1)


def _axis_sincos(positions, dim: int) -> Float[np.ndarray, "n dim"]:
    angles = np.outer(positions, 10_000.0 ** -(np.arange(dim // 2) / (dim / 2)))
    return np.concatenate([np.sin(angles), np.cos(angles)], axis=1)


def _interpolate(table: Float[np.ndarray, "n d"], length: int) -> Float[np.ndarray, "length d"]:
    """Linear, half-pixel centres, no antialiasing when it shrinks (torch align_corners=False)."""
    at = np.maximum((np.arange(length) + 0.5) * len(table) / length - 0.5, 0)
    low = np.floor(at).astype(int)
    high = np.minimum(low + 1, len(table) - 1)
    weight = (at - low)[:, None]
    return (1 - weight) * table[low] + weight * table[high]
