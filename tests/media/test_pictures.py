"""Pictures and clips are told apart by what is in the file."""

import zlib

import numpy as np
import pytest
from PIL import Image

from mask2dit_jax.errors import UserError
from mask2dit_jax.media.pictures import is_picture, read_picture
from mask2dit_jax.media.video_reader import iter_frames, probe
from tests.data.clips import make_clip

COLOURS = ((200, 30, 40), (30, 180, 60), (40, 60, 200), (120, 120, 120))
DELAYS = [100, 200, 300, 100]  # milliseconds


def images():
    return [Image.new("RGB", (64, 48), colour) for colour in COLOURS]


@pytest.mark.parametrize(("name", "kind"), [
    ("a.jfif", "JPEG"), ("a.tiff", "TIFF"), ("a.avif", "AVIF"), ("a.jpg", "WEBP"), ("a.mp4", "PNG"), ("a", "JPEG"),
    ("a.gif", "GIF"), ("a.ppm", "PPM"), ("a.jp2", "JPEG2000"),
])  # fmt: skip
def test_a_still_picture_of_any_name(tmp_path, name, kind):
    images()[0].save(tmp_path / name, kind)
    assert is_picture(tmp_path / name)
    np.testing.assert_allclose(read_picture(tmp_path / name)[20, 20], COLOURS[0], atol=6)


def test_pages_and_second_pictures_are_no_animation(tmp_path):
    """Phones add a second picture to a JPEG (MPO); a TIFF may have pages."""
    for name in ("a.tiff", "a.mpo"):
        images()[0].save(tmp_path / name, save_all=True, append_images=images()[1:])
        assert is_picture(tmp_path / name)
        np.testing.assert_allclose(read_picture(tmp_path / name)[20, 20], COLOURS[0], atol=6)


@pytest.mark.parametrize("kind", ["WEBP", "PNG", "GIF", "AVIF"])
def test_an_animation_of_any_name_is_a_clip(tmp_path, kind):
    path = tmp_path / "a.png"
    images()[0].save(path, kind, save_all=True, append_images=images()[1:], duration=DELAYS, loop=0)
    assert not is_picture(path)
    info = probe(path)
    assert (info.num_frames, info.height, info.width) == (4, 48, 64)
    np.testing.assert_allclose(info.times, (0, 0.1, 0.3, 0.6), atol=1e-6)
    frames = np.stack(list(iter_frames(path)))
    np.testing.assert_allclose(frames[:, 20, 20], COLOURS, atol=8)


def test_an_animation_is_over_white(tmp_path):
    clear = [Image.new("RGBA", (64, 48), (0, 0, 0, 128 * number)) for number in range(2)]
    clear[0].save(tmp_path / "a.webp", save_all=True, append_images=clear[1:], duration=100, lossless=True)
    assert [frame[0, 0, 0] for frame in iter_frames(tmp_path / "a.webp")] == [255, 127]


def test_a_video_of_any_name_is_a_clip(tmp_path):
    make_clip(tmp_path).path.rename(tmp_path / "a.png")
    assert not is_picture(tmp_path / "a.png") or probe(tmp_path / "a.png").num_frames == 20


@pytest.mark.parametrize("brand", [b"heic", b"mif1"])
def test_heic_is_a_picture_that_is_refused_by_name(tmp_path, brand):
    (tmp_path / "a.bin").write_bytes(b"\x00\x00\x00\x18ftyp" + brand + b"\x00\x00\x00\x00mif1heic" + bytes(50))
    assert is_picture(tmp_path / "a.bin")
    with pytest.raises(UserError, match=r"a.bin: HEIC pictures cannot be read; save it as png, jpg or webp"):
        read_picture(tmp_path / "a.bin")


@pytest.mark.parametrize(("transfer", "name"), [(16, "PQ"), (18, "HLG")])
def test_an_hdr_picture_is_refused(tmp_path, transfer, name):
    images()[0].save(tmp_path / "a.png")
    images()[0].save(tmp_path / "a.avif")
    content = (tmp_path / "a.png").read_bytes()
    chunk = b"cICP" + bytes([9, transfer, 0, 1])
    chunk = (4).to_bytes(4) + chunk + zlib.crc32(chunk).to_bytes(4)
    (tmp_path / "a.png").write_bytes(content[:33] + chunk + content[33:])
    content = bytearray((tmp_path / "a.avif").read_bytes())
    content[content.index(b"colrnclx") + 11] = transfer
    (tmp_path / "a.avif").write_bytes(content)
    for ending in ("png", "avif"):
        with pytest.raises(UserError, match=rf"a.{ending}: is HDR \({name}\); convert it"):
            read_picture(tmp_path / f"a.{ending}")


def test_the_ending_decides_for_a_missing_file(tmp_path):
    assert is_picture(tmp_path / "gone.jfif")
    assert not is_picture(tmp_path / "gone.mp4")
    assert not is_picture("")
