"""How `bench_kernels` times a product, and compares it with XLA's."""

from collections.abc import Callable
import functools

import jax
import jax.numpy as jnp

from effllm_jax import errors
from kernels import autotune
from kernels import forms

# Most by which a product may differ from XLA's, as a share of its largest
# entry: a bfloat16 has 8 bits, a float32 that was multiplied as TF32 has 11.
TOLERANCE = {'float32': 2e-3, 'bfloat16': 1e-2}


def zeroed(a: jax.Array, letters: str, width: int) -> jax.Array:
  """`a` with zeros from `width` of k on, as the caller of a product owes.

  Args:
    a: the left operand, two-dimensional.
    letters: of its axes, `'mk'` or `'km'`.
    width: live extent of k.
  """
  k = letters.index('k')
  live = jnp.arange(a.shape[k]) < width
  return jnp.where(jnp.expand_dims(live, 1 - k), a, 0)


def compare(
  what: str, got: jax.Array, want: jax.Array, dtype: jax.typing.DTypeLike
) -> None:
  """Refuses a product that differs from XLA's within the extents.

  Args:
    what: it is, for the error.
    got: at least as wide as `want`; beyond that anything goes.
    want: XLA's product of arrays that are cut to the extents.
    dtype: of the operands.

  Raises:
    errors.InputError: an entry differs by more than `TOLERANCE`.
  """
  got, want = (
    x[: want.shape[0], : want.shape[1]].astype(jnp.float32) for x in (got, want)
  )
  limit = TOLERANCE[jnp.dtype(dtype).name]
  # Not by the largest, which on a CPU passes NaN over.
  right = jnp.abs(got - want) <= limit * jnp.abs(want).max()
  if not right.all():
    raise errors.InputError(
      f"{what} differs from XLA's in {right.size - int(right.sum()):,} of "
      f'{right.size:,} entries, by more than {limit:g} of the largest one: a '
      'wrong kernel; leave it out with --implementations'
    )


def timed(
  product: Callable[..., jax.Array], *operands: jax.Array
) -> Callable[[], float]:
  """Times one product anew, in seconds, whenever it is called."""
  many, times = autotune.enough(product, *operands)
  return lambda: autotune.seconds(lambda: many(*operands)) / times


def peak(dtype: jax.typing.DTypeLike) -> tuple[float, float]:
  """FLOP/s of a large square product, bytes/s of a large copy; the best.

  The product is of random numbers: a GPU at the limit of its power multiplies
  ones up to 15 % faster.
  """
  n = 1024 if jax.default_backend() == 'cpu' else 8192
  a, b = (jax.random.normal(jax.random.key(i), (n, n), dtype) for i in (0, 1))
  long = jnp.ones(2**26 if n == 1024 else 2**29, jnp.float32)
  dense = functools.partial(forms.dense, form='nn', dtype=dtype)
  product, copy = timed(dense, a, b), timed(lambda x: x + 1, long)
  return (
    2 * n**3 / min(product() for _ in range(8)),
    2 * long.nbytes / min(copy() for _ in range(5)),
  )
