"""From a decoded frame to the picture that a player shows: colours, transparency, shape of the pixels, orientation."""

from fractions import Fraction

import av
import numpy as np
from av.sidedata.sidedata import Type as SideData
from av.video.reformatter import ColorRange, Colorspace
from jaxtyping import UInt8
from PIL import Image

from mask2dit_jax.errors import UserError

# Numbers of ITU-T H.273, which all codecs and containers use.
_MATRICES = {
    **{1: Colorspace.ITU709, 4: Colorspace.FCC, 5: Colorspace.ITU601, 6: Colorspace.ITU601},
    7: Colorspace.SMPTE240M,
}
_UNTAGGED = 2
_WIDE = {"color_trc": {14: "BT.2020", 15: "BT.2020", 16: "PQ", 18: "HLG"},
         "colorspace": {9: "BT.2020", 10: "BT.2020", 14: "ICtCp"},
         "color_primaries": {9: "BT.2020"}}  # fmt: skip
_NARROWEST = Fraction(1, 8)  # pixels that are more oblong than this are an error in the file
_REMEDY = "convert it to SDR (BT.709) first"


class NotShown(UserError):
    """A frame is whole, but cannot be shown as 8-bit RGB; the message continues the name of its file."""


def shown_picture(frame: av.VideoFrame, pixel_aspect: Fraction | None = None) -> UInt8[np.ndarray, "h w 3"]:
    """Return what a player shows of a frame, as RGB with square pixels.

    The colours are those of the frame's matrix and range. Without a tag, HD is BT.709 and smaller pictures are BT.601,
    as in every player. Transparent parts are over white. Pixels that are not square are stretched, never squeezed. The
    display matrix turns and mirrors, to the nearest quarter turn.

    Args:
        frame: Decoded frame.
        pixel_aspect: Width of a pixel over its height; None or 0 if unknown, which means 1.

    Raises:
        NotShown: The frame is HDR or has colours beyond BT.709, which 8 bits of sRGB do not hold.
    """
    check_colours(frame)
    picture = _square(_rgb(frame), pixel_aspect or Fraction(1))
    return np.ascontiguousarray(_oriented(picture, frame))


def upright_size(frame: av.VideoFrame) -> tuple[int, int]:
    """Return the width and height of a frame as it is turned, in pixels that may be oblong."""
    return (frame.height, frame.width) if _is_on_its_side(frame) else (frame.width, frame.height)


def check_colours(frame: av.VideoFrame) -> None:
    """Raise NotShown if the frame is HDR or has colours beyond BT.709: taken as SDR, it would be grey and flat."""
    for field, names in _WIDE.items():
        name = names.get(int(getattr(frame, field)))
        if name:
            raise NotShown(f"is HDR or of a wide gamut ({name}); {_REMEDY}")
    if any(data.type in (SideData.DOVI_METADATA, SideData.DOVI_RPU_BUFFER) for data in frame.side_data):
        raise NotShown(f"is HDR (Dolby Vision); {_REMEDY}")


def _rgb(frame: av.VideoFrame) -> UInt8[np.ndarray, "h w 3"]:
    transparent = any(part.is_alpha for part in frame.format.components) or frame.format.has_palette
    target = "rgba" if transparent else "rgb24"
    if frame.format.is_rgb or frame.format.has_palette or len(frame.format.components) < 3:
        pixels = frame.to_ndarray(format=target)
    else:
        matrix = _MATRICES.get(_matrix(frame))
        if matrix is None:
            raise NotShown(f"has colours of an unknown kind (matrix {int(frame.colorspace)} of H.273); {_REMEDY}")
        full = frame.color_range == ColorRange.JPEG or frame.format.name.startswith("yuvj")
        pixels = frame.reformat(
            format=target,
            src_colorspace=matrix,
            dst_colorspace=matrix,
            src_color_range=ColorRange.JPEG if full else ColorRange.MPEG,
            dst_color_range=ColorRange.JPEG,
        ).to_ndarray()
    if not transparent:
        return pixels
    alpha = pixels[..., 3:].astype(np.uint16)
    return ((pixels[..., :3] * alpha + 255 * (255 - alpha) + 127) // 255).astype(np.uint8)


def _matrix(frame: av.VideoFrame) -> int:
    if int(frame.colorspace) not in (0, _UNTAGGED, 3):  # 0 stands for RGB, 3 is reserved
        return int(frame.colorspace)
    return 1 if frame.width >= 1280 or frame.height > 576 else 6


def _square(picture: UInt8[np.ndarray, "h w 3"], aspect: Fraction) -> UInt8[np.ndarray, "_h _w 3"]:
    if not _NARROWEST <= aspect <= 1 / _NARROWEST:
        raise NotShown(f"has pixels of {aspect.numerator}:{aspect.denominator}; correct its sample aspect ratio")
    height, width = picture.shape[:2]
    size = max(width, round(width * aspect)), max(height, round(height / aspect))
    if size == (width, height):
        return picture
    return np.asarray(Image.fromarray(picture).resize(size, Image.Resampling.BICUBIC))


def _oriented(picture: UInt8[np.ndarray, "h w 3"], frame: av.VideoFrame) -> UInt8[np.ndarray, "_h _w 3"]:
    a, b, c, d = _display_matrix(frame)
    if _is_on_its_side(frame):
        picture, a, d = picture.transpose(1, 0, 2), c, b
    return picture[:: -1 if d < 0 else 1, :: -1 if a < 0 else 1]


def _is_on_its_side(frame: av.VideoFrame) -> bool:
    a, b, c, d = _display_matrix(frame)
    return abs(a) + abs(d) < abs(b) + abs(c)


def _display_matrix(frame: av.VideoFrame) -> tuple[int, int, int, int]:
    """Return the matrix that sends (x, y) to (a x + c y, b x + d y); a negative determinant mirrors."""
    for data in frame.side_data:
        if data.type == SideData.DISPLAYMATRIX:
            a, b, _, c, d = np.frombuffer(bytes(data), np.int32)[:5].tolist()
            return a, b, c, d
    return 1, 0, 0, 1
