"""JAX's persistent compilation cache, in the user's cache (io/user_cache.py) unless JAX is given another folder."""

import jax
from absl import logging

from mask2dit_jax.io.user_cache import user_cache


def keep_compiled_programs() -> None:
    """Turn on JAX's persistent compilation cache. Call this before anything is compiled.

    JAX stores programs that took a second or more to compile. Its key covers the program, compiler options, versions
    and devices, so a changed program is compiled again. JAX_ENABLE_COMPILATION_CACHE=false turns the cache off.
    """
    if not jax.config.jax_compilation_cache_dir:
        jax.config.update("jax_compilation_cache_dir", str(user_cache("compiled")))
    if jax.config.jax_enable_compilation_cache:
        logging.info("compilation cache: %s", jax.config.jax_compilation_cache_dir)
