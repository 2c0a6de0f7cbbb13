"""The page of a story: what a browser is told about long names."""

from mask2dit_jax.story.page import PageScene, story_page

LONG = "/data/" + "a_very_long_name_" * 20 + ".mp4"


def test_long_names_wrap_within_their_card():
    """A path has no spaces to break at, and a grid's cards are as wide as their longest word unless told otherwise."""
    measured = {"mean": 0.5}
    scene = PageScene("scene_01.mp4", LONG, 1.0, f"given: {LONG}", measured, {"mean": 0.0})
    page = story_page(LONG, (32, 48), [scene], f"plan: {LONG}", f'{{"given": "{LONG}"}}')
    style = page.partition("<style>")[2].partition("</style>")[0]
    assert "h1, h3, p { overflow-wrap: anywhere }" in style
    assert "article { min-width: 0 }" in style
    assert "pre { white-space: pre-wrap; overflow-wrap: anywhere" in style
