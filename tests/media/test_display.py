"""What is read of a frame is what a player shows of it."""

from fractions import Fraction

import av
import numpy as np
import pytest

from mask2dit_jax.errors import UserError
from mask2dit_jax.media.display import shown_picture
from mask2dit_jax.media.video_reader import iter_frames, probe, read_frames

RED, GREEN, BLUE, GREY = (200, 30, 40), (30, 180, 60), (40, 60, 200), (120, 120, 120)
CORNERS = np.repeat(np.repeat(np.array([[RED, GREEN], [BLUE, GREY]], np.uint8), 24, 0), 32, 1)


def write(
    path, picture, codec="libx264", pixels="yuv444p", matrix=None, aspect=None, options=None, metadata=None, **tags
):
    """Write five equal frames; `tags` are colour properties of the encoder."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=25, options={"crf": "10", **(options or {})})
        stream.height, stream.width, stream.pix_fmt = *picture.shape[:2], pixels
        stream.metadata.update(metadata or {})
        if aspect:
            stream.codec_context.sample_aspect_ratio = aspect
        if matrix:
            a, b, c, d = (number << 16 for number in matrix)
            stream.set_display_matrix([a, b, 0, c, d, 0, 0, 0, 1 << 30])
        for name, value in tags.items():
            setattr(stream.codec_context, name, value)
        for _ in range(5):
            frame = av.VideoFrame.from_ndarray(
                np.ascontiguousarray(picture), format=("rgb24", "rgba")[picture.shape[2] - 3]
            )
            frame = frame.reformat(format=pixels)
            for name, value in tags.items():
                setattr(frame, name, value)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


@pytest.mark.parametrize(("matrix", "shown"), [
    ((-1, 0, 0, 1), CORNERS[:, ::-1]),
    ((1, 0, 0, -1), CORNERS[::-1]),
    ((-1, 0, 0, -1), CORNERS[::-1, ::-1]),
    ((0, 1, 1, 0), CORNERS.transpose(1, 0, 2)),
    ((0, -1, -1, 0), CORNERS.transpose(1, 0, 2)[::-1, ::-1]),
    ((0, 1, -1, 0), np.rot90(CORNERS, -1)),
    ((0, -1, 1, 0), np.rot90(CORNERS, 1)),
])  # fmt: skip
def test_the_display_matrix_turns_and_mirrors(tmp_path, matrix, shown):
    path = write(tmp_path / "phone.mp4", CORNERS, matrix=matrix)
    np.testing.assert_allclose(read_frames(path, [3])[0], shown, atol=8)
    info = probe(path)
    assert (info.height, info.width) == shown.shape[:2]


@pytest.mark.parametrize(("aspect", "matrix", "shape"), [
    (Fraction(2), None, (48, 128)),
    (Fraction(1, 2), None, (96, 64)),
    (Fraction(16, 15), None, (48, 68)),
    (Fraction(2), (0, 1, -1, 0), (128, 48)),
])  # fmt: skip
def test_pixels_become_square(tmp_path, aspect, matrix, shape):
    path = write(tmp_path / "anamorphic.mp4", CORNERS, aspect=aspect, matrix=matrix)
    info = probe(path)
    assert (info.height, info.width) == shape
    frame = next(iter_frames(path))
    assert frame.shape == (*shape, 3)
    quarter = np.array(shape) // 4
    expected = BLUE if matrix else RED
    np.testing.assert_allclose(frame[quarter[0], quarter[1]], expected, atol=8)


def test_absurd_pixels_are_an_error_of_the_file():
    with pytest.raises(UserError, match=r"has pixels of 1:200; correct its sample aspect ratio"):
        shown_picture(yuv_frame((64, 48), 100, 90, 200, 1, 1), Fraction(1, 200))


@pytest.mark.parametrize(("tags", "name"), [
    ({"color_trc": 16, "color_primaries": 9, "colorspace": 9}, "PQ"),
    ({"color_trc": 18, "color_primaries": 9, "colorspace": 9}, "HLG"),
    ({"color_trc": 16}, "PQ"),
    ({"color_primaries": 9, "colorspace": 9}, "BT.2020"),
])  # fmt: skip
def test_hdr_is_never_taken_as_sdr(tmp_path, tags, name):
    path = write(tmp_path / "hdr.mp4", CORNERS, pixels="yuv420p10le", **tags)
    for read in (probe, lambda path: read_frames(path, [0])):
        with pytest.raises(UserError, match=rf"hdr.mp4: is HDR or of a wide gamut \({name}\); convert it to SDR"):
            read(path)


def yuv_frame(size, y, u, v, matrix, value_range, pixels="yuv444p"):
    frame = av.VideoFrame(*size, pixels)
    for plane, level in zip(frame.planes, (y, u, v), strict=True):
        plane.update(bytes([level]) * plane.buffer_size)
    frame.colorspace, frame.color_range = matrix, value_range
    return frame


@pytest.mark.parametrize(("size", "matrix", "value_range", "expected"), [
    ((64, 48), 1, 1, (226, 66, 16)),  # BT.709 as tagged
    ((64, 48), 5, 1, (211, 52, 20)),  # BT.601
    ((64, 48), 6, 1, (211, 52, 20)),
    ((64, 48), 2, 0, (211, 52, 20)),  # untagged: BT.601 if small, BT.709 if large, limited range
    ((720, 576), 2, 0, (211, 52, 20)),
    ((1280, 720), 2, 0, (226, 66, 16)),
    ((1280, 534), 2, 0, (226, 66, 16)),
    ((64, 48), 1, 2, (213, 73, 29)),  # full range
    ((64, 48), 2, 2, (200, 61, 32)),
])  # fmt: skip
def test_colours_by_tag_or_size(size, matrix, value_range, expected):
    shown = shown_picture(yuv_frame(size, 100, 90, 200, matrix, value_range))
    np.testing.assert_allclose(shown[20, 20], expected, atol=3)  # FFmpeg rounds by up to 2, which differs by format


def test_colours_of_an_unknown_kind_are_refused():
    with pytest.raises(UserError, match=r"has colours of an unknown kind \(matrix 8 of H.273\)"):
        shown_picture(yuv_frame((64, 48), 100, 90, 200, 8, 1))


@pytest.mark.parametrize(("name", "codec", "pixels", "extra"), [
    ("a.mov", "prores_ks", "yuva444p10le", {}),
    ("a.mov", "qtrle", "argb", {}),
    ("a.mkv", "ffv1", "bgra", {}),
    ("a.webm", "libvpx-vp9", "yuva420p", {}),
    ("a.webm", "libvpx", "yuva420p", {"options": {"auto-alt-ref": "0"}}),
])  # fmt: skip
def test_transparency_is_over_white(tmp_path, name, codec, pixels, extra):
    picture = np.zeros((48, 64, 4), np.uint8)
    picture[:, :32] = (*RED, 255)
    picture[24:, 32:] = (0, 0, 0, 128)
    frame = read_frames(write(tmp_path / name, picture, codec, pixels, **extra), [3])[0]
    for place, expected in (((10, 10), RED), ((10, 54), (255,) * 3), ((40, 54), (127,) * 3)):
        np.testing.assert_allclose(frame[place], expected, atol=12)
