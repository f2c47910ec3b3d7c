"""The three products behind a masked matmul and its gradients.

    form   product              in a layer y = x w    m       n     k
    nn     a[m,k] b[k,n]        y  = x w              tokens  out   in
    nt     a[m,k] b[n,k]^T      dx = dy w^T           tokens  in    out
    tn     a[k,m]^T b[k,n]      dw = x^T dy           in      out   tokens

Every implementation is a module with

    product(a, b, form, extents, dtype, blocks=None) -> c[m, n] in `dtype`
    ZERO_BEYOND_EXTENTS  whether c is zero beyond the extents where a or b is

and, apart from `xla`, a frozen dataclass `Blocks`, the `default_blocks` of a
form and size, and `candidates` to time. An extent is 1 + the last live index of
an axis: a traced int32 scalar, or an int where the axis is not masked. The
contract:

- c is right, with float32 accumulation, within the extents; beyond them it is
  unspecified (zero, left-over or NaN), and the caller masks it;
- nothing is read beyond the extents rounded up to the blocks: NaN there does
  no harm;
- between an extent of k and that rounding, one of a and b is zero and the other
  finite: the caller masks its activations. So no implementation needs a mask in
  its main loop;
- an extent of k of 0 gives zeros; an extent of m or n of 0 gives nothing;
- extents are data: one trace and one compile serve all.

An implementation that has kernels for attention keeps them in a module
`<name>_attention`, with

    causal(q, k, v, live, blocks) -> out
    Blocks, candidates  as above, for each of `ATTENTION`

where a form is one of the kernels: m queries meet n keys, of k channels. The
first candidate is the default.
"""

from collections.abc import Callable
from collections.abc import Sequence
import dataclasses
import importlib
import types
from typing import Any

import jax
from jax.experimental import layout
import jax.numpy as jnp

FORMS = ('nn', 'nt', 'tn')
# The kernels of attention: its result, and gradients by queries, and by keys
# and values.
ATTENTION = ('forward', 'dq', 'dkv')
_SPECS = {'nn': 'mk,kn->mn', 'nt': 'mk,nk->mn', 'tn': 'km,kn->mn'}
# Which axis of a and of b is m, n or k.
AXES = {
  form: (spec[:2], spec[3:5]) for form, spec in _SPECS.items()
}  # fmt: skip


def module(name: str) -> types.ModuleType:
  """An implementation, or its attention, imported when first asked for."""
  return importlib.import_module(f'effllm_jax.kernels.{name}')


@dataclasses.dataclass(frozen=True)
class Extents:
  """How far each axis of a product is alive.

  Each is an int32 scalar, traced or not; an int that is the whole size says
  that the axis is not masked.
  """

  m: int | jax.Array
  n: int | jax.Array
  k: int | jax.Array


@dataclasses.dataclass(frozen=True)
class Blocks:
  """Lengths along the axes by which `xla_loop` and `bucket` round extents up.

  Unused where an axis is not masked.
  """

  m: int
  n: int
  k: int


def in_parts(
  length: Callable[[int, int], int], m: int, n: int, k: int, *parts: int
) -> list[Blocks]:
  """Different blocks: `length(size, part)` of all axes, for each of `parts`."""
  found = [Blocks(*(length(size, p) for size in (m, n, k))) for p in parts]
  return list(dict.fromkeys(found))


def masked(
  extents: Extents, blocks: Blocks
) -> list[tuple[str, int, jax.Array]]:
  """(axis, block, extent) of every axis that is masked, m before n before k."""
  return [
    (axis, getattr(blocks, axis), getattr(extents, axis))
    for axis in 'mnk'
    if not isinstance(getattr(extents, axis), int)
  ]


def attention_blocks(
  candidates: Callable[..., list[Any]],
  blocks: Sequence[Any | None],
  T: int,
  H: int,
  dtype: jax.typing.DTypeLike,
) -> tuple[Any, ...]:
  """The blocks of each of `ATTENTION`, by default the first candidate.

  Raises:
    ValueError: blocks that are no candidates.
  """
  found = []
  for form, mine in zip(ATTENTION, blocks, strict=True):
    known = candidates(form, T, T, H, dtype)
    if mine not in (None, *known):
      raise ValueError(
        f'{mine} of {form}: texts of {T:,} tokens and heads of {H} channels '
        f'take {", ".join(map(str, known))}'
      )
    found.append(mine or known[0])
  return tuple(found)


def live_heads(x: jax.Array, live: int | jax.Array, K: int) -> jax.Array:
  """Zeros, also in place of NaN, in the dead heads of [B, T, heads, H].

  Of K key/value heads those from `live` on are dead, and of as many groups of
  query heads.
  """
  head = jnp.arange(x.shape[2]) // (x.shape[2] // K)
  return jnp.where((head < live)[:, None], x, 0)


def sizes(a: jax.Array, b: jax.Array, form: str) -> tuple[int, int, int]:
  """(m, n, k) of the arrays.

  Raises:
    ValueError: unknown form, or shapes that do not belong together.
  """
  if form not in FORMS:
    raise ValueError(f'form {form!r} is not one of {", ".join(FORMS)}')
  left, right = AXES[form]
  if a.ndim != 2 or b.ndim != 2:
    raise ValueError(f'{form} of shapes {a.shape} and {b.shape}: not matrices')
  size = dict(zip(left, a.shape, strict=True))
  for letter, length in zip(right, b.shape, strict=True):
    if size.setdefault(letter, length) != length:
      raise ValueError(
        f'{form} of shapes {a.shape} and {b.shape}: {letter} differs'
      )
  return size['m'], size['n'], size['k']


def layer_sizes(
  form: str, tokens: int, width_in: int, width_out: int
) -> tuple[int, int, int]:
  """(m, n, k) of a linear layer's product: its output, dx or dw."""
  return {
    'nn': (tokens, width_out, width_in),
    'nt': (tokens, width_in, width_out),
    'tn': (width_in, width_out, tokens),
  }[form]


def result_dtype(
  form: str, dtype: jax.typing.DTypeLike
) -> jax.typing.DTypeLike:
  """Of a linear layer's product; dw is float32, as weights are."""
  return jnp.float32 if form == 'tn' else dtype


def dense(
  a: jax.Array, b: jax.Array, form: str, dtype: jax.typing.DTypeLike
) -> jax.Array:
  """The whole product by XLA, accumulated in float32."""
  return einsum(_SPECS[form], a, b, dtype)


def einsum(
  spec: str, a: jax.Array, b: jax.Array, dtype: jax.typing.DTypeLike
) -> jax.Array:
  """A product of two arrays in `dtype`, accumulated in float32.

  Args:
    spec: as of `jnp.einsum`, without an ellipsis; a letter of both operands is
      summed.
    a: first operand.
    b: second operand.
    dtype: of the result.
  """
  if not a.dtype == b.dtype == jnp.bfloat16:
    product = jnp.einsum(spec, a, b, preferred_element_type=jnp.float32)
    return product.astype(dtype)
  operands, out = spec.split('->')
  pairs = zip(operands.split(','), (a, b), strict=True)
  # What comes first in the result is on the left: nothing is transposed then.
  (left, a), (right, b) = sorted(pairs, key=lambda pair: out[0] not in pair[0])

  def on_cpu(a, b):
    product = _dot(*_summed_last(left, a, out), right, b, out, jnp.float32)
    return product.astype(dtype)

  def elsewhere(a, b):
    # XLA sums bfloat16 in float32 and can round as it stores. Asked for
    # float32, a GPU stores all of that, and converts it in a kernel more.
    return _dot(left, a, right, b, out, dtype)

  return jax.lax.platform_dependent(a, b, cpu=on_cpu, default=elsewhere)


def _dot(left, a, right, b, out, dtype):
  # Summed in the order in which the left operand lies: `jnp.einsum` goes by the
  # alphabet, and XLA then copies heads and weights first.
  summed = [letter for letter in left if letter not in out]
  axes = [[letters.index(x) for x in summed] for letters in (left, right)]
  product = jax.lax.dot_general(
    a, b, (axes, ((), ())), preferred_element_type=dtype
  )
  kept = [letter for letter in left + right if letter in out]
  return product.transpose([kept.index(letter) for letter in out])


def _summed_last(letters, x, out):
  """Moves what is summed to the last axes of an operand, in memory too.

  On a CPU XLA's fast product (YNNPACK) takes bfloat16 only if the left operand
  is like that, and, in jax 0.10, if the result is float32. All else is summed
  as float32, at 140 GFLOP/s where a core with AMX reaches 600 to 850 (256 x 576
  x 1,536; whole steps are in BENCHMARKS.md, "Bfloat16 on a CPU").
  """
  order = ''.join(sorted(letters, key=lambda letter: letter not in out))
  if order == letters:
    return letters, x
  moved = x.transpose([letters.index(letter) for letter in order])
  # Without this XLA would only rename the axes, and read x as it is.
  rows = layout.Layout(tuple(range(x.ndim)))
  return order, layout.with_layout_constraint(moved, rows)
