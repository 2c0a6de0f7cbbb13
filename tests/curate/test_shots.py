import itertools
from fractions import Fraction

import av
import numpy as np
import pytest

from mask2dit_jax.curate.demo import demo_videos
from mask2dit_jax.curate.shots import find_shots, write_shots
from mask2dit_jax.errors import UserError
from mask2dit_jax.media.video_reader import iter_frames, probe, read_frames
from mask2dit_jax.media.video_writer import write_video

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


def test_a_broken_video(tmp_path):
    (tmp_path / "film.mp4").write_bytes(b"no film")
    with pytest.raises(UserError, match=r"film.mp4: damaged, truncated or not a video"):
        find_shots(tmp_path / "film.mp4")


def test_real_video():
    bikes, rabbit = demo_videos()
    assert bounds(find_shots(bikes)) == [(0, 30), (30, 76), (76, 137), (137, 187), (187, 242), (242, 250)]
    assert bounds(find_shots(rabbit)) == [(0, 132)]
