"""Discrete diffusion with partial masking: pure functions of tensors, without files, configuration or hidden noise."""
