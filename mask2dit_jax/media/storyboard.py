"""A storyboard, which shows a whole story in one picture: a row per scene, with its prompt and some of its frames."""

import bisect
import os
import unicodedata
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageDraw, ImageFont, ImageOps

from mask2dit_jax.errors import UserError
from mask2dit_jax.io.atomic import atomic_output

_PAPER, _INK, _MUTED, _RULE = "#fbfaf7", "#1f2328", "#77706a", "#e2ddd4"
_MARGIN, _GAP, _ROW_GAP = 36, 8, 28
_FRAME_BOX = 256, 160  # larger frames would make the page so large that its text becomes too small
_LEAST_WIDTH = 760
_TITLE_SIZE, _TEXT_SIZE, _LINE_HEIGHT = 20, 17, 25
_MOST_PROMPT_LINES = 4


class StoryboardScene(NamedTuple):
    """One row of a storyboard.

    Attributes:
        prompt: Text that the scene was made from.
        frames: RGB frames. Their size may differ between scenes.
        label: Remark beside the scene's number, such as "extended from scenes 2-3".
    """

    prompt: str
    frames: UInt8[np.ndarray, "f h w 3"]
    label: str = ""


def write_storyboard(path: str | os.PathLike, scenes: Sequence[StoryboardScene], frames_per_scene: int = 5) -> None:
    """Write a PNG that shows each scene's number, label, prompt, and frames spaced evenly from first to last.

    All frames are scaled to one readable size. Prompts of more than four lines end in an ellipsis.

    Args:
        path: Output, local or gs://.
        scenes: Scenes of the story, in order.
        frames_per_scene: Maximum number of frames in a row.

    Raises:
        UserError: There are no scenes, a scene has no frames, or `path` cannot be written.
    """
    if not scenes:
        raise UserError(f"cannot write {path}: a storyboard needs at least one scene")
    for number, scene in enumerate(scenes, start=1):
        if not scene.frames.size:
            raise UserError(f"cannot write {path}: scene {number} has no frames")
    strips = [_strip(scene.frames, frames_per_scene) for scene in scenes]
    width = max(_LEAST_WIDTH, *(strip.width for strip in strips))
    rows = [_row(number, *pair, width) for number, pair in enumerate(zip(scenes, strips, strict=True), start=1)]
    with atomic_output(path) as local:
        _stack(rows, width).save(local, format="PNG")


def _strip(frames: UInt8[np.ndarray, "f h w 3"], count: int) -> Image.Image:
    """Put evenly spaced frames side by side, including the first and the last."""
    chosen = np.unique(np.linspace(0, len(frames) - 1, count).round().astype(int))
    pictures = [Image.fromarray(frames[i]) for i in chosen]
    pictures = [ImageOps.contain(picture, _FRAME_BOX, Image.Resampling.LANCZOS) for picture in pictures]
    width, height = pictures[0].size
    strip = Image.new("RGB", (len(pictures) * (width + _GAP) - _GAP, height), _PAPER)
    for i, picture in enumerate(pictures):
        strip.paste(picture, (i * (width + _GAP), 0))
    return strip


def _row(number: int, scene: StoryboardScene, strip: Image.Image, width: int) -> Image.Image:
    title_font, text_font = ImageFont.load_default(_TITLE_SIZE), ImageFont.load_default(_TEXT_SIZE)
    lines = _wrap(_drawable(scene.prompt), text_font, width)
    text_top = _LINE_HEIGHT + 5
    strip_top = text_top + len(lines) * _LINE_HEIGHT + 9
    row = Image.new("RGB", (width, strip_top + strip.height), _PAPER)
    draw = ImageDraw.Draw(row)
    title = f"Scene {number}"
    draw.text((0, _TITLE_SIZE), title, _INK, title_font, anchor="ls", stroke_width=0.4)  # the font has no bold
    draw.text((title_font.getlength(title) + 14, _TITLE_SIZE), _drawable(scene.label), _MUTED, text_font, anchor="ls")
    for i, line in enumerate(lines):
        draw.text((0, text_top + i * _LINE_HEIGHT + _TEXT_SIZE), line, _INK, text_font, anchor="ls")
    row.paste(strip, (0, strip_top))
    return row


def _stack(rows: Sequence[Image.Image], width: int) -> Image.Image:
    height = sum(row.height for row in rows) + (len(rows) - 1) * 2 * _ROW_GAP
    page = Image.new("RGB", (width + 2 * _MARGIN, height + 2 * _MARGIN), _PAPER)
    draw = ImageDraw.Draw(page)
    top = _MARGIN
    for row in rows:
        if top > _MARGIN:
            draw.line([(_MARGIN, top - _ROW_GAP), (_MARGIN + width, top - _ROW_GAP)], _RULE)
        page.paste(row, (_MARGIN, top))
        top += row.height + 2 * _ROW_GAP
    return page


def _drawable(text: str) -> str:
    """Replace accented letters and long dashes, which Pillow's own font lacks. Other scripts are drawn as boxes."""
    plain = (c for c in unicodedata.normalize("NFKD", text) if not unicodedata.combining(c))
    return "".join("-" if unicodedata.category(c) == "Pd" else c for c in plain)


def _wrap(text: str, font: ImageFont.FreeTypeFont, width: int) -> list[str]:
    """Break text into lines of at most `width` pixels. An ellipsis replaces the rest after the last line."""
    lines = [""]
    for word in _words(text, font, width):
        longer = f"{lines[-1]} {word}".lstrip()
        if font.getlength(longer) <= width:
            lines[-1] = longer
        elif len(lines) < _MOST_PROMPT_LINES:
            lines.append(word)
        else:
            lines[-1] = _shorten(lines[-1], font, width)
            break
    return lines


def _words(text, font, width) -> Iterator[str]:
    """Yield the words of `text`, and a word wider than a line in pieces."""
    for word in text.split():
        while font.getlength(word) > width:
            too_long = bisect.bisect_right(range(len(word)), width, key=lambda end: font.getlength(word[:end]))
            fitting = too_long - 1
            yield word[:fitting]
            word = word[fitting:]
        yield word


def _shorten(line, font, width) -> str:
    while font.getlength(line + "…") > width:
        line = line[:-1].rstrip()
    return line.rstrip(" ,.;:") + "…"
