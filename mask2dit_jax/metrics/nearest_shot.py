"""Which training shot a sampled scene looks most like: the demo's proof that a prompt got its own scene."""

from collections.abc import Mapping

import numpy as np
from jaxtyping import UInt8

Frames = UInt8[np.ndarray, "_f h w 3"]


def shot_distance(scene: Frames, shot: Frames, stride: int) -> float:
    """Root mean square difference, in grey levels (0..255), at the best start of the scene within the shot.

    Args:
        scene: n frames.
        shot: all frames of a shot, at the same size; the scene is held against every n frames `stride` apart. A
            stride that does not fit the shot is lowered.
    """
    count = len(scene)
    stride = max(1, min(stride, (len(shot) - 1) // max(count - 1, 1)))
    starts = max(1, len(shot) - (count - 1) * stride)
    scene = scene.astype(np.float32)
    squares = [
        np.square(scene[: len(part)] - part).mean()
        for part in (shot[start : start + (count - 1) * stride + 1 : stride] for start in range(starts))
    ]
    return float(np.sqrt(min(squares)))


def distances(scene: Frames, shots: Mapping[str, Frames], stride: int) -> dict[str, float]:
    """Distance of one scene to every shot, nearest first."""
    found = {name: shot_distance(scene, frames, stride) for name, frames in shots.items()}
    return dict(sorted(found.items(), key=lambda item: item[1]))
