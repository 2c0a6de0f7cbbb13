import hashlib
import itertools
import json
import os
from fractions import Fraction

import av
import numpy as np
import pytest

from mask2dit_jax.curate.demo import demo_videos
from mask2dit_jax.curate.shots import find_shots, write_shots
from mask2dit_jax.errors import UserError
from mask2dit_jax.media.video_reader import iter_frames, probe, read_frames
from mask2dit_jax.media.video_writer import ENCODER, write_video

CUTS = (0, 25, 60, 90)


def scenes(cuts=CUTS, height=64, width=96):
    """A different picture between any two cuts, with a light that moves, so that no two frames are alike."""
    rng = np.random.default_rng(0)
    frames = []
    for start, stop in itertools.pairwise(cuts):
        picture = np.kron(rng.integers(0, 256, (height // 16, width // 16, 3)), np.ones((16, 16, 1)))
        for frame in range(start, stop):
            frames.append(picture.copy())
            frames[-1][:8, frame % width] = 255
    return np.stack(frames).astype(np.uint8)


@pytest.fixture
def video(tmp_path):
    write_video(tmp_path / "film.mp4", scenes(), 25)
    return tmp_path / "film.mp4"


def bounds(shots):
    return [(shot.start, shot.stop) for shot in shots]


def test_finds_the_cuts(video):
    shots = find_shots(video)
    assert bounds(shots) == [(0, 25), (25, 60), (60, 90)]
    assert [shot.name for shot in shots] == ["film-1", "film-2", "film-3"]


def test_one_shot(tmp_path):
    write_video(tmp_path / "calm.mp4", scenes((0, 40)), 25)
    assert bounds(find_shots(tmp_path / "calm.mp4")) == [(0, 40)]


def test_threshold(video):
    assert bounds(find_shots(video, threshold=250.0)) == [(0, 90)]


def test_varying_frame_rate(tmp_path):
    """Time stamps say little about frame numbers here; the cut must still be between the frames it is between."""
    path = tmp_path / "phone.mp4"
    with av.open(path, "w") as container:
        stream = container.add_stream("libx264", rate=25)
        stream.width, stream.height, stream.pix_fmt = 96, 64, "yuv420p"
        stream.codec_context.time_base = Fraction(1, 1000)
        time = 0
        for number, image in enumerate(scenes((0, 30, 60))):
            frame = av.VideoFrame.from_ndarray(image)
            frame.pts, frame.time_base = time, Fraction(1, 1000)
            time += 20 if number < 30 else 90
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    assert bounds(find_shots(path)) == [(0, 30), (30, 60)]


def test_writes_each_shot(video, tmp_path):
    shots = find_shots(video)
    paths = write_shots([shots[0], shots[2]], tmp_path / "shots")  # one in between is left out
    assert [path.name for path in paths] == ["film-1.mp4", "film-3.mp4"]
    original = np.stack(list(iter_frames(video))).astype(int)
    for path, shot in zip(paths, (shots[0], shots[2]), strict=True):
        assert (probe(path).num_frames, probe(path).fps) == (shot.num_frames, 25)
        frames = read_frames(path, range(shot.num_frames))
        assert np.abs(frames - original[shot.start : shot.stop]).mean() < 3


def test_goes_on_where_it_stopped(video, tmp_path):
    shots = find_shots(video)
    paths = write_shots(shots, tmp_path)
    contents = [np.stack(list(iter_frames(path))) for path in paths]
    paths[0].write_bytes(paths[0].read_bytes()[:-100])
    paths[1].unlink()
    kept = paths[2].stat().st_mtime_ns
    assert write_shots(shots, tmp_path) == paths
    for path, frames in zip(paths, contents, strict=True):
        assert np.abs(np.stack(list(iter_frames(path))).astype(int) - frames).mean() < 1
    assert paths[2].stat().st_mtime_ns == kept


def test_a_newer_video_is_cut_again(video, tmp_path):
    shots = find_shots(video)
    (path, *_) = write_shots(shots, tmp_path)
    before = read_frames(path, [0])
    write_video(video, 255 - scenes(), 25)
    write_shots(find_shots(video), tmp_path)
    assert np.abs(read_frames(path, [0]).astype(int) - before).mean() > 20


def greys(path, *values, frames=30):
    """A film of grey shots, one of each value; they differ more or less."""
    write_video(
        path, np.repeat(np.array(values, np.uint8), frames)[:, None, None, None] * np.ones((64, 96, 3), "u1"), 25
    )
    return path


def shown(paths):
    return [round(read_frames(path, [15]).mean() / 10) * 10 for path in paths]


def test_another_threshold_cuts_shots_of_one_number_and_length_anew(tmp_path):
    """With the low threshold, weak-2 is grey 100; with the high one it was 250, of the same length."""
    film = greys(tmp_path / "weak.mp4", 60, 100, 250)
    few = find_shots(film, 27.0)
    assert bounds(few) == [(0, 60), (60, 90)]
    assert shown(write_shots(few, tmp_path / "out"))[1] == 250
    many = find_shots(film, 8.0)
    assert bounds(many) == [(0, 30), (30, 60), (60, 90)]
    assert shown(write_shots(many, tmp_path / "out")) == [60, 100, 250]
    assert shown(write_shots(few, tmp_path / "out"))[1] == 250


def test_a_video_replaced_by_an_older_one_is_cut_again(tmp_path):
    film = greys(tmp_path / "film.mp4", 20, 200)
    assert shown(write_shots(find_shots(film), tmp_path / "out")) == [20, 200]
    greys(film, 230, 40)
    os.utime(film, (1, 1))
    assert shown(write_shots(find_shots(film), tmp_path / "out")) == [230, 40]


def test_a_copied_or_touched_video_is_not_cut_again(tmp_path):
    film = greys(tmp_path / "film.mp4", 20, 200)
    paths = write_shots(find_shots(film), tmp_path / "out")
    before = [path.stat().st_mtime_ns for path in paths]
    other = tmp_path / "copy" / "film.mp4"
    other.parent.mkdir()
    other.write_bytes(film.read_bytes())
    write_shots(find_shots(other), tmp_path / "out")
    assert [path.stat().st_mtime_ns for path in paths] == before


def test_a_shot_that_was_replaced_by_another_file_of_its_length_is_written_again(tmp_path):
    film = greys(tmp_path / "film.mp4", 20, 200)
    first, second = write_shots(find_shots(film), tmp_path / "out")
    first.write_bytes(second.read_bytes())
    assert shown(write_shots(find_shots(film), tmp_path / "out")) == [20, 200]


def test_other_settings_of_the_encoder_make_other_shots(tmp_path, monkeypatch):
    film = greys(tmp_path / "film.mp4", 20, 200)
    (first, _) = write_shots(find_shots(film), tmp_path / "out")
    before = first.read_bytes()
    monkeypatch.setitem(ENCODER, "crf", "40")
    write_shots(find_shots(film), tmp_path / "out")
    assert first.read_bytes() != before


def test_a_shot_says_what_it_was_made_from(tmp_path):
    film = greys(tmp_path / "film.mp4", 20, 200)
    (_, second) = write_shots(find_shots(film), tmp_path / "out")
    said = json.loads(second.with_suffix(".json").read_text())
    assert said["source"] == hashlib.sha256(film.read_bytes()).hexdigest()
    assert (said["frames"], said["fps"]) == ([30, 59], 25.0)
    assert said["encoder"]["crf"] == "16"
    second.with_suffix(".json").write_text("{")  # left by a kill
    assert shown(write_shots(find_shots(film), tmp_path / "out")) == [20, 200]


def test_a_broken_video(tmp_path):
    (tmp_path / "film.mp4").write_bytes(b"no film")
    with pytest.raises(UserError, match=r"film.mp4: damaged, truncated or not a video"):
        find_shots(tmp_path / "film.mp4")


def test_real_video():
    bikes, rabbit = demo_videos()
    assert bounds(find_shots(bikes)) == [(0, 30), (30, 76), (76, 137), (137, 187), (187, 242), (242, 250)]
    assert bounds(find_shots(rabbit)) == [(0, 132)]
