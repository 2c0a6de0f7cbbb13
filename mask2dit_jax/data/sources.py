"""The two data files of the authors: the csv of pretraining (a clip a row) and the json of SFT (groups of shots).

    pretrain.csv   fps,width,height,caption,path,num_frame
    sft.json       [{"prefix", "values": [{"vid", "width", "height", "duration", "fps", "url", "caption"}, ...]}, ...]

`path` and `url` are relative to the folder of the file. Every fault is one line with the file and the row or prefix.
`read_*` raise the first one. `scan_*` go on: a faulty row costs that clip alone, and only a file whose structure is
broken (no such column, no json) is an error. Names of files may be other bytes than UTF-8; captions may not.
"""

import contextlib
import csv
import dataclasses
import io
import json
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Protocol, runtime_checkable

from mask2dit_jax.errors import UserError
from mask2dit_jax.io.atomic import atomic_output

CSV_COLUMNS = ("fps", "width", "height", "caption", "path", "num_frame")
_TEXT = {"encoding": "utf-8", "errors": "surrogateescape"}  # other bytes may be a file's name: they are kept
JSON_KEYS = ("vid", "width", "height", "duration", "fps", "url", "caption")


@dataclasses.dataclass(frozen=True)
class Clip:
    """One shot: a whole video file and its caption. `name` is its path as the data file has it, `path` where it is.

    `num_frames`, `fps`, `width` and `height` are what the data file says; what counts is what the video holds.
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
    """What drawing samples needs to know of a clip; equal ones are the same clip."""

    name: str


@dataclasses.dataclass(frozen=True)
class Group:
    """Consecutive shots of one story, in order; None stands for a shot whose entry in the data file is faulty."""

    name: str
    clips: tuple[NamedClip | None, ...]


@dataclasses.dataclass(frozen=True)
class Scan:
    """What a data file holds.

    Attributes:
        groups: of consecutive shots; None in a file of single clips.
        clips: every clip without a fault, once, in the order of the file.
        faults: the name of every other row or shot, and what is wrong with it.
    """

    clips: tuple[Clip, ...]
    groups: tuple[Group, ...] | None
    faults: Mapping[str, str]

    @property
    def num_clips(self) -> int:
        """Usable or not."""
        return len(self.clips) + len(self.faults)


def read_pretrain_csv(path: str | Path) -> list[Clip]:
    """Raises a UserError for an unreadable file, a missing column, value or video, an empty caption, or no rows."""
    return list(_parse_csv(path, _Strict()))


def read_sft_json(path: str | Path) -> list[Group]:
    """Raises a UserError for an unreadable file, a missing key, value or video, an empty caption, or no groups."""
    return _parse_json(path, _Strict())


def scan_pretrain_csv(path: str | Path) -> Scan:
    """Raises a UserError for an unreadable file, a missing column, or no rows; a faulty row is among `faults`."""
    faults = _Faults()
    clips = [clip for clip in _parse_csv(path, faults) if clip]
    return Scan(tuple(dict.fromkeys(clips)), None, faults.named)


def scan_sft_json(path: str | Path) -> Scan:
    """Raises a UserError for an unreadable file, or one that lists no groups; a faulty shot is among `faults`."""
    faults = _Faults()
    groups = tuple(_parse_json(path, faults))
    clips = [clip for group in groups for clip in group.clips if clip]
    return Scan(tuple(dict.fromkeys(clips)), groups, faults.named)


def printable(name: str) -> str:
    """The name of a file as text for logs and json; bytes that are not UTF-8 show as \\xe9."""
    try:
        return os.fsencode(name).decode(errors="backslashreplace")
    except UnicodeEncodeError:  # half of a surrogate pair, which no file is called
        return name.encode(errors="backslashreplace").decode()


class _Strict:
    """The first fault ends it."""

    def tolerate(self, _name: str):
        return contextlib.nullcontext()


class _Faults:
    """Faults are put down by name, and reading goes on."""

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
    path = Path(path)
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
    path = Path(path)
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
    """Writes what `read_pretrain_csv` reads."""
    with atomic_output(path) as partial, partial.open("w", newline="", **_TEXT) as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(CSV_COLUMNS)
        writer.writerows(
            (clip.fps, clip.width, clip.height, clip.caption, clip.name, clip.num_frames) for clip in clips
        )


def write_sft_json(path: str | Path, groups: Iterable[Group]) -> None:
    """Writes what `read_sft_json` reads."""

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
        return path.read_text(**_TEXT).removeprefix("\ufeff")  # which a spreadsheet puts in front
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); give the path of the data file") from error


def _csv_clip(where: str, folder: Path, row: Mapping) -> Clip:
    if None in row:  # where DictReader puts what is left over
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
    if not isinstance(row["caption"], str) or not row["caption"].strip():
        raise UserError(f"{where} ({name}): the caption is empty; write one or remove the clip")
    if printable(row["caption"]) != row["caption"]:
        raise UserError(f"{where} ({name}): the caption is not UTF-8 text; save the file as UTF-8")
    if not os.path.isfile(folder / name):  # False for whatever cannot be a path, too
        raise UserError(f"{where}: no video at {folder / name}; correct the path or remove the clip")
    return Clip(
        name=name,
        path=folder / name,
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
