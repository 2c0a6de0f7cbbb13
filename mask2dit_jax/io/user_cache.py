"""The user's cache, which makes later runs start sooner. It can be deleted at any time.

~/.cache/mask2dit_jax/compiled    programs compiled by XLA; JAX_COMPILATION_CACHE_DIR sets another folder, local or gs://
~/.cache/mask2dit_jax/prompts     text embeddings of prompts that were sampled before
~/.cache/mask2dit_jax/hashes      hashes of files (io/content.py)
"""

import os

from etils import epath


def user_cache(name: str) -> epath.Path:
    """Return the folder `name` in the user's cache (XDG_CACHE_HOME or ~/.cache). It need not exist yet."""
    root = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return epath.Path(root).expanduser() / "mask2dit_jax" / name
