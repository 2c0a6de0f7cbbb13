"""Compares a sampled story with the training shots that its prompts describe.

    python -m mask2dit_jax.evaluate --story=demo --shots=data/demo/pretrain.csv

This writes demo/evaluation.json. For each scene the file lists the distance to every training shot (RMS difference in
grey levels), the nearest shot, and whether the nearest shot is the one whose caption equals the scene's prompt. The
command fails if any scene is nearest to a different shot.
"""

import json

import numpy as np
from absl import flags
from etils import epath
from tqdm import tqdm

from mask2dit_jax.data.sources import Clip, read_pretrain_csv
from mask2dit_jax.errors import UserError, run_main
from mask2dit_jax.io.atomic import atomic_output
from mask2dit_jax.media.transforms import fit_frames
from mask2dit_jax.media.video_reader import iter_frames
from mask2dit_jax.metrics.nearest_shot import distances
from mask2dit_jax.pretrained.directory import read_json

_STORY = flags.DEFINE_string("story", None, "Output folder of mask2dit_jax.sample.", required=True)
_SHOTS = flags.DEFINE_string("shots", None, "CSV file that lists the training shots.", required=True)


def main(argv):
    """Measure all scenes of the story, write evaluation.json and print a table.

    Raises:
        UserError: A file cannot be read, or a scene is nearest to a shot that its prompt does not describe.
    """
    if len(argv) > 1:
        raise UserError(f"unexpected argument {argv[1]}; the flags are --story=DIR --shots=CSV")
    story = epath.Path(_STORY.value)
    run = read_json(story / "run.json")
    clips = read_pretrain_csv(_SHOTS.value)
    config, prompts = run["config"], [scene["prompt"] for scene in run["story"]["scenes"]]
    size, fps = (config["height"], config["width"]), config["fps"]
    shots = {clip.name: _all_frames(clip.path, size) for clip in tqdm(clips, desc="reading shots", unit="shot")}
    stride = max(1, round(clips[0].fps / fps))
    rows = []
    for number, prompt in enumerate(tqdm(prompts, desc="measuring scenes", unit="scene"), start=1):
        scene = _all_frames(story / f"scene_{number:02d}.mp4", size)
        rows.append(_measure(number, prompt, distances(scene, shots, stride), clips))
    correct = sum(row["correct"] for row in rows)
    result = {"correct": correct, "num_scenes": len(rows), "unit": "RMS difference, grey levels 0..255", "scenes": rows}
    with atomic_output(story / "evaluation.json") as path:
        path.write_text(json.dumps(result, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    _print_table(rows)
    for name in ("story.mp4", "storyboard.png", "evaluation.json"):
        print(story / name)
    if correct < len(rows):
        raise UserError(
            f"{len(rows) - correct} of {len(rows)} scenes look like a shot of another prompt; "
            f"see {story}/evaluation.json"
        )


def _all_frames(path, size) -> np.ndarray:
    """Return all frames of a video, resized and cropped as in training, in 8 bits."""
    fitted = [fit_frames(frame[None], size)[0] for frame in iter_frames(path)]
    return ((np.stack(fitted) + 1) * 127.5).round().astype(np.uint8)


def _measure(number: int, prompt: str, found: dict[str, float], clips: list[Clip]) -> dict:
    described = [clip.name for clip in clips if clip.caption == prompt]
    nearest = next(iter(found))
    return {
        "scene": number,
        "prompt": prompt,
        "described_shot": described[0] if described else None,
        "nearest_shot": nearest,
        "correct": nearest in described,
        "distances": {name: round(value, 2) for name, value in found.items()},
    }


def _print_table(rows: list[dict]):
    print(f"{'scene':>5}  {'nearest shot':28} {'distance':>8}   {'next shot':28} {'distance':>8}")
    for row in rows:
        (nearest, first), *rest = row["distances"].items()
        second, next_distance = rest[0] if rest else ("-", float("nan"))
        mark = "" if row["correct"] else f"   expected {row['described_shot']}"
        print(f"{row['scene']:>5}  {nearest:28} {first:8.1f}   {second:28} {next_distance:8.1f}{mark}")


if __name__ == "__main__":
    run_main(main)
