"""The dry run of a data file: which of its clips training could use, and why it cannot use the others."""

import concurrent.futures
import dataclasses
from collections.abc import Mapping, Sequence

from tqdm import tqdm

from mask2dit_jax.data.frames import PretrainSampling, SftSampling, frame_choices
from mask2dit_jax.data.samples import window_starts
from mask2dit_jax.data.sources import Clip, Scan, printable
from mask2dit_jax.errors import UserError
from mask2dit_jax.media.video_reader import read_frames

_THREADS = 16  # they wait for the disk, and FFmpeg runs without Python's lock


@dataclasses.dataclass(frozen=True)
class Checked:
    """The verdict on a data file.

    Attributes:
        usable: clips that training could use.
        faults: name -> reason of every other clip.
        num_groups: number of groups with enough usable shots in a row; None for a csv.
    """

    usable: tuple[Clip, ...]
    faults: Mapping[str, str]
    num_groups: int | None


def check_clips(
    scan: Scan, sampling: PretrainSampling | SftSampling, num_scenes: int, all_frames: bool = False
) -> Checked:
    """Look into every video by the rules of training; nothing is written.

    Args:
        scan: the data file.
        sampling: rule for which frames are taken.
        num_scenes: scenes of a training sample; a group counts if so many shots in a row are usable.
        all_frames: whether every frame is decoded, as in encoding. Otherwise it is key frames where these tell the
            number of frames and their size, and damage between them is not seen.
    """

    def fault(clip: Clip) -> str | None:
        try:
            frame_choices(clip, sampling, all_frames)
        except UserError as error:
            return printable(str(error))
        return None

    with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
        found = tqdm(pool.map(fault, scan.clips), "checking clips", len(scan.clips), unit="clip")
        faults = dict(zip(scan.clips, found, strict=True))
    usable = tuple(clip for clip, reason in faults.items() if reason is None)
    if scan.groups is None:
        num_groups = None
    else:
        num_groups = sum(bool(window_starts(group, num_scenes, set(usable))) for group in scan.groups)
    named = {printable(clip.name): reason for clip, reason in faults.items() if reason is not None}
    return Checked(usable, {**scan.faults, **named}, num_groups)


def frame_shapes(clips: Sequence[Clip]) -> list[tuple[int, int]]:
    """Return height and width of every usable clip as its first frame has them, whatever the data file says."""

    def shape(clip: Clip) -> tuple[int, int]:
        return read_frames(clip.path, [0]).shape[1:3]

    with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
        return list(pool.map(shape, clips))
