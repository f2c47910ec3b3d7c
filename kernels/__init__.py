"""Masked matrix products; imports nothing from effllm_jax."""

from kernels import autotune
from kernels.ops import IMPLEMENTATIONS
from kernels.ops import masked_attention
from kernels.ops import masked_matmul
from kernels.ops import masked_swiglu
from kernels.ops import PLATFORMS
from kernels.ops import resolve

__all__ = [
  'IMPLEMENTATIONS',
  'PLATFORMS',
  'autotune',
  'masked_attention',
  'masked_matmul',
  'masked_swiglu',
  'resolve',
]
