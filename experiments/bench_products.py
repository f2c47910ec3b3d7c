"""The products that `bench_kernels` times, and how it times and checks one."""

from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Mapping
from collections.abc import Sequence
import dataclasses
import functools
import importlib
import statistics

import jax
import jax.numpy as jnp

from effllm_jax import errors
from kernels import autotune
from kernels import forms

# Most by which a product may differ from XLA's, as a share of its largest
# entry: a bfloat16 has 8 bits, a float32 that was multiplied as TF32 has 11.
TOLERANCE = {'float32': 2e-3, 'bfloat16': 1e-2}


@dataclasses.dataclass(frozen=True)
class Case:
  """A product of a layer, of which one axis is masked.

  Attributes:
    form: one of `forms.FORMS`.
    what: it is in the layer.
    size: of the arrays, by 'm', 'n', 'k'.
    masked: which of these it is.
  """

  form: str
  what: str
  size: Mapping[str, int]
  masked: str

  def width(self, share: float) -> int:
    """So much of the masked axis is alive; one at least."""
    return max(round(self.size[self.masked] * share), 1)

  def roofline(
    self,
    width: int,
    dtype: jax.typing.DTypeLike,
    peak: float,
    bandwidth: float,
  ) -> float:
    """Least seconds of the product of the live part, by `peak`'s two numbers.

    What has to be moved are both operands and the result, once each.
    """
    live = dict(self.size) | {self.masked: width}
    m, n, k = (live[x] for x in 'mnk')
    out = forms.result_dtype(self.form, dtype)
    moved = (m * k + k * n) * jnp.dtype(dtype).itemsize
    moved += m * n * jnp.dtype(out).itemsize
    return max(2 * m * n * k / peak, moved / bandwidth)


def cases(stem: int, ffn: int, tokens: int) -> list[Case]:
  """All products of a feed-forward layer and of its gradients."""
  up = {'nn': 'n', 'nt': 'k', 'tn': 'n'}
  down = {'nn': 'k', 'nt': 'n', 'tn': 'm'}
  found = []
  for layer, masked, widths in (
    ('gate, up', up, (stem, ffn)),
    ('down', down, (ffn, stem)),
  ):
    for form, gradient in (('nn', ''), ('nt', ', dx'), ('tn', ', dw')):
      mnk = forms.layer_sizes(form, tokens, *widths)
      size = dict(zip('mnk', mnk, strict=True))
      found.append(Case(form, layer + gradient, size, masked[form]))
  return found


def medians(
  case: Case,
  shares: Sequence[float],
  names: Sequence[str],
  dtype: jax.typing.DTypeLike,
  rounds: int,
) -> Iterator[dict[str, float]]:
  """Median seconds of one product by each implementation, in turns.

  Args:
    case: the product.
    shares: live shares of its masked axis, for each of which times are given.
    names: of the implementations, which are compared with XLA first.
    dtype: of the operands.
    rounds: that count; one more comes first.

  Yields:
    By name, and of XLA on arrays that are cut to the live width as 'cut'.

  Raises:
    errors.InputError: as `compare`.
  """
  left, right = forms.AXES[case.form]
  out = forms.result_dtype(case.form, dtype)
  a, b = (
    jax.random.normal(jax.random.key(i), [case.size[x] for x in letters], dtype)
    for i, letters in enumerate((left, right))
  )
  dense = functools.partial(forms.dense, form=case.form, dtype=out)
  runs = {name: _masked(name, case, out) for name in names}
  for width in map(case.width, shares):
    cut = [
      jnp.asarray(
        x[tuple(slice(width if y == case.masked else None) for y in letters)]
      )
      for x, letters in ((a, left), (b, right))
    ]
    extent = jnp.int32(width)
    want = jax.jit(dense)(*cut)
    clean = zeroed(a, left, width) if case.masked == 'k' else a
    for name, run in runs.items():
      what = f'{name} of {case.form} {case.size}, {case.masked} up to {width},'
      compare(what, run(clean, b, extent), want, dtype)
    calls = {'cut': timed(dense, *cut)}
    calls |= {name: timed(run, a, b, extent) for name, run in runs.items()}
    seconds = {name: [] for name in calls}
    for _ in range(rounds + 1):
      for name, call in calls.items():
        seconds[name].append(call())
    yield {name: statistics.median(x[1:]) for name, x in seconds.items()}


def _masked(name, case, out):
  """The jitted product by one implementation, of a traced extent."""
  module = importlib.import_module(f'kernels.{name}')

  @jax.jit
  def run(a, b, extent):
    extents = forms.Extents(**dict(case.size) | {case.masked: extent})
    blocks = autotune.choice(name, case.form, *case.size.values(), a.dtype)
    return module.product(a, b, case.form, extents, out, blocks)

  return run


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
