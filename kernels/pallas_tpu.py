"""The products of `forms` on a TPU, as one Pallas kernel.

    grid (m, n, k)     as many steps as the extents need, so a dead tile costs
                       nothing: neither its product nor its transfer
    a, b               a block each, fetched while the step before computes
    c                  written once, from a float32 sum in VMEM, after the last
                       step of k

The extents are data of the grid: one compile serves all. Blocks are whole tiles
of the hardware, (8, 128) in float32 and (16, 128) in bfloat16, or the whole
axis; a last block that stands over the end of its array is fine.
"""

from collections.abc import Mapping
import dataclasses
import functools

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
import jax.numpy as jnp

from effllm_jax.kernels import forms

ZERO_BEYOND_EXTENTS = False

DTYPES = ('bfloat16', 'float32')
_LANES = 128
# Half of what the smallest TPU from v5 on has (v5p, v7x: 64 MiB a core; v5e,
# v6e: 128). Mosaic's own limit is 16 on v5e; XLA keeps the rest for itself.
VMEM_BYTES = 32 * 2**20
# Sizes (m, n, k) to aim at, the preferred one first. See `default_blocks`.
_LINEAR = (
  (2048, 512, 512),
  (1024, 1024, 512),
  (1024, 512, 1024),
  (1024, 512, 512),
  (512, 512, 512),
  (512, 256, 512),
)
_AIMS = {
  'nn': _LINEAR,
  'nt': _LINEAR,
  'tn': (
    (512, 1024, 1024),
    (512, 512, 2048),
    (512, 512, 1024),
    (1024, 1024, 512),
    (512, 512, 512),
    (256, 512, 512),
  ),
}


@dataclasses.dataclass(frozen=True)
class Blocks:
  """How much of each axis one step of the grid works on.

  A block as long as its axis or longer is the whole axis.
  """

  m: int
  n: int
  k: int


def product(
  a: jax.Array,
  b: jax.Array,
  form: str,
  extents: forms.Extents,
  dtype: jax.typing.DTypeLike,
  blocks: Blocks | None = None,
  interpret: bool | object = False,
) -> jax.Array:
  """c [m, n] of `form` within the extents; unspecified beyond.

  A product of float32 has the precision of `jax.default_matmul_precision`, as
  XLA's has: one pass of bfloat16 by default, float32's own under 'highest'.

  Args:
    a: [m, k], or [k, m] of the form tn; bfloat16 or float32.
    b: [k, n], or [n, k] of the form nt; the dtype of a.
    form: one of `forms.FORMS`.
    extents: int32 scalars, at most m, n, k; they may be traced.
    dtype: of c; bfloat16 or float32.
    blocks: `default_blocks` where None.
    interpret: for tests on a CPU: True, or a `pltpu.InterpretParams`.

  Raises:
    ValueError: an unknown form, shapes that do not belong together, another
      dtype, or blocks that are not whole tiles.
  """
  size = dict(zip('mnk', forms.sizes(a, b, form), strict=True))
  dtype = jnp.dtype(dtype)
  if a.dtype != b.dtype or any(x not in DTYPES for x in (a.dtype, dtype)):
    raise ValueError(
      f'{form} of {a.dtype} and {b.dtype} to {dtype}: a and b must have one '
      f'dtype, and all be one of {", ".join(DTYPES)}'
    )
  if blocks is None:
    blocks = default_blocks(form, *size.values(), a.dtype)
  block = _clip(size, blocks)
  left, right = forms.AXES[form]
  for letters, of in ((left, a.dtype), (right, a.dtype), ('mn', dtype)):
    _check(letters, size, block, of)
  grid = tuple(_steps(getattr(extents, x), block[x]) for x in 'mnk')

  def spec(letters):
    def index(i, j, l, _):
      step = {'m': i, 'n': j, 'k': l}
      return tuple(step[x] for x in letters)

    return pl.BlockSpec(tuple(block[x] for x in letters), index)

  kernel = functools.partial(
    _kernel, k_axes=(left.index('k'), right.index('k')), k=size['k']
  )
  return pl.pallas_call(
    kernel,
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=1,
      grid=grid,
      in_specs=[spec(left), spec(right)],
      out_specs=spec('mn'),
      scratch_shapes=[pltpu.VMEM((block['m'], block['n']), jnp.float32)],
    ),
    out_shape=jax.ShapeDtypeStruct((size['m'], size['n']), dtype),
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=_semantics(grid),
      vmem_limit_bytes=VMEM_BYTES,
    ),
    interpret=interpret,
    name=f'product_{form}',
  )(jnp.asarray(extents.k, jnp.int32).reshape(1), a, b)


def default_blocks(
  form: str, m: int, n: int, k: int, dtype: jax.typing.DTypeLike
) -> Blocks:
  """The first of `candidates`: what to use where nothing has been timed.

  A step does m n k multiplications on (m + n) k numbers of bfloat16: m n /
  (m + n) operations a byte. A TPU v5e needs 240 of them to be busy, a v6e 560.
  In nn and nt, m is the tokens, which nobody masks, so it is the long side,
  while n and k, where a mask ends, are 512: half a block of 8192 is 3 %; 2048 x
  512 gives 410. In tn, m and n are both masked and k is the tokens: 512 x 1024
  gives 341, and long steps of k touch the sum less often. Of float32 less fits
  in VMEM: 1024 x 1024 in nn and nt. An axis is divided evenly; one of up to 1.5
  blocks is left whole.

  Args:
    form: one of `forms.FORMS`.
    m: whole size of the axis m, and so on.
    n: likewise.
    k: likewise.
    dtype: of the operands.
  """
  return candidates(form, m, n, k, dtype)[0]


