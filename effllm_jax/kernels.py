"""Masked matmul, SwiGLU and attention: cost follows what is alive.

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

The modules are in the folder kernels/ beside effllm_jax/, and import nothing
else of effllm_jax. That folder has no `__init__.py`: transformers imports a
package `kernels`, of Hugging Face, which it needs from 5.25 on, and Python
prefers a package to a mere folder that it comes upon first.
"""

import pathlib

# In an installation they lie in this package, as pyproject.toml says.
_IN_PACKAGE = pathlib.Path(__file__).with_suffix('')
_IN_CLONE = _IN_PACKAGE.parents[1] / 'kernels'
# What makes this module a package, in which they are found by name.
__path__ = [str(_IN_PACKAGE if _IN_PACKAGE.is_dir() else _IN_CLONE)]

from effllm_jax.kernels import autotune
from effllm_jax.kernels.attention import masked_attention
from effllm_jax.kernels.dispatch import IMPLEMENTATIONS
from effllm_jax.kernels.dispatch import KEPT
from effllm_jax.kernels.dispatch import PLATFORMS
from effllm_jax.kernels.dispatch import refusal
from effllm_jax.kernels.dispatch import resolve
from effllm_jax.kernels.dispatch import runnable
from effllm_jax.kernels.forms import einsum
from effllm_jax.kernels.matmul import masked_matmul
from effllm_jax.kernels.swiglu import masked_swiglu

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
