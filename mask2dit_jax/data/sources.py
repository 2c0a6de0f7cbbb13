"""The two data files of the authors: the csv of pretraining (a clip a row) and the json of SFT (groups of shots).

    pretrain.csv   fps,width,height,caption,path,num_frame
    sft.json       [{"prefix", "values": [{"vid", "width", "height", "duration", "fps", "url", "caption"}, ...]}, ...]

`path` and `url` are relative to the folder of the file. Every fault is one line with the file and the row or prefix.
"""

import csv
import dataclasses
import io
import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path

from mask2dit_jax.data.output_file import atomic_output
from mask2dit_jax.errors import UserError

CSV_COLUMNS = ("fps", "width", "height", "caption", "path", "num_frame")
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


@dataclasses.dataclass(frozen=True)
class Group:
    """Consecutive shots of one story, in order."""

    name: str
    clips: tuple[Clip, ...]


def read_pretrain_csv(path: str | Path) -> list[Clip]:
    """Raises a UserError for an unreadable file, a missing column, value or video, an empty caption, or no rows."""
    path = Path(path)
    rows = csv.DictReader(io.StringIO(_read_text(path), newline=""), strict=True)
    try:
        missing = [column for column in CSV_COLUMNS if column not in (rows.fieldnames or ())]
        if missing:
            raise UserError(f"{path}: no column {', '.join(missing)}; the first line must name {','.join(CSV_COLUMNS)}")
        clips = [_csv_clip(f"{path} row {number}", path.parent, row) for number, row in enumerate(rows, 1)]
    except csv.Error as error:
        raise UserError(f"{path}: no valid csv after line {rows.line_num} ({error}); look at its quotes") from error
    if not clips:
        raise UserError(f"{path}: has no rows; add at least one clip")
    return clips


def read_sft_json(path: str | Path) -> list[Group]:
    """Raises a UserError for an unreadable file, a missing key, value or video, an empty caption, or no groups."""
    path = Path(path)
    try:
        groups = json.loads(_read_text(path))
    except json.JSONDecodeError as error:
        raise UserError(f"{path}: no valid json ({error}); correct the file") from error
    if not isinstance(groups, list) or not groups:
        raise UserError(f'{path}: must be a list of at least one {{"prefix", "values"}}')
    return [_group(f"{path} entry {number}", path.parent, group) for number, group in enumerate(groups, 1)]


def write_pretrain_csv(path: str | Path, clips: Iterable[Clip]) -> None:
    """Writes what `read_pretrain_csv` reads."""
    with atomic_output(path) as partial, partial.open("w", newline="", encoding="utf-8") as file:
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
        partial.write_text(json.dumps(raw, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")  # a spreadsheet puts a byte order mark in front
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); give the path of the data file") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: is not UTF-8 text ({error.reason}); save it as UTF-8") from error


def _csv_clip(where: str, folder: Path, row: Mapping) -> Clip:
    if None in row:  # where DictReader puts what is left over
        raise UserError(f"{where}: has more values than columns; put a caption with commas in double quotes")
    return _clip(where, folder, row, row["path"])


def _group(where: str, folder: Path, group: object) -> Group:
    if not isinstance(group, Mapping) or not isinstance(group.get("values"), list) or "prefix" not in group:
        raise UserError(f'{where}: must be {{"prefix": a name, "values": a list of shots}}')
    name, clips = str(group["prefix"]), []
    for number, value in enumerate(group["values"], 1):
        shot = f"{where} ({name}), shot {number}"
        missing = [key for key in JSON_KEYS if not isinstance(value, Mapping) or key not in value]
        if missing:
            raise UserError(f"{shot}: no {', '.join(missing)}; a shot has {', '.join(JSON_KEYS)}")
        frames = _number(shot, value, "duration") * _number(shot, value, "fps")
        clips.append(_clip(shot, folder, {**value, "num_frame": max(1, round(frames))}, value["url"]))
    return Group(name, tuple(clips))


def _clip(where: str, folder: Path, row: Mapping, name: object) -> Clip:
    if not isinstance(name, str) or not name.strip():
        raise UserError(f"{where}: names no video; give its path relative to {folder}")
    if not isinstance(row["caption"], str) or not row["caption"].strip():
        raise UserError(f"{where} ({name}): the caption is empty; write one or remove the clip")
    if not (folder / name).is_file():
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
