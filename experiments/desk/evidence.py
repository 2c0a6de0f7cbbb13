"""The table of a finding: each trained run samples the same stories, which are read and averaged with intervals."""

import dataclasses
import functools
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from experiments.desk.bootstrap import interval
from experiments.desk.findings import Arm, Finding
from experiments.desk.readers import Frames, Reading, measure_stories
from experiments.desk.runs import TrainingRun
from experiments.desk.story_maker import Protocol, StoryMaker
from experiments.desk.world import WorldStory, draw_stories
from mask2dit_jax.io.atomic import atomic_output

NUM_STORIES = 128
_SEED = 1_000_003  # of the stories to sample; the training stories have a different seed


def evaluation_stories(protocol: Protocol) -> list[WorldStory]:
    """Return the stories to sample. The prompts of a story are distinct as long as there are enough captions."""
    return draw_stories(_SEED, NUM_STORIES, num_scenes=protocol.num_scenes, distinct=protocol.num_scenes <= 16)


def sampled(run: TrainingRun, protocol: Protocol, output: Path) -> list[Frames]:
    """Sample the evaluation stories with a trained run, or read them from disk if they exist.

    Returns:
        The frames of all stories' first, second, ... scenes.
    """
    path = run.workdir(output) / f"{protocol.name}.npz"
    if not path.exists():
        scenes = _maker(run, output, protocol.condition)(evaluation_stories(protocol), protocol)
        with atomic_output(path) as partial:
            np.savez_compressed(partial, *scenes)
    with np.load(path) as stored:
        return [stored[f"arr_{number}"] for number in range(len(stored))]


@functools.lru_cache(maxsize=64)
def _maker(run: TrainingRun, output: Path, condition: str) -> StoryMaker:
    """Build a sampler. It is cached, because programs compiled for one protocol serve most others."""
    return StoryMaker(run.workdir(output), output / "world" / "pretrained", condition)


def read_run(run: TrainingRun, protocol: Protocol, output: Path) -> Reading:
    """Sample the evaluation stories with a trained run and measure them."""
    return measure_stories(sampled(run, protocol, output), evaluation_stories(protocol))


def compare_arms(finding: Finding, output: Path) -> dict:
    """Return the figures of a finding: shares in percent, errors in grey levels."""
    arms = {arm.label: summary([read_run(run, arm.protocol, output) for run in arm.runs], arm) for arm in finding.arms}
    return {"finding": finding.name, "claim": finding.claim, "unit": "%; error: grey levels, 0..255", "arms": arms}


def summary(readings: Sequence[Reading], arm: Arm) -> dict:
    """Return the figures of an arm: visual and semantic with 95 % intervals and by seed, and the matrix.

    Given scenes count for agreement, but not for semantic, because the model did not make them. They determine all
    that the new scenes should show, so arms with given scenes have an error as well.

    Args:
        readings: Measurements of each seed.
        arm: The arm.
    """
    new = range(arm.protocol.num_known, arm.protocol.num_scenes)
    measures = {
        "visual": np.stack([reading.visual for reading in readings]),
        "semantic": np.stack([reading.matrix[:, new, new].mean(axis=1) for reading in readings]),
    }
    result: dict = {}
    for name, values in measures.items():
        result[name] = _percent(values.mean())
        result[f"{name}_interval"] = [_percent(end) for end in interval(values)]
        result[f"{name}_by_seed"] = [_percent(mean) for mean in values.mean(axis=1)]
    matrix = np.mean([reading.matrix.mean(axis=0) for reading in readings], axis=0)
    result["matrix"] = [[_percent(share) for share in row] for row in matrix]
    result["agreement_with_first"] = [
        _percent(share) for share in np.mean([reading.agreement.mean(axis=0) for reading in readings], axis=0)
    ]
    if arm.protocol.num_known:
        error = np.stack([reading.error[:, new].mean(axis=1) for reading in readings])
        result["error"], result["error_interval"] = float(error.mean()), interval(error)
    result["seeds"] = [run.seed for run in arm.runs]
    result["num_stories"] = len(readings[0].visual)
    result["settings"] = {**dict(arm.runs[0].fields), **dataclasses.asdict(arm.protocol)}
    return result


def write_table(result: dict, path: Path) -> None:
    """Write the figures of a finding as JSON."""
    with atomic_output(path) as partial:
        partial.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def _percent(share: float) -> float:
    return round(100 * float(share), 2)
