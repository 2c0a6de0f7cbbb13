"""The authors' two data files, a csv of clips and a json of groups of shots, and what in them cannot be used.

    pretrain.csv   fps,width,height,caption,path,num_frame
    sft.json       [{"prefix", "values": [{"vid", "width", "height", "duration", "fps", "url", "caption"}, ...]}, ...]

`path` and `url` are relative to the folder of the file. Every fault is one line with the file and the row or prefix.
The `read_` functions raise an error at the first fault. The `scan_` functions go on: a faulty row costs that clip
alone, and only a file with a broken structure (no such column, no json) is an error. File names may hold bytes that are
not UTF-8; captions may not.
"""

import contextlib
import csv
import dataclasses
import io
import json
import math
import os
import threading
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Protocol, runtime_checkable

from absl import logging

from mask2dit_jax.errors import UserError
from mask2dit_jax.io.atomic import atomic_output
from mask2dit_jax.io.paths import find_file

CSV_COLUMNS = ("fps", "width", "height", "caption", "path", "num_frame")
JSON_KEYS = ("vid", "width", "height", "duration", "fps", "url", "caption")
_TEXT = {"encoding": "utf-8", "errors": "surrogateescape"}  # keeps other bytes, which a file name may hold


@dataclasses.dataclass(frozen=True)
class Clip:
    """One shot: a whole video file and its caption.

    Attributes:
        name: path as the data file has it.
        path: path on this machine.
        caption: text prompt.
        num_frames: number of frames. Like the next three, it is the data file's claim; only the video itself counts.
        fps: frames per second.
        width: pixels.
        height: pixels.
    """

    name: str
    path: Path
    caption: str
    num_frames: int
    fps: float
    width: int
    height: int


@runtime_checkable
class NamedClip(Protocol):
    """The part of a clip that drawing samples needs; equal objects are the same clip."""

    name: str


@dataclasses.dataclass(frozen=True)
class Group:
    """Consecutive shots of one story, in order; None stands for a shot whose entry in the data file is faulty."""

    name: str
    clips: tuple[NamedClip | None, ...]


@dataclasses.dataclass(frozen=True)
class Scan:
    """The contents of a data file.

    Attributes:
        clips: every clip without a fault, once, in the order of the file.
        groups: groups of consecutive shots; None in a file of single clips.
        faults: the name of every other row or shot, and what is wrong with it.
    """

    clips: tuple[Clip, ...]
    groups: tuple[Group, ...] | None
    faults: Mapping[str, str]

    @property
    def num_clips(self) -> int:
        """Number of clips, usable or not."""
        return len(self.clips) + len(self.faults)


def read_pretrain_csv(path: str | Path) -> list[Clip]:
    """Read a csv of single clips.

    Raises:
        UserError: an unreadable file, a missing column, value or video, an empty caption, or no rows.
    """
    return list(_parse_csv(path, _Strict()))


def read_sft_json(path: str | Path) -> list[Group]:
    """Read a json of groups of shots.

    Raises:
        UserError: an unreadable file, a missing key, value or video, an empty caption, or no groups.
    """
    return _parse_json(path, _Strict())


def scan_data_file(file_format: str, path: str | Path) -> Scan:
    """Read a data file of either format ("csv", "json"), its faulty rows set apart.

    Raises:
        UserError: see `scan_pretrain_csv` and `scan_sft_json`.
    """
    return {"csv": scan_pretrain_csv, "json": scan_sft_json}[file_format](path)


def scan_pretrain_csv(path: str | Path) -> Scan:
    """Read a csv of single clips; a faulty row is among `faults`.

    Raises:
        UserError: an unreadable file, a missing column, or no rows.
    """
    faults = _Faults()
    clips = [clip for clip in _parse_csv(path, faults) if clip]
    return Scan(tuple(dict.fromkeys(clips)), None, faults.named)


def scan_sft_json(path: str | Path) -> Scan:
    """Read a json of groups of shots; a faulty shot is among `faults`.

    Raises:
        UserError: an unreadable file, or one that lists no groups.
    """
    faults = _Faults()
    groups = tuple(_parse_json(path, faults))
    clips = [clip for group in groups for clip in group.clips if clip]
    return Scan(tuple(dict.fromkeys(clips)), groups, faults.named)


