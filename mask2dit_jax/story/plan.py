"""The plan of a story, made before anything is loaded: its scenes, frames, tokens and windows."""

import dataclasses
from collections.abc import Callable, Sequence

from mask2dit_jax.layout import SceneLayout
from mask2dit_jax.media.pictures import is_picture
from mask2dit_jax.pretrained.tokenizer import Cut
from mask2dit_jax.story.story import Story
from mask2dit_jax.story.windows import Window, plan_windows


def num_frames(seconds: int | float, fps: int | float, per_latent: int) -> int:
    """Return the number of pixel frames, of the form `per_latent` k + 1 (CogVideoX: 4k + 1), nearest to `seconds`."""
    return max(0, round((seconds * fps - 1) / per_latent)) * per_latent + 1


@dataclasses.dataclass(frozen=True)
class StoryPlan:
    """How one story is made.

    Attributes:
        story: the story.
        fps: frames per second.
        windows: in the order in which they are generated.
        frames: pixel frames of each scene.
        latent_frames: latent frames of each scene.
        prompts: number of tokens of each scene's prompt, and the words that are cut.
        negatives: the same for negative prompts; empty without guidance.
        layouts: of the windows. Windows of one layout share one compiled program.
        trained_frames: pixel frames of a scene in training.
        cropped: given scenes that lose more than a fifth of their picture.
    """

    story: Story
    fps: int | float
    windows: tuple[Window, ...]
    frames: tuple[int, ...]
    latent_frames: tuple[int, ...]
    prompts: tuple[Cut, ...]
    negatives: tuple[Cut, ...]
    layouts: tuple[SceneLayout, ...]
    trained_frames: int
    cropped: tuple[int, ...] = ()

    @classmethod
    def make(
        cls,
        story: Story,
        *,
        window: int,
        anchor: bool,
        fps: int | float,
        default_frames: int,
        per_latent: int,
        count: Callable[[Sequence[str]], Sequence[Cut]],
        layout: Callable[[Sequence[int]], SceneLayout],
        guided: bool,
        trained_frames: int,
    ) -> "StoryPlan":
        """Plan a story.

        Args:
            story: the story.
            window: see `plan_windows`.
            anchor: see `plan_windows`.
            fps: frames per second.
            default_frames: pixel frames of a scene without a length of its own.
            per_latent: pixel frames that become one latent frame.
            count: counts the tokens of texts.
            layout: returns the layout of scenes with the given numbers of latent frames.
            guided: whether negative prompts are used.
            trained_frames: pixel frames of a scene in training.

        Raises:
            UserError: no windows fit the story, or the model cannot take its layouts.
        """
        windows = plan_windows(len(story.scenes), window, story.num_given, anchor=anchor)
        frames = [
            num_frames(scene.seconds, fps, per_latent) if scene.seconds else default_frames for scene in story.scenes
        ]
        latents = [(length - 1) // per_latent + 1 for length in frames]
        return cls(
            story,
            fps,
            windows,
            tuple(frames),
            tuple(latents),
            tuple(count([scene.prompt for scene in story.scenes])),
            tuple(count([scene.negative for scene in story.scenes])) if guided else (),
            tuple(layout([latents[scene] for scene in planned.scenes]) for planned in windows),
            trained_frames,
        )

    @property
    def guided(self) -> bool:
        """Whether negative prompts are used."""
        return bool(self.negatives)

    @property
    def texts(self) -> list[str]:
        """All texts that are embedded: every scene's prompt and, with guidance, its negative prompt."""
        scenes = self.story.scenes
        return [scene.prompt for scene in scenes] + [scene.negative for scene in scenes if self.guided]

    def origin(self, number: int) -> str:
        """Describe what scene `number` is made from."""
        scene = self.story.scenes[number]
        if scene.given:
            return f"given: {scene.given}{f', from second {scene.start:g} on' if scene.start else ''}"
        window = next(window for window in self.windows if number in window.new)
        if not window.known:
            return f"together: {in_words(window.new)}" if len(window.new) > 1 else "alone"
        if len(window.new) > 1:
            return f"together: {in_words(window.new)}, from {in_words(window.known)}"
        return f"extended from {in_words(window.known)}"

    def table(self, height: int, width: int, num_steps: int, memory: Sequence[str] = ()) -> str:
        """Return the plan as a table to read.

        Args:
            height: of the frames.
            width: of the frames.
            num_steps: denoising steps of a window.
            memory: lines about memory.
        """
        name, seconds = self.story.title or self.story.name, sum(self.frames) / self.fps
        largest = max(layout.num_tokens for layout in self.layouts)
        return "\n".join(
            [
                f"{name}: {_count(len(self.frames), 'scene')}, {seconds:.1f} s, {sum(self.frames)} "
                f"frames of {height} x {width} at {self.fps:g} a second",
                f"{'scene':>5}  {'seconds':>7}  {'frames':>6}  {'latent':>6}  {'tokens':>10}  how",
                *(self._row(number) for number in range(len(self.frames))),
                f"{_count(len(self.windows), 'window')} of up to {max(len(w.scenes) for w in self.windows)} scenes "
                f"x {num_steps} steps = {len(self.windows) * num_steps} denoising steps"
                f"{', two predictions each (guidance)' if self.guided else ''}",
                f"up to {largest:,} tokens at once; {_count(len(set(self.layouts)), 'layout')} to compile",
                *memory,
                *self._remarks(),
            ]
        )

    def _row(self, number: int) -> str:
        cut = self.prompts[number]
        tokens = f"{cut.tokens} of {cut.limit}"
        length = f"{self.frames[number] / self.fps:.2f}"
        return (
            f"{number + 1:>5}  {length:>7}  {self.frames[number]:>6}  {self.latent_frames[number]:>6}  {tokens:>10}"
            f"  {self.origin(number)}"
        )

    def _remarks(self) -> list[str]:
        remarks = []
        for number, scene in enumerate(self.story.scenes, start=1):
            frames = self.frames[number - 1]
            if scene.seconds and abs(frames / self.fps - scene.seconds) > 0.005:
                asked, made = f"{scene.seconds:g} s", f"{frames / self.fps:.2f} s"
                remarks.append(f"scene {number}: {asked} become {made}, the nearest length that the VAE has")
            if is_picture(scene.given):
                remarks.append(f"scene {number}: the picture {scene.given} is held for {frames} frames")
        longer = [number for number, frames in enumerate(self.frames) if frames > self.trained_frames]
        if longer:
            remarks.append(f"longer than the {self.trained_frames} frames that the model knows: {in_words(longer)}")
        if self.cropped:
            remarks.append(
                f"more than a fifth of the picture is cropped in {len(self.cropped)} of "
                f"{_count(self.story.num_given, 'given scene')}: {in_words(self.cropped)}"
            )
        for what, cuts in (("prompt", self.prompts), ("negative prompt", self.negatives)):
            for number, cut in enumerate(cuts, start=1):
                if cut.lost:
                    remarks.append(
                        f"scene {number}: the {what} has {cut.tokens} tokens, {cut.limit} are used; lost: {cut.lost}"
                    )
        return remarks


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def in_words(numbers: Sequence[int]) -> str:
    """Write numbers of scenes as "scenes 1, 4-5", counted from one."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and runs[-1][-1] == number - 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    words = [f"{run[0] + 1}-{run[-1] + 1}" if len(run) > 1 else f"{run[0] + 1}" for run in runs]
    return f"scene{'s' if len(numbers) > 1 else ''} {', '.join(words)}"
