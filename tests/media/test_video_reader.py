"""Tests that frames are read exactly, and that every kind of bad file is named."""

import os
from pathlib import Path

import av
import numpy as np
import pytest

from mask2dit_jax.errors import UserError
from mask2dit_jax.media.video_reader import check_frames, iter_frames, probe, read_frames
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


def encode(container, stream, frames, times=None):
    for number, frame in enumerate(frames):
        picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame))
        if times is not None:
            picture.pts = times[number]
        container.mux(stream.encode(picture))
    container.mux(stream.encode(None))


def agreed_count(path):
    """The count of a probe, fast or not, which must be that of decoding."""
    counts = {probe(path).num_frames, probe(path, all_frames=True).num_frames, sum(1 for _ in iter_frames(path))}
    assert len(counts) == 1
    return counts.pop()


def assert_refused(path, reason, all_frames=False):
    """What a probe refuses, decoding refuses with the same words."""
    for read in (lambda path: probe(path, all_frames), check_frames, lambda path: list(iter_frames(path))):
        with pytest.raises(UserError, match=rf"{path.name}: .*{reason}"):
            read(path)


@pytest.mark.parametrize("name", ["Scene: one.mp4", "http:a.mp4", "concat:a|b.mp4", "-i.mp4"])
def test_a_name_that_looks_like_an_address_or_a_flag_is_a_file(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    write_video(name, numbered_frames(5), 25)
    assert agreed_count(name) == 5
    Path("out: 1").mkdir()
    write_video("out: 1/a.mp4", numbered_frames(3), 25)
    assert agreed_count("out: 1/a.mp4") == 3


def test_a_file_that_refers_to_the_network_reads_nothing(tmp_path):
    path = tmp_path / "list.mp4"
    path.write_text("#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nhttp://localhost:1/a.ts\n#EXT-X-ENDLIST\n")
    with pytest.raises(UserError, match=r"list.mp4: "):
        probe(path)


@pytest.mark.parametrize("default", ["still", "moving"])
def test_the_moving_track_is_read(tmp_path, default):
    path = tmp_path / "thumbnail.mkv"
    with av.open(str(path), "w") as container:
        still = container.add_stream("mjpeg", rate=1)
        still.height, still.width, still.pix_fmt = 24, 32, "yuvj420p"
        moving = container.add_stream("libx264", rate=25)
        moving.height, moving.width, moving.pix_fmt = 32, 48, "yuv420p"
        {"still": still, "moving": moving}[default].disposition = av.stream.Disposition.default
        encode(container, still, numbered_frames(1, 24, 32))
        encode(container, moving, numbered_frames(20))
    assert agreed_count(path) == 20
    assert probe(path).width == 48


def test_a_cover_is_no_video(tmp_path):
    path = tmp_path / "song.mp4"
    with av.open(str(path), "w") as container:
        cover = container.add_stream("mjpeg", rate=1)
        cover.height, cover.width, cover.pix_fmt = 32, 48, "yuvj420p"
        cover.disposition = av.stream.Disposition.attached_pic
        encode(container, cover, numbered_frames(1))
    with pytest.raises(UserError, match=r"song.mp4: has no moving picture"):
        probe(path)


def test_one_flipped_bit_is_found_where_all_is_decoded():
    path = Path(__file__).parent / "one_bit_flipped.mp4"  # FFmpeg decodes all 60 frames, 44 of them wrong
    assert probe(path).num_frames == 60
    for _ in range(5):
        assert_refused(path, "damaged, as of frame 16", all_frames=True)
    assert len(read_frames(path, range(16))) == 16
    check_frames(path, 16)


@pytest.fixture
def noise_ts(tmp_path):
    noise = np.random.default_rng(0).integers(0, 255, (40, 48, 64, 3)).astype(np.uint8)
    write_packets(tmp_path / "noise.ts", noise)
    return (tmp_path / "noise.ts").read_bytes()


@pytest.mark.parametrize("first", [50, 100, 200, 300])
def test_lost_packets_are_found(tmp_path, noise_ts, first):
    (tmp_path / "lost.ts").write_bytes(noise_ts[: 188 * first] + noise_ts[188 * (first + 10) :])
    assert_refused(tmp_path / "lost.ts", "damaged")


def test_a_truncated_transport_stream_is_found_every_time(tmp_path, noise_ts):
    """With a thread a frame, FFmpeg forgets the flag of the last frame in two of five runs."""
    (tmp_path / "cut.ts").write_bytes(noise_ts[: -188 * 5])
    for _ in range(5):
        assert_refused(tmp_path / "cut.ts", "damaged")


def test_joined_transport_streams_are_whole(tmp_path, noise_ts):
    (tmp_path / "joined.ts").write_bytes(noise_ts * 2)
    assert agreed_count(tmp_path / "joined.ts") == 80
    times = probe(tmp_path / "joined.ts").times
    assert list(times) == sorted(times)


def test_a_size_that_changes_in_a_transport_stream(tmp_path):
    write_packets(tmp_path / "small.ts", numbered_frames(20))
    write_packets(tmp_path / "large.ts", numbered_frames(20, 64, 96))
    path = tmp_path / "resize.ts"
    path.write_bytes((tmp_path / "small.ts").read_bytes() + (tmp_path / "large.ts").read_bytes())
    assert_refused(path, "the picture changes its size at frame 20, from 48 x 32 to 96 x 64; cut the video there")
    assert frame_numbers(read_frames(path, [0, 19])) == [0, 19]


def test_a_turn_within_a_clip_changes_its_size_too(tmp_path):
    write_packets(tmp_path / "plain.ts", numbered_frames(20))
    with av.open(str(tmp_path / "plain.ts")) as source, av.open(str(tmp_path / "turned.ts"), "w") as container:
        copy = container.add_stream_from_template(source.streams.video[0])
        turn = av.BitStreamFilterContext(
            "h264_metadata=display_orientation=insert:rotate=90", source.streams.video[0], copy
        )
        for packet in source.demux(video=0):
            for turned in turn.filter(packet if packet.size else None):
                turned.stream = copy
                container.mux(turned)
    # FFmpeg turns the key frame alone, which holds the message.
    assert_refused(tmp_path / "turned.ts", "the picture changes its size at frame 1, from 32 x 48 to 48 x 32")


@pytest.mark.parametrize(("codec", "name"), [("libvpx", "a.webm"), ("libvpx-vp9", "a.webm"), ("libx264", "a.mkv")])
def test_a_size_that_changes_in_a_file(tmp_path, codec, name):
    path = tmp_path / name
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=25)
        stream.height, stream.width, stream.pix_fmt = 32, 48, "yuv420p"
        encode(container, stream, numbered_frames(10))
        larger = av.CodecContext.create(codec, "w")
        larger.height, larger.width, larger.pix_fmt = 64, 96, "yuv420p"
        larger.time_base = stream.codec_context.time_base
        packets = []
        for number, frame in enumerate(numbered_frames(10, 64, 96)):
            picture = av.VideoFrame.from_ndarray(frame).reformat(format="yuv420p")
            picture.pts, picture.time_base = 10 + number, larger.time_base
            packets += larger.encode(picture)
        for packet in [*packets, *larger.encode(None)]:
            packet.stream, packet.time_base = stream, larger.time_base
            container.mux(packet)
    assert_refused(path, "the picture changes its size at frame 10, from 48 x 32 to 96 x 64")


