"""Given scenes: what of a picture or a clip is used, and what is said of the rest."""

import dataclasses
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mask2dit_jax.errors import UserError
from mask2dit_jax.media.video_writer import write_video
from mask2dit_jax.story.given import check_given, read_given
from mask2dit_jax.story.story import Scene
from tests.data.odd_clips import write_packets

SIZE = (16, 32)


def shown(path) -> np.ndarray:
    """The first frame, as bytes."""
    frame = read_given(Scene("a", given=str(path)), 1, 8, SIZE)[0]
    return ((frame + 1) * 127.5).round().astype(np.uint8)


def test_a_photo_of_a_phone_is_turned_upright(tmp_path):
    pixels = np.zeros((32, 16, 3), np.uint8)
    pixels[:16] = 255  # the half that is on the right when it is turned
    turned = Image.fromarray(pixels)
    exif = turned.getexif()
    exif[0x0112] = 6  # Orientation: turn it clockwise
    turned.save(tmp_path / "photo.png", exif=exif)
    frame = shown(tmp_path / "photo.png")
    assert (frame[:, :15] == 0).all()
    assert (frame[:, 17:] == 255).all()


@pytest.mark.parametrize(("mode", "pixel", "expected"), [
    ("L", 100, (100, 100, 100)),
    ("RGBA", (200, 100, 0, 255), (200, 100, 0)),
    ("RGBA", (200, 100, 0, 0), (255, 255, 255)),
    ("LA", (0, 0), (255, 255, 255)),
    ("I;16", 257 * 50, (50, 50, 50)),
])  # fmt: skip
def test_pixels_of_every_kind(tmp_path, mode, pixel, expected):
    sixteen_bit = Image.fromarray(np.full(SIZE, pixel, np.uint16)) if mode == "I;16" else None
    image = sixteen_bit or Image.new(mode, SIZE[::-1], pixel)
    image.save(tmp_path / "picture.png")
    assert (shown(tmp_path / "picture.png") == expected).all()


def second_chunk_of_pixels(whole: bytes) -> int:
    return whole.index(b"IDAT", whole.index(b"IDAT") + 4)


@pytest.mark.parametrize("position", [
    lambda whole: whole.index(b"IHDR") - 1,  # its length: a ValueError of Pillow's
    second_chunk_of_pixels,  # its name: a SyntaxError
    lambda whole: 3,  # that it is a png at all
])  # fmt: skip
def test_a_damaged_picture_is_one_line(tmp_path, position):
    path = tmp_path / "a.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (400, 400, 3), np.uint8)).save(path)
    damaged = bytearray(path.read_bytes())
    damaged[position(bytes(damaged))] &= 0x03
    path.write_bytes(damaged)
    with pytest.raises(UserError, match=r"a\.png: damaged or not a picture; give a png, jpg or webp file"):
        shown(path)


@pytest.mark.parametrize(("fps", "count", "told"), [
    (8, 9, ""),
    (24, 25, ""),
    (8, 160, "the first 1.1 s of its 20.0 s are the scene; `start: 18.8` in a story file takes the last"),
    (12, 17, "12 frames a second become 8, so that it is 1.33 times as fast"),
    (6, 9, "6 frames a second become 8, so that it is 1.33 times as fast"),
])  # fmt: skip
def test_what_is_said_of_a_clip(tmp_path, caplog, fps, count, told):
    write_video(tmp_path / "clip.mp4", np.zeros((count, *SIZE, 3), np.uint8), fps)
    check_given(Scene("a", given=str(tmp_path / "clip.mp4")), 9, 8, SIZE)
    assert told in caplog.text
    assert bool(told) == bool(caplog.text)


def test_a_clip_from_a_place_in_it(tmp_path, caplog):
    """At 24 frames a second in a story of 8: every third frame from the one that is shown at that time."""
    greys = np.arange(100, dtype=np.uint8)[:, None, None, None] * 2
    write_video(tmp_path / "clip.mp4", np.tile(greys, (1, *SIZE, 3)), 24)
    scene = Scene("a", given=str(tmp_path / "clip.mp4"), start=2.5)
    check_given(scene, 9, 8, SIZE)
    assert not caplog.text
    levels = (read_given(scene, 9, 8, SIZE).mean((1, 2, 3)) + 1) * 127.5
    np.testing.assert_allclose(levels, np.arange(60, 85, 3) * 2, atol=1.5)
    with pytest.raises(UserError, match=r"9 frames at 8 a second from second 3.5 on need 109 of its 24 a second"):
        check_given(Scene("a", given=scene.given, start=3.5), 9, 8, SIZE)


