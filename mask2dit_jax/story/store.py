"""The finished scenes of a story, on disk: what a run that was killed goes on from.

    OUT/latents/scene_01.npz    latents (f h w c), and the fingerprint of what made them
                                once it has been shown: a few frames and the statistics of all

A fingerprint covers everything that the latents depend on, the fingerprints of the context among it. So whoever edits
scene 4, or adds scenes at the end, has only those made again that come out otherwise.
"""

import dataclasses
import hashlib
import io
import json
import zipfile
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from pathlib import Path

import numpy as np
from etils import epath

from mask2dit_jax.errors import UserError
from mask2dit_jax.io.atomic import atomic_output
from mask2dit_jax.story.plan import StoryPlan

FORMAT = 1  # raise it when the same settings make other latents


@dataclasses.dataclass(frozen=True)
class Shown:
    """What is kept of a scene's frames: a few of them, and what `story.statistics` measured."""

    frames: np.ndarray  # uint8 (f h w 3)
    statistics: Mapping[str, float]


class StoryLatents(MutableMapping[int, np.ndarray]):
    """Latents of scenes by their number, as `generate_story` takes them. Nothing but the folder is remembered.

    Scenes that other settings made count as not there; they are replaced when the new ones are done.
    """

    def __init__(self, folder: epath.PathLike, fingerprints: Sequence[str]):
        self._folder, self._fingerprints = epath.Path(folder), fingerprints

    def __setitem__(self, scene: int, latents: np.ndarray) -> None:
        self._write(scene, latents=np.asarray(latents))

    def __getitem__(self, scene: int) -> np.ndarray:
        stored = self._read(scene)
        if stored is None:
            raise KeyError(scene)
        return stored["latents"]

    def __contains__(self, scene: object) -> bool:
        return self._read(scene) is not None

    def __iter__(self) -> Iterator[int]:
        return (scene for scene in range(len(self._fingerprints)) if scene in self)

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __delitem__(self, scene: int) -> None:
        self._path(scene).unlink()

    def has_file(self, scene: int) -> bool:
        """Also one that other settings made, or a damaged one, which will be replaced."""
        return self._path(scene).exists()

    def show(self, scene: int, display: str, shown: Shown) -> None:
        """Keeps what is left of a scene's frames when its video is written; `display` says how they were made."""
        statistics = np.array(json.dumps(shown.statistics))
        self._write(scene, latents=self[scene], display=np.array(display), frames=shown.frames, statistics=statistics)

    def shown(self, scene: int, display: str) -> Shown | None:
        """None if the scene has not been shown, or in another way."""
        stored = self._read(scene)
        if stored is None or str(stored.get("display")) != display:
            return None
        return Shown(stored["frames"], json.loads(str(stored["statistics"])))

    def _path(self, scene: int) -> epath.Path:
        return self._folder / f"scene_{scene + 1:02d}.npz"

    def _write(self, scene: int, **arrays: np.ndarray) -> None:
        buffer = io.BytesIO()
        np.savez(buffer, fingerprint=np.array(self._fingerprints[scene]), **arrays)
        with atomic_output(self._path(scene)) as partial:
            partial.write_bytes(buffer.getvalue())

    def _read(self, scene: int) -> dict[str, np.ndarray] | None:
        """None if there is no file, if it is damaged, or if other settings made it."""
        try:
            with np.load(io.BytesIO(self._path(scene).read_bytes())) as stored:
                if str(stored["fingerprint"]) != self._fingerprints[scene]:
                    return None
                return dict(stored)
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
            return None


def fingerprints(plan: StoryPlan, settings: Mapping[str, object], given: Mapping[str, object]) -> list[str]:
    """Of every scene: a hash of what decides its latents.

    Args:
        settings: what the plan does not say of generated scenes: transformer, text encoder, sampler, seed, ...
        given: what it does not say of given scenes: VAE, size, seed, ...
    """
    made: dict[int, str] = {}
    story, frames = plan.story, plan.frames
    for number, scene in enumerate(story.scenes[: story.num_given]):
        made[number] = _hash(given, number, frames[number], plan.fps, float(scene.start), _file_hash(scene.given))
    for window in plan.windows:
        scenes = [story.scenes[number] for number in window.scenes]
        texts = [(scene.prompt, scene.negative if plan.guided else "") for scene in scenes]
        lengths = [frames[number] for number in window.scenes]
        context = [made[number] for number in window.known]
        for number in window.new:
            made[number] = _hash(settings, number, window.known, window.new, texts, lengths, context)
    return [made[number] for number in range(len(story.scenes))]


def _hash(*parts: object) -> str:
    return hashlib.sha256(json.dumps([FORMAT, *parts], sort_keys=True).encode()).hexdigest()[:16]


def _file_hash(path: str) -> str:
    try:
        with Path(path).open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"{path}: no such file ({error.strerror}); correct the path of the given scene") from error
