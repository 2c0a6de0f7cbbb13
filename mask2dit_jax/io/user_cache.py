"""The user's cache, which makes later runs start sooner. It can be deleted at any time.

~/.cache/mask2dit_jax/compiled    programs compiled by XLA; JAX_COMPILATION_CACHE_DIR sets another folder, local or gs://
~/.cache/mask2dit_jax/prompts     text embeddings of prompts that were sampled before
"""

import os

import jax
from absl import logging
from etils import epath


def user_cache(name: str) -> epath.Path:
    """Return the folder `name` in the user's cache (XDG_CACHE_HOME or ~/.cache). It need not exist yet."""
    root = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return epath.Path(root).expanduser() / "mask2dit_jax" / name


def keep_compiled_programs() -> None:
    """Turn on JAX's persistent compilation cache. Call this before anything is compiled.

    JAX stores programs that took a second or more to compile. Its key covers the program, compiler options, versions
    and devices, so a changed program is compiled again. JAX_ENABLE_COMPILATION_CACHE=false turns the cache off.
    """
    if not jax.config.jax_compilation_cache_dir:
        jax.config.update("jax_compilation_cache_dir", str(user_cache("compiled")))
    if jax.config.jax_enable_compilation_cache:
        logging.info("compilation cache: %s", jax.config.jax_compilation_cache_dir)
