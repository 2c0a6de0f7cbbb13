"""How a scene looks, in a few numbers, which drift when a story is extended again and again.

Colours wash out, contrast rises, or latents leave the range that the model knows. Each of these shows in one of the
numbers when a scene is compared with the first one.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np
from jaxtyping import UInt8

from mask2dit_jax.axes import NpFloats

_LUMA = np.array([0.2126, 0.7152, 0.0722], np.float32)  # BT.709, as the videos are written


class FrameStatistics:
    """Measures frames while they pass through, so that only one of them has to be in memory.

    Attributes:
        kept: the frames that were asked for, once they have passed.
    """

    def __init__(self, frames: Iterable[UInt8[np.ndarray, "h w 3"]], keep: Sequence[int] = ()):
        """Wrap frames; iterating over this object iterates over them.

        Args:
            frames: to measure.
            keep: numbers of the frames to keep.
        """
        self._frames, self._keep = frames, frozenset(keep)
        self._measured: list[tuple[float, float, float]] = []
        self.kept: list[np.ndarray] = []

    def __iter__(self) -> Iterator[UInt8[np.ndarray, "h w 3"]]:
        """Yield the frames, and measure each."""
        for number, frame in enumerate(self._frames):
            self._measured.append(_measure(frame))
            if number in self._keep:
                self.kept.append(np.array(frame))
            yield frame

    def result(self) -> dict[str, float]:
        """Return means over the frames that have passed, each in 0..1.

        These are brightness ("mean"), contrast (deviation of brightness within a frame) and saturation (of HSV).
        """
        return dict(zip(("mean", "contrast", "saturation"), np.mean(self._measured, axis=0).tolist(), strict=True))


def _measure(frame: UInt8[np.ndarray, "h w 3"]) -> tuple[float, float, float]:
    colours = frame.astype(np.float32) / 255
    luma, most = colours @ _LUMA, colours.max(axis=-1)
    saturation = np.divide(most - colours.min(axis=-1), most, out=np.zeros_like(most), where=most > 0)
    return float(luma.mean()), float(luma.std()), float(saturation.mean())


def frame_statistics(frames: Iterable[UInt8[np.ndarray, "h w 3"]]) -> dict[str, float]:
    """Measure frames that are all there; see `FrameStatistics.result`."""
    statistics = FrameStatistics(frames)
    for _ in statistics:
        pass
    return statistics.result()


def latent_statistics(latents: NpFloats["f h w c"]) -> dict[str, float]:
    """Return mean and standard deviation of the latents of a scene."""
    return {"latent_mean": float(latents.mean()), "latent_std": float(latents.std())}


def drift(statistics: Sequence[Mapping[str, float]]) -> list[dict[str, float]]:
    """Return the difference of each scene's statistics from those of the first scene."""
    return [{name: value - statistics[0][name] for name, value in scene.items()} for scene in statistics]
