"""Which clips become the scenes of one training sample: unrelated ones in pretraining, neighbours in SFT.

Both are a sequence of items that training walks through in shuffled order; `draw` picks the other scenes at random.
"""

from collections.abc import Sequence

import numpy as np
from absl import logging

from mask2dit_jax.data.sources import Group, NamedClip
from mask2dit_jax.errors import UserError

_TRIES = 100  # random tries for each scene; one suffices unless a video makes up most of the data


class UnrelatedClips:
    """Pretraining: item i is clip i, followed by clips of other videos."""

    def __init__(self, clips: Sequence[NamedClip], num_scenes: int):
        """Take the usable clips.

        Raises:
            UserError: there are fewer clips than scenes.
        """
        if len(clips) < num_scenes:
            raise UserError(
                f"{len(clips)} usable clips are too few for num_scenes={num_scenes}; add clips or lower num_scenes"
            )
        self._clips, self._num_scenes = tuple(clips), num_scenes

    def __len__(self) -> int:
        """Return the number of clips."""
        return len(self._clips)

    def draw(self, item: int, rng: np.random.Generator) -> list[NamedClip]:
        """Draw `num_scenes` different clips; a video comes twice only if there are fewer videos than scenes."""
        scenes = [self._clips[item]]
        while len(scenes) < self._num_scenes:
            scenes.append(self._another(scenes, rng))
        return scenes

    def _another(self, scenes: list[NamedClip], rng: np.random.Generator) -> NamedClip:
        """Draw from the clips of other videos, all equally likely; without a list, because there may be millions."""
        used = {scene.name for scene in scenes}
        for _ in range(_TRIES):
            clip = self._clips[rng.integers(len(self))]
            if clip.name not in used:
                return clip
        others = [clip for clip in self._clips if clip.name not in used]
        others = others or [clip for clip in self._clips if clip not in scenes]
        return others[rng.integers(len(others))]


class ConsecutiveShots:
    """SFT: item i is group i, of which `num_scenes` consecutive shots are drawn, every window equally likely."""

    def __init__(self, groups: Sequence[Group], num_scenes: int, usable: Sequence[NamedClip]):
        """Find the windows of each group; `skipped` names the groups that have none.

        Args:
            groups: groups of consecutive shots.
            num_scenes: length of a window.
            usable: clips that can be read; no window reaches across one that cannot.

        Raises:
            UserError: no group has a window.
        """
        usable = set(usable)
        self._num_scenes = num_scenes
        self._windows = []  # for each group, its clips and the shots with which windows start
        self.skipped: dict[str, str] = {}
        for group in groups:
            starts = window_starts(group, num_scenes, usable)
            if starts:
                self._windows.append((group.clips, starts))
            else:
                shots, num_usable = len(group.clips), len(usable.intersection(group.clips))
                self.skipped[group.name] = (
                    f"it has no {num_scenes} consecutive usable shots ({shots} shots, {num_usable} usable)"
                )
                logging.warning("group %s is skipped: %s", group.name, self.skipped[group.name])
        if not self._windows:
            raise UserError(
                f"none of {len(groups)} groups ({', '.join(group.name for group in groups[:5])}) has {num_scenes} "
                "consecutive usable shots; add longer groups or lower num_scenes"
            )

    def __len__(self) -> int:
        """Return the number of groups that have a window."""
        return len(self._windows)

    def draw(self, item: int, rng: np.random.Generator) -> list[NamedClip]:
        """Draw a window of group `item`."""
        clips, starts = self._windows[item]
        start = starts[rng.integers(len(starts))]
        return list(clips[start : start + self._num_scenes])


def window_starts(group: Group, num_scenes: int, usable: set[NamedClip]) -> list[int]:
    """Return the numbers of the shots with which `num_scenes` consecutive usable shots begin."""
    starts = range(len(group.clips) - num_scenes + 1)
    return [start for start in starts if usable.issuperset(group.clips[start : start + num_scenes])]
