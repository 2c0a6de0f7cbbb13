"""Reproduces a finding of the paper at desk scale: trains the models it compares, samples stories and measures them.

    python experiments/desk --finding=table2 --output=desk

This writes OUTPUT/FINDING.json, OUTPUT/FINDING.png and OUTPUT/storyboards/FINDING-*.png. Finished work is kept: a
killed run resumes, and findings share their runs. docs/desk.md shows the results.
"""

import re
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
from absl import flags
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[2]))

from experiments.desk import evidence, plots
from experiments.desk.desk_data import write_stories, write_world
from experiments.desk.findings import FINDINGS, SEEDS, STORIES, Finding
from experiments.desk.runs import train
from experiments.desk.world import draw_stories
from mask2dit_jax.errors import UserError, run_main

_FINDING = flags.DEFINE_enum("finding", "table2", list(FINDINGS), "Finding to reproduce.")
_OUTPUT = flags.DEFINE_string("output", "desk", "Folder for data, runs and results.")
_SEEDS = flags.DEFINE_integer("seeds", len(SEEDS), "Number of training seeds.", lower_bound=1, upper_bound=len(SEEDS))
_JOBS = flags.DEFINE_integer("jobs", 2, "Number of runs that train at once, with one thread each.", lower_bound=1)


def main(argv):
    """Train, sample and measure all arms of the finding, then write and print the table.

    Raises:
        UserError: A run fails, or matplotlib is missing.
    """
    if len(argv) > 1:
        raise UserError(f"unexpected argument {argv[1]}; the flags are --finding=NAME --output=DIR")
    finding, output = FINDINGS[_FINDING.value].with_seeds(_SEEDS.value), Path(_OUTPUT.value)
    _prepare_world(finding, output)
    jax.config.update("jax_compilation_cache_dir", str(output / "compiled"))
    with ThreadPoolExecutor(_JOBS.value) as pool:
        trained = pool.map(lambda run: train(run, output), finding.runs)
        for _ in tqdm(trained, desc="runs", total=len(finding.runs), unit="run"):
            pass
    result = evidence.compare_arms(finding, output)
    evidence.write_table(result, output / f"{finding.name}.json")
    plots.plot_table(result, output / f"{finding.name}.png")
    _draw_stories(finding, output)
    _print_table(result)
    print(f"{output / finding.name}.json\n{output / finding.name}.png")


def _prepare_world(finding: Finding, output: Path):
    """Write the world and the stories that the finding's runs train on, unless they exist."""
    world = output / "world"
    if not any(world.glob("*.json")):  # stories are written after the world
        write_world(world)
    for name in sorted({run.stories for run in finding.runs}):
        if not (world / f"{name}.json").exists():
            write_stories(world, name, draw_stories(0, **STORIES[name]))


def _draw_stories(finding: Finding, output: Path):
    """Draw the first story of each arm's first seed, a choice that does not depend on the results."""
    for arm in finding.arms:
        scenes = [frames[0] for frames in evidence.sampled(arm.runs[0], arm.protocol, output)]
        truth = evidence.evaluation_stories(arm.protocol)[0]
        path = output / "storyboards" / f"{finding.name}-{_file_name(arm.label)}.png"
        plots.draw_story(path, truth, scenes, arm.protocol.num_known)


def _file_name(label: str) -> str:
    return re.sub(r"[^\w.=-]+", "-", label).strip("-")


def _print_table(result: dict):
    print(f"{'':40} {'visual %':>20} {'semantic %':>20} {'error':>20}")
    for label, arm in result["arms"].items():
        cells = [
            f"{arm[name]:.1f} [{arm[f'{name}_interval'][0]:.1f}, {arm[f'{name}_interval'][1]:.1f}]"
            for name in ("visual", "semantic", "error")
            if name in arm
        ]
        print(f"{label:40} " + " ".join(f"{cell:>20}" for cell in cells))


if __name__ == "__main__":
    run_main(main)
