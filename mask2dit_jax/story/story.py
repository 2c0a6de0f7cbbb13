"""A story: scenes in order, each with the prompt that the model gets. It comes from a story file or from prompts."""

import dataclasses
import re
from collections.abc import Mapping, Sequence

from mask2dit_jax.errors import UserError
from mask2dit_jax.io.paths import find_file

LONGEST_SCENE = 60.0  # seconds; models are trained on about six, and memory grows with the length


@dataclasses.dataclass(frozen=True)
class Scene:
    """One scene.

    Attributes:
        prompt: as the model gets it, with the style in front and every actor described.
        negative: negative prompt, which guidance leads away from.
        seconds: length; None stands for the length in the run's config.
        given: path of the clip or picture that is this scene; empty if the scene is generated.
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
    """Scenes in order; given scenes come first.

    Attributes:
        name: of its output folder, where there are several stories.
        title: for people; may be empty.
        scenes: at least one of them is generated.

    Raises:
        UserError: there are no scenes, nothing is to be generated, or a given scene follows a generated one.
    """

    name: str
    title: str
    scenes: tuple[Scene, ...]

    def __post_init__(self):
        """Check the scenes."""
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
        """Number of given scenes."""
        return next((number for number, scene in enumerate(self.scenes) if not scene.given), len(self.scenes))

    @classmethod
    def from_prompts(cls, prompts: Sequence[str], negative: str, given: Sequence[str] = ()) -> "Story":
        """Make a story from one prompt per scene.

        Args:
            prompts: of all scenes, given scenes included.
            negative: negative prompt of every scene.
            given: paths of clips or pictures that are the first scenes.

        Raises:
            UserError: there is no scene to generate.
        """
        if given and len(prompts) <= len(given):
            raise UserError(
                f"{len(prompts)} prompts for {len(given)} given clips leave nothing to generate; "
                "give a prompt for every given clip and for every new scene"
            )
        paths = [*(str(find_file(path)) for path in given), *[""] * (len(prompts) - len(given))]
        scenes = [
            Scene(prompt, negative, given=path, where=f"scene {number}")
            for number, (prompt, path) in enumerate(zip(prompts, paths, strict=True), start=1)
        ]
        return cls("story", "", tuple(scenes))

    @classmethod
    def from_json(cls, raw: Mapping) -> "Story":
        """Read what `dataclasses.asdict` returned, as stored in a run.json."""
        scenes = (Scene(**scene) for scene in raw["scenes"])
        spelt = (dataclasses.replace(s, given=str(find_file(s.given)) if s.given else "") for s in scenes)
        return cls(raw["name"], raw["title"], tuple(spelt))

    def check_length(self, most: int) -> None:
        """Raise UserError if the story has more than `most` scenes, which is probably a mistake."""
        if len(self.scenes) > most:
            raise UserError(
                f"{self.name}: {len(self.scenes)} scenes are more than max_scenes={most}; if you mean it, "
                f"set --config.max_scenes={len(self.scenes)}"
            )


@dataclasses.dataclass(frozen=True)
class Actors:
    """Descriptions of actors: `Actor1` in a prompt always becomes `Actor1 (a young fox, red fur)`.

    This is the paper's form (section 4.1). No prompt sees another, so a name alone means nothing from scene to scene,
    but the same description, word for word, does.

    Attributes:
        looks: description of each actor by name.
    """

    looks: Mapping[str, str]

    def describe(self, text: str) -> str:
        """Insert the description after every actor's name."""
        return self._pattern.sub(lambda name: f"{name[0]} ({self.looks[name[0]]})", text) if self.looks else text

    def named_in(self, text: str) -> set[str]:
        """Return the actors that a text names."""
        return set(self._pattern.findall(text)) if self.looks else set()

    def unknown_in(self, text: str) -> str | None:
        """Return a name of the form Actor3 that is neither known nor described on the spot, or None."""
        for found in re.finditer(r"(?<!\w)Actor\d+(?!\w)(?!\s*\()", text):
            if found[0] not in self.looks:
                return found[0]
        return None

    @property
    def _pattern(self) -> re.Pattern:
        names = sorted(self.looks, key=len, reverse=True)  # "Old Fox" before "Fox"
        return re.compile(rf"(?<!\w)(?:{'|'.join(map(re.escape, names))})(?!\w)")
