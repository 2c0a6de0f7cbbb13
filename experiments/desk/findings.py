"""The paper's findings as comparisons of training runs and of the protocols they are sampled with."""

import dataclasses
import itertools

from experiments.desk.runs import TrainingRun
from experiments.desk.story_maker import Protocol

SEEDS = (0, 1, 2)
NUM_STORIES, FEW = 4000, (36, 9)
UNRELATED = (25, 50, 100)  # percent
# The sets of training stories, as arguments of `world.draw_stories`.
STORIES = {
    "stories": {"count": NUM_STORIES},
    **{f"few-{count:02d}": {"count": count} for count in FEW},
    **{f"unrelated-{share:03d}": {"count": NUM_STORIES, "unrelated": share / 100} for share in UNRELATED},
}
MASKS = ("v1", "v2", "v3", "v4", "v5")
PROBABILITIES = (0.0, 0.5, 0.9)

FIXED = Protocol()
EXTENSION = Protocol("extension", num_known=2)
TWELVE = Protocol("long", num_scenes=12)
LENGTHS = tuple(
    Protocol("frames-" + "-".join(map(str, frames)), scene_frames=frames)
    for frames in ((1, 1, 1), (2, 1, 2), (1, 2, 1))
)


@dataclasses.dataclass(frozen=True)
class Arm:
    """One side of a comparison: a training run per seed, all sampled with the same protocol."""

    label: str
    runs: tuple[TrainingRun, ...]
    protocol: Protocol = FIXED


@dataclasses.dataclass(frozen=True)
class Finding:
    """A comparison of several arms.

    Attributes:
        name: Name on the command line and of the files.
        claim: What the comparison is about, or what the paper claims.
        arms: The sides of the comparison.
    """

    name: str
    claim: str
    arms: tuple[Arm, ...]

    def with_seeds(self, count: int) -> "Finding":
        """Return the finding with only the first `count` training seeds, for a quicker and rougher look."""
        arms = tuple(dataclasses.replace(arm, runs=arm.runs[:count]) for arm in self.arms)
        return dataclasses.replace(self, arms=arms)

    @property
    def runs(self) -> tuple[TrainingRun, ...]:
        """All training runs, each once. The first seeds of all arms come first, for an early look at all arms."""
        by_seed = zip(*(arm.runs for arm in self.arms), strict=True)
        return tuple(dict.fromkeys(run for runs in by_seed for run in runs))


def _runs(name: str, *, stage="sft", stories="stories", starts=(), **fields) -> tuple[TrainingRun, ...]:
    """Return a run for each seed, with `fields` set in the config."""
    settings = tuple((field.replace("__", "."), value) for field, value in fields.items())
    return tuple(
        TrainingRun(f"{name}-{seed}", seed, settings, stage, stories, start)
        for seed, start in itertools.zip_longest(SEEDS, starts)
    )


_BY_MASK = {mask: _runs(f"table2-{mask}", mask=mask) for mask in MASKS}
_V2 = _BY_MASK["v2"]
_BY_PROBABILITY = {
    p: _V2 if p == 0.5 else _runs(f"table4-p{round(100 * p):03d}", condition_probability=p) for p in PROBABILITIES
}

TABLE_2 = Finding(
    "table2",
    "v1: scenes disagree; v2, v3: scenes agree and follow their prompts; v4, v5: scenes agree but ignore their prompts",
    tuple(Arm(mask, runs) for mask, runs in _BY_MASK.items()),
)
TABLE_4 = Finding(
    "table4",
    "training with the conditional mask enables extension; too much of it harms fixed scenes",
    tuple(
        Arm(f"p={p:g} {protocol.name}", runs, protocol)
        for protocol in (EXTENSION, TWELVE, FIXED)
        for p, runs in _BY_PROBABILITY.items()
    ),
)
TABLE_3 = Finding(
    "table3",
    "the more groups of unrelated scenes the SFT data contain, the less the scenes of a story agree",
    (
        Arm("0 %", _V2),
        *(Arm(f"{share} %", _runs(f"table3-{share:03d}", stories=f"unrelated-{share:03d}")) for share in UNRELATED),
    ),
)
_PRETRAINED = _runs("table5-pretrain", stage="pretrain")
TABLE_5 = Finding(
    "table5",
    "pretraining alone: scenes follow their prompts but disagree; SFT: they do both; the two together: a little better",
    (
        Arm("pretraining", _PRETRAINED),
        Arm(f"SFT, {NUM_STORIES} stories", _V2),
        *(
            Arm(
                f"{label} {count} stories",
                _runs(f"table5-{name}-{count:02d}", stories=f"few-{count:02d}", starts=starts),
            )
            for count in FEW
            for label, name, starts in (("SFT,", "sft", ()), ("pretraining + SFT,", "both", _PRETRAINED))
        ),
    ),
)
_MIXED = _runs("table8-mixed", scene_frames="((2,2,2),(1,1,1),(2,1,2),(1,2,1))")
TABLE_8 = Finding(
    "table8",
    "shorter scenes and scenes of mixed lengths, from a model trained on 2-frame scenes and one trained on all lengths",
    tuple(
        Arm(f"{label} {'-'.join(map(str, protocol.scene_frames or (2, 2, 2)))}", runs, protocol)
        for label, runs in (("trained on 2-2-2:", _V2), ("trained on all:", _MIXED))
        for protocol in (FIXED, *LENGTHS)
    ),
)
# The remaining findings need no training. They sample the runs of v2 with other protocols.
CONDITION = Finding(
    "condition",
    "known scenes shown clean (the authors' training code) or noised at t = 0 (the authors' sampling code)",
    tuple(
        Arm(protocol.condition, _V2, protocol)
        for protocol in (EXTENSION, Protocol("extension-noised", num_known=2, condition="noised"))
    ),
)
LONG = Finding(
    "long",
    "stories of twelve scenes, three at once, then one at a time; known latents kept or re-encoded from 8-bit pixels",
    tuple(
        Arm("re-encoded" if protocol.reencode else "carried", _V2, protocol)
        for protocol in (TWELVE, dataclasses.replace(TWELVE, name="long-reencoded", reencode=True))
    ),
)
FINDINGS = {finding.name: finding for finding in (TABLE_2, TABLE_3, TABLE_4, TABLE_5, TABLE_8, CONDITION, LONG)}
