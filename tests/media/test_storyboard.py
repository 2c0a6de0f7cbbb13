"""Tests the storyboard's layout, text and errors."""

import os

import numpy as np
import pytest
from PIL import Image, ImageFont

from mask2dit_jax.errors import UserError
from mask2dit_jax.media.storyboard import StoryboardScene, _wrap, write_storyboard

COLOURS = np.array([[220, 20, 20], [20, 200, 20], [20, 20, 220], [200, 200, 20], [20, 200, 200]], np.uint8)


def scene(prompt="a street", label="", shape=(64, 96), count=9):
    """Make a scene that shows each of COLOURS for two frames. Of 9 frames, the even ones show the five colours."""
    colours = COLOURS[np.arange(count) // 2 % len(COLOURS)]
    return StoryboardScene(prompt, np.broadcast_to(colours[:, None, None], (count, *shape, 3)), label)


def draw(path, scenes):
    write_storyboard(path, scenes)
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


def colour_rows(page, colour):
    """Return the rows of the page that have many pixels of one colour."""
    return np.flatnonzero((page == colour).all(-1).sum(1) > 100)


def ink(page):
    """Count the dark pixels, which are text."""
    return (page.max(-1) < 80).sum()


def test_row_shows_evenly_spaced_frames_in_order(tmp_path):
    page = draw(tmp_path / "board.png", [scene()])
    for colour in COLOURS:
        assert len(colour_rows(page, colour)) == 160
    middle = page[colour_rows(page, COLOURS[0])[80]]
    lefts = [np.flatnonzero((middle == colour).all(-1))[0] for colour in COLOURS]
    np.testing.assert_array_equal(np.diff(lefts), 248)  # 240 wide frames and a gap


def test_each_scene_has_a_row_and_the_label_is_drawn(tmp_path):
    plain = draw(tmp_path / "1.png", [scene()])
    three = draw(tmp_path / "3.png", [scene(), scene(), scene()])
    labelled = draw(tmp_path / "l.png", [scene(label="extended from scenes 2-3")])
    assert len(colour_rows(three, COLOURS[0])) == 3 * 160
    assert plain.shape == labelled.shape
    assert (plain != labelled).any()


@pytest.mark.parametrize("count", [1, 3])
def test_short_scene_shows_every_frame_once(tmp_path, count):
    page = draw(tmp_path / "board.png", [scene(count=count)])
    frames = ((page[:, :, None] == COLOURS).all(-1).any(-1)).sum()
    assert frames == count * 160 * 240


def test_frames_of_any_size_fit_on_the_page(tmp_path):
    page = draw(tmp_path / "board.png", [scene(shape=shape) for shape in ((32, 32), (272, 640), (480, 270))])
    assert page.shape[1] < 1500
    for row in colour_rows(page, COLOURS[4]):
        assert (page[row, -20:] == page[0, 0]).all()  # the margin stays empty


def test_long_prompt_is_wrapped_and_shortened(tmp_path):
    one_line = draw(tmp_path / "1.png", [scene()])
    four_lines = draw(tmp_path / "4.png", [scene("a man walks through a long street " * 20)])
    endless = draw(tmp_path / "n.png", [scene("a man walks through a long street " * 500)])
    assert one_line.shape[0] < four_lines.shape[0] == endless.shape[0]
    assert ink(four_lines) > 10 * ink(one_line)


@pytest.mark.parametrize("text", ["word " * 300, "x" * 2000, "short " + "x" * 2000])
def test_wrapped_lines_fit_and_the_cut_is_shown(text):
    font = ImageFont.load_default(17)
    lines = _wrap(text, font, 500)
    assert len(lines) == 4
    assert max(map(font.getlength, lines)) <= 500
    assert lines[-1].endswith("…")
    assert (
        "".join(lines[:3]).replace(" ", "") == text.replace(" ", "")[: sum(len(s.replace(" ", "")) for s in lines[:3])]
    )


def test_short_text_is_kept_whole():
    assert _wrap("two words", ImageFont.load_default(17), 500) == ["two words"]
    assert _wrap("", ImageFont.load_default(17), 500) == [""]


def test_accents_are_drawn_as_plain_letters(tmp_path):
    accented = draw(tmp_path / "a.png", [scene("café \N{EN DASH} Tür")])
    np.testing.assert_array_equal(accented, draw(tmp_path / "b.png", [scene("cafe - Tur")]))


def test_bad_input_is_named_and_leaves_nothing(tmp_path):
    path = tmp_path / "board.png"
    with pytest.raises(UserError, match="at least one scene"):
        write_storyboard(path, [])
    with pytest.raises(UserError, match="scene 2 has no frames"):
        write_storyboard(path, [scene(), scene(count=0)])
    with pytest.raises(UserError, match="cannot write"):
        write_storyboard(tmp_path, [scene()])
    assert not os.listdir(tmp_path)
