"""The story world as files that the mains read: clips, lists of clips, and the frozen components.

FOLDER/clips/*.mkv       every scene of the world once, in lossless FFV1 (H.264 would smear 4 x 4 pixels)
FOLDER/NAME.json         stories, as groups of consecutive shots
FOLDER/pretrain.csv      single shots
FOLDER/pretrained/       a lossless codec, and the text encoder, tokenizer and noise schedule of the tiny preset
"""

import os
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path

import av
import numpy as np
from jaxtyping import UInt8

from experiments.desk.world import ALL_SCENES, NUM_FRAMES, SIDE, WorldScene, WorldStory, render
from mask2dit_jax.data.sources import Clip, Group, write_pretrain_csv, write_sft_json
from mask2dit_jax.io.atomic import atomic_output
from mask2dit_jax.io.paths import ASSETS
from mask2dit_jax.models.space_to_depth import SpaceToDepthConfig
from mask2dit_jax.pretrained.safetensors import write_json

FPS = 8
CODEC = SpaceToDepthConfig(1, scaling_factor=1.5, sample_height=SIDE, sample_width=SIDE)  # about unit variance


def write_world(folder: str | os.PathLike) -> None:
    """Write the clips, pretrain.csv and pretrained/ to `folder`."""
    folder = Path(folder)
    for scene in ALL_SCENES:
        write_lossless(folder / _path(scene), render(scene))
        # Pretraining skips the ends of a clip, so its copy repeats the last frame.
        write_lossless(folder / _path(scene, "pretrain"), np.pad(render(scene), ((0, 1), *[(0, 0)] * 3), mode="edge"))
    write_pretrain_csv(folder / "pretrain.csv", [_clip(folder, scene, "pretrain") for scene in ALL_SCENES])
    for name in ("text_encoder", "tokenizer", "scheduler"):
        shutil.copytree(ASSETS / "tiny" / name, folder / "pretrained" / name, dirs_exist_ok=True)
    (folder / "pretrained" / "vae").mkdir(exist_ok=True)
    write_json(folder / "pretrained" / "vae" / "config.json", CODEC.to_json())


def write_stories(folder: str | os.PathLike, name: str, stories: Sequence[WorldStory]) -> None:
    """Write FOLDER/NAME.json, whose clips `write_world` has written."""
    folder = Path(folder)
    groups = [
        Group(f"story {number}", tuple(_clip(folder, scene) for scene in story)) for number, story in enumerate(stories)
    ]
    write_sft_json(folder / f"{name}.json", groups)


def write_lossless(path: str | os.PathLike, frames: UInt8[np.ndarray, "f h w 3"] | Iterable) -> None:
    """Write frames as FFV1 in Matroska, which preserves every bit."""
    with atomic_output(path) as local, av.open(f"file:{local}", "w", format="matroska") as container:
        stream = container.add_stream("ffv1", rate=FPS)
        stream.height, stream.width, stream.pix_fmt = *frames[0].shape[:2], "bgr0"
        for image in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode(None))


def _path(scene: WorldScene, folder: str = "clips") -> str:
    return f"{folder}/{scene.name}.mkv"


def _clip(folder: Path, scene: WorldScene, subfolder: str = "clips") -> Clip:
    name, frames = _path(scene, subfolder), NUM_FRAMES + (subfolder == "pretrain")
    return Clip(name, folder / name, scene.said.caption, frames, float(FPS), SIDE, SIDE)
