from pathlib import Path

import numpy as np

from mask2dit_jax.curate.check import check_clips, frame_shapes
from mask2dit_jax.data.encode import Encoders, encode_clip
from mask2dit_jax.data.frames import PretrainSampling, SftSampling
from mask2dit_jax.data.latents import LatentSettings
from mask2dit_jax.data.sources import Clip, Group, Scan
from mask2dit_jax.errors import UserError
from tests.data.clips import make_clip
from tests.data.odd_clips import write_clips


def test_every_fault_is_named_and_groups_are_counted(tmp_path):
    counts = (20, 20, 4, 20, 20, 20, 20)
    clips = tuple(make_clip(tmp_path, f"{n}.mp4", count) for n, count in enumerate(counts))
    clips[5].path.write_bytes(b"")
    groups = (Group("two", clips[:3]), Group("none", (clips[3], None, clips[4])), Group("one", clips[4:]))
    scan = Scan(clips, groups, {"gone.mp4": "no video"})
    checked = check_clips(scan, SftSampling(5), num_scenes=2)
    assert checked.usable == (*clips[:2], *clips[3:5], clips[6])
    assert list(checked.faults) == ["gone.mp4", "2.mp4", "5.mp4"]
    assert "a clip of 4 frames is too short" in checked.faults["2.mp4"]
    assert "the file is empty" in checked.faults["5.mp4"]
    assert checked.num_groups == 1
    assert check_clips(scan, SftSampling(5), num_scenes=1).num_groups == 3


def test_the_rule_is_that_of_the_stage(tmp_path):
    clips = (make_clip(tmp_path, "a.mp4", 20),)
    assert check_clips(Scan(clips, None, {}), PretrainSampling(5, stride=3), 1).usable == clips
    checked = check_clips(Scan(clips, None, {}), PretrainSampling(9, stride=3), 1)
    assert "its middle (5% to 95%) holds 6 of 9 frames" in checked.faults["a.mp4"]
    assert checked.num_groups is None


def test_what_a_full_check_passes_is_what_encoding_takes(tmp_path):
    """A flipped bit between key frames is all that the quick check does not see."""
    rows = write_clips(tmp_path)
    flipped = Path(__file__).parents[1] / "media/one_bit_flipped.mp4"
    names = [*(row.name for row in rows if (tmp_path / row.name).is_file()), str(flipped)]
    clips = tuple(Clip(name, tmp_path / name, "a", 20, 25.0, 48, 32) for name in dict.fromkeys(names))
    settings = LatentSettings(
        SftSampling(9), size=(16, 16), variants=2, seed=0, max_tokens=4, encoders="stub", compute_dtype="float32"
    )
    encoders = Encoders(lambda pixels: (pixels, pixels), lambda captions: np.zeros((len(captions), 4, 8), np.float32))

    def encodes(clip: Clip) -> bool:
        try:
            encode_clip(clip, settings, encoders)
        except UserError:
            return False
        return True

    encoded = {clip.name for clip in clips if encodes(clip)}
    full, quick = (check_clips(Scan(clips, None, {}), settings.sampling, 1, all_frames) for all_frames in (True, False))
    assert {clip.name for clip in full.usable} == encoded
    assert {clip.name for clip in quick.usable} == encoded | {str(flipped)}
    assert "damaged, as of frame 16" in full.faults[str(flipped)]


def test_shapes_are_those_of_the_videos_whatever_the_data_file_says(tmp_path):
    clips = [make_clip(tmp_path, f"{height}.mp4", 3, height=height) for height in (32, 64)]
    assert [(clip.height, clip.width) for clip in clips] == [(32, 48)] * 2
    assert frame_shapes(clips) == [(32, 48), (64, 48)]
