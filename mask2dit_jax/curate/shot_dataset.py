"""From videos and the captions of their shots to a data set: shot files, `pretrain.csv` and `sft.json`."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from absl import logging

from mask2dit_jax.curate.shots import Shot, find_shots, write_shots
from mask2dit_jax.data.sources import Clip, Group, is_blank, printable, write_pretrain_csv, write_sft_json
from mask2dit_jax.errors import UserError
from mask2dit_jax.io.paths import as_composed, find_file
from mask2dit_jax.media.video_reader import probe

# captions[name of the video without its ending, in composed form][number of the shot, from 1]
Captions = Mapping[str, Mapping[int, str]]


def read_captions(path: str | Path) -> Captions:
    """Read `{"video name": {"1": "caption of its first shot", ...}, ...}`.

    Raises:
        UserError: the file is unreadable or has another form.
    """
    try:
        raw = json.loads(find_file(path).read_text(encoding="utf-8-sig"))
        captions = {
            as_composed(video): {int(number): text for number, text in shots.items()} for video, shots in raw.items()
        }
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); give a captions file") from error
    except (ValueError, AttributeError) as error:
        raise UserError(f'{path}: must be json like {{"video name": {{"1": "caption"}}}} ({error})') from error
    if len(captions) < len(raw):
        raise UserError(f"{path}: one video is named twice, with its accents in two spellings; join the two entries")
    for video, shots in captions.items():
        for number, text in shots.items():
            if not isinstance(text, str):
                raise UserError(f"{path}: caption {number} of {video} is {json.dumps(text)}; give a text in quotes")
    return captions


def build_dataset(
    videos: Sequence[str | Path], captions: Captions, output: str | Path, *, threshold: float, min_frames: int
) -> tuple[list[Clip], list[Group]]:
    """Cut videos into `output/shots/*.mp4`, and list the shots in two data files.

    `output/pretrain.csv` has every shot. `output/sft.json` has a group for each run of consecutive shots of a video.
    Shots that are there already are kept, so a run that was killed can go on. A video that cannot be read, is damaged
    or changes its size is left out, with its reason in the log.

    Args:
        videos: files to cut.
        captions: captions of all shots.
        output: folder to write to.
        threshold: see `find_shots`.
        min_frames: shots shorter than this are left out, each with a line in the log.

    Raises:
        UserError: a video is missing, none can be read, two have one name, a shot has no caption, or no shot is left.
    """
    videos, output = [find_file(video) for video in videos], Path(output)
    names = [as_composed(video.stem) for video in videos]
    if len(set(names)) < len(names):
        raise UserError(f"two videos have the same name ({', '.join(sorted(names))}); rename one, captions go by name")
    missing = [video for video in videos if not video.is_file()]
    if missing:
        raise UserError(f"{missing[0]}: no such file; correct the path of the video")
    runs, faults = [], []
    for video in videos:
        try:
            shots = find_shots(video, threshold)
        except UserError as error:
            logging.warning("%s is skipped: %s", printable(video.name), printable(str(error)))
            faults.append(error)
            continue
        long_enough = [shot for shot in shots if shot.num_frames >= min_frames]
        for shot in shots:
            if shot.num_frames < min_frames:
                name = printable(shot.name)
                logging.info("shot %s is left out: %d frames, fewer than %d", name, shot.num_frames, min_frames)
        _check_captions(long_enough, captions)
        if long_enough:
            write_shots(long_enough, output / "shots")
        runs += _runs(long_enough)
    groups = [Group(_group_name(run), tuple(_clip(shot, captions, output) for shot in run)) for run in runs]
    clips = [clip for group in groups for clip in group.clips]
    if not clips and faults:
        raise faults[0]
    if not clips:
        raise UserError(f"no shot has {min_frames} frames; lower --min_frames or give longer videos")
    for group in groups:
        if len(group.clips) == 1:
            logging.info("shot %s has no neighbour and is in no group of sft.json", printable(group.name))
    groups = [group for group in groups if len(group.clips) > 1]
    write_pretrain_csv(output / "pretrain.csv", clips)
    write_sft_json(output / "sft.json", groups)
    return clips, groups


def _check_captions(shots: Sequence[Shot], captions: Captions) -> None:
    missing = [shot for shot in shots if is_blank(captions.get(as_composed(shot.video.stem), {}).get(shot.number, ""))]
    if missing:
        named = ", ".join(
            f"{shot.video.name} shot {shot.number} (frames {shot.start}-{shot.stop - 1})" for shot in missing
        )
        raise UserError(f"no caption for {named}; add them to the captions file")


def _runs(shots: Sequence[Shot]) -> list[list[Shot]]:
    """Split where a shot was left out: the shot after the gap is not the next one of the video."""
    runs: list[list[Shot]] = []
    for shot in shots:
        if runs and runs[-1][-1].number + 1 == shot.number:
            runs[-1].append(shot)
        else:
            runs.append([shot])
    return runs


def _group_name(run: Sequence[Shot]) -> str:
    return run[0].name if len(run) == 1 else f"{run[0].name}-{run[-1].number}"


def _clip(shot: Shot, captions: Captions, output: Path) -> Clip:
    name = f"shots/{shot.name}.mp4"
    info = probe(output / name)
    caption = captions[as_composed(shot.video.stem)][shot.number]
    return Clip(name, output / name, caption, info.num_frames, round(float(info.fps), 3), info.width, info.height)
