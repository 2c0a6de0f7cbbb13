"""The finished scenes of a story on disk, from which a run that was killed resumes.

    OUT/latents/scene_01.npz    latents (f h w c), and the fingerprint of everything that decided them;
                                once the scene has been shown, also a few of its frames, the statistics of all, and
                                the hash of its video

The fingerprint of a scene includes those of its context. So if scene 4 is edited, or scenes are added at the end, only
the scenes that change are made again.

Each array of an .npz file is read by itself. What is asked of a finished story, such as which scenes are there, reads a
fingerprint of a few bytes and leaves the latents alone.
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
from mask2dit_jax.io.content import file_hash
from mask2dit_jax.story.plan import StoryPlan

FORMAT = 1  # raise it when the same settings make other latents


@dataclasses.dataclass(frozen=True)
class Shown:
    """What is kept of a scene's frames.

    Attributes:
        frames: a few of them, uint8 (f h w 3).
        statistics: what `story.statistics` measured over all of them.
    """

    frames: np.ndarray
    statistics: Mapping[str, float]


class StoryLatents(MutableMapping[int, np.ndarray]):
    """Maps scene numbers to latents, as `StoryEngine.generate` takes them. Nothing is kept in memory.

    Scenes that were made with other settings count as missing; each is replaced when its new latents are done.
    """

    def __init__(self, folder: epath.PathLike, fingerprints: Sequence[str]):
        """Name the folder and what its scenes must have been made with.

        Args:
            folder: local or gs://; it need not exist yet.
            fingerprints: of every scene.
        """
        self._folder, self._fingerprints = epath.Path(folder), fingerprints

    def __setitem__(self, scene: int, latents: np.ndarray) -> None:
        """Write the latents of a scene, completely or not at all."""
        self._write(scene, latents=np.asarray(latents))

    def __getitem__(self, scene: int) -> np.ndarray:
        """Read the latents of a scene. Raises UserError if they are damaged."""
        stored = self._read(scene, "latents")
        if stored is not None:
            return stored["latents"]
        if scene in self:
            raise UserError(f"{self._path(scene)} is damaged; delete it, and the scene is made again")
        raise KeyError(scene)

    def __contains__(self, scene: object) -> bool:
        """Return whether the scene is there, made with these settings; reads no latents."""
        return self._read(scene) is not None

    def __iter__(self) -> Iterator[int]:
        """Yield the scenes that are there."""
        return (scene for scene in range(len(self._fingerprints)) if scene in self)

    def __len__(self) -> int:
        """Count the scenes that are there."""
        return sum(1 for _ in self)

    def __delitem__(self, scene: int) -> None:
        """Delete the file of a scene."""
        self._path(scene).unlink()

    def has_file(self, scene: int) -> bool:
        """Return whether there is a file at all, even one that is damaged or was made with other settings."""
        return self._path(scene).exists()

    def show(self, scene: int, display: str, shown: Shown, video: str) -> None:
        """Store what is kept of a scene's frames once its video is written.

        Args:
            scene: its number.
            display: says how the frames were made from the latents.
            shown: what to keep.
            video: hash of the video's content, see `file_hash`.
        """
        self._write(
            scene,
            latents=self[scene],
            display=np.array(display),
            frames=shown.frames,
            statistics=np.array(json.dumps(shown.statistics)),
            video=np.array(video),
        )

    def is_shown(self, scene: int, display: str) -> bool:
        """Return whether the scene has been shown in the way that `display` says."""
        stored = self._read(scene, "display")
        return stored is not None and str(stored["display"]) == display

    def video_hash(self, scene: int) -> str | None:
        """Return the hash of the video that was written; None if an older version wrote it, or nothing did."""
        stored = self._read(scene, "video")
        return stored and str(stored["video"])

    def shown(self, scene: int, display: str) -> Shown | None:
        """Return what is kept of the scene's frames; None if it has not been shown, or not in this way."""
        stored = self._read(scene, "frames", "statistics") if self.is_shown(scene, display) else None
        return stored and Shown(stored["frames"], json.loads(str(stored["statistics"])))

    def _path(self, scene: int) -> epath.Path:
        return self._folder / f"scene_{scene + 1:02d}.npz"

    def _write(self, scene: int, **arrays: np.ndarray) -> None:
        buffer = io.BytesIO()
        np.savez(buffer, fingerprint=np.array(self._fingerprints[scene]), **arrays)
        with atomic_output(self._path(scene)) as partial:
            partial.write_bytes(buffer.getvalue())

    def _read(self, scene: int, *names: str) -> dict[str, np.ndarray] | None:
        """Read some arrays of a scene. None if a part is missing or damaged, or if other settings made the scene."""
        try:
            with self._path(scene).open("rb") as file, np.load(file) as stored:
                if str(stored["fingerprint"]) != self._fingerprints[scene]:
                    return None
                return {name: stored[name] for name in names}
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
            return None


def fingerprints(plan: StoryPlan, settings: Mapping[str, object], given: Mapping[str, object]) -> list[str]:
    """Return a hash of everything that decides the latents of each scene.

    Args:
        plan: of the story.
        settings: what generated scenes depend on beside the plan: transformer, text encoder, sampler, seed, ...
        given: what given scenes depend on beside the plan: VAE, size, seed, ...

    Raises:
        UserError: the file of a given scene is missing.
    """
    made: dict[int, str] = {}
    story, frames = plan.story, plan.frames
    for number, scene in enumerate(story.scenes[: story.num_given]):
        made[number] = _hash(given, number, frames[number], plan.fps, float(scene.start), _given_hash(scene.given))
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


def _given_hash(path: str) -> str:
    try:
        return file_hash(Path(path))
    except OSError as error:
        raise UserError(f"{path}: no such file ({error.strerror}); correct the path of the given scene") from error
