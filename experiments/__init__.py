"""Commands and configs; everything they do is in `effllm_jax`."""
