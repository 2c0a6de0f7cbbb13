"""Samples stories: fixed scenes, then auto-regressive extension to as many scenes as there are prompts.

    python -m mask2dit_jax.sample --config=configs/sample.py:tiny --output=OUT
    python -m mask2dit_jax.sample --config=configs/sample.py:5b --story=story.yaml --output=OUT
    python -m mask2dit_jax.sample --config=configs/sample.py:5b --story=story.yaml --output=OUT --plan

writes OUT/index.html, OUT/story.mp4, OUT/scene_01.mp4 ..., OUT/storyboard.png, OUT/run.json and OUT/latents/. The plan
comes first, before any weights are loaded; --plan stops there.

Several stories (--story=a.yaml,b.yaml) or seeds (--config.seeds="(0, 1, 2)") go into folders of their own under OUT. A
run started again goes on where it stopped, scene by scene; what is done is not done again. Several processes share the
stories out among themselves, each on the mesh of its own devices.
"""

import dataclasses
import itertools
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
from absl import flags, logging
from etils import epath
from ml_collections import ConfigDict, config_flags
from tqdm import tqdm

from mask2dit_jax.config import SampleConfig, read_config
from mask2dit_jax.errors import UserError, run_main
from mask2dit_jax.io import user_cache
from mask2dit_jax.parallel import distributed
from mask2dit_jax.pretrained.directory import read_json
from mask2dit_jax.sampling.extension import generate_story
from mask2dit_jax.sampling_models import SamplingModels, wait_for_others
from mask2dit_jax.story.file import read_story
from mask2dit_jax.story.folder import StoryFolder
from mask2dit_jax.story.given import check_given, read_given
from mask2dit_jax.story.plan import StoryPlan
from mask2dit_jax.story.store import StoryLatents, fingerprints
from mask2dit_jax.story.story import Story
from mask2dit_jax.story.windows import Window

_CONFIG = config_flags.DEFINE_config_file("config", None, "Run config, e.g. configs/sample.py:tiny.", lock_config=True)
_STORY = flags.DEFINE_list("story", [], "Story files, instead of --config.prompts; see mask2dit_jax/story/file.py.")
_REPEAT = flags.DEFINE_string("repeat", None, "A run.json: its config and story again, instead of --config.")
_OUTPUT = flags.DEFINE_string("output", None, "Folder for the results; default: runs/NAME, such as runs/sample.")
_PLAN = flags.DEFINE_bool("plan", False, "Say what would be done, and stop.")
flags.register_multi_flags_validator(
    ["config", "repeat"],
    lambda values: values["config"] is not None or values["repeat"] is not None,
    "Flag --config must have a value other than None.",
)


def main(argv):
    if len(argv) > 1:
        raise UserError(f"what is {argv[1]}? settings are given as --config.field=value")
    if _REPEAT.value and (_CONFIG.value is not None or _STORY.value):
        raise UserError(
            f"--repeat takes config and story from {_REPEAT.value}; leave out --config and --story, and to change a "
            "field (pretrained, checkpoint), change it in a copy of that file"
        )
    distributed.initialize()
    user_cache.keep_compiled_programs()
    config, stories = _repeated(_REPEAT.value) if _REPEAT.value else _asked(_CONFIG.value)
    logging.info("config:\n%s", config)
    models = SamplingModels(config)
    _warn_of_other_weights(_REPEAT.value, models)
    folders = [
        _folder(config, models, plan, seed, epath.Path(_OUTPUT.value or f"runs/{config.name}") / name)
        for plan in [_plan(config, models, story) for story in stories]
        for seed, name in _seeds(config, plan.story, len(stories))
    ]
    if jax.process_index() == 0:
        print(*dict.fromkeys(folder.text for folder in folders), sep="\n\n", flush=True)
    folders = folders[jax.process_index() :: jax.process_count()]
    for folder in folders:
        folder.say_what_is_there()
    if _PLAN.value:
        return
    for folder in folders:
        folder.open()
        _encode_given(folder, models)
    texts = models.encode(text for folder in folders for text in _texts(folder))
    for folder in folders:
        _make(folder, models, texts)
    wait_for_others()


def _make(folder: StoryFolder, models: SamplingModels, texts: dict[str, np.ndarray]) -> None:
    """Generates, decodes and writes what is not there yet, a window at a time."""
    plan = folder.plan
    if not folder.is_generated():
        scenes = plan.story.scenes
        story = generate_story(
            models.sampler,
            np.stack([texts[scene.prompt] for scene in scenes]),
            np.stack([texts[scene.negative if plan.guided else scene.prompt] for scene in scenes]),
            windows=plan.windows,
            frames=plan.latent_frames,
            scene_layout=models.layout,
            latent_shape=models.latent_shape,
            key=jax.random.key(folder.run["seed"]),
            latents=folder.scenes,
            progress=_progress,
        )
        for window in story:
            _show(folder, models, window.new)
    _show(folder, models, range(len(plan.frames)))
    print(*folder.finish(), sep="\n")


