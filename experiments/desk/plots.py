"""The pictures of a finding: bars with intervals, matrices, and a storyboard for each arm."""

import textwrap
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from experiments.desk.world import WorldStory
from mask2dit_jax.errors import UserError
from mask2dit_jax.io.atomic import atomic_output
from mask2dit_jax.media.storyboard import StoryboardScene, write_storyboard

_MOST_IN_MATRIX = 4  # scenes
_LABEL_WIDTH = 14  # characters
_LETTERS_PER_ARM = 21  # characters of the title
_ENLARGED = 36  # storyboard pixels per pixel of the world
_COLOURS = {"visual": "#3d6f9e", "semantic": "#d08a3e"}


def plot_table(result: dict, path: Path) -> None:
    """Plot bars of visual and semantic with 95 % intervals, and below each arm its matrix.

    An arm with more than _MOST_IN_MATRIX scenes gets a curve over its scenes instead of the matrix.

    Args:
        result: Figures from `evidence.compare_arms`.
        path: PNG file to write.
    """
    plt = _pyplot()
    arms = result["arms"]
    figure, axes = plt.subplots(
        2, len(arms), figsize=(1.2 + 1.35 * len(arms), 4.6), height_ratios=(3, 1.2), squeeze=False, layout="constrained"
    )
    for axis in axes[0]:
        axis.remove()
    bars = figure.add_subplot(axes[0, 0].get_gridspec()[0, :])
    for offset, (name, colour) in zip((-0.2, 0.2), _COLOURS.items(), strict=True):
        values = np.array([arm[name] for arm in arms.values()])
        ends = np.array([arm[f"{name}_interval"] for arm in arms.values()])
        errors = np.abs(ends - values[:, None]).T
        bars.bar(np.arange(len(arms)) + offset, values, 0.38, yerr=errors, capsize=3, color=colour, label=name)
    labels = [textwrap.fill(label, _LABEL_WIDTH) for label in arms]
    bars.set(xticks=range(len(arms)), xticklabels=labels, ylim=(0, 105), ylabel="% of stories, of scenes")
    bars.set_title(textwrap.fill(result["claim"], _LETTERS_PER_ARM * len(arms)), fontsize=9)
    bars.legend(loc="lower left", bbox_to_anchor=(1, 0), frameon=False)
    for axis, arm in zip(axes[1], arms.values(), strict=True):
        matrix = np.array(arm["matrix"])
        if len(matrix) <= _MOST_IN_MATRIX:
            _draw_matrix(axis, matrix)
        else:
            _draw_by_scene(axis, np.array(arm["agreement_with_first"]), np.diagonal(matrix))
    with atomic_output(path) as partial:
        figure.savefig(partial, dpi=110, format="png")
    plt.close(figure)


def _draw_matrix(axis, matrix: np.ndarray):
    axis.imshow(matrix, cmap="Greys", vmin=0, vmax=100)
    axis.set(xticks=[], yticks=[], xlabel="prompt", ylabel="scene")
    for (row, column), value in np.ndenumerate(matrix):
        ink = "w" if value > 50 else "k"
        axis.text(column, row, f"{value:.0f}", ha="center", va="center", fontsize=7, color=ink)


def _draw_by_scene(axis, agreement: np.ndarray, semantic: np.ndarray):
    """Plot for each scene how often it agrees with the first scene and how often it follows its prompt."""
    for values, colour in zip((agreement, semantic), _COLOURS.values(), strict=True):
        axis.plot(range(1, len(values) + 1), values, color=colour, marker=".")
    axis.set(ylim=(0, 105), xlabel="scene", ylabel="%")


def draw_story(path: Path, truth: WorldStory, scenes: Sequence[np.ndarray], num_known: int) -> None:
    """Write the storyboard of one sampled story.

    Args:
        path: PNG file to write.
        truth: Story whose captions are the prompts.
        scenes: Frames (f h w 3) of each scene.
        num_known: Number of leading scenes that were given.
    """
    large = [frames.repeat(_ENLARGED, axis=1).repeat(_ENLARGED, axis=2) for frames in scenes]
    labels = ["given" if number < num_known else "" for number in range(len(truth))]
    rows: Sequence[StoryboardScene] = [
        StoryboardScene(scene.said.caption, video, label)
        for scene, video, label in zip(truth, large, labels, strict=True)
    ]
    write_storyboard(path, rows)


def _pyplot():
    try:
        import matplotlib
    except ImportError as error:
        raise UserError('the plots need matplotlib; run pip install -e ".[desk]" and start again') from error
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt
