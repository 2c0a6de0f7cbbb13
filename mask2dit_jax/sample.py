"""Sample stories: the first scenes together, then one at a time until every prompt has its scene.

    python -m mask2dit_jax.sample --config=configs/sample.py:tiny --output=OUT
    python -m mask2dit_jax.sample --config=configs/sample.py:5b --story=story.yaml --output=OUT
    python -m mask2dit_jax.sample --config=configs/sample.py:5b --story=story.yaml --output=OUT --plan

writes OUT/index.html, OUT/story.mp4, OUT/scene_01.mp4 ..., OUT/storyboard.png, OUT/run.json and OUT/latents/. It prints
the plan before it loads any weights; --plan stops there.

Each of several stories (--story=a.yaml,b.yaml) or seeds (--config.seeds="(0, 1, 2)") gets a folder of its own under
OUT. A run that is started again resumes after the last finished scene; Ctrl-C stops it with exit code 130. One living
run at a time may write into a folder. Several processes divide the stories among themselves, and each uses its own
devices.

`sampling/engine.py` does the same from Python.
"""

import contextlib
import dataclasses
from collections.abc import Iterable
from pathlib import Path

import jax
from absl import flags, logging
from etils import epath
from jax.experimental import multihost_utils
from ml_collections import ConfigDict, config_flags
from tqdm import tqdm

from mask2dit_jax.config import SampleConfig, read_config
from mask2dit_jax.errors import UserError, run_main
from mask2dit_jax.io.compiled_programs import keep_compiled_programs
from mask2dit_jax.io.run_hold import folder_held
from mask2dit_jax.io.user_cache import user_cache
from mask2dit_jax.parallel import distributed
from mask2dit_jax.pretrained.directory import read_json
from mask2dit_jax.pretrained.pretrained import Pretrained
from mask2dit_jax.sampling.engine import StoryEngine
from mask2dit_jax.story.file import read_story
from mask2dit_jax.story.folder import StoryFolder
from mask2dit_jax.story.plan import StoryPlan
from mask2dit_jax.story.store import StoryLatents
from mask2dit_jax.story.story import Story

_CONFIG = config_flags.DEFINE_config_file("config", None, "Run config, e.g. configs/sample.py:tiny.", lock_config=True)
_STORY = flags.DEFINE_list("story", [], "Story files, instead of --config.prompts; see mask2dit_jax/story/file.py.")
_REPEAT = flags.DEFINE_string("repeat", None, "A run.json whose config and story are used again, instead of --config.")
_OUTPUT = flags.DEFINE_string("output", None, "Folder for the results; default: runs/NAME, such as runs/sample.")
_PLAN = flags.DEFINE_bool("plan", False, "Print what would be done, and stop.")
flags.register_multi_flags_validator(
    ["config", "repeat"],
    lambda values: values["config"] is not None or values["repeat"] is not None,
    "Flag --config must have a value other than None.",
)


def main(argv):
    """Plan all stories, then make those of this process."""
    if len(argv) > 1:
        raise UserError(f"what is {argv[1]}? settings are given as --config.field=value")
    if _REPEAT.value and (_CONFIG.value is not None or _STORY.value):
        raise UserError(
            f"--repeat takes config and story from {_REPEAT.value}; leave out --config and --story, and to change a "
            "field (pretrained, checkpoint), change it in a copy of that file"
        )
    distributed.initialize()
    keep_compiled_programs()
    config, stories = _repeated(_REPEAT.value) if _REPEAT.value else _asked(_CONFIG.value)
    output = epath.Path(_OUTPUT.value or f"runs/{config.name}")
    weights = Pretrained.open(config.pretrained, checkpoint=config.checkpoint, weights=config.weights)
    engine = StoryEngine(weights, config, prompt_cache=user_cache("prompts"))
    logging.info("%s in %s\n%s", config.name, output, engine.summary())
    _warn_of_other_weights(_REPEAT.value, engine)
    folders = [
        _folder(config, engine, plan, seed, output / name)
        for plan in [engine.plan(story) for story in stories]
        for seed, name in _seeds(config, plan.story, len(stories))
    ]
    if jax.process_index() == 0:
        print(*dict.fromkeys(folder.text for folder in folders), sep="\n\n", flush=True)
    folders = folders[jax.process_index() :: jax.process_count()]
    for folder in folders:
        folder.log_contents()
    if _PLAN.value:
        return
    with contextlib.ExitStack() as holds:
        for folder in folders:
            holds.enter_context(folder_held(folder.folder))
        for folder in folders:
            folder.open()
        _make(folders, engine)
    if jax.process_count() > 1:  # a process that ends takes the others of its run with it
        multihost_utils.sync_global_devices("sampled")


def _make(folders: list[StoryFolder], engine: StoryEngine) -> None:
    engine.embed(folder.plan for folder in folders if not folder.is_generated())
    for folder in folders:
        for scene in engine.generate(folder.plan, folder.run["seed"], latents=folder.scenes, progress=_progress):
            if not folder.is_shown(scene.number):
                folder.show(scene.number, scene.frames())
        print(*folder.finish(), sep="\n")


def _progress(steps: Iterable[int], description: str) -> Iterable[int]:
    return tqdm(steps, desc=description, unit="step")


def _asked(config: ConfigDict) -> tuple[SampleConfig, list[Story]]:
    """Return the config, and the stories of the files or of the config's prompts."""
    config = read_config(config, SampleConfig, "sample")
    config.require("pretrained", *(() if _STORY.value else ("prompts",)))
    if not _STORY.value:
        return config, [Story.from_prompts(config.prompts, config.negative_prompt, config.given)]
    if config.given:
        raise UserError("--config.given does not go with --story; say `given:` in the story file")
    stories = [read_story(path, config.negative_prompt) for path in _STORY.value]
    names = [story.name for story in stories]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice:
        raise UserError(f"--story names two files {twice}, whose results would have one folder; rename one")
    return config, stories


def _repeated(path: str) -> tuple[SampleConfig, list[Story]]:
    """Return the config and the story of a run that is to be repeated."""
    run = read_json(epath.Path(path))
    try:
        config = read_config(run["config"] | {"seed": run["seed"], "seeds": ()}, SampleConfig, "sample")
        return config, [Story.from_json(run["story"])]
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: this run.json lacks {error}; give one that sample wrote") from error


def _warn_of_other_weights(path: str | None, engine: StoryEngine) -> None:
    for name, fingerprint in (read_json(epath.Path(path)).get("weights", {}) if path else {}).items():
        if engine.weights.get(name, fingerprint) != fingerprint:
            logging.warning("%s was made with other weights (%s), so the story will differ", path, name)


def _seeds(config: SampleConfig, story: Story, num_stories: int) -> list[tuple[int, str]]:
    """Return the seeds of a story, each with its folder under --output, which is "" for a single result."""
    seeds = tuple(dict.fromkeys(config.seeds or (config.seed,)))  # one given twice is one result
    parent = story.name if num_stories > 1 else ""
    return [(seed, str(Path(parent, f"seed_{seed}" if len(seeds) > 1 else ""))) for seed in seeds]


def _folder(config: SampleConfig, engine: StoryEngine, plan: StoryPlan, seed: int, folder: epath.Path) -> StoryFolder:
    scenes = StoryLatents(folder / "latents", engine.fingerprints(plan, seed))
    run = {"config": dataclasses.asdict(config), "seed": seed, "weights": engine.weights}
    return StoryFolder(folder, plan, engine.describe(plan), (config.height, config.width), scenes, engine.display, run)


if __name__ == "__main__":
    run_main(main)