def is_blank(caption: str) -> bool:
    """Return whether a caption is empty, or what a data frame writes for an empty cell."""
    return caption.strip().casefold() in ("", "nan", "none", "null", "n/a", "na", "<na>")


def printable(name: str) -> str:
    """Return the name of a file as text for logs and json, with bytes that are not UTF-8 as hexadecimal escapes."""
    try:
        return os.fsencode(name).decode(errors="backslashreplace")
    except UnicodeEncodeError:  # half of a surrogate pair, which no file is called
        return name.encode(errors="backslashreplace").decode()


class Skipped(Mapping[str, str]):
    """The account of what cannot be used: name -> reason, up to a share of all.

    It grows while training reads; threads may add to it.
    """

    def __init__(self, total: int, max_share: float):
        """Start with nothing skipped.

        Args:
            total: number of items, usable or not.
            max_share: share of them that may be skipped.
        """
        self.total, self.max_share = total, max_share
        self._reasons: dict[str, str] = {}
        self._lock = threading.Lock()

    def add(self, name: str, reason: str) -> None:
        """Record and log an item, once for each name.

        Raises:
            UserError: that makes too many.
        """
        name, reason = printable(name), printable(reason)
        with self._lock:
            if name in self._reasons:
                return
            self._reasons[name] = reason
        logging.warning("%s is skipped: %s", name, reason)
        self.check()

    def check(self) -> None:
        """Check that no more than the allowed share is skipped.

        Raises:
            UserError: it is more; the message names the first items.
        """
        if len(self) <= self.max_share * self.total:
            return
        some = "; ".join(f"{name}: {reason}" for name, reason in list(self.items())[:3])
        raise UserError(
            f"{len(self)} of {self.total} items cannot be used, more than data.max_skipped_share={self.max_share:g} "
            f"({some}{'; ...' if len(self) > 3 else ''}); build_data --check lists all; correct or remove them"
        )

    def __getitem__(self, name: str) -> str:
        """Return the reason of a name."""
        return self._reasons[name]

    def __iter__(self) -> Iterator[str]:
        """Iterate over the names as of now; other threads may add to them."""
        return iter(list(self._reasons))

    def __len__(self) -> int:
        """Return the number of names."""
        return len(self._reasons)


class _Strict:
    """Ends at the first fault."""

    def tolerate(self, _name: str):
        return contextlib.nullcontext()


class _Faults:
    """Records faults by name and goes on."""

    def __init__(self):
        self.named: dict[str, str] = {}

    @contextlib.contextmanager
    def tolerate(self, name: str):
        try:
            yield
        except UserError as error:
            name, reason = printable(name), printable(str(error))
            while name in self.named:
                name += " again"
            self.named[name] = reason


def _parse_csv(path: str | Path, faults: _Strict | _Faults) -> list[Clip | None]:
    path = find_file(path)
    rows = csv.DictReader(io.StringIO(_read_text(path), newline=""), strict=True)
    try:
        missing = [column for column in CSV_COLUMNS if column not in (rows.fieldnames or ())]
        if missing:
            raise UserError(f"{path}: no column {', '.join(missing)}; the first line must name {','.join(CSV_COLUMNS)}")
        clips: list[Clip | None] = []
        for number, row in enumerate(rows, 1):
            clips.append(None)
            shifted = None in row  # more values than columns: which of them is the path?
            with faults.tolerate(f"row {number}" if shifted or not row["path"] else row["path"]):
                clips[-1] = _csv_clip(f"{path} row {number}", path.parent, row)
    except csv.Error as error:
        raise UserError(f"{path}: no valid csv after line {rows.line_num} ({error}); look at its quotes") from error
    if not clips:
        raise UserError(f"{path}: has no rows; add at least one clip")
    return clips


def _parse_json(path: str | Path, faults: _Strict | _Faults) -> list[Group]:
    path = find_file(path)
    try:
        groups = json.loads(_read_text(path))
    except json.JSONDecodeError as error:
        raise UserError(f"{path}: no valid json ({error}); correct the file") from error
    if not isinstance(groups, list) or not groups:
        raise UserError(f'{path}: must be a list of at least one {{"prefix", "values"}}')
    parsed = []
    for number, group in enumerate(groups, 1):
        with faults.tolerate(f"entry {number}"):
            parsed.append(_group(f"{path} entry {number}", path.parent, group, faults))
    return parsed


