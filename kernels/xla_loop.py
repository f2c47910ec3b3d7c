"""A loop of dense products over chunks of the live extents. Any platform.

The trip count is data, so the cost follows the extents; XLA cannot
differentiate such a loop, which is why the gradients are products of their own.
"""

import jax
import jax.numpy as jnp

from effllm_jax.kernels import forms

ZERO_BEYOND_EXTENTS = True
Blocks = forms.Blocks


def default_blocks(
  form: str, m: int, n: int, k: int, dtype: jax.typing.DTypeLike
) -> Blocks:
  """About eight chunks of m or n, about four of k."""
  del form, dtype
  return Blocks(_chunk(m, 8), _chunk(n, 8), _chunk(k, 4))


def candidates(
  form: str, m: int, n: int, k: int, dtype: jax.typing.DTypeLike
) -> list[Blocks]:
  """What is worth timing: 4, 8 or 16 chunks of every axis."""
  del form, dtype
  return forms.in_parts(_chunk, m, n, k, 4, 8, 16)


def product(
  a: jax.Array,
  b: jax.Array,
  form: str,
  extents: forms.Extents,
  dtype: jax.typing.DTypeLike,
  blocks: Blocks | None = None,
) -> jax.Array:
  """See `forms`; beyond the extents c is zero, up to the chunk.

  Raises:
    ValueError: a chunk does not divide its axis.
  """
  m, n, k = forms.sizes(a, b, form)
  blocks = blocks or default_blocks(form, m, n, k, a.dtype)
  for axis, size in (('m', m), ('n', n), ('k', k)):
    chunk = getattr(blocks, axis)
    if size % chunk:
      raise ValueError(f'a chunk of {chunk} does not divide {axis} {size}')
  loops = forms.masked(extents, blocks)
  return _loop(a, b, form, loops, jnp.float32).astype(dtype)


def _loop(a, b, form, loops, dtype):
  """Chunks of the first axis in `loops`; within a chunk those of the rest."""
  if not loops:
    return forms.dense(a, b, form, dtype)
  (axis, chunk, extent), *rest = loops
  m, n, _ = forms.sizes(a, b, form)
  left, right = forms.AXES[form]

  def cut(x, letters, start):
    if axis not in letters:
      return x
    return jax.lax.dynamic_slice_in_dim(
      x, start, chunk, axis=letters.index(axis)
    )

  def body(i, c):
    start = i * chunk
    part = _loop(cut(a, left, start), cut(b, right, start), form, rest, dtype)
    if axis == 'k':
      return c + part
    return jax.lax.dynamic_update_slice_in_dim(
      c, part, start, axis='mn'.index(axis)
    )

  trips = (extent + chunk - 1) // chunk
  return jax.lax.fori_loop(0, trips, body, jnp.zeros((m, n), dtype))


def _chunk(size: int, parts: int) -> int:
  """The least divisor that makes at most so many parts; a prime stays whole."""
  least = max(size // parts, 16)
  return next((d for d in range(least, size) if size % d == 0), size)