@pytest.mark.parametrize("name", ["cut.ts", "cut.mkv"])
def test_what_comes_before_the_first_key_frame_does_not_count(tmp_path, name):
    whole = tmp_path / "whole.mkv"
    with av.open(str(whole), "w") as container:
        stream = container.add_stream("libx264", rate=25, options={"g": "15", "keyint_min": "15", "sc_threshold": "0"})
        stream.height, stream.width, stream.pix_fmt = 32, 48, "yuv420p"
        encode(container, stream, numbered_frames(45))
    with av.open(str(whole)) as source, av.open(str(tmp_path / name), "w") as container:
        copy = container.add_stream_from_template(source.streams.video[0])
        for packet in [packet for packet in source.demux(video=0) if packet.size][5:]:
            packet.stream = copy
            container.mux(packet)
    count = agreed_count(tmp_path / name)
    assert count == 30
    assert frame_numbers(read_frames(tmp_path / name, [0, count - 1])) == [15, 44]


def test_frames_that_an_avi_leaves_out_are_repeated(tmp_path):
    """FFmpeg writes an empty chunk for every moment that has no frame of its own, as capture programs do."""
    path = tmp_path / "capture.avi"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=25, options={"qscale": "2"})
        stream.height, stream.width, stream.pix_fmt = 32, 48, "yuv420p"
        encode(container, stream, numbered_frames(50)[::10], times=[0, 1, 4, 6, 7])
    with av.open(str(path)) as container:
        assert container.streams.video[0].frames == 8
    assert agreed_count(path) == 8
    assert frame_numbers(np.stack(list(iter_frames(path)))) == [0, 10, 10, 10, 20, 20, 30, 40]
    np.testing.assert_allclose(probe(path).times, np.arange(8) / 25)
    content = path.read_bytes()
    path.write_bytes(content[: content.rindex(b"00dc", 0, content.index(b"idx1"))])  # without the last frame
    with pytest.raises(UserError, match=r"capture.avi: truncated, 7 of 8 frames are present"):
        probe(path)


def test_packets_that_show_nothing_do_not_count(tmp_path):
    noise = np.cumsum(np.random.default_rng(0).integers(-5, 6, (60, 48, 64, 3)), axis=0) + 128
    path = tmp_path / "hidden.webm"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libvpx", rate=25, options={"auto-alt-ref": "1", "lag-in-frames": "16"})
        stream.height, stream.width, stream.pix_fmt = 48, 64, "yuv420p"
        encode(container, stream, noise.clip(0, 255).astype(np.uint8))
    assert agreed_count(path) == 60


def test_times_are_those_of_the_time_stamps(tmp_path):
    times = uneven_times(20)
    write_packets(tmp_path / "uneven.mp4", numbered_frames(20), times=times)
    info = probe(tmp_path / "uneven.mp4")
    np.testing.assert_allclose(info.times, (times - times[0]) / 1000, atol=1e-3)
    assert not info.is_steady
    write_packets(tmp_path / "uneven.mkv", numbered_frames(20), times=times)  # Matroska states 25 frames a second
    rates = [float(info.fps), float(probe(tmp_path / "uneven.mkv").fps)]
    np.testing.assert_allclose(rates, 10, rtol=0.1)
    write_packets(tmp_path / "even.mkv", numbered_frames(20), format="matroska")
    assert probe(tmp_path / "even.mkv").is_steady


def test_whatever_a_decoder_raises_names_the_file(clip, monkeypatch):
    def fail(*_):
        raise ZeroDivisionError("in a\ndecoder")

    monkeypatch.setattr("mask2dit_jax.media.video_reader.shown_picture", fail)
    with pytest.raises(UserError, match=r"clip.mp4: cannot be read \(ZeroDivisionError in a decoder\)"):
        probe(clip)
