"""The distance between a sampled scene and training shots, with which the demo proves that a prompt got its scene."""

from collections.abc import Mapping

import numpy as np
from jaxtyping import UInt8

Frames = UInt8[np.ndarray, "_f h w 3"]


def shot_distance(scene: Frames, shot: Frames, stride: int) -> float:
    """Return the RMS difference in grey levels (0..255) at the best start of the scene within the shot.

    Args:
        scene: n frames.
        shot: All frames of a shot, in the same size. The scene is compared with every run of n frames.
        stride: Distance between the frames of such a run. It is lowered if the shot is too short for it.
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
    """Return the distance of one scene to each shot by name, nearest first."""
    found = {name: shot_distance(scene, frames, stride) for name, frames in shots.items()}
    return dict(sorted(found.items(), key=lambda item: item[1]))
