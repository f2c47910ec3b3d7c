"""Masked matrix products; imports nothing from effllm_jax."""
