"""Story files: what a prompt becomes, and that each fault is one line with the number of its line."""

import dataclasses
import json
import logging as std_logging
import unicodedata

import pytest

from mask2dit_jax.errors import UserError
from mask2dit_jax.story.file import read_story
from mask2dit_jax.story.story import Story

STORY = """\
title: A fox in winter
style: Hand-painted film.
negative: blurred
actors:
  Actor1: a young fox, red fur
  Old Owl: an owl
scenes:
  - given: den.png
    prompt: Actor1 sleeps near Old Owl.
  - prompt: Actor1 runs; Actor1 jumps.
    seconds: 3
    negative: still
  - Snow falls on Actor10 (a wolf).
"""


@pytest.fixture
def read(tmp_path):
    def read(text):
        path = tmp_path / "story.yaml"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return read_story(path, "the config's")

    return read


def test_a_story(read, tmp_path):
    story = read(STORY)
    assert (story.name, story.title, story.num_given) == ("story", "A fox in winter", 1)
    fox = "Actor1 (a young fox, red fur)"
    assert [scene.prompt for scene in story.scenes] == [
        f"Hand-painted film. {fox} sleeps near Old Owl (an owl).",
        f"Hand-painted film. {fox} runs; {fox} jumps.",
        "Hand-painted film. Snow falls on Actor10 (a wolf).",  # described on the spot, and not Actor1
    ]
    assert [scene.negative for scene in story.scenes] == ["blurred", "still", "blurred"]
    assert [scene.seconds for scene in story.scenes] == [None, 3, None]
    assert [scene.given for scene in story.scenes] == [str(tmp_path / "den.png"), "", ""]


def test_a_part_of_a_clip(read):
    scenes = read(STORY.replace("den.png", "den.mp4\n    start: 12.5")).scenes
    assert [scene.start for scene in scenes] == [12.5, 0, 0]


def test_the_shortest_story(read):
    assert read("scenes: [A fox runs.]").scenes[0].negative == "the config's"
    assert read("scenes: [A fox runs.]").scenes[0].prompt == Story.from_prompts(["A fox runs."], "").scenes[0].prompt


def test_an_actor_nobody_needs(read, caplog):
    with caplog.at_level(std_logging.WARNING, logger="absl"):
        read(STORY.replace("Old Owl.", "a tree."))
    assert "story.yaml line 6: actor Old Owl is never used" in caplog.text


