"""One dense product of a few static widths, chosen as it runs. Any platform.

Inside a branch the library's own product runs at full speed; an extent between
two widths pays for the next one up.
"""

import dataclasses

import jax
import jax.numpy as jnp

from kernels import forms

# Whether c is zero beyond the extents where one of the operands is.
FILLS = True


@dataclasses.dataclass(frozen=True)
class Blocks:
  """Distance between two widths of a masked axis; each has a branch.

  Attributes:
    m, n, k: channels; the last width is that of the array.
  """

  m: int
  n: int
  k: int


def default_blocks(
  form: str, m: int, n: int, k: int, dtype: jax.typing.DTypeLike
) -> Blocks:
  """About a dozen widths, on multiples of 64 where there is room."""
  del form, dtype
  return Blocks(*(_step(size, 12) for size in (m, n, k)))


def candidates(
  form: str, m: int, n: int, k: int, dtype: jax.typing.DTypeLike
) -> list[Blocks]:
  """What is worth timing: about 6, 12 and 24 widths."""
  del form, dtype
  found = [
    Blocks(*(_step(size, parts) for size in (m, n, k))) for parts in (6, 12, 24)
  ]
  return list(dict.fromkeys(found))


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
  blocks = blocks or default_blocks(form, m, n, k, a.dtype)
  axes = []
  for axis, size in (('m', m), ('n', n), ('k', k)):
    step, extent = getattr(blocks, axis), getattr(extents, axis)
    if step < 1:
      raise ValueError(f'{axis}: widths {step} apart; take at least 1')
    if not isinstance(extent, int):
      axes.append((axis, widths(size, step), extent))
  return _narrow(a, b, form, axes, dtype)


def step(size: int, unit: int = 1) -> int:
  """Distance between about a dozen widths, a multiple of `unit`."""
  return -(-_step(size, 12) // unit) * unit


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
  (axis, options, extent), *rest = axes
  shape = forms.sizes(a, b, form)[:2]
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
