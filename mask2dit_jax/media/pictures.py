"""Still and animated pictures. A file is told by its content: its name may have any ending."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import ExifTags, Image, ImageSequence

from mask2dit_jax.errors import UserError

_ENDINGS = ("png", "jpg", "jpeg", "jfif", "webp", "bmp", "tif", "tiff", "avif", "heic", "heif")
# All that Pillow knows well. Others (MPEG, ICNS, EPS and the like) are no pictures to it but stubs, layers or programs.
_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "AVIF", "GIF", "PPM", "JPEG2000")
_ANIMATED = ("PNG", "WEBP", "AVIF", "GIF")  # a JPEG or TIFF of several pictures has a main one, or pages
_HEIC_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"mif1", b"msf1")
_TURNS = {  # by EXIF's orientation
    **{2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM},
    **{5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE},
    8: Image.Transpose.ROTATE_90,
}
_HDR = {16: "PQ", 18: "HLG"}  # transfer functions by their numbers in ITU-T H.273
_LEAST_DELAY, _USUAL_DELAY = 0.02, 0.1  # seconds; browsers show a frame of less than the one for the other


def is_picture(path: str | Path) -> bool:
    """Return whether a file is a still picture, by its content; any other file is read as a video.

    The ending decides only where the content does not: the file is missing or damaged.
    """
    kind, is_animated = _sniff(path)
    return not is_animated if kind else Path(path).suffix.lower().removeprefix(".") in _ENDINGS


def is_animation(path: str | Path) -> bool:
    """Return whether a file is an animated PNG, WebP or AVIF. FFmpeg lacks some of them, but reads every GIF."""
    kind, is_animated = _sniff(path)
    return is_animated and kind != "GIF"


def read_picture(path: str | Path) -> UInt8[np.ndarray, "h w 3"]:
    """Read a picture upright, with 8 bits, and on white where it is transparent.

    Raises:
        UserError: The file is missing, damaged, HDR, or not a picture that Pillow reads.
    """
    transfer = _transfer(path)
    if transfer in _HDR:
        raise UserError(f"{path}: is HDR ({_HDR[transfer]}); convert it to SDR (sRGB) first")
    try:
        with Image.open(path) as image:
            return np.asarray(_plain(_upright(image)))
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file; correct the path of the given scene") from error
    except Exception as error:  # Pillow has no one word for damage
        if _sniff(path)[0] == "HEIC":
            raise UserError(f"{path}: HEIC pictures cannot be read; save it as png, jpg or webp") from error
        raise UserError(f"{path}: damaged or not a picture; give a png, jpg or webp file") from error


def read_animation(path: str | Path) -> Iterator[tuple[float, UInt8[np.ndarray, "h w 3"]]]:
    """Yield the time in seconds and the pixels of every frame, on white where they are transparent.

    Frames last as long as browsers show them: delays below 20 ms are 100 ms.
    """
    with Image.open(path, formats=_ANIMATED) as image:
        time = 0.0
        for number, frame in enumerate(ImageSequence.Iterator(image)):
            if number == 0 and getattr(image, "default_image", False):
                continue  # a PNG may begin with a picture for programs that show no animations
            pixels = np.asarray(_plain(frame))
            delay = frame.info.get("duration", 0) / 1000  # known once the frame is decoded
            yield time, pixels
            time += delay if delay >= _LEAST_DELAY else _USUAL_DELAY


def _sniff(path: str | Path) -> tuple[str, bool]:
    """Return the kind of picture that the file holds, empty if it holds none, and whether it is animated."""
    try:
        with open(path, "rb") as file:
            head = file.read(12)
        if head[4:8] == b"ftyp" and head[8:12] in _HEIC_BRANDS and b"avif" not in _brands(path):
            return "HEIC", False
        with Image.open(path, formats=_FORMATS) as image:
            return image.format, image.format in _ANIMATED and getattr(image, "n_frames", 1) > 1
    except Exception:  # it is missing, or Pillow fails on what it takes for a picture
        return "", False


def _transfer(path: str | Path) -> int | None:
    """Return the transfer function that a PNG or AVIF names in its header, which Pillow does not tell."""
    try:
        with open(path, "rb") as file:
            head = file.read(1 << 16)
    except OSError:
        return None
    place = head.find(b"cICP") + 5 if head.startswith(b"\x89PNG") and b"cICP" in head else None
    if head[4:8] == b"ftyp" and b"colrnclx" in head:
        place = head.index(b"colrnclx") + 11
    return head[place] if place is not None and place < len(head) else None


def _brands(path: str | Path) -> bytes:
    """Return all brands of an ISO file: an AVIF may name the general one, mif1, first."""
    with open(path, "rb") as file:
        return file.read(min(256, int.from_bytes(file.read(4))))


def _upright(image: Image.Image) -> Image.Image:
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation)
    except Exception:  # whatever is wrong with the EXIF, the pixels are fine
        return image
    return image.transpose(_TURNS[orientation]) if orientation in _TURNS else image


def _plain(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image) / 257).round().astype(np.uint8))
    if image.has_transparency_data:
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
    return image.convert("RGB")
