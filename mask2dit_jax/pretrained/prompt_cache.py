"""Text embeddings on disk, so that each prompt is embedded once. Files are named by a hash of the prompt's tokens."""

import dataclasses
import hashlib
import io

import numpy as np
from absl import logging
from etils import epath
from jaxtyping import Float32, Int32

from mask2dit_jax.errors import UserError
from mask2dit_jax.io.atomic import atomic_output


@dataclasses.dataclass(frozen=True)
class EmbeddingCache:
    """Embeddings of one text encoder in one precision.

    Attributes:
        folder: local or gs://; it need not exist yet.
        shape: text tokens and width of every embedding.
    """

    folder: epath.Path
    shape: tuple[int, int]

    def read(self, ids: Int32[np.ndarray, " t"]) -> Float32[np.ndarray, "t x"] | None:
        """Return the embedding of token ids, or None if it is missing. Logs a damaged file, which counts as missing."""
        path = self._path(ids)
        try:
            if not path.exists():
                return None
            found = np.load(io.BytesIO(path.read_bytes()), allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            logging.warning("%s cannot be read (%s); its prompt is embedded again", path, error)
            return None
        if found.shape != self.shape or found.dtype != np.float32 or not np.isfinite(found).all():
            logging.warning("%s holds no embedding of %d x %d; its prompt is embedded again", path, *self.shape)
            return None
        return found

    def write(self, ids: Int32[np.ndarray, " t"], embedding: Float32[np.ndarray, "t x"]) -> None:
        """Write an embedding, completely or not at all.

        If the disk is full or read-only, this run goes on, and the next one has to embed the prompt again.
        """
        try:
            with atomic_output(self._path(ids)) as partial:
                partial.write_bytes(_as_npy(embedding))
        except UserError as error:
            logging.warning("the embedding of a prompt is not kept: %s", error)

    def _path(self, ids) -> epath.Path:
        return self.folder / f"{hashlib.sha256(ids.astype(np.int32).tobytes()).hexdigest()[:32]}.npy"


def _as_npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()
