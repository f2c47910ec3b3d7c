"""The products that `bench_kernels` times, and how it times and checks one."""

from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Mapping
from collections.abc import Sequence
import dataclasses
import functools
import statistics
from typing import Any

import jax
import jax.numpy as jnp

from effllm_jax import errors
from effllm_jax.kernels import autotune
from effllm_jax.kernels import forms

# Most by which a product may differ from XLA's, as a share of its largest
# entry: a bfloat16 has 8 bits, a float32 that was multiplied as TF32 has 11.
TOLERANCE = {'float32': 2e-3, 'bfloat16': 1e-2}


@dataclasses.dataclass(frozen=True)
class Operand:
  """An array of random numbers.

  Attributes:
    shape: of all of it.
    axis: which one is masked; None: none is.
    deviation: of the numbers.
    dtype: None: that of the activations.
  """

  shape: tuple[int, ...]
  axis: int | None
  deviation: float = 1.0
  dtype: str | None = None

  def draw(self, seed: int, dtype: jax.typing.DTypeLike) -> jax.Array:
    """The array, with activations of `dtype`."""
    x = jax.random.normal(jax.random.key(seed), self.shape, self.dtype or dtype)
    return x * self.deviation

  def cut(self, x: jax.Array, width: int) -> jax.Array:
    """The array without what is dead."""
    if self.axis is None:
      return x
    return jax.lax.slice_in_dim(x, 0, width, axis=self.axis)


@dataclasses.dataclass(frozen=True)
class Case:
  """What is timed: something of arrays, of which one axis is masked.

  Attributes:
    name: of the product or the op.
    what: it is in a layer.
    sizes: its m, n and k, or what stands for them in a table.
    masked: name of the masked axis.
    size: of that axis.
    operands: the arrays.
    dense: (*arrays that are cut) -> arrays; by XLA.
    run: (implementation, *whole arrays, extent) -> arrays.
    flops: (width) -> operations on what is alive.
    tolerance: by dtype, see `compare`.
    owes_zeros: whether the first operand must be zero beyond the extent.
  """

  name: str
  what: str
  sizes: Sequence[object]
  masked: str
  size: int
  operands: Sequence[Operand]
  dense: Callable[..., Any]
  run: Callable[..., Any]
  flops: Callable[[int], float]
  tolerance: Mapping[str, float]
  owes_zeros: bool = False

  def width(self, share: float) -> int:
    """So much of the masked axis is alive; one at least."""
    return max(round(self.size * share), 1)

  def size_text(self) -> str:
    """The sizes in one line."""
    return ' '.join(map(str, self.sizes))

  def live(self, width: int) -> str:
    """The masked axis and what share of it is alive."""
    return f'{self.masked} {width / self.size:.0%}'

  def roofline(
    self,
    width: int,
    dtype: jax.typing.DTypeLike,
    peak: float,
    bandwidth: float,
  ) -> float:
    """Least seconds on the live part, by the two numbers of `peak`.

    What has to be moved are operands and results, once each.
    """
    arrays = jax.eval_shape(lambda: _cut(self, _draw(self, dtype), width))
    moved = arrays + jax.tree.leaves(jax.eval_shape(self.dense, *arrays))
    size = sum(x.size * x.dtype.itemsize for x in moved)
    return max(self.flops(width) / peak, size / bandwidth)


def cases(stem: int, ffn: int, tokens: int) -> list[Case]:
  """All products of a feed-forward layer and of its gradients."""
  up = {'nn': 'n', 'nt': 'k', 'tn': 'n'}
  down = {'nn': 'k', 'nt': 'n', 'tn': 'm'}
  return [
    _product(
      form, layer + gradient, forms.layer_sizes(form, tokens, *widths),
      masked[form],
    )
    for layer, masked, widths in (
      ('gate, up', up, (stem, ffn)),
      ('down', down, (ffn, stem)),
    )
    for form, gradient in (('nn', ''), ('nt', ', dx'), ('tn', ', dw'))
  ]  # fmt: skip


