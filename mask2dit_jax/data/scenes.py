"""Which clips become the scenes of one training sample: unrelated ones in pretraining, neighbours in SFT.

Both are a sequence of items that training walks through in shuffled order; `draw` picks the rest at random.
"""

from collections.abc import Sequence

import numpy as np
from absl import logging

from mask2dit_jax.data.sources import Clip, Group
from mask2dit_jax.errors import UserError


class UnrelatedClips:
    """Pretraining: item i is clip i, followed by clips of other videos."""

    def __init__(self, clips: Sequence[Clip], num_scenes: int):
        if len(clips) < num_scenes:
            raise UserError(
                f"{len(clips)} usable clips are too few for num_scenes={num_scenes}; add clips or lower num_scenes"
            )
        self._clips, self._num_scenes = tuple(clips), num_scenes

    def __len__(self) -> int:
        return len(self._clips)

    def draw(self, item: int, rng: np.random.Generator) -> list[Clip]:
        """`num_scenes` different clips; a video file comes twice only where there are fewer files than scenes."""
        others = [self._clips[index] for index in rng.permutation(len(self)) if index != item]
        scenes, used = [self._clips[item]], {self._clips[item].path}
        for unused_only in (True, False):
            for clip in others:
                if len(scenes) < self._num_scenes and clip not in scenes and (clip.path not in used or not unused_only):
                    scenes.append(clip)
                    used.add(clip.path)
        return scenes


class ConsecutiveShots:
    """SFT: item i is group i, of which `num_scenes` consecutive shots are drawn, every window equally likely."""

    def __init__(self, groups: Sequence[Group], num_scenes: int, usable: Sequence[Clip]):
        """`usable` are the clips that can be read; no window reaches over one that cannot."""
        usable = set(usable)
        self._windows = []
        for group in groups:
            starts = range(len(group.clips) - num_scenes + 1)
            windows = [group.clips[start : start + num_scenes] for start in starts]
            windows = [window for window in windows if usable.issuperset(window)]
            if windows:
                self._windows.append(windows)
            else:
                logging.warning(
                    "group %s is skipped: it has no %d consecutive usable shots (%d shots, %d usable)",
                    *(group.name, num_scenes, len(group.clips), len(usable.intersection(group.clips))),
                )
        self.num_skipped = len(groups) - len(self._windows)
        if not self._windows:
            raise UserError(
                f"none of {len(groups)} groups ({', '.join(group.name for group in groups[:5])}) has {num_scenes} "
                "consecutive usable shots; add longer groups or lower num_scenes"
            )

    def __len__(self) -> int:
        return len(self._windows)

    def draw(self, item: int, rng: np.random.Generator) -> list[Clip]:
        windows = self._windows[item]
        return list(windows[rng.integers(len(windows))])
