"""Where encoded scenes come from: the cache that training fills itself, or a data set of records."""

from typing import Protocol, runtime_checkable

import numpy as np

from mask2dit_jax.data.sources import NamedClip
from mask2dit_jax.errors import UserError


class UnreadableScene(UserError):
    """What is stored of the clip `name` cannot be read; the rest of the store may be in order."""

    def __init__(self, name: str, message: str):
        super().__init__(message)
        self.name = name


@runtime_checkable
class LatentStore(Protocol):
    """Latents and embeddings of clips. `variants`: how many choices of frames there are of each."""

    variants: int

    def read(self, clip: NamedClip, variant: int) -> dict[str, np.ndarray]:
        """`mean`, `logvar` (f h w c) and `text` (t x). Raises UnreadableScene."""
