"""A story of any number of scenes: the first window together, then one scene at a time (paper, section 3.3).

Every further scene is generated with the n-1 scenes before it as context, so a window never grows. The latents of
finished scenes are carried into the next window as they are: nothing is decoded and encoded again, and nothing drifts
on that account.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from mask2dit_jax.axes import Array, Floats
from mask2dit_jax.errors import UserError
from mask2dit_jax.layout import SceneLayout
from mask2dit_jax.sampling.generate import WindowSampler


@dataclasses.dataclass(frozen=True)
class Window:
    """Scenes start .. stop-1 of a story, of which the first `num_known` exist already."""

    start: int
    stop: int
    num_known: int

    @property
    def new_scenes(self) -> range:
        return range(self.start + self.num_known, self.stop)


def plan_windows(num_prompts: int, window: int, num_given: int = 0) -> list[Window]:
    """The windows of a story: a prompt a scene, the first `num_given` scenes given as clips.

    Raises:
        UserError: the numbers of prompts, given scenes and window do not fit together.
    """
    if window < 2 and num_prompts > 1:
        raise UserError("num_scenes must be at least 2, or no scene would see another; sample the prompts one by one")
    if num_given and num_given < window - 1:
        raise UserError(
            f"{num_given} given clips are too few: a scene is extended from the {window - 1} before it; "
            f"give {window - 1} clips or set num_scenes to {num_given + 1}"
        )
    if num_given and num_prompts <= num_given:
        raise UserError(
            f"{num_prompts} prompts for {num_given} given clips leave nothing to generate; "
            "give a prompt for every given clip and for every new scene"
        )
    if num_prompts < window:
        raise UserError(
            f"{num_prompts} prompts are too few for num_scenes={window}; give at least {window} prompts (one a scene)"
        )
    first = [] if num_given else [Window(0, window, 0)]
    done = num_given or window
    return first + [Window(stop - window, stop, window - 1) for stop in range(done + 1, num_prompts + 1)]


def generate_story(
    sampler: WindowSampler,
    text: Floats["n t x"],
    negative_text: Floats["t x"],
    *,
    window: int,
    scene_layout: Callable[[Sequence[int]], SceneLayout],
    scene_shape: tuple[int, int, int, int],
    key: Array,
    given: Sequence[Floats["f h w c"]] = (),
    progress: Callable[[Window], Callable] = lambda window: iter,
) -> Iterator[tuple[int, Floats["f h w c"]]]:
    """Yields (scene number, clean latents) of every new scene as soon as its window is done.

    Args:
        text: embeddings of every scene's prompt, those of given scenes included.
        negative_text: of the one negative prompt, repeated for every scene.
        scene_layout: layout of scenes of the given latent frames.
        scene_shape: (f h w c) of a new scene's latents.
        key: the story; noise of a window is folded from it and from the window's first new scene.
        given: clean, scaled latents of leading scenes.
        progress: gives a wrapper of the steps of a window.
    """
    latents = dict(enumerate(given))
    for planned in plan_windows(len(text), window, len(given)):
        start_key, condition_key, step_key = jax.random.split(jax.random.fold_in(key, planned.new_scenes.start), 3)
        num_new = len(planned.new_scenes)
        noise = jax.random.normal(start_key, (num_new * scene_shape[0], *scene_shape[1:]))
        known = [latents[scene] for scene in range(planned.start, planned.new_scenes.start)]
        parts = [noise[None]]
        if known:
            parts.insert(0, sampler.conditions(jnp.concatenate(known)[None], condition_key))
        layout = scene_layout([len(scene) for scene in known] + [scene_shape[0]] * num_new)
        window_text = text[None, planned.start : planned.stop]
        result = sampler(
            jnp.concatenate(parts, axis=1),
            window_text,
            jnp.broadcast_to(negative_text, window_text.shape),
            np.arange(layout.num_scenes) < planned.num_known,
            layout=layout,
            key=step_key,
            progress=progress(planned),
        )[0]
        for scene in planned.new_scenes:
            latents[scene] = result[layout.frame_slices[scene - planned.start]]
            yield scene, latents[scene]
        for scene in range(planned.stop - window + 1):  # no later window looks so far back
            latents.pop(scene, None)
