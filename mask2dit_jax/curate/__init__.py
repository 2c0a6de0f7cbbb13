"""Making data sets: shots, checks, and latents."""
