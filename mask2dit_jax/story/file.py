"""Story files.

    title: A fox in winter
    style: Hand-painted film, soft morning light.       # in front of every prompt
    negative: Blurred, text on the picture.             # instead of the config's; a scene may have its own
    actors:
      Actor1: a young fox, red fur, a torn left ear     # "Actor1" becomes "Actor1 (a young fox, ...)", every time
    scenes:
      - given: den.png                                  # a clip or a picture that is this scene; relative to the file
        prompt: Actor1 sleeps in the den.
      - given: walk.mp4
        start: 12.5                                     # seconds into the clip; default: 0
        prompt: Actor1 stretches.
      - prompt: Actor1 steps out into the snow.
        seconds: 3
      - Actor1 runs along the frozen river.             # just a prompt

Every error is one line that names the file, the line in it and the remedy.
"""

import difflib
import math
from pathlib import Path

import yaml
from absl import logging

from mask2dit_jax.errors import UserError
from mask2dit_jax.io.paths import find_file
from mask2dit_jax.media.pictures import is_picture
from mask2dit_jax.story.story import LONGEST_SCENE, Actors, Scene, Story

STORY_KEYS = ("title", "style", "negative", "actors", "scenes")
SCENE_KEYS = ("prompt", "negative", "seconds", "given", "start")
_KINDS = {"str": "a text", "int": "a number", "float": "a number", "bool": "yes or no", "null": "nothing",
          "map": "keys with values", "seq": "a list", "timestamp": "a date"}  # fmt: skip


def read_story(path: str | Path, negative: str = "") -> Story:
    """Read a story from a file. Paths in the file are relative to its folder.

    Args:
        path: of the file.
        negative: negative prompt of scenes for which the file has none.

    Raises:
        UserError: the file is missing or has an error.
    """
    return _Reader(find_file(path)).story(negative)


