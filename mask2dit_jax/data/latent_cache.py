"""The latent cache: what the frozen encoders make of each clip, computed once and kept on disk.

    root/<fingerprint>/cache.json                  the settings that made it, for people
    root/<fingerprint>/<name>-<key>.safetensors    one clip: mean, logvar (v f h w c), text (t x), starts, strides (v)

The folder's name is a hash of everything that changes the numbers, so that other settings never meet old latents.
`v` counts the variants of a clip: each is another choice of its frames.
"""

import dataclasses
import hashlib
import json
import os
import re
from pathlib import Path

import numpy as np
from jaxtyping import Float32, Int32
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from mask2dit_jax.data.frames import FrameChoices, PretrainSampling, SftSampling
from mask2dit_jax.data.scene_store import UnreadableScene
from mask2dit_jax.data.sources import Clip, printable
from mask2dit_jax.errors import UserError
from mask2dit_jax.io.atomic import atomic_output
from mask2dit_jax.io.paths import is_remote

FORMAT = 1  # raise it when the meaning of a stored number changes


@dataclasses.dataclass(frozen=True)
class CacheSettings:
    """Everything but the clips themselves that decides what is stored, here and in a data set of records.

    Attributes:
        sampling: which frames are taken, and how many.
        size: height and width in pixels.
        variants: choices of frames stored for each clip.
        seed: of these choices.
        max_tokens: text tokens, padding included.
        encoders: names the encoder weights, by a hash of their files.
        compute_dtype: what the encoders compute in.
    """

    sampling: PretrainSampling | SftSampling
    size: tuple[int, int]
    variants: int
    seed: int
    max_tokens: int
    encoders: str
    compute_dtype: str

    def describe(self) -> dict:
        sampling = {"rule": type(self.sampling).__name__, **dataclasses.asdict(self.sampling)}
        return {"format": FORMAT, **dataclasses.asdict(self), "size": list(self.size), "sampling": sampling}

    def fingerprint(self) -> str:
        return hashlib.sha256(json.dumps(self.describe(), sort_keys=True).encode()).hexdigest()[:16]

    def start(self, clip: Clip, variant: int, choices: FrameChoices) -> int:
        """The first frame of a variant: random, but always the same for the same seed, clip and variant."""
        return choices.draw(np.random.default_rng([self.seed, int(_key(clip), 16), variant]))


@dataclasses.dataclass(frozen=True)
class EncodedClip:
    """All variants of one clip: moments of the VAE's posterior, unscaled, and the embedding of the caption."""

    mean: Float32[np.ndarray, "v f h w c"]
    logvar: Float32[np.ndarray, "v f h w c"]
    text: Float32[np.ndarray, "t x"]
    starts: Int32[np.ndarray, " v"]
    strides: Int32[np.ndarray, " v"]


@dataclasses.dataclass(frozen=True)
class LatentCache:
    """One folder of encoded clips, all made with the same settings."""

    folder: Path
    settings: CacheSettings

    @property
    def variants(self) -> int:
        return self.settings.variants

    @classmethod
    def open(cls, root: str | Path, settings: CacheSettings) -> "LatentCache":
        """The cache of these settings under `root`, made if it is not there.

        Raises:
            UserError: the folder cannot be written.
        """
        if is_remote(root):
            raise UserError(f"data.cache={root} is no folder on a disk; for a bucket, use build_data --encode")
        folder = Path(root) / settings.fingerprint()
        with atomic_output(folder / "cache.json") as partial:
            partial.write_text(json.dumps(settings.describe(), indent=2) + "\n")
        return cls(folder, settings)

    def path(self, clip: Clip) -> Path:
        readable = re.sub(r"[^\w.-]+", "_", Path(clip.name).stem)[:80]
        return self.folder / f"{readable}-{_key(clip)}.safetensors"

    def write(self, clip: Clip, encoded: EncodedClip) -> None:
        """Whole or not at all: a kill in between leaves no file of that name. Raises a UserError if it cannot be."""
        tensors = {name: np.ascontiguousarray(tensor) for name, tensor in vars(encoded).items()}
        metadata = {"caption": clip.caption, "video": printable(clip.name), "source": source_stamp(clip)}
        with atomic_output(self.path(clip)) as partial:
            partial.write_bytes(save(tensors, metadata))

    def has(self, clip: Clip) -> bool:
        """True if the clip is stored, its file is complete, and the video has not been changed since."""
        try:
            with safe_open(self.path(clip), framework="np") as file:
                return (file.metadata() or {}).get("source") == source_stamp(clip)
        except (OSError, SafetensorError):
            return False

    def read(self, clip: Clip, variant: int) -> dict[str, np.ndarray]:
        """`mean`, `logvar` (f h w c) of one variant and `text` (t x); nothing else is read from disk.

        Raises:
            UnreadableScene: the clip is not stored, or its file is damaged.
        """
        try:
            with safe_open(self.path(clip), framework="np") as file:
                mean, logvar = file.get_slice("mean"), file.get_slice("logvar")
                return {"mean": mean[variant], "logvar": logvar[variant], "text": file.get_tensor("text")}
        except (OSError, SafetensorError) as error:
            message = f"{self.path(clip)}: {error}; encode {clip.name} again by starting once more"
            raise UnreadableScene(clip.name, message) from error


def _key(clip: Clip) -> str:
    """Names a clip across machines: by what the data file says of it, not by where that file lies."""
    return hashlib.sha256(os.fsencode(f"{clip.name}\0{clip.caption}")).hexdigest()[:16]


def source_stamp(clip: Clip) -> str:
    """Changes when the video file is replaced."""
    try:
        status = clip.path.stat()
    except OSError:
        return "missing"
    return f"{status.st_size} bytes, modified {status.st_mtime_ns}"