def _encode_given(folder: StoryFolder, models: SamplingModels) -> None:
    """A scene at a time: the frames of one are large."""
    plan, key = folder.plan, jax.random.fold_in(jax.random.key(folder.run["seed"]), 2**31 - 1)
    missing = [number for number in range(plan.story.num_given) if number not in folder.scenes]
    for number in tqdm(missing, desc="encoding given scenes", disable=not missing):
        pixels = read_given(plan.story.scenes[number], plan.frames[number], plan.fps, folder.size)
        folder.scenes[number] = np.asarray(models.codec.sample(pixels, jax.random.fold_in(key, number)))


def _show(folder: StoryFolder, models: SamplingModels, numbers: Sequence[int]) -> None:
    for number in numbers:
        if not folder.is_shown(number):
            chunks = models.codec.decode_chunks(folder.scenes[number])  # each is written while the next is decoded
            folder.show(number, itertools.chain.from_iterable(chunks))


def _texts(folder: StoryFolder) -> list[str]:
    """What the text encoder has to read for a story; nothing, if its scenes are there."""
    scenes = () if folder.is_generated() else folder.plan.story.scenes
    prompts = [scene.prompt for scene in scenes]
    return prompts + [scene.negative for scene in scenes if folder.plan.guided]


def _progress(window: Window):
    scenes = ", ".join(str(scene + 1) for scene in window.new)
    return lambda steps: tqdm(steps, desc=f"scene {scenes}", unit="step")


def _asked(config: ConfigDict) -> tuple[SampleConfig, list[Story]]:
    """Stories of files, or the one of the config's prompts."""
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
    """The config and the story of a run that is to be made again."""
    run = read_json(epath.Path(path))
    try:
        config = read_config(run["config"] | {"seed": run["seed"], "seeds": ()}, SampleConfig, "sample")
        return config, [Story.from_json(run["story"])]
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: this run.json lacks {error}; give one that sample wrote") from error


def _warn_of_other_weights(path: str | None, models: SamplingModels) -> None:
    for name, fingerprint in (read_json(epath.Path(path)).get("weights", {}) if path else {}).items():
        if models.weights.get(name, fingerprint) != fingerprint:
            logging.warning("%s was made with other weights (%s): the story will be another one", path, name)


def _seeds(config: SampleConfig, story: Story, num_stories: int) -> list[tuple[int, str]]:
    """Seeds of a story, each with the folder under --output that its result has: none for a single one."""
    seeds = config.seeds or (config.seed,)
    parent = story.name if num_stories > 1 else ""
    return [(seed, str(Path(parent, f"seed_{seed}" if len(seeds) > 1 else ""))) for seed in seeds]


def _plan(config: SampleConfig, models: SamplingModels, story: Story) -> StoryPlan:
    """Raises UserError for what cannot work: afterwards, weights and hours are all that a story needs."""
    story.check_length(config.max_scenes)
    plan = StoryPlan.make(
        story,
        window=config.num_scenes,
        anchor=config.anchor,
        fps=config.fps,
        default_frames=config.num_frames,
        per_latent=models.vae.temporal_compression_ratio,
        count=models.cut,
        layout=models.layout,
        guided=models.sampling.guided,
        trained_frames=models.model.sample_frames,
    )
    for scene, frames in zip(story.scenes[: story.num_given], plan.frames, strict=False):
        check_given(scene, frames, config.fps, (config.height, config.width))
    return plan


def _folder(
    config: SampleConfig, models: SamplingModels, plan: StoryPlan, seed: int, folder: epath.Path
) -> StoryFolder:
    size = config.height, config.width
    largest = max(plan.layouts, key=lambda layout: layout.num_tokens)
    memory = models.memory(largest, sum(plan.latent_frames)).lines(models.mesh.size)
    weights, common = models.weights, {"seed": seed, "compute_dtype": config.compute_dtype}
    settings = {
        **common,
        "weights": {name: weights[name] for name in ("transformer", "text_encoder", "scheduler")},
        "latents": [*models.latent_shape, models.vae.temporal_compression_ratio],
        **{name: getattr(config, name) for name in ("mask", "condition", "guidance", "guidance_scale")},
        "sampler": dataclasses.asdict(config.sampler),
    }
    given = {**common, "vae": weights["vae"], "size": size}
    scenes = StoryLatents(folder / "latents", fingerprints(plan, settings, given))
    run = {"config": dataclasses.asdict(config), "seed": seed, "weights": weights}
    text = plan.table(*size, models.sampling.sampler.num_steps, memory)
    display = f"VAE {weights['vae']}, {config.decode_chunking}, {config.fps} frames a second"
    return StoryFolder(folder, plan, text, size, scenes, display, run)


if __name__ == "__main__":
    run_main(main)
