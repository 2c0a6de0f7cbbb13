"""The output folder of a story. Every file is written as soon as it can be.

story.mp4  scene_01.mp4 ...  storyboard.png  index.html  run.json  latents/scene_01.npz ...
"""

import dataclasses
import importlib.metadata
import json
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
from absl import logging
from etils import epath
from jaxtyping import UInt8

from mask2dit_jax.errors import UserError
from mask2dit_jax.io.atomic import atomic_output, remove_leftovers
from mask2dit_jax.io.content import file_hash
from mask2dit_jax.io.paths import is_remote
from mask2dit_jax.media.storyboard import StoryboardScene, write_storyboard
from mask2dit_jax.media.video_join import join_videos
from mask2dit_jax.media.video_writer import write_video
from mask2dit_jax.story.page import PageScene, story_page
from mask2dit_jax.story.plan import StoryPlan, in_words
from mask2dit_jax.story.statistics import FrameStatistics, drift, latent_statistics
from mask2dit_jax.story.store import Shown, StoryLatents

_FRAMES_KEPT = 5  # of each scene, for the storyboard
_VERSIONS = ("mask2dit_jax", "jax", "jaxlib", "flax", "numpy")


@dataclasses.dataclass(frozen=True)
class StoryFolder:
    """One story in one folder.

    Attributes:
        folder: local or gs://.
        plan: of the story.
        text: the plan as a table to read.
        size: height and width of the frames.
        scenes: the latents, in `latents/`.
        display: says how frames are made from latents; scenes that were shown in another way are shown again.
        run: what it takes to repeat the run.
    """

    folder: epath.Path
    plan: StoryPlan
    text: str
    size: tuple[int, int]
    scenes: StoryLatents
    display: str
    run: Mapping[str, object]

    def log_contents(self) -> None:
        """Log which scenes will be kept and, as a warning, which will be replaced."""
        numbers = range(len(self.plan.frames))
        kept = [number for number in numbers if number in self.scenes]
        replaced = [number for number in numbers if number not in kept and self.scenes.has_file(number)]
        if kept:
            logging.info("%s: finished already: %s", self.folder, in_words(kept))
        if replaced:
            logging.warning(
                "%s: to be replaced: %s, made with other settings or damaged; choose another output to keep them",
                *(self.folder, in_words(replaced)),
            )

    def open(self) -> None:
        """Check that the folder can be written, and remove what killed runs left half-written.

        Writes run.json; an earlier one keeps its contents until this run shows a scene.

        Raises:
            UserError: the folder cannot be written, or the disk has no room for the scenes to come.
        """
        record = self.folder / "run.json"
        with atomic_output(record) as path:
            path.write_bytes(record.read_bytes() if record.exists() else self._record({}))
        for name in ("run.json", "scene_*.mp4", "story.mp4", "storyboard.png", "index.html"):
            remove_leftovers(self.folder, name)
        remove_leftovers(self.folder / "latents")
        missing = [number for number in range(len(self.plan.frames)) if number not in self.scenes]
        frame = self.size[0] * self.size[1] * 3
        needed = len(missing) * 2 * _FRAMES_KEPT * frame  # kept frames; videos take about as much again
        if missing and not is_remote(self.folder) and shutil.disk_usage(self.folder).free < needed:
            raise UserError(
                f"{self.folder}: the disk has {shutil.disk_usage(self.folder).free / 2**20:.0f} MiB free, the story "
                f"needs about {needed / 2**20:.0f} MiB; make room, or choose another output"
            )

    def video(self, number: int) -> epath.Path:
        """Return the path of a scene's video."""
        return self.folder / f"scene_{number + 1:02d}.mp4"

    def is_generated(self) -> bool:
        """Return whether the latents of all scenes are there; reads none of them."""
        return all(number in self.scenes for number in range(len(self.plan.frames)))

    def is_shown(self, number: int) -> bool:
        """Return whether a scene's statistics are there, and the very video that was made from its latents."""
        video = self.video(number)
        if not (self.scenes.is_shown(number, self.display) and video.exists()):
            return False
        return self.scenes.video_hash(number) in (None, file_hash(video))

    def show(self, number: int, frames: Iterable[UInt8[np.ndarray, "h w 3"]]) -> None:
        """Write the video of a scene from its frames, one by one, and keep a few of them with their statistics."""
        self._write_run({})
        length = self.plan.frames[number]
        keep = np.linspace(0, length - 1, _FRAMES_KEPT).round().astype(int)
        measured = FrameStatistics(frames, keep.tolist())
        write_video(self.video(number), measured, self.plan.fps)
        statistics = measured.result() | latent_statistics(self.scenes[number])
        shown = Shown(np.stack(measured.kept), statistics)
        self.scenes.show(number, self.display, shown, file_hash(self.video(number)))

    def finish(self) -> list[epath.Path]:
        """Write what is made from all scenes together, and return the files to look at."""
        story, numbers = self.plan.story, range(len(self.plan.frames))
        shown = [self.scenes.shown(number, self.display) for number in numbers]
        changes = drift([scene.statistics for scene in shown])
        join_videos(self.folder / "story.mp4", [self.video(number) for number in numbers])
        rows = [
            StoryboardScene(scene.prompt, kept.frames, self._label(number))
            for number, (scene, kept) in enumerate(zip(story.scenes, shown, strict=True))
        ]
        write_storyboard(self.folder / "storyboard.png", rows, _FRAMES_KEPT)
        self._write_page([kept.statistics for kept in shown], changes)
        measured = [
            {"scene": number + 1, **kept.statistics, "drift": change}
            for number, kept, change in zip(numbers, shown, changes, strict=True)
        ]
        self._write_run({"scenes": measured})
        return [self.folder / name for name in ("story.mp4", "storyboard.png", "index.html")]

    def _label(self, number: int) -> str:
        """Return the label for the storyboard, on which scenes of the first window have none."""
        origin = self.plan.origin(number)
        return "" if origin.startswith(("together", "alone")) else origin

    def _write_page(self, statistics: list[Mapping[str, float]], changes: list[Mapping[str, float]]) -> None:
        story = self.plan.story
        scenes = [
            PageScene(
                self.video(number).name,
                scene.prompt,
                self.plan.frames[number] / self.plan.fps,
                self.plan.origin(number),
                statistics[number],
                changes[number],
            )
            for number, scene in enumerate(story.scenes)
        ]
        title = story.title or story.name.replace("_", " ").capitalize()
        page = story_page(title, self.size, scenes, self.text, json.dumps(self.run, indent=2, ensure_ascii=False))
        with atomic_output(self.folder / "index.html") as path:
            path.write_text(page, encoding="utf-8")

    def _write_run(self, more: Mapping[str, object]) -> None:
        with atomic_output(self.folder / "run.json") as path:
            path.write_bytes(self._record(more))

    def _record(self, more: Mapping[str, object]) -> bytes:
        versions = {name: _version(name) for name in _VERSIONS}
        record = {**self.run, "story": dataclasses.asdict(self.plan.story), "versions": versions, **more}
        return (json.dumps(record, indent=2, ensure_ascii=False, default=_plain) + "\n").encode()


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _plain(value: object) -> object:
    """Convert paths to strings for json."""
    if isinstance(value, Path | epath.Path):
        return str(value)
    raise TypeError(f"{value!r} cannot be written as json")
