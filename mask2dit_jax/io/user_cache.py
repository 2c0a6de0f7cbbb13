"""What a run leaves on disk so that the next one starts sooner. All of it can be deleted at any time.

~/.cache/mask2dit_jax/compiled    XLA's programs; JAX_COMPILATION_CACHE_DIR names another place, gs:// too
~/.cache/mask2dit_jax/prompts     text embeddings of prompts that have been sampled before
"""

import os

import jax
from absl import logging
from etils import epath


def user_cache(name: str) -> epath.Path:
    """A folder under the user's cache (XDG_CACHE_HOME, else ~/.cache); it need not exist yet."""
    root = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return epath.Path(root).expanduser() / "mask2dit_jax" / name


def keep_compiled_programs() -> None:
    """Call before anything is compiled. What took a second or more to compile is read back by later runs.

    The key is XLA's own (program, options, versions, devices), so a program that changes is compiled again.
    JAX_ENABLE_COMPILATION_CACHE=false turns it off.
    """
    if not jax.config.jax_compilation_cache_dir:
        jax.config.update("jax_compilation_cache_dir", str(user_cache("compiled")))
    if jax.config.jax_enable_compilation_cache:
        logging.info("compiled programs are kept in %s", jax.config.jax_compilation_cache_dir)
