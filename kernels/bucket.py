"""One dense product of a few static widths, chosen as it runs. Any platform.

Inside a branch the library's own product runs at full speed; an extent between
two widths pays for the next one up.
"""

import jax
import jax.numpy as jnp

from effllm_jax.kernels import forms

ZERO_BEYOND_EXTENTS = True
Blocks = forms.Blocks


def default_blocks(
  form: str, m: int, n: int, k: int, dtype: jax.typing.DTypeLike
) -> Blocks:
  """About a dozen widths, on multiples of 64 where there is room."""
  del form, dtype
  return forms.in_parts(_step, m, n, k, 12)[0]


def candidates(
  form: str, m: int, n: int, k: int, dtype: jax.typing.DTypeLike
) -> list[Blocks]:
  """What is worth timing: about 6, 12 and 24 widths."""
  del form, dtype
  return forms.in_parts(_step, m, n, k, 6, 12, 24)


def product(
  a: jax.Array,
  b: jax.Array,
  form: str,
  extents: forms.Extents,
  dtype: jax.typing.DTypeLike,
  blocks: Blocks | None = None,
) -> jax.Array:
  """See `forms`; beyond the extents c is zero, up to the width.

  Raises:
    ValueError: a distance below 1.
  """
  m, n, k = forms.sizes(a, b, form)
  if blocks is None:
    blocks = default_blocks(form, m, n, k, a.dtype)
    if len(forms.masked(extents, blocks)) > 1:
      # Every pair of widths is a branch: a dozen by a dozen compile for 48 s
      # with their gradients, four by four for 5.
      (blocks,) = forms.in_parts(_step, m, n, k, 4)
  for axis in 'mnk':
    if getattr(blocks, axis) < 1:
      raise ValueError(
        f'{axis}: widths {getattr(blocks, axis)} apart; take at least 1'
      )
  return _narrow(a, b, form, forms.masked(extents, blocks), dtype)


def step(size: int, unit: int = 1) -> int:
  """Distance between the widths of a whole block, a multiple of `unit`.

  About two dozen of them: 64 apart for 1,536 channels, where shapes are on
  multiples of 64. A dozen make a step of SmolLM2-135M at half width 8 % slower
  and are not compiled any sooner (2 cores, 512 tokens).
  """
  return -(-_step(size, 24) // unit) * unit


def widths(size: int, step: int) -> list[int]:
  """0, step, 2 step, ..., size."""
  return [*range(0, size, step), size]


def choose(widths: list[int], extent: jax.Array) -> jax.Array:
  """Index of the least width that covers the extent, int32."""
  # Not searchsorted, which on a CPU is a loop.
  return (jnp.asarray(widths) < extent).sum(dtype=jnp.int32)


def _narrow(a, b, form, axes, dtype):
  """Branches over the widths of the first axis, in each those of the rest."""
  if not axes:
    return forms.dense(a, b, form, dtype)
  (axis, step, extent), *rest = axes
  m, n, k = forms.sizes(a, b, form)
  shape, options = (m, n), widths({'m': m, 'n': n, 'k': k}[axis], step)
  left, right = forms.AXES[form]

  def branch(width):
    def cut(x, letters):
      if axis not in letters:
        return x
      return jax.lax.slice_in_dim(x, 0, width, axis=letters.index(axis))

    def run(a, b):
      if not width:
        return jnp.zeros(shape, dtype)
      c = _narrow(cut(a, left), cut(b, right), form, rest, dtype)
      return jnp.pad(c, [(0, shape[i] - c.shape[i]) for i in range(2)])

    return run

  return jax.lax.switch(
    choose(options, extent), [branch(width) for width in options], a, b
  )


def _step(size: int, parts: int) -> int:
  """About `parts` widths; on multiples of 64, of a small axis fewer."""
  step = max(-(-size // parts), 16)
  return -(-step // 64) * 64 if size >= 32 * parts else step
