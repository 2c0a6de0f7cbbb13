"""A story: scenes in order, each with the prompt that the model gets. Story files and plain prompts both become one."""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from mask2dit_jax.errors import UserError

LONGEST_SCENE = 60.0  # seconds; a model sees six or so, and memory grows with it


@dataclasses.dataclass(frozen=True)
class Scene:
    """One scene.

    Attributes:
        prompt: as the model gets it: style in front, actors described.
        negative: what guidance leads away from.
        seconds: how long; None: as long as the run's config says.
        given: path of the clip or the picture that is this scene; empty: it is generated.
        start: seconds into the given clip at which the scene begins.
        where: names the scene in messages: its number, or the line of its file.
    """

    prompt: str
    negative: str = ""
    seconds: int | float | None = None
    given: str = ""
    start: int | float = 0
    where: str = ""


@dataclasses.dataclass(frozen=True)
class Story:
    """Scenes in order; those that are given come first.

    Raises:
        UserError: there are no scenes, nothing is to be generated, or a given scene follows a generated one.
    """

    name: str  # of its output folder, where there are several
    title: str
    scenes: tuple[Scene, ...]

    def __post_init__(self):
        if not self.scenes:
            raise UserError(f"{self.name}: 0 scenes; give at least one prompt")
        given = [bool(scene.given) for scene in self.scenes]
        if all(given):
            raise UserError(
                f"{self.name}: {len(given)} prompts for {len(given)} given scenes leave nothing to generate; give a "
                "prompt for every given scene and for every new scene"
            )
        if True in given[self.num_given :]:
            late = self.scenes[given.index(True, self.num_given)]
            raise UserError(
                f"{late.where}: a given scene follows one to be generated; move all given scenes to the top"
            )

    @property
    def num_given(self) -> int:
        return next((number for number, scene in enumerate(self.scenes) if not scene.given), len(self.scenes))

    @classmethod
    def from_prompts(cls, prompts: Sequence[str], negative: str, given: Sequence[str] = ()) -> "Story":
        """A prompt a scene, the first scenes given as clips or pictures."""
        if given and len(prompts) <= len(given):
            raise UserError(
                f"{len(prompts)} prompts for {len(given)} given clips leave nothing to generate; "
                "give a prompt for every given clip and for every new scene"
            )
        paths = [*given, *[""] * (len(prompts) - len(given))]
        scenes = [
            Scene(prompt, negative, given=path, where=f"scene {number}")
            for number, (prompt, path) in enumerate(zip(prompts, paths, strict=True), start=1)
        ]
        return cls("story", "", tuple(scenes))

    @classmethod
    def from_json(cls, raw: Mapping) -> "Story":
        """What `dataclasses.asdict` made, e.g. in a run.json."""
        return cls(raw["name"], raw["title"], tuple(Scene(**scene) for scene in raw["scenes"]))

    def check_length(self, most: int) -> None:
        if len(self.scenes) > most:
            raise UserError(
                f"{self.name}: {len(self.scenes)} scenes are more than max_scenes={most}; if you mean it, "
                f"set --config.max_scenes={len(self.scenes)}"
            )


@dataclasses.dataclass(frozen=True)
class Actors:
    """Names and what they look like: `Actor1` in a prompt becomes `Actor1 (a young fox, red fur)`, every time.

    These are the paper's words (section 4.1): a name means nothing from scene to scene, since no prompt sees another;
    what is said of it, word for word the same, does.
    """

    looks: Mapping[str, str]

    def describe(self, text: str) -> str:
        return self._pattern.sub(lambda name: f"{name[0]} ({self.looks[name[0]]})", text) if self.looks else text

    def named_in(self, text: str) -> set[str]:
        return set(self._pattern.findall(text)) if self.looks else set()

    def unknown_in(self, text: str) -> str | None:
        """A name of the form Actor3 that is neither known nor described on the spot."""
        for found in re.finditer(r"(?<!\w)Actor\d+(?!\w)(?!\s*\()", text):
            if found[0] not in self.looks:
                return found[0]
        return None

    @property
    def _pattern(self) -> re.Pattern:
        names = sorted(self.looks, key=len, reverse=True)  # "Old Fox" before "Fox"
        return re.compile(rf"(?<!\w)(?:{'|'.join(map(re.escape, names))})(?!\w)")


def is_picture(path: str) -> bool:
    """Whether a given scene is a still; everything else is read as a video."""
    return Path(path).suffix.lower() in (".png", ".jpg", ".jpeg", ".webp", ".bmp")