def candidates(
  form: str, m: int, n: int, k: int, dtype: jax.typing.DTypeLike
) -> list[Blocks]:
  """Up to six different blocks worth timing that fit in VMEM.

  Args and order: see `default_blocks`.

  Raises:
    ValueError: an unknown form.
  """
  if form not in _AIMS:
    raise ValueError(f'form {form!r} is not one of {", ".join(_AIMS)}')
  found = []
  for aim in _AIMS[form]:
    blocks = Blocks(*map(_even, (m, n, k), aim))
    if blocks not in found and _vmem_bytes(blocks, dtype) <= VMEM_BYTES:
      found.append(blocks)
  return found


def _kernel(
  extent_ref, a_ref, b_ref, c_ref, sum_ref, *, k_axes: tuple[int, int], k: int
) -> None:
  """One step of the grid; `k_axes` is where k is in a and in b."""
  step = pl.program_id(2)
  block = a_ref.shape[k_axes[0]]

  @pl.when(step == 0)
  def _():
    sum_ref[...] = jnp.zeros_like(sum_ref)

  def add(live=None):
    a, b = a_ref[...], b_ref[...]
    if live is not None:
      a, b = (
        jnp.where(
          jax.lax.broadcasted_iota(jnp.int32, x.shape, axis) < live,
          x,
          jnp.zeros_like(x),
        )
        for x, axis in zip((a, b), k_axes, strict=True)
      )
    sum_ref[...] += jax.lax.dot_general(
      a,
      b,
      (((k_axes[0],), (k_axes[1],)), ((), ())),
      preferred_element_type=jnp.float32,
    )

  # A grid has at least one step; of an extent of 0 it has nothing to add.
  whole = extent_ref[0] > 0
  full_steps, rest = divmod(k, block)
  if rest:
    # What the last block holds beyond the arrays may be NaN, in both of them.
    pl.when(step == full_steps)(lambda: add(rest))
    whole &= step < full_steps
  pl.when(whole)(add)

  @pl.when(step == pl.num_programs(2) - 1)
  def _():
    c_ref[...] = sum_ref[...].astype(c_ref.dtype)


def _steps(extent: int | jax.Array, block: int) -> int | jax.Array:
  """Blocks that an extent reaches into; at least one, for k must give zeros."""
  steps = pl.cdiv(extent, block)
  return max(steps, 1) if isinstance(steps, int) else jnp.maximum(steps, 1)


def _semantics(grid: tuple[int | jax.Array, ...]) -> tuple[str, ...]:
  """Which axes of the grid two cores (v4, v5p) may share.

  Blocks of c, but no traced number of them, which cannot be divided. The sum
  over k is carried from step to step. Parallel axes come first.
  """
  m, n, _ = (isinstance(x, int) for x in grid)
  shared = m + (m and n)
  return ('parallel',) * shared + ('arbitrary',) * (3 - shared)


def _even(size: int, aim: int) -> int:
  """About `aim`, so that the last block of an axis is nearly a whole one."""
  parts = max(1, round(size / aim))
  return min(size, whole_lanes(pl.cdiv(size, parts)))


def whole_lanes(size: int) -> int:
  """The least multiple of the lanes of a tile that is not smaller."""
  return _LANES * pl.cdiv(size, _LANES)


def _vmem_bytes(blocks: Blocks, dtype: jax.typing.DTypeLike) -> int:
  """An upper bound of what a step holds, for c in float32.

  Beside a, b and c, each two times (one in transfer), and the sum there is a
  again: turned round, or in 'highest' split into summands of bfloat16, which
  libtpu takes 16 bytes a number for (v5e, v6e), and up to 2 MiB of the rest.
  """
  m, n, k = (whole_lanes(x) for x in dataclasses.astuple(blocks))
  itemsize = jnp.dtype(dtype).itemsize
  again = 16 if itemsize == 4 else itemsize
  return 2 * (m + n) * k * itemsize + 3 * 4 * m * n + again * m * k + 2**21


def _clip(size: Mapping[str, int], blocks: Blocks) -> dict[str, int]:
  return {x: min(size[x], getattr(blocks, x)) for x in 'mnk'}


def _check(
  letters: str,
  size: Mapping[str, int],
  block: Mapping[str, int],
  dtype: jnp.dtype,
) -> None:
  """Refuses blocks that are neither whole tiles of `dtype` nor the axis."""
  tile = (32 // dtype.itemsize, _LANES)
  for x, multiple in zip(letters, tile, strict=True):
    if block[x] < size[x] and (block[x] < 1 or block[x] % multiple):
      raise ValueError(
        f'block {x}={block[x]} of {dtype}[{size[letters[0]]},'
        f'{size[letters[1]]}] is neither a multiple of {multiple} nor the '
        f'whole {size[x]}'
      )
