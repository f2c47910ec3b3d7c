"""Masked matmul, SwiGLU and attention: cost follows what is alive.

Imports nothing from effllm_jax.

A *keep* is a bool mask, True = alive, over an axis of channels; one of length
c over an axis of length c * u says of each u neighbours at a time whether they
live (a head and its channels). What is computed is the product over the live
channels; outputs of dead ones, and the gradients of dead entries, are exactly
zero. Only the *extent* of a mask, 1 + its last live index, saves time: order
survivors to the front.

Masks are data: they may differ from layer to layer inside a `lax.scan`, and one
compile serves all. The gradients are products of the same implementation, with
float32 accumulation; that of a weight has the dtype of the weight, so float32
master weights get a float32 gradient from bfloat16 activations.
"""

from kernels import autotune
from kernels.attention import masked_attention
from kernels.dispatch import IMPLEMENTATIONS
from kernels.dispatch import KEPT
from kernels.dispatch import PLATFORMS
from kernels.dispatch import refusal
from kernels.dispatch import resolve
from kernels.dispatch import runnable
from kernels.forms import einsum
from kernels.matmul import masked_matmul
from kernels.swiglu import masked_swiglu

__all__ = [
  'IMPLEMENTATIONS',
  'KEPT',
  'PLATFORMS',
  'autotune',
  'einsum',
  'masked_attention',
  'masked_matmul',
  'masked_swiglu',
  'refusal',
  'resolve',
  'runnable',
]
