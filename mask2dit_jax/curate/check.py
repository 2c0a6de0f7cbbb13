"""The dry run of a data file: which of its clips training could use, and why it could not use the others."""

import concurrent.futures
import dataclasses
from collections.abc import Mapping

from tqdm import tqdm

from mask2dit_jax.curate.encode import frame_choices
from mask2dit_jax.data.frames import PretrainSampling, SftSampling
from mask2dit_jax.data.samples import window_starts
from mask2dit_jax.data.sources import Clip, Scan, printable
from mask2dit_jax.errors import UserError

_THREADS = 16  # they wait for the disk, and FFmpeg runs without Python's lock


@dataclasses.dataclass(frozen=True)
class Checked:
    """`usable` clips; `faults` names all others, with the reason; `num_groups` have enough neighbours (None: a csv)."""

    usable: tuple[Clip, ...]
    faults: Mapping[str, str]
    num_groups: int | None


def check_clips(scan: Scan, sampling: PretrainSampling | SftSampling, num_scenes: int) -> Checked:
    """Looks into every video, by the rules of training: nothing is decoded but a first frame, nothing written.

    Args:
        num_scenes: of a training sample; so many shots in a row must be usable for a group to count.
    """

    def fault(clip: Clip) -> str | None:
        try:
            frame_choices(clip, sampling)
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
