"""Pruning-aware pretraining of Llama models in JAX (EfficientLLM)."""
