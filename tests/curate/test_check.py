from mask2dit_jax.curate.check import check_clips, frame_shapes
from mask2dit_jax.data.frames import PretrainSampling, SftSampling
from mask2dit_jax.data.sources import Group, Scan
from tests.data.clips import make_clip


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


def test_shapes_are_those_of_the_videos_whatever_the_data_file_says(tmp_path):
    clips = [make_clip(tmp_path, f"{height}.mp4", 3, height=height) for height in (32, 64)]
    assert [(clip.height, clip.width) for clip in clips] == [(32, 48)] * 2
    assert frame_shapes(clips) == [(32, 48), (64, 48)]