def write_pretrain_csv(path: str | Path, clips: Iterable[Clip]) -> None:
    """Write a csv that `read_pretrain_csv` reads."""
    with atomic_output(path) as partial, partial.open("w", newline="", **_TEXT) as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(CSV_COLUMNS)
        writer.writerows(
            (clip.fps, clip.width, clip.height, clip.caption, clip.name, clip.num_frames) for clip in clips
        )


def write_sft_json(path: str | Path, groups: Iterable[Group]) -> None:
    """Write a json that `read_sft_json` reads."""

    def values(clip: Clip) -> tuple:
        duration = round(clip.num_frames / clip.fps, 3)
        return Path(clip.name).stem, clip.width, clip.height, duration, clip.fps, clip.name, clip.caption

    raw = [
        {"prefix": group.name, "values": [dict(zip(JSON_KEYS, values(clip), strict=True)) for clip in group.clips]}
        for group in groups
    ]
    with atomic_output(path) as partial:
        partial.write_text(json.dumps(raw, indent=2, ensure_ascii=False) + "\n", **_TEXT)


def _read_text(path: Path) -> str:
    try:
        return path.read_text(**_TEXT).removeprefix("\ufeff")  # spreadsheets put it in front
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); give the path of the data file") from error


def _csv_clip(where: str, folder: Path, row: Mapping) -> Clip:
    if None in row:  # DictReader's key for surplus values
        raise UserError(f"{where}: has more values than columns; put a caption with commas in double quotes")
    return _clip(where, folder, row, row["path"])


def _group(where: str, folder: Path, group: object, faults: _Strict | _Faults) -> Group:
    if not isinstance(group, Mapping) or not isinstance(group.get("values"), list) or "prefix" not in group:
        raise UserError(f'{where}: must be {{"prefix": a name, "values": a list of shots}}')
    name = str(group["prefix"])
    clips: list[Clip | None] = []
    for number, value in enumerate(group["values"], 1):
        url = value.get("url") if isinstance(value, Mapping) else None
        clips.append(None)
        with faults.tolerate(url if isinstance(url, str) and url else f"{name}, shot {number}"):
            clips[-1] = _json_clip(f"{where} ({name}), shot {number}", folder, value)
    return Group(name, tuple(clips))


def _json_clip(where: str, folder: Path, value: object) -> Clip:
    missing = [key for key in JSON_KEYS if not isinstance(value, Mapping) or key not in value]
    if missing:
        raise UserError(f"{where}: no {', '.join(missing)}; a shot has {', '.join(JSON_KEYS)}")
    frames = _number(where, value, "duration") * _number(where, value, "fps")
    return _clip(where, folder, {**value, "num_frame": max(1, round(frames))}, value["url"])


def _clip(where: str, folder: Path, row: Mapping, name: object) -> Clip:
    if not isinstance(name, str) or not name.strip():
        raise UserError(f"{where}: names no video; give its path relative to {folder}")
    if not isinstance(row["caption"], str) or is_blank(row["caption"]):
        raise UserError(f"{where} ({name}): the caption is empty; write one or remove the clip")
    if printable(row["caption"]) != row["caption"]:
        raise UserError(f"{where} ({name}): the caption is not UTF-8 text; save the file as UTF-8")
    path = find_file(folder / name)
    if not os.path.isfile(path):  # False for whatever cannot be a path, too
        raise UserError(f"{where}: no video at {folder / name}; correct the path or remove the clip")
    return Clip(
        name=name,
        path=path,
        caption=row["caption"],
        num_frames=int(_number(where, row, "num_frame")),
        fps=_number(where, row, "fps"),
        width=int(_number(where, row, "width")),
        height=int(_number(where, row, "height")),
    )


def _number(where: str, row: Mapping, key: str) -> float:
    try:
        number = float(row[key])
    except (TypeError, ValueError):
        number = math.nan
    if not 0 < number < math.inf:
        raise UserError(f"{where}: {key} is {row[key]!r}; it must be a positive number")
    return number
