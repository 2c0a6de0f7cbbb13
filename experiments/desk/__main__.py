"""The paper's findings at desk scale: trains what a finding compares, samples stories, reads them, draws the table.

    python experiments/desk --finding=table2 --output=desk

writes OUTPUT/FINDING.json and .png, OUTPUT/storyboards/FINDING-*.png. What is done is kept: a run that was killed goes
on, and findings share their runs. docs/desk.md says what came out.
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

_FINDING = flags.DEFINE_enum("finding", "table2", list(FINDINGS), "What to show.")
_OUTPUT = flags.DEFINE_string("output", "desk", "Folder for data, runs and results.")
_SEEDS = flags.DEFINE_integer("seeds", len(SEEDS), "Training seeds.", lower_bound=1, upper_bound=len(SEEDS))
_JOBS = flags.DEFINE_integer("jobs", 2, "Runs that train side by side, a thread each.", lower_bound=1)


def main(argv):
    if len(argv) > 1:
        raise UserError(f"what is {argv[1]}? settings are given as --finding=NAME --output=DIR")
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
    """The world, and the stories that the finding's runs are trained on."""
    world = output / "world"
    if not any(world.glob("*.json")):  # written last
        write_world(world)
    for name in sorted({run.stories for run in finding.runs}):
        if not (world / f"{name}.json").exists():
            write_stories(world, name, draw_stories(0, **STORIES[name]))


def _draw_stories(finding: Finding, output: Path):
    """The first story of each arm's first seed: chosen before anything was sampled."""
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