def test_the_start_that_is_advised_is_one(tmp_path, caplog):
    write_video(tmp_path / "clip.mp4", np.zeros((480, *SIZE, 3), np.uint8), 24)
    scene = Scene("a", given=str(tmp_path / "clip.mp4"))
    check_given(scene, 9, 8, SIZE)
    advised = float(re.search(r"`start: ([\d.]+)`", caplog.text)[1])
    check_given(dataclasses.replace(scene, start=advised), 9, 8, SIZE)


def test_exif_that_cannot_be_read_costs_no_picture(tmp_path):
    path = tmp_path / "photo.webp"
    image = Image.new("RGB", SIZE[::-1], (200, 100, 0))
    exif = image.getexif()
    exif[0x0112] = 6
    image.save(path, exif=b"Exif\x00\x00" + exif.tobytes()[6:14], lossless=True)
    np.testing.assert_array_equal(shown(path)[0, 0], (200, 100, 0))


def brightness(frames) -> np.ndarray:
    return (frames.mean((1, 2, 3)) + 1) * 127.5


def varying_clip(folder, name="vfr.mp4"):
    """Four seconds that grow lighter by 40 a second from 20: 30 frames in the first second, then 10 a second."""
    times = np.concatenate([np.arange(30) / 30, 1 + np.arange(31) / 10])
    levels = (20 + 40 * times).round().astype(np.uint8)
    frames = np.broadcast_to(levels[:, None, None, None], (len(times), 32, 48, 3))
    write_packets(folder / name, frames, times=(times * 1000).round().astype(int).tolist())
    return folder / name


@pytest.mark.parametrize("start", [0, 0.5, 2.0, 2.9])
@pytest.mark.parametrize("name", ["vfr.mp4", "vfr.mkv"])
def test_a_varying_rate_goes_by_time_stamps(tmp_path, caplog, name, start):
    scene = Scene("a", given=str(varying_clip(tmp_path, name)), start=start)
    check_given(scene, 9, 8, SIZE)
    assert "times as fast" not in caplog.text
    expected = 20 + 40 * (start + np.arange(9) / 8)
    shown = brightness(read_given(scene, 9, 8, SIZE))
    assert (shown < expected + 1.5).all()  # a frame stays for up to 0.1 s
    assert (shown > expected - 4 - 1.5).all()


def test_a_varying_rate_that_ends_too_early(tmp_path):
    scene = Scene("a", given=str(varying_clip(tmp_path)), start=3.5)
    with pytest.raises(UserError, match=r"9 frames at 8 a second from second 3.5 on need 4.5 of its 4.1 s"):
        check_given(scene, 9, 8, SIZE)


@pytest.mark.parametrize("name", ["a.gif", "a.webp", "a.png"])
def test_an_animation_goes_by_its_delays(tmp_path, caplog, name):
    delays = [100, 400, 100, 300, 100, 100, 400]  # milliseconds
    images = [Image.new("RGB", SIZE[::-1], (30 * number,) * 3) for number in range(7)]
    images[0].save(tmp_path / name, save_all=True, append_images=images[1:], duration=delays, loop=0)
    scene = Scene("a", given=str(tmp_path / name), start=0.1)
    check_given(scene, 9, 8, SIZE)
    assert "times as fast" not in caplog.text
    starts = np.cumsum([0, *delays[:-1]]) / 1000
    moments = 0.1 + np.arange(9) / 8
    expected = 30 * (np.searchsorted(starts, moments + 1e-3, "right") - 1)
    np.testing.assert_allclose(brightness(read_given(scene, 9, 8, SIZE)), expected, atol=4)


@pytest.mark.parametrize("kind", ["JPEG", "TIFF", "AVIF"])
def test_a_picture_is_told_by_its_content(tmp_path, kind):
    Image.new("RGB", SIZE[::-1], (200, 100, 0)).save(tmp_path / "picture.mp4", kind)
    check_given(Scene("a", given=str(tmp_path / "picture.mp4")), 9, 8, SIZE)
    np.testing.assert_allclose(shown(tmp_path / "picture.mp4")[0, 0], (200, 100, 0), atol=6)


def test_a_damaged_frame_is_found_before_anything_is_made(caplog):
    path = str(Path(__file__).parents[1] / "media/one_bit_flipped.mp4")
    with pytest.raises(UserError, match=r"one_bit_flipped.mp4: damaged, as of frame 16"):
        check_given(Scene("a", given=path), 9, 8, SIZE)
    check_given(Scene("a", given=path), 5, 8, SIZE)  # frames 0 to 12
