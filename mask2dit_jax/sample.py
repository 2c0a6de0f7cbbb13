"""Samples a story: fixed scenes, then auto-regressive extension to as many scenes as there are prompts.

    python -m mask2dit_jax.sample --config=configs/sample.py:tiny --output=OUT

writes OUT/story.mp4, OUT/scene_01.mp4 ..., OUT/storyboard.png and OUT/run.json.
"""

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags, logging
from etils import epath
from jax.sharding import Mesh
from ml_collections import ConfigDict, config_flags
from tqdm import tqdm

from mask2dit_jax import caches, setup_run
from mask2dit_jax.data.output_file import atomic_output
from mask2dit_jax.data.storyboard import StoryboardScene, write_storyboard
from mask2dit_jax.data.transforms import fit_frames
from mask2dit_jax.data.video import probe, read_frames
from mask2dit_jax.data.video_writer import write_video
from mask2dit_jax.diffusion.schedule import NoiseSchedule
from mask2dit_jax.encoders import TextEncoder, VideoCodec
from mask2dit_jax.errors import UserError, run_main
from mask2dit_jax.models.dit import DiT, DiTConfig
from mask2dit_jax.parallel import sharding
from mask2dit_jax.parallel.mesh import check_tokens, make_mesh
from mask2dit_jax.parallel.module import abstract_module
from mask2dit_jax.port import pretrained as port
from mask2dit_jax.sampling.extend import Window, generate_story, plan_windows
from mask2dit_jax.sampling.generate import WindowSampler
from mask2dit_jax.transformer import TransformerSource

_CONFIG = config_flags.DEFINE_config_file("config", None, "Run config, e.g. configs/sample.py:tiny.", lock_config=True)
_OUTPUT = flags.DEFINE_string("output", None, "Folder for the results.")
flags.mark_flags_as_required(["config", "output"])


def main(argv):
    if len(argv) > 1:
        raise UserError(f"what is {argv[1]}? settings are given as --config.field=value")
    caches.keep_compiled_programs()
    config, output = _CONFIG.value, epath.Path(_OUTPUT.value)
    setup_run.check_values(config, "sample", "prompts")
    logging.info("config:\n%s", config)
    prompts, given = _texts(config, "prompts"), _texts(config, "given")
    windows = plan_windows(len(prompts), config.num_scenes, len(given))
    logging.info("plan: %d scenes in %d windows of up to %d", len(prompts), len(windows), config.num_scenes)
    with atomic_output(output / "run.json") as path:  # also finds out early whether the output can be written
        path.write_text(config.to_json_best_effort(indent=2))

    pretrained = setup_run.resolve_pretrained(config)
    vae_config = port.load_config(pretrained, "vae")
    source = TransformerSource.require(config.checkpoint or pretrained)
    model_config = setup_run.with_run_settings(source.config(), config)
    setup_run.check_encoders(model_config, pretrained)
    layout = setup_run.scene_layout(config, model_config, vae_config)
    sampling = setup_run.sampling_config(config)
    dtype = setup_run.resolve_dtype(config.compute_dtype)
    clips = [_read_given(path, config) for path in given]
    prompted = (config.negative_prompt if sampling.guided else "", *prompts)
    # T5 is freed before the transformer comes.
    negative, *text = TextEncoder(pretrained, model_config.text_tokens, dtype, caches.user_cache("prompts"))(prompted)
    codec = VideoCodec(pretrained, dtype, config.decode_chunking)
    key = jax.random.key(config.seed)
    given_latents = [
        codec.sample(clip, jax.random.fold_in(jax.random.fold_in(key, 2**31 - 1), number))
        for number, clip in enumerate(tqdm(clips, desc="encoding given clips", disable=not given))
    ]
    schedule = NoiseSchedule(port.load_schedule(pretrained))
    mesh = make_mesh(config.mesh.to_dict(), batch_size=1 + sampling.guided)
    check_tokens(layout.num_tokens, mesh)
    sampler = WindowSampler(*_load_transformer(source, model_config, dtype, mesh), schedule, sampling, mesh)
    latent_size = [side // vae_config.spatial_compression_ratio for side in (config.height, config.width)]
    story = generate_story(
        sampler,
        jnp.stack(text),
        jnp.asarray(negative),
        window=config.num_scenes,
        scene_layout=lambda frames: model_config.layout(tuple(frames), *latent_size),
        scene_shape=(layout.frames[0], *latent_size, model_config.latent_channels),
        key=key,
        given=given_latents,
        progress=_progress,
    )
    frames = {number: codec.decode(latents) for number, latents in enumerate(given_latents)}
    for number, latents in story:
        frames[number] = codec.decode(latents)
        write_video(output / f"scene_{number + 1:02d}.mp4", frames[number], config.fps)
    _write_story(output, config, prompts, frames, windows)
    print(f"{output / 'story.mp4'}\n{output / 'storyboard.png'}")


def _load_transformer(source: TransformerSource, config: DiTConfig, dtype, mesh: Mesh):
    """Graph and parameters, kept in the dtype of the computation, each on its devices."""
    graph, abstract = abstract_module(DiT, config, dtype, mesh, sharding.DIT)
    return graph, source.load(abstract)


def _texts(config: ConfigDict, name: str) -> tuple[str, ...]:
    """A field that holds texts; what looks like a number on the command line comes as one."""
    for value in config[name]:
        if not isinstance(value, str):
            raise UserError(f"{name} holds {value!r}, which is no text; quote each: --config.{name}=\"('one', 'two')\"")
    return tuple(config[name])


def _read_given(path: str, config: ConfigDict) -> np.ndarray:
    """The first frames of a clip, at the story's frame rate, as the VAE takes them."""
    info = probe(path)
    stride = max(1, round(info.fps / config.fps))
    needed = (config.num_frames - 1) * stride + 1
    if info.num_frames < needed:
        raise UserError(
            f"{path}: {info.num_frames} frames are too few; {config.num_frames} frames at {config.fps} a second need "
            f"{needed} of its {float(info.fps):g} a second; give a longer clip or lower num_frames"
        )
    return fit_frames(read_frames(path, range(0, needed, stride)), (config.height, config.width))


def _progress(window: Window):
    scenes = ", ".join(str(scene + 1) for scene in window.new_scenes)
    return lambda steps: tqdm(steps, desc=f"scene {scenes}", unit="step")


def _write_story(output: epath.Path, config: ConfigDict, prompts, frames, windows):
    write_video(output / "story.mp4", np.concatenate([frames[i] for i in range(len(prompts))]), config.fps)
    labels = {i: f"given: {path}" for i, path in enumerate(config.given)}
    for window in windows:
        if window.num_known:
            context = f"{window.start + 1}-{window.start + window.num_known}"
            labels |= dict.fromkeys(window.new_scenes, f"extended from scenes {context}")
    rows = [StoryboardScene(prompt, frames[i], labels.get(i, "")) for i, prompt in enumerate(prompts)]
    write_storyboard(output / "storyboard.png", rows)


if __name__ == "__main__":
    run_main(main)
