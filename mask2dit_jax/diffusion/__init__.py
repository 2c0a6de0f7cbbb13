"""The diffusion process: noise schedule, samplers, guidance and conditioning on known scenes."""
