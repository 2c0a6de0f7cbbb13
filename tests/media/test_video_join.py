"""Tests that joined videos contain every frame of every part, unchanged."""

import av
import numpy as np
import pytest

from mask2dit_jax.errors import UserError
from mask2dit_jax.media.video_join import join_videos
from mask2dit_jax.media.video_reader import iter_frames, probe
from mask2dit_jax.media.video_writer import write_video


def write(path, count: int, size=(48, 80), fps=8):
    frames = np.random.default_rng(count).integers(0, 255, (count, *size, 3), np.uint8)
    write_video(path, frames, fps)
    return path


# Videos of one or two frames have no delay between decoding and display; longer ones do.
@pytest.mark.parametrize("lengths", [(9,), (9, 9, 9), (1, 9, 2, 1), (5, 1, 49), (1, 1)])
def test_frames_are_those_of_the_parts(tmp_path, lengths):
    parts = [write(tmp_path / f"{number}.mp4", length) for number, length in enumerate(lengths)]
    join_videos(tmp_path / "whole.mp4", parts)
    expected = [frame for part in parts for frame in iter_frames(part)]
    np.testing.assert_array_equal(list(iter_frames(tmp_path / "whole.mp4")), expected)
    info = probe(tmp_path / "whole.mp4")
    assert (info.num_frames, info.fps) == (sum(lengths), 8)
    with av.open(str(tmp_path / "whole.mp4")) as container:
        times = [frame.time for frame in container.decode(video=0)]
    np.testing.assert_allclose(times, np.arange(sum(lengths)) / 8)
    whole = (tmp_path / "whole.mp4").read_bytes()
    assert whole.find(b"moov") < whole.find(b"mdat")  # so that a browser can play it while loading


def test_parts_that_do_not_go_together(tmp_path):
    parts = [write(tmp_path / "a.mp4", 3), write(tmp_path / "b.mp4", 3, (48, 96))]
    with pytest.raises(UserError, match=r"b.mp4 is not encoded like .*a.mp4; delete it to have it written again"):
        join_videos(tmp_path / "whole.mp4", parts)
    parts[1].write_bytes(b"%PDF-1.7")
    with pytest.raises(UserError, match=r"b.mp4: cannot be read .* delete it"):
        join_videos(tmp_path / "whole.mp4", parts)
    assert not (tmp_path / "whole.mp4").exists()
