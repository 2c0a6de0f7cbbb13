"""How a scene looks, in a few numbers: what drifts when a story is extended again and again.

Colours wash out, contrast rises, or latents leave the range that the model knows: each shows in one of these numbers,
scene by scene, against the first scene.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np
from jaxtyping import UInt8

from mask2dit_jax.axes import NpFloats

_LUMA = np.array([0.2126, 0.7152, 0.0722], np.float32)  # BT.709, as the videos are written


class FrameStatistics:
    """Lets frames pass and measures them on the way: no more than one is in memory for it."""

    def __init__(self, frames: Iterable[UInt8[np.ndarray, "h w 3"]], keep: Sequence[int] = ()):
        """
        Args:
            keep: numbers of frames that are kept, as `kept`.
        """
        self._frames, self._keep = frames, frozenset(keep)
        self._measured: list[tuple[float, float, float]] = []
        self.kept: list[np.ndarray] = []

    def __iter__(self) -> Iterator[UInt8[np.ndarray, "h w 3"]]:
        for number, frame in enumerate(self._frames):
            self._measured.append(_measure(frame))
            if number in self._keep:
                self.kept.append(np.array(frame))
            yield frame

    def result(self) -> dict[str, float]:
        """Means over the frames that have passed, in 0..1: brightness, contrast (its deviation within a frame), and
        saturation (of HSV)."""
        return dict(zip(("mean", "contrast", "saturation"), np.mean(self._measured, axis=0).tolist(), strict=True))


def _measure(frame: UInt8[np.ndarray, "h w 3"]) -> tuple[float, float, float]:
    colours = frame.astype(np.float32) / 255
    luma, most = colours @ _LUMA, colours.max(axis=-1)
    saturation = np.divide(most - colours.min(axis=-1), most, out=np.zeros_like(most), where=most > 0)
    return float(luma.mean()), float(luma.std()), float(saturation.mean())


def latent_statistics(latents: NpFloats["f h w c"]) -> dict[str, float]:
    return {"latent_mean": float(latents.mean()), "latent_std": float(latents.std())}


def drift(statistics: Sequence[Mapping[str, float]]) -> list[dict[str, float]]:
    """What the statistics of each scene have more (or less) than those of the first."""
    return [{name: value - statistics[0][name] for name, value in scene.items()} for scene in statistics]
