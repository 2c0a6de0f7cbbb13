"""Positions of video tokens: 3D RoPE (5B) and the interpolated 3D sin-cos table (2B).

Both are made from one small table per axis (frame, row, column). These tables are NumPy arrays in float64. The arrays
with a row per token are broadcast from them inside jit, so that the program contains no constant of that size.
The frame index continues across scenes; it does not restart. Text tokens have no position.
"""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from mask2dit_jax.axes import Floats
from mask2dit_jax.errors import UserError
from mask2dit_jax.layout import SceneLayout

CropRegion = tuple[tuple[int, int], tuple[int, int]]


def crop_region(grid: tuple[int, int], base: tuple[int, int]) -> CropRegion:
    """Return the region of the base grid that `grid` fills when it is scaled to fit inside it.

    Rounds half to even, as Python does. Source: get_resize_crop_region_for_grid in the authors' code.

    Args:
        grid: Rows and columns of tokens.
        base: Rows and columns of the base grid.

    Returns:
        ((top, left), (bottom, right)) in units of the base grid.
    """
    (height, width), (base_height, base_width) = grid, base
    if height / width > base_height / base_width:
        size = base_height, round(base_height / height * width)
    else:
        size = round(base_width / width * height), base_width
    top, left = (round((b - s) / 2.0) for b, s in zip(base, size, strict=True))
    return (top, left), (top + size[0], left + size[1])


def rope_angles(layout: SceneLayout, base: tuple[int, int], head_dim: int) -> Floats["v half"]:
    """Return the rotation angle in radians of each video token (v) and channel pair (half = head_dim / 2).

    A quarter of a head's channels encode the frame, 3/8 the row and 3/8 the column. Rows and columns are fractional,
    because the grid is stretched over its crop region of the base grid, whose end is excluded.

    Source: get_3d_rotary_pos_embed of diffusers 0.30. Later versions exclude the end in another way; their angles
    differ where the region does not start at 0.
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
    """Return the channels [frame, row, column] of each token of the frames x rows x columns grid, in token order."""
    shape = (len(frame), len(row), len(column))
    tables = (frame[:, None, None], row[None, :, None], column[None, None, :])
    tables = [jnp.broadcast_to(jnp.asarray(t, jnp.float32), (*shape, t.shape[-1])) for t in tables]
    return jnp.concatenate(tables, axis=-1).reshape(np.prod(shape), -1)


def rope_table(layout: SceneLayout, base: tuple[int, int], head_dim: int) -> tuple[Floats["l half"], Floats["l half"]]:
    """Return the cosine and sine of each token's angles. Text tokens get 1 and 0, so they are not rotated at all."""
    angles = rope_angles(layout, base, head_dim)
    angles = jnp.pad(angles, ((layout.num_text_tokens, 0), (0, 0)))
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x: Floats["b l k m"], table: tuple[Floats["l half"], Floats["l half"]]) -> Floats["b l k m"]:
    """Rotate the interleaved channel pairs (0, 1), (2, 3), ... of each head. Computes in fp32; keeps the dtype of x."""
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
    """Return the 2B model's position of each video token (v): a base table, interpolated linearly.

    The base table covers ONE scene of T0 latent frames. It is stretched in time to n * T0 positions for n scenes and
    then cut to the layout's frames. If scenes are shorter than T0, they therefore do not start at multiples of T0.
    Scenes of unequal length follow each other without gaps, as with RoPE, so a scene may be longer than T0 if others
    are shorter. The channels are 1/4 frame, 3/8 column, 3/8 row.

    Source: CogVideoXPatchEmbed in the authors' code.

    Args:
        layout: Scenes and token grid.
        base: Frames (T0), rows and columns of the base table.
        dim: Number of channels.
        spatial_scale: Divides rows and columns.
        temporal_scale: Divides frames.

    Raises:
        UserError: The scenes are longer than the table; see `check_table`.
    """
    base_frames, base_rows, base_columns = base
    check_table(layout, base_frames)
    stretched = layout.num_scenes * base_frames
    frame = _interpolate(_axis_sincos(np.arange(base_frames) / temporal_scale, dim // 4), stretched)
    column = _interpolate(_axis_sincos(np.arange(base_columns) / spatial_scale, dim // 8 * 3), layout.grid[1])
    row = _interpolate(_axis_sincos(np.arange(base_rows) / spatial_scale, dim // 8 * 3), layout.grid[0])
    return _frame_column_row(frame[: layout.num_frames], column, row)


def check_table(layout: SceneLayout, base_frames: int) -> None:
    """Check that the n scenes together have at most n * base_frames latent frames, for which the table has positions.

    Raises:
        UserError: The scenes are too long.
    """
    if layout.num_frames > layout.num_scenes * base_frames:
        raise UserError(
            f"scenes of {layout.frames} latent frames are longer than the {base_frames} per scene in this model's "
            "position table (sample_frames of its config.json); use shorter scenes or a RoPE model"
        )


def _frame_column_row(frame, column, row) -> Floats["v d"]:
    """Return the channels [frame, column, row] of each token. The order of the tokens is still frame, row, column."""
    tokens = _over_tokens(frame, row, column)
    split = (frame.shape[-1], frame.shape[-1] + row.shape[-1])
    return jnp.concatenate([tokens[:, : split[0]], tokens[:, split[1] :], tokens[:, split[0] : split[1]]], axis=-1)


def _axis_sincos(positions, dim: int) -> Float[np.ndarray, "n dim"]:
    angles = np.outer(positions, 10_000.0 ** -(np.arange(dim // 2) / (dim / 2)))
    return np.concatenate([np.sin(angles), np.cos(angles)], axis=1)


def _interpolate(table: Float[np.ndarray, "n d"], length: int) -> Float[np.ndarray, "length d"]:
    """Interpolate linearly as torch does with align_corners=False: half-pixel centres, no antialiasing."""
    at = np.maximum((np.arange(length) + 0.5) * len(table) / length - 0.5, 0)
    low = np.floor(at).astype(int)
    high = np.minimum(low + 1, len(table) - 1)
    weight = (at - low)[:, None]
    return (1 - weight) * table[low] + weight * table[high]
