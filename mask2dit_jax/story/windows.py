"""Which scenes are generated together, and which scenes they are generated from (paper, section 3.3).

The model was trained on n scenes at once, so the first n scenes are generated together. Every further scene is
generated alone, from the n-1 before it. With an anchor it is generated from the first scene and the n-2 before it, so
that the model always sees a drifting story beside its beginning. Positions count from the start of the window, as in
training: its first scene is at frame 0 wherever it is in the story.

Given scenes are known from the start. If there are n-1 or more, the next scene is an extension, for which the model was
trained. If there are fewer, the rest of the first window is generated together with them as its context.
"""

import dataclasses

from mask2dit_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Window:
    """The scenes of one window.

    Attributes:
        known: numbers of the scenes that the model is shown, from 0, in the story's order.
        new: numbers of the scenes that it generates.
    """

    known: tuple[int, ...]
    new: tuple[int, ...]

    @property
    def scenes(self) -> tuple[int, ...]:
        """Numbers of all scenes, known ones first."""
        return self.known + self.new


def plan_windows(num_scenes: int, window: int, num_given: int = 0, *, anchor: bool = False) -> tuple[Window, ...]:
    """Return the windows of a story in the order in which they are generated.

    Args:
        num_scenes: of the story, given scenes included.
        window: number of scenes that the model works on at once; a shorter story is one shorter window.
        num_given: number of given scenes at the start of the story.
        anchor: whether every window has the first scene of the story.

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
