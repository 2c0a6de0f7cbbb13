from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from mask2dit_jax.data.samples import ConsecutiveShots, UnrelatedClips
from mask2dit_jax.data.sources import Clip, Group
from mask2dit_jax.errors import UserError


def clip(name, caption="x"):
    return Clip(name, Path("/videos", name), caption, 20, 25.0, 48, 32)


CLIPS = [clip(name) for name in "abcdef"]


def draws(samples, item, count=300):
    return [samples.draw(item, np.random.default_rng(seed)) for seed in range(count)]


def names(clips):
    return "".join(clip.name for clip in clips)


def test_unrelated_clips():
    samples = UnrelatedClips(CLIPS, 3)
    assert len(samples) == 6
    for item in range(6):
        for scenes in draws(samples, item, 50):
            assert scenes[0] == CLIPS[item]
            assert len({scene.path for scene in scenes}) == 3
    pairs = Counter(names(scenes) for scenes in draws(samples, 0))
    assert len(pairs) == 5 * 4  # every ordered pair of the others


def test_a_video_comes_once_if_that_can_be():
    clips = [clip("a", "one"), clip("a", "two"), clip("b"), clip("c")]
    assert {names(scenes) for scenes in draws(UnrelatedClips(clips, 3), 0)} == {"abc", "acb"}


def test_a_video_comes_again_only_if_it_must():
    clips = [clip("a", "one"), clip("a", "two"), clip("b")]
    for scenes in draws(UnrelatedClips(clips, 3), 0, 20):
        assert len(set(scenes)) == 3
        assert names(scenes) == "aba"


def test_too_few_clips():
    with pytest.raises(UserError, match="2 usable clips are too few for num_scenes=3; add clips or lower num_scenes"):
        UnrelatedClips(CLIPS[:2], 3)
    assert len(UnrelatedClips(CLIPS[:1], 1).draw(0, np.random.default_rng(0))) == 1


def test_consecutive_shots():
    samples = ConsecutiveShots([Group("g", tuple(CLIPS[:5])), Group("h", tuple(CLIPS[3:]))], 3, CLIPS)
    counts = Counter(names(scenes) for scenes in draws(samples, 0, 600))
    assert set(counts) == {"abc", "bcd", "cde"}
    assert min(counts.values()) > 150
    assert {names(scenes) for scenes in draws(samples, 1)} == {"def"}
    assert (len(samples), samples.skipped) == (2, {})


def test_no_window_over_an_unusable_shot():
    samples = ConsecutiveShots([Group("g", tuple(CLIPS))], 2, [c for c in CLIPS if c.name != "c"])
    assert {names(scenes) for scenes in draws(samples, 0)} == {"ab", "de", "ef"}


def test_short_groups_are_skipped_by_name(caplog):
    samples = ConsecutiveShots([Group("rat", tuple(CLIPS[:2])), Group("court", tuple(CLIPS[:3]))], 3, CLIPS)
    assert (len(samples), list(samples.skipped)) == (1, ["rat"])
    assert "group rat is skipped: it has no 3 consecutive usable shots (2 shots, 2 usable)" in caplog.text


def test_no_group_left():
    with pytest.raises(UserError, match=r"none of 1 groups \(rat\) has 3 consecutive usable shots; add longer groups"):
        ConsecutiveShots([Group("rat", tuple(CLIPS[:2]))], 3, CLIPS)
