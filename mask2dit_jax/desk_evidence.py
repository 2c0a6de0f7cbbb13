"""The paper's findings at desk scale: trains what a finding compares, samples stories, reads them, draws the table.

    python -m mask2dit_jax.desk_evidence --finding=table2 --output=desk

writes OUTPUT/FINDING.json and .png, OUTPUT/storyboards/FINDING-*.png. What is done is kept: a run that was killed goes
on, and findings share their runs. docs/desk.md says what came out.
"""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
from absl import flags
from tqdm import tqdm

from mask2dit_jax.desk import evidence, plots
from mask2dit_jax.desk.dataset import write_stories, write_world
from mask2dit_jax.desk.findings import FINDINGS, NUM_TRAINING_STORIES, SEEDS, Finding
from mask2dit_jax.desk.runs import train
from mask2dit_jax.desk.world import draw_stories
from mask2dit_jax.errors import UserError, run_main

_FINDING = flags.DEFINE_enum("finding", "table2", list(FINDINGS), "What to show.")
_OUTPUT = flags.DEFINE_string("output", "desk", "Folder for data, runs and results.")
_SEEDS = flags.DEFINE_integer("seeds", len(SEEDS), "Training seeds.", lower_bound=1, upper_bound=len(SEEDS))
_JOBS = flags.DEFINE_integer("jobs", 2, "Runs that train side by side, a thread each.", lower_bound=1)


def main(argv):
    if len(argv) > 1:
        raise UserError(f"what is {argv[1]}? settings are given as --finding=NAME --output=DIR")
    finding, output = FINDINGS[_FINDING.value].with_seeds(_SEEDS.value), Path(_OUTPUT.value)
    _prepare_world(output)
    jax.config.update("jax_compilation_cache_dir", str(output / "compiled"))
    with ThreadPoolExecutor(_JOBS.value) as pool:
        trained = pool.map(lambda run: train(run, output), finding.runs)
        for _ in tqdm(trained, desc="runs", total=len(finding.runs), unit="run"):
            pass
    result = evidence.table(finding, output)
    evidence.write_table(result, output / f"{finding.name}.json")
    plots.plot_table(result, output / f"{finding.name}.png")
    _draw_stories(finding, output)
    _print_table(result)
    print(f"{output / finding.name}.json\n{output / finding.name}.png")


def _prepare_world(output: Path):
    world = output / "world"
    if not (world / "stories.json").exists():  # written last
        write_world(world)
        write_stories(world, "stories", draw_stories(0, NUM_TRAINING_STORIES))


def _draw_stories(finding: Finding, output: Path):
    """The first story of each arm's first seed: chosen before anything was sampled."""
    for arm in finding.arms:
        frames = evidence.sampled(arm.runs[0], arm.protocol, output)[0]
        truth = evidence.evaluation_stories(arm.protocol)[0]
        path = output / "storyboards" / f"{finding.name}-{arm.label.replace(' ', '-')}.png"
        plots.draw_story(path, truth, frames, arm.protocol.num_known)


def _print_table(result: dict):
    print(f"{'':24} {'visual %':>20} {'semantic %':>20}")
    for label, arm in result["arms"].items():
        cells = [
            f"{arm[name]:.1f} [{arm[f'{name}_interval'][0]:.1f}, {arm[f'{name}_interval'][1]:.1f}]"
            for name in ("visual", "semantic")
        ]
        print(f"{label:24} {cells[0]:>20} {cells[1]:>20}")


if __name__ == "__main__":
    run_main(main)