class _Reader:
    """Turns YAML nodes into values. Nodes know their lines, so every error can name one."""

    def __init__(self, path: Path):
        self._path = path

    def story(self, negative: str) -> Story:
        root = self._compose()
        if root is None:
            raise UserError(f"{self._path}: the file is empty; list the scenes under `scenes:`")
        fields = self._mapping(root, "the story", STORY_KEYS)
        actors = self._actors(fields.get("actors"))
        style = self._described(fields, "style", actors)
        negative = self._text(fields["negative"], "negative") if "negative" in fields else negative
        if "scenes" not in fields:
            raise self._fault(root, "no scenes; list them under `scenes:`")
        nodes = self._sequence(fields["scenes"], "scenes")
        if not nodes:
            raise self._fault(fields["scenes"], "no scenes; list at least one prompt, each after a dash")
        scenes = tuple(self._scene(node, actors, style, negative) for node in nodes)
        self._warn_of_unused(fields.get("actors"), scenes, actors)
        title = self._text(fields["title"], "title") if "title" in fields else ""
        return Story(self._path.stem, title, scenes)

    def _compose(self) -> yaml.Node | None:
        try:
            return yaml.compose(self._path.read_text(encoding="utf-8-sig"), Loader=yaml.SafeLoader)
        except OSError as error:
            raise UserError(f"{self._path}: cannot be read ({error.strerror}); give a story file") from error
        except UnicodeDecodeError as error:
            raise UserError(f"{self._path}: is not UTF-8 text ({error.reason}); save it as UTF-8") from error
        except yaml.MarkedYAMLError as error:
            mark = error.problem_mark or error.context_mark
            raise UserError(f"{self._path} line {mark.line + 1}: {_syntax(error)}") from error
        except yaml.YAMLError as error:
            raise UserError(f"{self._path}: no YAML ({str(error).splitlines()[0]}); give a story file") from error

    def _actors(self, node: yaml.Node | None) -> Actors:
        if node is None:
            return Actors({})
        looks = {}
        for name, look in self._mapping(node, "actors").items():
            if not name[:1].isalpha() or not name[-1:].isalnum():
                raise self._fault(look, f"actor {name!r} must begin with a letter and end with a letter or number")
            looks[name] = self._text(look, f"what actor {name} looks like")
        return Actors(looks)

    def _scene(self, node: yaml.Node, actors: Actors, style: str, negative: str) -> Scene:
        """Read a scene, which is a mapping or just a prompt."""
        is_prompt = isinstance(node, yaml.ScalarNode)
        fields = {"prompt": node} if is_prompt else self._mapping(node, "a scene", SCENE_KEYS)
        if "prompt" not in fields:
            raise self._fault(node, "the scene has no prompt; add one (a given scene needs one too)")
        prompt = self._described(fields, "prompt", actors)
        given = self._text(fields["given"], "given") if "given" in fields else ""
        given = str(find_file(self._path.parent / given)) if given else ""
        if "start" in fields and (not given or is_picture(given)):
            raise self._fault(fields["start"], "start is a place in a given clip, and there is none; remove the key")
        return Scene(
            prompt=f"{style} {prompt}".strip(),  # the style comes first: a prompt that is too long loses its end
            negative=self._text(fields["negative"], "negative") if "negative" in fields else negative,
            seconds=self._seconds(fields["seconds"]) if "seconds" in fields else None,
            given=given,
            start=self._start(fields["start"]) if "start" in fields else 0,
            where=self._where(node),
        )

    def _described(self, fields: dict[str, yaml.Node], key: str, actors: Actors) -> str:
        if key not in fields:
            return ""
        text = self._text(fields[key], key)
        unknown = actors.unknown_in(text)
        if unknown:
            remedy = self._similar(unknown, actors.looks) or "describe it under `actors:`"
            raise self._fault(fields[key], f"unknown actor {unknown}; {remedy}")
        return actors.describe(text)

    def _warn_of_unused(self, node: yaml.Node | None, scenes: tuple[Scene, ...], actors: Actors) -> None:
        used = set().union(*(actors.named_in(scene.prompt) for scene in scenes))
        for name, look in self._mapping(node, "actors").items() if node else ():
            if name not in used:
                logging.warning("%s: actor %s is never used", self._where(look), name)

    def _mapping(self, node: yaml.Node, what: str, keys: tuple[str, ...] = ()) -> dict[str, yaml.Node]:
        """Read a mapping. Raises for a duplicate key, and for one that is not in `keys` unless that is empty."""
        if not isinstance(node, yaml.MappingNode):
            raise self._fault(node, f"{what} must be keys with values, such as `key: value`, not {_kind(node)}")
        fields = {}
        for key_node, value in node.value:
            key = key_node.value if isinstance(key_node, yaml.ScalarNode) else "?"
            if keys and key not in keys:
                remedy = self._similar(key, keys) or f"known are {', '.join(keys)}"
                raise self._fault(key_node, f"{what} has no key {key!r}; {remedy}")
            if key in fields:
                raise self._fault(key_node, f"{key!r} is there twice; remove one")
            fields[key] = value
        return fields

    def _sequence(self, node: yaml.Node, what: str) -> list[yaml.Node]:
        if _kind(node) == "nothing":
            return []
        if not isinstance(node, yaml.SequenceNode):
            raise self._fault(node, f"{what} must be a list, each item after a dash, not {_kind(node)}")
        return node.value

    def _text(self, node: yaml.Node, what: str) -> str:
        if _kind(node) != "a text":
            raise self._fault(node, f"{what} must be a text, not {_kind(node)}; write one, in quotes if need be")
        if not node.value.strip():
            raise self._fault(node, f"{what} is empty; write it or remove the key")
        return " ".join(node.value.split())

    def _seconds(self, node: yaml.Node) -> float:
        seconds = _number(node)
        if not 0 < seconds <= LONGEST_SCENE:
            raise self._fault(
                node,
                f"seconds must be a number above 0 and at most {LONGEST_SCENE:g}, not {_value(node)}; "
                "split what is longer into scenes",
            )
        return seconds

    def _start(self, node: yaml.Node) -> float:
        start = _number(node)
        if not 0 <= start < math.inf:
            raise self._fault(node, f"start must be a number of seconds into the clip, not {_value(node)}")
        return start

    def _similar(self, name: str, known) -> str:
        close = difflib.get_close_matches(name, list(known), n=1)
        return f"did you mean {close[0]!r}?" if close else ""

    def _where(self, node: yaml.Node) -> str:
        return f"{self._path} line {node.start_mark.line + 1}"

    def _fault(self, node: yaml.Node, message: str) -> UserError:
        return UserError(f"{self._where(node)}: {message}")


def _kind(node: yaml.Node) -> str:
    return _KINDS.get(node.tag.rpartition(":")[2], "something else")


def _number(node: yaml.Node) -> float:
    """Return the number, or NaN if the node is not one."""
    return float(yaml.safe_load(node.value)) if _kind(node) == "a number" else math.nan


def _value(node: yaml.Node) -> str:
    return node.value if isinstance(node, yaml.ScalarNode) else _kind(node)


def _syntax(error: yaml.MarkedYAMLError) -> str:
    """Say what is wrong and what most likely helps, since YAML's own messages help no writer of stories."""
    problem = error.problem or "no YAML"
    if "'\\t'" in problem:
        return "a tab indents the line; indent with spaces"
    if "mapping values are not allowed" in problem:
        return "a colon in the middle of a text; put the text in quotes"
    if "cannot start any token" in problem:
        return f"{problem}; put the text in quotes"
    return f"no valid YAML ({problem}); check the indentation, and quote texts with special characters"