@pytest.mark.parametrize(("old", "new", "line", "told"), [
    ("title:", "titel:", 1, "no key 'titel'; did you mean 'title'?"),
    ("    seconds: 3", "    secnds: 3", 11, "no key 'secnds'; did you mean 'seconds'?"),
    ("    seconds: 3", "    colour: red", 11, "no key 'colour'; known are prompt, negative, seconds, given, start"),
    ("seconds: 3", "seconds: -3", 11, "must be a number above 0 and at most 60, not -3"),
    ("seconds: 3", "seconds: three", 11, "must be a number above 0 and at most 60, not three"),
    ("seconds: 3", "seconds: [3]", 11, "not a list"),
    ("seconds: 3", "seconds: 1e9", 11, "split what is longer into scenes"),
    ("seconds: 3", "seconds: .nan", 11, "must be a number"),
    ("seconds: 3", "start: 3", 11, "start is a place in a given clip, and there is none"),
    ("given: den.png", "given: den.png\n    start: 3", 9, "start is a place in a given clip"),
    ("given: den.png", "given: den.mp4\n    start: -3", 9, "start must be a number of seconds into the clip, not -3"),
    ("given: den.png", "given: den.mp4\n    start: .inf", 9, "start must be a number of seconds"),
    ("given: den.png", "given: den.mp4\n    start: [3]", 9, "not a list"),
    ("seconds: 3", "prompt: again", 11, "'prompt' is there twice"),
    ("seconds: 3", "given: den.mp4", 0, "leave nothing"),
    ("Actor1 runs", "Actor2 runs", 10, "unknown actor Actor2; did you mean 'Actor1'?"),
    ("Hand-painted film", "Actor3's film", 2, "unknown actor Actor3"),
    ("Hand-painted film.", "[a, b]", 2, "style must be a text, not a list"),
    ("A fox in winter", "2024", 1, "title must be a text, not a number; write one, in quotes"),
    ("A fox in winter", "", 1, "title must be a text, not nothing"),
    ("A fox in winter", "'  '", 1, "title is empty"),
    ("  Actor1: a young fox, red fur\n  Old Owl: an owl", "  - Actor1", 5, "actors must be keys with values"),
    ("  Old Owl", "  (Owl)", 6, "must begin with a letter"),
    ("  - Snow falls", "  - seconds: 3\n  - Snow falls", 13, "the scene has no prompt; add one"),
    ("  - Snow falls on Actor10 (a wolf).", "  - [a, b]", 13, "a scene must be keys with values"),
    ("  - Snow falls", "\t- Snow falls", 13, "a tab indents the line; indent with spaces"),
    ("Snow falls", "Snow: falls: on", 13, "a colon in the middle of a text; put the text in quotes"),
    ("Snow falls", "@Snow falls", 13, "put the text in quotes"),
    ("  - Snow falls", " - Snow falls", 13, "no valid YAML"),
    ("  - Snow", "  - {prompt: x, given: a.mp4}\n  - Snow", 13, "a given scene follows one to be generated"),
])  # fmt: skip
def test_faults(read, tmp_path, old, new, line, told):
    assert old in STORY
    with pytest.raises(UserError) as caught:
        read(STORY.replace(old, new, 1) if line else "scenes: [{prompt: a, given: b.png}]")
    message = str(caught.value)
    assert told in message
    assert "\n" not in message
    assert not line or message.startswith(f"{tmp_path / 'story.yaml'} line {line}: ")


@pytest.mark.parametrize(("text", "told"), [
    ("", "the file is empty"),
    ("title: nothing else", "line 1: no scenes; list them under `scenes:`"),
    ("scenes: []", "line 1: no scenes; list at least one prompt"),
    ("scenes:", "line 1: no scenes"),
    ("scenes: a fox", "line 1: scenes must be a list, each item after a dash, not a text"),
    ("just words", "line 1: the story must be keys with values"),
    ("scenes: [*fox]", "line 1: no valid YAML"),
    ("scenes: [a]\n---\nscenes: [b]", "line 2: no valid YAML"),
    (b"scenes: [\xff\xfe]", "is not UTF-8 text"),
    (b"%PDF-1.7\n\x00\x01", "no"),
])  # fmt: skip
def test_files_that_are_no_story(read, text, told):
    with pytest.raises(UserError, match=r"story\.yaml") as caught:
        read(text)
    assert told in str(caught.value)
    assert "\n" not in str(caught.value)


def test_too_many_scenes():
    story = Story.from_prompts(["a"] * 200, "")
    with pytest.raises(UserError, match=r"200 scenes are more than max_scenes=100; .* --config.max_scenes=200"):
        story.check_length(100)
    story.check_length(200)


@pytest.mark.parametrize("forms", [("NFC", "NFD"), ("NFD", "NFC")])
def test_a_given_scene_is_found_however_its_accents_are_spelt(tmp_path, forms):
    stored, named = (unicodedata.normalize(form, "tanière.png") for form in forms)
    (tmp_path / stored).touch()
    path = tmp_path / "story.yaml"
    path.write_text(f"scenes:\n  - given: {named}\n    prompt: a den\n  - prompt: snow\n", encoding="utf-8")
    story = read_story(path)
    assert story.scenes[0].given == str(tmp_path / stored)
    prompts = ["a den", "snow"]
    assert Story.from_prompts(prompts, "", [str(tmp_path / named)]).scenes[0].given == str(tmp_path / stored)
    moved = json.loads(json.dumps(dataclasses.asdict(story)).replace(*(json.dumps(n)[1:-1] for n in (stored, named))))
    assert Story.from_json(moved) == story
