"""The paper's findings as comparisons: which runs, sampled how, under which name."""

import dataclasses
import itertools

from experiments.desk.runs import TrainingRun
from experiments.desk.story_maker import Protocol

SEEDS = (0, 1, 2)
NUM_STORIES, FEW = 4000, (36, 9)
UNRELATED = (25, 50, 100)  # percent
# Training stories: what `world.draw_stories` is asked for.
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
    """One side of a comparison: a training run for each seed, all sampled in the same way."""

    label: str
    runs: tuple[TrainingRun, ...]
    protocol: Protocol = FIXED


@dataclasses.dataclass(frozen=True)
class Finding:
    """Attributes:
    claim: what the paper says of it.
    """

    name: str
    claim: str
    arms: tuple[Arm, ...]

    def with_seeds(self, count: int) -> "Finding":
        """The same with the first `count` training seeds alone: a quicker, rougher look."""
        arms = tuple(dataclasses.replace(arm, runs=arm.runs[:count]) for arm in self.arms)
        return dataclasses.replace(self, arms=arms)

    @property
    def runs(self) -> tuple[TrainingRun, ...]:
        """All training runs, each once; an arm's first seed comes first, so that an early look shows all arms."""
        by_seed = zip(*(arm.runs for arm in self.arms), strict=True)
        return tuple(dict.fromkeys(run for runs in by_seed for run in runs))


def _runs(name: str, *, stage="sft", stories="stories", starts=(), **fields) -> tuple[TrainingRun, ...]:
    """A run for each seed; `fields` are the config's."""
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
    "v1 keeps scenes apart, v2 and v3 agree and obey, v4 and v5 agree and do not obey",
    tuple(Arm(mask, runs) for mask, runs in _BY_MASK.items()),
)
TABLE_4 = Finding(
    "table4",
    "training with the conditional mask is what lets a model extend; too much of it costs fixed scenes",
    tuple(
        Arm(f"p={p:g} {protocol.name}", runs, protocol)
        for protocol in (EXTENSION, TWELVE, FIXED)
        for p, runs in _BY_PROBABILITY.items()
    ),
)
TABLE_3 = Finding(
    "table3",
    "the more groups of unrelated scenes the SFT data have, the less the scenes of a story agree",
    (
        Arm("0 %", _V2),
        *(Arm(f"{share} %", _runs(f"table3-{share:03d}", stories=f"unrelated-{share:03d}")) for share in UNRELATED),
    ),
)
_PRETRAINED = _runs("table5-pretrain", stage="pretrain")
TABLE_5 = Finding(
    "table5",
    "pretraining alone obeys and does not agree, SFT does both, the two together do a little better",
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
    "shorter scenes, and scenes of several lengths in one story, from a model of 2-frame scenes and from a mixed one",
    tuple(
        Arm(f"{label} {'-'.join(map(str, protocol.scene_frames or (2, 2, 2)))}", runs, protocol)
        for label, runs in (("trained on 2-2-2:", _V2), ("trained on all:", _MIXED))
        for protocol in (FIXED, *LENGTHS)
    ),
)
# The rest needs no run of its own: the runs of v2, sampled in other ways.
CONDITION = Finding(
    "condition",
    "known scenes shown clean (as in training) or noised at t = 0 (as the released model was sampled)",
    tuple(
        Arm(protocol.condition, _V2, protocol)
        for protocol in (EXTENSION, Protocol("extension-noised", num_known=2, condition="noised"))
    ),
)
LONG = Finding(
    "long",
    "stories of twelve scenes: three together, then one at a time; latents carried on, or through 8-bit pixels",
    tuple(
        Arm("re-encoded" if protocol.reencode else "carried", _V2, protocol)
        for protocol in (TWELVE, dataclasses.replace(TWELVE, name="long-reencoded", reencode=True))
    ),
)
FINDINGS = {finding.name: finding for finding in (TABLE_2, TABLE_3, TABLE_4, TABLE_5, TABLE_8, CONDITION, LONG)}
