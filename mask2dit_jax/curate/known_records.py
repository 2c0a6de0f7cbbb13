"""Records of clips that were encoded before: what a data set that is built can copy instead of encoding it again."""

import contextlib
import dataclasses
import json
import os
from collections.abc import Iterable, Mapping, Sequence

from array_record.python import array_record_module
from etils import epath

from mask2dit_jax.data.latents import SPLIT, LatentSettings, Shard, clip_key, dated_stamp, is_whole, read_settings
from mask2dit_jax.data.sources import Clip
from mask2dit_jax.errors import UserError

SHARD_FILE = f"scene_latents-{SPLIT}.array_record-{{}}"  # as TFDS names it, but for the part "00003-of-00064"
REPORT_FILE = "shard-{}.json"


@dataclasses.dataclass(frozen=True)
class StoredRecords:
    """The records of one clip in a finished shard.

    Attributes:
        path: file of the shard.
        numbers: numbers of the records in that file.
        outcome: what the shard's report says of the clip.
    """

    path: epath.Path
    numbers: range
    outcome: Mapping

    def read(self) -> list[bytes] | None:
        """Read the records as they are stored; None if they cannot be read."""
        try:
            reader = array_record_module.ArrayRecordReader(os.fspath(self.path), "readahead_buffer_size:0")
            with contextlib.closing(reader):
                return reader.read(list(self.numbers))
        except (RuntimeError, ValueError, IndexError, OSError):
            return None


Known = dict[tuple[str, str], StoredRecords]  # by the clip's key and its video's hash, or its size and time


def known_records(known: Known, clip: Clip, source: Mapping[str, str]) -> StoredRecords | None:
    """Return the records of a clip whose video is as `describe_source` says; None if there are none."""
    found = known.get((clip_key(clip), source["source"]))
    if found is None and source["state"]:
        found = known.get((clip_key(clip), dated_stamp(source["state"])))
    return found


def link_shard(target: os.PathLike, stored: Sequence[StoredRecords | None]) -> bool:
    """Make `target` a hard link to the shard that holds just these records, in this order.

    Returns:
        Whether it is one. It is not if no shard does, or if the file system has no such links.
    """
    paths = {records and records.path for records in stored}
    if len(paths) != 1 or None in paths:
        return False
    (path,) = paths
    numbers = [number for records in stored for number in records.numbers]
    try:
        with contextlib.closing(array_record_module.ArrayRecordReader(os.fspath(path), "")) as reader:
            if numbers != list(range(reader.num_records())):
                return False
        if any(records.read() is None for records in stored):  # a damaged record must not spread
            return False
        os.link(path, target)
    except (RuntimeError, ValueError, OSError):
        return False
    return True


def records_of_data_sets(folders: Iterable[epath.Path], settings: LatentSettings) -> Known:
    """Return all records in those of `folders` that are data sets, complete or not, made with the same settings."""
    known = {}
    for folder in folders:
        try:
            is_same = read_settings(folder) == settings.describe()
        except UserError:
            continue
        for path in folder.glob(REPORT_FILE.format("*")) if is_same else ():
            known |= records_of_shard(path, settings)
    return known


def records_of_shard(report_path: epath.Path, settings: LatentSettings) -> Known:
    """Return the records of the shard that the report describes; none if one of the two is not there or not whole."""
    report = read_report(report_path)
    if report is None:
        return {}
    before, after = REPORT_FILE.split("{}")
    name = SHARD_FILE.format(report_path.name.removeprefix(before).removesuffix(after))
    if not is_whole(report_path.parent, Shard(name, report["bytes"], report["records"])):
        return {}
    known, first, count = {}, 0, max(1, settings.variants)
    for outcome in report["clips"]:
        if "skipped" not in outcome:
            if "key" in outcome:  # reports of older versions have none
                stored = StoredRecords(report_path.parent / name, range(first, first + count), outcome)
                known[outcome["key"], outcome["source"]] = stored
            first += count
    return known


def read_report(path: epath.Path) -> dict | None:
    """Read the report of a shard; None if it is not there, or not whole because an upload was cut off."""
    try:
        return json.loads(path.read_text()) if path.exists() else None
    except (OSError, ValueError):
        return None
