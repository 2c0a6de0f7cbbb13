"""Tests that frames are read exactly, and that every kind of bad file is named."""

import os

import av
import numpy as np
import pytest

from mask2dit_jax.errors import UserError
from mask2dit_jax.media.video_reader import iter_frames, probe, read_frames
from mask2dit_jax.media.video_writer import write_video
from tests.data.clips import frame_numbers, make_clip, numbered_frames
from tests.data.odd_clips import uneven_times, write_packets


@pytest.fixture
def clip(tmp_path):
    return make_clip(tmp_path, count=20).path


def test_probe(clip):
    info = probe(clip)
    assert (info.num_frames, info.width, info.height, info.fps, info.duration) == (20, 48, 32, 25, 0.8)


def test_reads_exactly_the_frames_asked_for(clip):
    assert frame_numbers(read_frames(clip, [0, 1, 2])) == [0, 1, 2]
    assert frame_numbers(read_frames(clip, [19, 3, 3])) == [19, 3, 3]
    assert frame_numbers(np.stack(list(iter_frames(clip)))) == list(range(20))


@pytest.mark.parametrize("indices", [[20], [0, 400]])
def test_index_beyond_the_end(clip, indices):
    with pytest.raises(UserError, match=rf"clip.mp4: frame {indices[-1]} was asked for, but only 20 frames"):
        read_frames(clip, indices)


@pytest.mark.parametrize("indices", [[-1], []])
def test_impossible_indices(clip, indices):
    with pytest.raises(UserError, match=r"clip.mp4: frame indices"):
        read_frames(clip, indices)


def test_colours_survive(tmp_path):
    colours = np.array([[200, 30, 40], [30, 180, 60], [40, 60, 200]], np.uint8)
    frames = np.repeat(colours, 16, axis=0)[None, None].repeat(4, 0).repeat(32, 1)
    write_video(tmp_path / "colours.mp4", frames, 25)
    read = read_frames(tmp_path / "colours.mp4", [2])[0, 16, 8::16]
    np.testing.assert_allclose(read, colours, atol=6)


def test_counts_where_the_header_has_no_count(tmp_path):
    path = tmp_path / "clip.mkv"
    with av.open(path, "w") as container:
        stream = container.add_stream("libx264", rate=25)
        stream.width, stream.height, stream.pix_fmt = 48, 32, "yuv420p"
        for frame in numbered_frames(12):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame)))
        container.mux(stream.encode(None))
    with av.open(path) as container:
        assert container.streams.video[0].frames == 0
    assert probe(path).num_frames == 12
    assert frame_numbers(read_frames(path, [11, 4])) == [11, 4]


@pytest.mark.parametrize("degrees", [90, -90, 180])
def test_rotation_is_undone(tmp_path, degrees):
    """Phones store frames sideways with a rotation flag. The marked corner shows that the rotation was applied."""
    upright = np.full((5, 32, 48, 3), 60, np.uint8)
    upright[:, :16, :16] = 230
    path = tmp_path / "phone.mp4"
    with av.open(path, "w") as container:
        stored = np.rot90(upright, -degrees // 90, axes=(1, 2))
        stream = container.add_stream("libx264", rate=25)
        stream.height, stream.width = stored.shape[1:3]
        stream.pix_fmt = "yuv420p"
        stream.set_display_rotation(degrees)  # counter-clockwise
        for frame in stored:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(frame))))
        container.mux(stream.encode(None))
    info = probe(path)
    assert (info.width, info.height) == (48, 32)
    np.testing.assert_allclose(read_frames(path, [3])[0], upright[3], atol=12)


def test_a_varying_frame_rate_changes_no_frame_number(tmp_path):
    write_packets(tmp_path / "uneven.mp4", numbered_frames(20), times=uneven_times(20))
    assert probe(tmp_path / "uneven.mp4").num_frames == 20
    assert frame_numbers(read_frames(tmp_path / "uneven.mp4", [0, 7, 19])) == [0, 7, 19]
    assert frame_numbers(np.stack(list(iter_frames(tmp_path / "uneven.mp4")))) == list(range(20))


def test_odd_sizes(tmp_path):
    frames = numbered_frames(6, 33, 47)
    frames[:, :, -1] = 255  # shows that the last column is read
    write_packets(tmp_path / "odd.mp4", frames, pixels="yuv444p")
    info = probe(tmp_path / "odd.mp4")
    assert (info.num_frames, info.width, info.height) == (6, 47, 33)
    read = read_frames(tmp_path / "odd.mp4", [5])[0]
    np.testing.assert_allclose(read, frames[5], atol=12)


def test_a_name_that_is_not_utf_8(clip):
    path = clip.rename(clip.parent / os.fsdecode(b"caf\xe9.mp4"))
    assert probe(path).num_frames == 20
    assert frame_numbers(read_frames(path, [3, 17])) == [3, 17]


def test_missing(tmp_path):
    for read in (probe, lambda path: read_frames(path, [0])):
        with pytest.raises(UserError, match=r"gone.mp4: no such file"):
            read(tmp_path / "gone.mp4")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "the file is empty"),
        (b"%PDF-1.4\n" + b"1 0 obj << /Type /Catalog >> endobj\n" * 50, "damaged, truncated or not a video"),
        (b"just some text, line by line\n" * 100, "damaged, truncated or not a video"),
    ],
)
def test_no_video(tmp_path, content, reason):
    path = tmp_path / "renamed.mp4"
    path.write_bytes(content)
    for read in (probe, lambda path: read_frames(path, [0])):
        with pytest.raises(UserError, match=rf"renamed.mp4.*{reason}.*replace the file or remove it"):
            read(path)


def test_sound_only(tmp_path):
    path = tmp_path / "sound.mp4"
    with av.open(path, "w") as container:
        stream = container.add_stream("aac", rate=44100)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 44100), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 44100
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    with pytest.raises(UserError, match=r"sound.mp4: has no video stream"):
        probe(path)


@pytest.mark.parametrize("part", [0.3, 0.6, 0.95])
def test_truncated(tmp_path, part):
    """`write_video` puts the index at the front, so a truncated file still opens and promises all of its frames."""
    noise = np.random.default_rng(0).integers(0, 255, (30, 32, 48, 3)).astype(np.uint8)
    path = tmp_path / "cut.mp4"
    write_video(path, noise, 25)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * part)])
    with pytest.raises(UserError, match=r"cut.mp4: truncated, \d+ of 30 frames"):
        probe(path)
    with pytest.raises(UserError, match=r"cut.mp4: (frame 29 was asked for, but only|damaged)"):
        read_frames(path, range(30))


def test_truncated_with_the_index_at_the_end(tmp_path):
    path = tmp_path / "cut.mp4"
    with av.open(path, "w") as container:
        stream = container.add_stream("libx264", rate=25)
        stream.width, stream.height, stream.pix_fmt = 48, 32, "yuv420p"
        for frame in numbered_frames(12):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame)))
        container.mux(stream.encode(None))
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(UserError, match=r"cut.mp4: (damaged, )?truncated"):
        probe(path)


def test_messages_are_one_line(tmp_path):
    (tmp_path / "x.mp4").write_bytes(b"nonsense" * 100)
    with pytest.raises(UserError) as error:
        probe(tmp_path / "x.mp4")
    assert "\n" not in str(error.value)
