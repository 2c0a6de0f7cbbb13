"""mask2dit_jax: multi-scene video diffusion (Mask2DiT, CVPR 2025) in JAX."""

__version__ = "0.1.0"
