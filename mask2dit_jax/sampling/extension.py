"""A story of any number of scenes: the first window together, then one scene at a time (paper, section 3.3).

Every further scene is generated with scenes that are done as its context (story/windows.py says which), so a window
never grows. The latents of finished scenes are carried into the next window as they are: nothing is decoded and encoded
again, and nothing drifts on that account.
"""

from collections.abc import Callable, Iterator, MutableMapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from mask2dit_jax.axes import Array, NpFloats
from mask2dit_jax.errors import UserError
from mask2dit_jax.layout import SceneLayout
from mask2dit_jax.sampling.window import WindowSampler
from mask2dit_jax.story.plan import in_words
from mask2dit_jax.story.windows import Window


def generate_story(
    sampler: WindowSampler,
    text: NpFloats["n t x"],
    negative_text: NpFloats["n t x"],
    *,
    windows: Sequence[Window],
    frames: Sequence[int],
    scene_layout: Callable[[Sequence[int]], SceneLayout],
    latent_shape: tuple[int, int, int],
    key: Array,
    latents: MutableMapping[int, np.ndarray],
    progress: Callable[[Window], Callable] = lambda window: iter,
) -> Iterator[Window]:
    """Yields each window when the latents of its new scenes are in `latents`.

    Windows whose new scenes are there from the start are not generated again. What a window comes out as depends on
    nothing but the key, its texts, its frames and its context: so a story that goes on tomorrow is the same story.

    Args:
        text: embeddings of every scene's prompt, those of given scenes included.
        negative_text: of every scene's negative prompt.
        windows: as `plan_windows` gives them.
        frames: latent frames of every scene; they may differ.
        scene_layout: layout of scenes of the given latent frames.
        latent_shape: (h w c) of a latent frame.
        key: the story; noise of a window is folded from it and from the window's first new scene.
        latents: clean, scaled latents (f h w c) of the scenes that are known; takes those that are generated. A dict,
            or what keeps them on disk, so that memory does not grow with the story.
        progress: gives a wrapper of the steps of a window.

    Raises:
        UserError: the latents of a window are not finite.
    """
    for window in windows:
        if not all(scene in latents for scene in window.new):
            layout = scene_layout([frames[scene] for scene in window.scenes])
            known = [latents[scene] for scene in window.known]
            texts = (values[None, list(window.scenes)] for values in (text, negative_text))
            window_key = jax.random.fold_in(key, window.new[0])
            result = _generate_window(sampler, known, *texts, layout, latent_shape, window_key, progress(window))
            if not np.isfinite(result).all():
                raise UserError(
                    f"{in_words(window.new)}: the latents are no numbers (NaN or infinite) and are not kept; look "
                    "for damage in the transformer's weights, or compute in float32"
                )
            for scene, part in zip(window.new, layout.frame_slices[len(known) :], strict=True):
                latents[scene] = result[part]
        yield window


def _generate_window(
    sampler: WindowSampler,
    known: list[np.ndarray],
    text: NpFloats["1 s t x"],
    negative_text: NpFloats["1 s t x"],
    layout: SceneLayout,
    latent_shape: tuple[int, int, int],
    key: Array,
    progress: Callable,
) -> NpFloats["f h w c"]:
    """Latents of all scenes of a window, of which the first are known."""
    start_key, condition_key, step_key = jax.random.split(key, 3)
    num_new = sum(layout.frames[len(known) :])
    parts = [jax.random.normal(start_key, (num_new, *latent_shape))[None]]
    if known:
        parts.insert(0, sampler.conditions(jnp.concatenate(known)[None], condition_key))
    result = sampler(
        jnp.concatenate(parts, axis=1),
        jnp.asarray(text),
        jnp.asarray(negative_text),
        np.arange(layout.num_scenes) < len(known),
        layout=layout,
        key=step_key,
        progress=progress,
    )
    return np.asarray(result[0])
