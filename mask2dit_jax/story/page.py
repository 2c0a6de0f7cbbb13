"""The page index.html, which shows a story. It opens from disk and needs only the videos beside it."""

from collections.abc import Mapping, Sequence
from html import escape
from typing import NamedTuple

_STYLE = """
:root { color-scheme: light dark; --paper: #fbfaf7; --ink: #1f2328; --muted: #77706a; --rule: #e2ddd4; --mark: #b4552d }
@media (prefers-color-scheme: dark) {
  :root { --paper: #17181a; --ink: #e9e6e0; --muted: #9b958d; --rule: #33343a; --mark: #e08a5f } }
* { box-sizing: border-box }
body { margin: 0 auto; max-width: 72rem; padding: 2.5rem 1.5rem 4rem; background: var(--paper); color: var(--ink);
  font: 1rem/1.5 system-ui, sans-serif }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0 } h2 { font-size: 1.15rem; margin: 3rem 0 .8rem }
h1, h3, p { overflow-wrap: anywhere } p { margin: .3rem 0 } .muted { color: var(--muted); font-size: .9rem }
video { display: block; width: 100%; background: #000; border-radius: 6px }
.whole { margin-top: 1.5rem; max-width: 52rem }
.scenes { display: grid; gap: 2rem 1.5rem; grid-template-columns: repeat(auto-fill, minmax(19rem, 1fr)) }
article { min-width: 0 } article h3 { margin: .7rem 0 .1rem; font-size: 1rem }
article h3 span { color: var(--muted); font-weight: 400 }
.scroll { overflow-x: auto } table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .9rem }
th, td { text-align: right; padding: .3rem .9rem; border-bottom: 1px solid var(--rule); white-space: nowrap }
th { font-weight: 600; color: var(--muted) } td small { color: var(--muted) } td.far small { color: var(--mark) }
th:first-child, td:first-child { padding-left: 0 }
pre { white-space: pre-wrap; overflow-wrap: anywhere; font-size: .8rem; line-height: 1.45; padding: 1rem;
  border: 1px solid var(--rule); border-radius: 6px; margin: 0 } summary { cursor: pointer }
"""
# Changes that are marked: those that are obvious when two scenes are seen side by side.
_FAR = {"mean": 0.1, "contrast": 0.05, "saturation": 0.1, "latent_mean": 0.2, "latent_std": 0.2}
_NAMES = {"mean": "brightness", "contrast": "contrast", "saturation": "saturation", "latent_mean": "latent mean",
          "latent_std": "latent deviation"}  # fmt: skip


class PageScene(NamedTuple):
    """What the page shows of a scene.

    Attributes:
        video: file name of its video, which lies beside the page.
        prompt: of the scene.
        seconds: its length.
        origin: what it was made from, in words.
        statistics: of its frames and latents.
        drift: differences of the statistics from those of the first scene.
    """

    video: str
    prompt: str
    seconds: float
    origin: str
    statistics: Mapping[str, float]
    drift: Mapping[str, float]


def story_page(title: str, size: tuple[int, int], scenes: Sequence[PageScene], plan: str, settings: str) -> str:
    """Return the page. All texts are escaped, because a prompt may hold anything.

    Args:
        title: of the story.
        size: height and width of the videos.
        scenes: in their order.
        plan: the plan as text.
        settings: the settings as text.
    """
    seconds = sum(scene.seconds for scene in scenes)
    height, width = size
    return f"""<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}</title>
<style>{_STYLE}</style>
<h1>{escape(title)}</h1>
<p class="muted">{len(scenes)} scenes, {seconds:.1f} seconds, {height} x {width}</p>
<video class="whole" src="story.mp4" style="aspect-ratio: {width} / {height}" controls loop preload="auto"></video>
<h2>Scenes</h2>
<div class="scenes">
{"".join(_scene(number, scene, size) for number, scene in enumerate(scenes, start=1))}</div>
<h2>Drift</h2>
<p class="muted">Measurements of each scene, and differences from scene 1. Large differences are marked.</p>
<div class="scroll">{_drift_table(scenes)}</div>
<h2>Plan</h2>
<pre>{escape(plan)}</pre>
<h2>Settings</h2>
<details><summary>All of them, as in run.json</summary><pre>{escape(settings)}</pre></details>
</html>
"""


def _scene(number: int, scene: PageScene, size: tuple[int, int]) -> str:
    shape = f"aspect-ratio: {size[1]} / {size[0]}"
    return f"""<article>
<video src="{escape(scene.video)}" style="{shape}" controls loop muted preload="auto"></video>
<h3>Scene {number} <span>{scene.seconds:.1f} s, {escape(scene.origin)}</span></h3>
<p>{escape(scene.prompt)}</p>
</article>
"""


def _drift_table(scenes: Sequence[PageScene]) -> str:
    names = [name for name in _NAMES if name in scenes[0].statistics]
    head = "".join(f"<th>{_NAMES[name]}</th>" for name in names)
    rows = []
    for number, scene in enumerate(scenes, start=1):
        cells = []
        for name in names:
            far = ' class="far"' if abs(scene.drift[name]) > _FAR[name] else ""
            change = f" <small>{scene.drift[name]:+.3f}</small>" if number > 1 else ""
            cells.append(f"<td{far}>{scene.statistics[name]:.3f}{change}</td>")
        rows.append(f"<tr><td>{number}</td>{''.join(cells)}</tr>")
    return f"<table><tr><th>scene</th>{head}</tr>{''.join(rows)}</table>"