def _product(form, what, mnk, masked):
  size = dict(zip('mnk', mnk, strict=True))

  def run(name, a, b, extent):
    extents = forms.Extents(**size | {masked: extent})
    blocks = autotune.choice(name, form, *mnk, a.dtype)
    product = forms.module(name).product
    out = forms.result_dtype(form, a.dtype)
    return product(a, b, form, extents, out, blocks)

  def flops(width):
    m, n, k = (size | {masked: width}).values()
    return 2 * m * n * k

  return Case(
    name=form,
    what=what,
    sizes=mnk,
    masked=masked,
    size=size[masked],
    operands=[
      Operand(
        tuple(size[x] for x in letters),
        letters.index(masked) if masked in letters else None,
      )
      for letters in forms.AXES[form]
    ],
    dense=lambda a, b: forms.dense(
      a, b, form, forms.result_dtype(form, a.dtype)
    ),
    run=run,
    flops=flops,
    tolerance=TOLERANCE,
    owes_zeros=masked == 'k',
  )


def medians(
  case: Case,
  shares: Sequence[float],
  names: Sequence[str],
  dtype: jax.typing.DTypeLike,
  rounds: int,
) -> Iterator[tuple[int, dict[str, float]]]:
  """Median seconds of a case by each implementation, in turns.

  Args:
    case: what to time.
    shares: live shares of its masked axis.
    names: of the implementations, which are compared with XLA first.
    dtype: of the activations.
    rounds: that count; one more comes first.

  Yields:
    For each width that these shares come to, it and seconds by name; of XLA on
    arrays that are cut to the width as 'cut'.

  Raises:
    errors.InputError: as `compare`.
  """
  operands = _draw(case, dtype)
  widths = list(dict.fromkeys(map(case.width, shares)))
  # Compiled once for all widths; the narrowest tells how often to repeat it.
  runs = {
    name: autotune.enough(
      functools.partial(case.run, name), *operands, jnp.int32(min(widths))
    )
    for name in names
  }
  for width in widths:
    extent, cut = jnp.int32(width), _cut(case, operands, width)
    clean = list(operands)
    if case.owes_zeros:
      clean[0] = zeroed(clean[0], case.operands[0].axis, width)
    want = jax.jit(case.dense)(*cut)
    for name, (many, _) in runs.items():
      what = f'{name} of {case.name} {case.size_text()}, {case.live(width)},'
      limit = case.tolerance[jnp.dtype(dtype).name]
      compare(what, many(*clean, extent), want, limit)
    calls = {'cut': timed(case.dense, *cut)}
    for name, (many, times) in runs.items():
      calls[name] = _timed(many, times, *operands, extent)
    seconds = {name: [] for name in calls}
    for _ in range(rounds + 1):
      for name, call in calls.items():
        seconds[name].append(call())
    yield width, {name: statistics.median(x[1:]) for name, x in seconds.items()}


def _draw(case, dtype):
  return [x.draw(i, dtype) for i, x in enumerate(case.operands)]


def _cut(case, arrays, width):
  return [
    x.cut(array, width) for x, array in zip(case.operands, arrays, strict=True)
  ]


def zeroed(a: jax.Array, axis: int, width: int) -> jax.Array:
  """`a` with zeros from `width` of an axis on, as the caller of a product owes.

  Args:
    a: two-dimensional.
    axis: 0 or 1.
    width: live extent of it.
  """
  live = jnp.arange(a.shape[axis]) < width
  return jnp.where(jnp.expand_dims(live, 1 - axis), a, 0)


def compare(what: str, got: Any, want: Any, limit: float) -> None:
  """Refuses results that differ from XLA's within the extents.

  Args:
    what: it is, for the error.
    got: tree of arrays at least as wide as those of `want`; beyond that
      anything goes.
    want: XLA's results of arrays that are cut to the extents.
    limit: most by which an entry may differ, as a share of the largest one.

  Raises:
    errors.InputError: an entry differs by more.
  """
  for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    x = x[tuple(map(slice, y.shape))].astype(jnp.float32)
    y = y.astype(jnp.float32)
    # Not by the largest, which on a CPU passes NaN over.
    right = jnp.abs(x - y) <= limit * jnp.abs(y).max()
    if not right.all():
      raise errors.InputError(
        f"{what} differs from XLA's in {right.size - int(right.sum()):,} of "
        f'{right.size:,} entries, by more than {limit:g} of the largest one: a '
        'wrong kernel; leave it out with --implementations'
      )


def timed(
  product: Callable[..., Any], *operands: jax.Array
) -> Callable[[], float]:
  """Times one product anew, in seconds, whenever it is called."""
  return _timed(*autotune.enough(product, *operands), *operands)


def _timed(many, times, *operands):
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
