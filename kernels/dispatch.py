"""What all masked ops share: which implementation, masks, extents, products."""

from collections.abc import Callable
from collections.abc import Sequence
import functools

import jax
from jax.ad_checkpoint import checkpoint_name
import jax.numpy as jnp

from effllm_jax.kernels import autotune
from effllm_jax.kernels import bucket
from effllm_jax.kernels import forms

Array = jax.Array

# Modules of this package, see `module`.
IMPLEMENTATIONS = ('xla', 'xla_loop', 'bucket', 'pallas_tpu', 'pallas_hopper')
# Those that one platform alone can run.
PLATFORMS = {'pallas_tpu': 'tpu', 'pallas_hopper': 'gpu'}
# The `checkpoint_name` of what products and attention come to. A policy of
# `jax.checkpoint` that keeps dots would miss loops, and keep those of every
# branch of a bucket: 324 MB a layer of SmolLM2-135M, 2,048 tokens, not 45.
KEPT = 'masked_op'
# Chosen only where it was measured: BENCHMARKS.md, "Kernels". Elsewhere the
# reference, until somebody has.
_BY_PLATFORM = {'cpu': 'bucket'}


def resolve(implementation: str | None) -> str:
  """The name of an implementation; None: the choice for this platform.

  Raises:
    ValueError: unknown name.
  """
  if implementation is None:
    return _BY_PLATFORM.get(jax.default_backend(), 'xla')
  if implementation not in IMPLEMENTATIONS:
    raise ValueError(
      f'implementation {implementation!r} is not one of '
      f'{", ".join(IMPLEMENTATIONS)}'
    )
  return implementation


def runnable() -> list[str]:
  """The implementations that this machine can run."""
  return [x for x in IMPLEMENTATIONS if not refusal(x)]


def refusal(name: str) -> str | None:
  """Why this machine cannot run an implementation; None: it can."""
  here, needs = jax.default_backend(), PLATFORMS.get(name)
  if needs not in (None, here):
    return f'needs a {needs}, this machine has a {here}'
  return forms.module(name).refusal() if name == 'pallas_hopper' else None


def forward(
  name: str, x: Array, w: Array, keep_in: Array | None, keep_out: Array | None
) -> Array:
  """x w, [t, out]; unspecified beyond the extents."""
  extents = forms.Extents(
    m=x.shape[0],
    n=extent(keep_out, w.shape[1]),
    k=extent(keep_in, w.shape[0]),
  )
  return _product(name, x, w.astype(x.dtype), 'nn', extents, x.dtype)


def to_input(
  name: str, dy: Array, w: Array, keep_in: Array | None, keep_out: Array | None
) -> Array:
  """dy w^T, [t, in]; unspecified beyond the extents."""
  extents = forms.Extents(
    m=dy.shape[0],
    n=extent(keep_in, w.shape[0]),
    k=extent(keep_out, w.shape[1]),
  )
  return _product(name, dy, w.astype(dy.dtype), 'nt', extents, dy.dtype)


def to_weight(
  name: str,
  x: Array,
  dy: Array,
  dtype: jax.typing.DTypeLike,
  keep_in: Array | None,
  keep_out: Array | None,
) -> Array:
  """x^T dy, [in, out]; exactly zero in dead rows and columns."""
  extents = forms.Extents(
    m=extent(keep_in, x.shape[1]),
    n=extent(keep_out, dy.shape[1]),
    k=x.shape[0],
  )
  dw = _product(name, x, dy, 'tn', extents, dtype)
  if forms.module(name).ZERO_BEYOND_EXTENTS:
    # Dead rows and columns come of zeros, or are beyond the extents.
    return dw
  return mask(mask(dw, keep_out).T, keep_in).T


def _product(name, a, b, form, extents, dtype):
  size = m, n, _ = forms.sizes(a, b, form)
  if not all(size):
    # No loop and no grid can cut an axis of nothing.
    return jnp.zeros((m, n), dtype)
  blocks = autotune.choice(name, form, *size, a.dtype)
  return forms.module(name).product(a, b, form, extents, dtype, blocks)


def named(result: Array) -> Array:
  """The same array under the name `KEPT`, for a policy to keep."""
  return checkpoint_name(result, KEPT)


def mask(x: Array, keep: Array | None) -> Array:
  """Zeros, also in place of NaN, where the last axis of x is dead."""
  if keep is None:
    return x
  return jnp.where(jnp.repeat(keep, x.shape[-1] // keep.size), x, 0)


def extent(keep: Array | None, size: int) -> int | Array:
  """1 + the last live channel, int32; the size where nothing is masked."""
  if keep is None:
    return size
  last = jnp.max(jnp.where(keep, jnp.arange(1, keep.size + 1), 0))
  return (last * (size // keep.size)).astype(jnp.int32)


def check_floating(*operands: Array) -> None:
  """Raises ValueError for integers, to which weights would be rounded."""
  for x in operands:
    if not jnp.issubdtype(x.dtype, jnp.floating):
      raise ValueError(
        f'an operand is {x.dtype}{list(x.shape)}; masked ops take '
        'floating-point numbers'
      )


def check_keep(name: str, keep: Array | None, size: int) -> None:
  """Raises ValueError where `keep` is no mask over an axis of `size`."""
  if keep is None:
    return
  fits = keep.ndim == 1 and keep.size and size % keep.size == 0
  if keep.dtype != bool or not fits:
    raise ValueError(
      f'{name} is {keep.dtype}{list(keep.shape)}; it takes bool of a length '
      f'that divides {size}'
    )


def in_buckets(
  block: Callable[..., tuple],
  keep: Array,
  size: int,
  step: int,
  axes_in: Sequence[int | None],
  axes_out: Sequence[int | None],
  *args: Array | None,
) -> tuple:
  """block(name, keep, *args), whose channels are one axis of most arrays.

  A bucket holds the whole block: in its branch all arrays are cut to one
  width, also what passes from product to product.

  Args:
    block: see above; returns a tuple.
    keep: bool, `size` or a divisor of it.
    size: of the axis of channels.
    step: between two widths; a multiple of what a mask bit stands for.
    axes_in: which axis of each argument has the channels; None: none has.
    axes_out: the same for the results.
    *args: arrays, or None.
  """
  unit = size // keep.size
  widths = bucket.widths(size, step)

  def cut(x, axis, width):
    if x is None or axis is None:
      return x
    return jax.lax.slice_in_dim(x, 0, width, axis=axis)

  def pad(x, axis, width):
    if x is None or axis is None:
      return x
    ends = [(0, (size - width) * (i == axis)) for i in range(x.ndim)]
    return jnp.pad(x, ends)

  def branch(width, *args):
    def run(width):
      some = [cut(x, a, width) for x, a in zip(args, axes_in, strict=True)]
      return block('xla', keep[: width // unit], *some)

    # Nothing alive: the shapes of the least width, all of it zero.
    out = (
      run(width)
      if width
      else jax.tree.map(
        lambda x: jnp.zeros(x.shape, x.dtype),
        jax.eval_shape(lambda: run(unit)),
      )
    )
    return tuple(
      pad(x, a, width or unit) for x, a in zip(out, axes_out, strict=True)
    )

  # On a GPU XLA copies this index to the host, and the queue runs dry until it
  # is there: 4 to 6 times for each layer and micro-batch. No timing of single
  # products tells what that costs a step.
  return jax.lax.switch(
    bucket.choose(widths, extent(keep, size)),
    [functools.partial(branch, width) for width in widths],
    *args,
  )
