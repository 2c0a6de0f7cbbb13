"""Which scenes are generated together, and from which (paper, section 3.3).

The first n scenes come together, n being the scenes that the model was trained on. Every further one comes alone, from
the n-1 before it; or, with an anchor, from the first scene and the n-2 before it, so that what drifts from scene to
scene is always seen beside what it drifts from. Positions are those of the window: the first scene of a window is at
frame 0 wherever it is in the story, as in training.

Given scenes are known from the start. As many as n-1 make the next scene an extension, what training showed the model.
Fewer are allowed: the rest of the first window is then generated together, around them.
"""

import dataclasses

from mask2dit_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Window:
    """Numbers of the scenes, from 0, in the story's order: `known` ones are shown to the model, `new` ones come out."""

    known: tuple[int, ...]
    new: tuple[int, ...]

    @property
    def scenes(self) -> tuple[int, ...]:
        return self.known + self.new


def plan_windows(num_scenes: int, window: int, num_given: int = 0, *, anchor: bool = False) -> tuple[Window, ...]:
    """The windows of a story, in the order of their making.

    Args:
        num_scenes: of the story, the given ones among them.
        window: scenes that the model works on at once, n; a shorter story is one shorter window.

    Raises:
        UserError: there are no scenes or none to generate, or the window is too small for them.
    """
    if num_scenes < 1:
        raise UserError("0 prompts leave nothing to generate; give at least one (one a scene)")
    if num_given >= num_scenes:
        raise UserError(
            f"{num_given} given scenes of {num_scenes} leave nothing to generate; add a scene with a prompt"
        )
    if window < 2 and num_scenes > 1:
        raise UserError("num_scenes must be at least 2, or no scene would see another; sample the prompts one by one")
    if anchor and window < 3:
        raise UserError("an anchor needs num_scenes of at least 3: the first scene, the one before, and the new one")
    together = min(window, num_scenes)
    windows = []
    if num_given < together:
        windows.append(Window(tuple(range(num_given)), tuple(range(num_given, together))))
    for scene in range(max(num_given, together), num_scenes):
        context = range(scene - window + 1, scene)
        windows.append(Window((0, *context[1:]) if anchor else tuple(context), (scene,)))
    return tuple(windows)
