"""Causal attention over the live heads on a TPU, as three Pallas kernels.

FlashAttention-2 (arXiv 2307.08691) on the lower triangle of blocks:

    grid (b, h, s)   sequences, live heads, blocks on or below the diagonal, row
                     after row: a dead head and what a row must not see cost
                     nothing, neither a product nor a transfer
    forward          the softmax of a row is carried from block to block
    dq               row after row, by the probabilities computed again
    dk, dv           column after column, summed over the query heads of a group

No array grows with the square of a text. The number of live heads is data of
the grid: one compile serves all. Scores stand as [keys, queries], so that sums
over keys run down the sublanes, and what there is one of for each query (its
maximum, its sum) is a row, which spreads over a block as it is.
"""

from collections.abc import Sequence
import dataclasses
import functools

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
import jax.numpy as jnp
import numpy as np

from effllm_jax.kernels import forms
from effllm_jax.kernels import pallas_tpu

# Most rows of a block, by default and of other candidates. With 512 a matrix of
# float32 scores has 1 MiB, of which a step holds a few at a time. There was no
# TPU to time it on.
_MOST_ROWS = 512
_OTHERS = (1024, 256)
# The lists of blocks are in scalar memory: 263 kB at 131,072 tokens; at 262,144
# they would be all of its 1 MB.
_MOST_TOKENS = 2**17


@dataclasses.dataclass(frozen=True)
class Blocks:
  """How a kernel cuts the causal square: into squares of so many rows."""

  rows: int


def causal(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  live: int | jax.Array,
  blocks: Sequence[Blocks | None] = (None, None, None),
  interpret: bool | object = False,
) -> jax.Array:
  """Causal softmax attention of the live heads, scaled by 1 / sqrt(H).

  Scores and sums are float32; probabilities meet `v` in its dtype. Only one
  derivative, and none by `live`.

  Args:
    q: [B, T, K * G, H], bfloat16 or float32.
    k, v: [B, T, K, H], in the dtype of q.
    live: int32 scalar, at most K; it may be traced. Heads of k and v from here
      on, and the query heads that read them, are dead and are not read.
    blocks: of each of `forms.ATTENTION`; the first of `candidates` where None.
    interpret: for tests on a CPU: True, or a `pltpu.InterpretParams`.

  Returns:
    [B, T, K * G, H] in the dtype of q; dead heads, and their gradients, are
    exactly zero.

  Raises:
    ValueError: dtypes that differ, or that the kernel does not take; more than
      131,072 tokens in a text; blocks that are no candidates.
  """
  if len({q.dtype, k.dtype, v.dtype}) > 1 or q.dtype not in pallas_tpu.DTYPES:
    raise ValueError(
      f'q, k, v are {q.dtype}, {k.dtype}, {v.dtype}; the attention of '
      'pallas_tpu takes one dtype, bfloat16 or float32'
    )
  if not q.size:
    # No grid can be cut out of nothing.
    return jnp.zeros_like(q)
  T = q.shape[1]
  if T > _MOST_TOKENS:
    raise ValueError(
      f'a text of {T:,} tokens: the attention of pallas_tpu takes up to '
      f'{_MOST_TOKENS:,}; use implementation=xla'
    )
  blocks = forms.attention_blocks(candidates, blocks, T, q.shape[3], q.dtype)
  # What fills up the last block is seen by no row before it.
  ends = [(0, 0), (0, 0), (0, _filled(T) - T), (0, 0)]
  heads_first = (
    jnp.pad(jnp.moveaxis(forms.live_heads(x, live, k.shape[2]), 1, 2), ends)
    for x in (q, k, v)
  )
  out = _attend(blocks, interpret, jnp.asarray(live, jnp.int32), *heads_first)
  out = jnp.moveaxis(out[..., :T], 3, 1)
  return forms.live_heads(out, live, k.shape[2])


def candidates(
  form: str, m: int, n: int, k: int, dtype: jax.typing.DTypeLike
) -> list[Blocks]:
  """Up to three different blocks worth timing: whole lanes, all of one size.

  The first is the default, and whatever its blocks, a kernel has the text that
  those of the default fill.

  Args:
    form: one of `forms.ATTENTION`.
    m, n: queries and keys: tokens of a text.
    k: channels of a head.
    dtype: of the operands.
  """
  del k
  if form not in forms.ATTENTION or m != n:
    return []
  if jnp.dtype(dtype) not in pallas_tpu.DTYPES:
    return []
  filled, lanes = _filled(m), pallas_tpu.whole_lanes(1)
  even = [x for x in range(lanes, filled + 1, lanes) if filled % x == 0]
  found = [_rows(m)] + [max(x for x in even if x <= y) for y in _OTHERS]
  return [Blocks(x) for x in dict.fromkeys(found)]


def _rows(T):
  """Rows of a block by default: whole lanes, about as many in each."""
  return pallas_tpu.whole_lanes(pl.cdiv(T, pl.cdiv(T, _MOST_ROWS)))


def _filled(T):
  """Rows of a text with its last block filled up."""
  return _rows(T) * pl.cdiv(T, _rows(T))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attend(blocks, interpret, live, q, k, v):
  """[B, K * G, H, T] of q [B, K * G, T, H] on k, v [B, K, T, H].

  Of the result nothing is kept for the backward pass, in which it is computed
  again, as in `kernels/attention.py`.
  """
  return _result(blocks, interpret, live, q, k, v)[0]


def _forward(blocks, interpret, live, q, k, v):
  return _attend(blocks, interpret, live, q, k, v), (live, q, k, v)


def _result(blocks, interpret, live, q, k, v):
  """See `_attend`; and of each softmax the logsumexp, [B, K * G, 1, T]."""
  B, heads, T, H = q.shape
  G, rows = heads // k.shape[1], blocks[0].rows
  return _call(
    functools.partial(_forward_kernel, scale=H**-0.5),
    'causal_forward',
    (B, live * G, *_row_by_row(T, rows)),
    inputs=[(q, _queries(rows)), (k, _keys(rows, G)), (v, _keys(rows, G))],
    outputs=[
      ((B, heads, H, T), q.dtype, _turned(rows)),
      ((B, heads, 1, T), jnp.float32, _turned(rows)),
    ],
    scratch=[(1, rows), (1, rows), (H, rows)],
    interpret=interpret,
  )


def _backward(blocks, interpret, saved, dout):
  live, q, k, v = saved
  out, logsumexp = _result(blocks, interpret, *saved)
  B, heads, T, H = q.shape
  G = heads // k.shape[1]
  # What the softmax takes off each gradient of a score.
  shift = (out.astype(jnp.float32) * dout).sum(2, keepdims=True)
  rows = blocks[1].rows
  (dq,) = _call(
    functools.partial(_dq_kernel, scale=H**-0.5),
    'causal_dq',
    (B, live * G, *_row_by_row(T, rows)),
    inputs=[
      (q, _queries(rows)), (k, _keys(rows, G)), (v, _keys(rows, G)),
      (dout, _turned(rows)), (logsumexp, _turned(rows)), (shift, _turned(rows)),
    ],
    outputs=[((B, heads, H, T), q.dtype, _turned(rows))],
    scratch=[(H, rows)],
    interpret=interpret,
  )  # fmt: skip
  rows = blocks[2].rows
  dk, dv = _call(
    functools.partial(_dkv_kernel, scale=H**-0.5),
    'causal_dkv',
    (B, live, *_column_by_column(T, rows), G),
    inputs=[
      (q, _queries(rows, G)), (k, _keys(rows)), (v, _keys(rows)),
      (dout, _turned(rows, G)), (logsumexp, _turned(rows, G)),
      (shift, _turned(rows, G)),
    ],
    outputs=[(x.shape, x.dtype, _keys(rows)) for x in (k, v)],
    scratch=[(rows, H), (rows, H)],
    interpret=interpret,
  )  # fmt: skip
  return None, jnp.moveaxis(dq, 2, 3), dk, dv


_attend.defvjp(_forward, _backward)


def _call(kernel, name, axes, *, inputs, outputs, scratch, interpret):
  """Runs a kernel on a grid of `axes`, the third of which is a list of blocks.

  Args:
    kernel: see below.
    name: of the kernel in a profile.
    axes: sizes of the grid; in place of the third two arrays, the row and the
      column of each block.
    inputs: arrays, each with a function that tells the size of its block from
      its shape, and where that is.
    outputs: shapes and dtypes with the same.
    scratch: shapes of float32 sums.
    interpret: see `causal`.
  """
  B, heads, row, column, *rest = axes
  specs = lambda some: [block(shape) for shape, block in some]
  return pl.pallas_call(
    kernel,
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=2,
      grid=(B, heads, len(row), *rest),
      in_specs=specs((x.shape, block) for x, block in inputs),
      out_specs=specs((shape, block) for shape, _, block in outputs),
      scratch_shapes=[pltpu.VMEM(shape, jnp.float32) for shape in scratch],
    ),
    out_shape=[
      jax.ShapeDtypeStruct(shape, dtype) for shape, dtype, _ in outputs
    ],
    compiler_params=pltpu.CompilerParams(
      # A traced number of heads cannot be divided between two cores (v4, v5p).
      dimension_semantics=('parallel',) + ('arbitrary',) * (2 + len(rest)),
      vmem_limit_bytes=pallas_tpu.VMEM_BYTES,
    ),
    interpret=interpret,
    name=name,
  )(row, column, *(x for x, _ in inputs))


def _row_by_row(T, rows):
  """Row and column of every block on or below the diagonal, int32."""
  row, column = np.tril_indices(T // rows)
  return row.astype(np.int32), column.astype(np.int32)


def _column_by_column(T, rows):
  column, row = np.triu_indices(T // rows)
  return row.astype(np.int32), column.astype(np.int32)


def _queries(rows, G=None, turned=False):
  """Blocks by the row of [B, K * G, T, H]; `turned`: of [B, K * G, X, T].

  For a grid of K * G heads, or with G for one of K heads and G groups.
  """

  def block(shape):
    def index(b, h, s, *rest):
      *group, row, _ = rest
      head = h * G + group[0] if group else h
      return (b, head, 0, row[s]) if turned else (b, head, row[s], 0)

    size = (shape[2], rows) if turned else (rows, shape[3])
    return pl.BlockSpec((None, None, *size), index)

  return block


_turned = functools.partial(_queries, turned=True)


def _keys(rows, G=1):
  """Blocks of [B, K, T, H] by the column, for a grid of K * G heads."""

  def block(shape):
    def index(b, h, s, *rest):
      # `//` asks Mosaic for a sign, and that for the chip it is on.
      return b, jax.lax.div(h, G), rest[-1][s], 0

    return pl.BlockSpec((None, None, rows, shape[3]), index)

  return block


def _dot(form, a, b):
  left, right = (x.index('k') for x in forms.AXES[form])
  return jax.lax.dot_general(
    a,
    b,
    (((left,), (right,)), ((), ())),
    preferred_element_type=jnp.float32,
  )


def _scores(q_ref, k_ref, scale, diagonal):
  """[keys, queries]; -inf where a key comes after the query."""
  scores = _dot('nt', k_ref[...], q_ref[...]) * scale
  if not diagonal:
    return scores
  key, query = (
    jax.lax.broadcasted_iota(jnp.int32, scores.shape, axis) for axis in (0, 1)
  )
  return jnp.where(key <= query, scores, -jnp.inf)


def _on_either(row, column, step):
  """step(diagonal), compiled with and without the comparison of positions."""
  pl.when(row == column)(lambda: step(True))
  pl.when(row != column)(lambda: step(False))


def _forward_kernel(
  row_ref, column_ref, q_ref, k_ref, v_ref, out_ref, logsumexp_ref,
  most_ref, sum_ref, out_sum_ref, *, scale,
):  # fmt: skip
  s = pl.program_id(2)
  row, column = row_ref[s], column_ref[s]

  @pl.when(column == 0)
  def _():
    most_ref[...] = jnp.full_like(most_ref, -jnp.inf)
    sum_ref[...] = jnp.zeros_like(sum_ref)
    out_sum_ref[...] = jnp.zeros_like(out_sum_ref)

  def step(diagonal):
    scores = _scores(q_ref, k_ref, scale, diagonal)
    # No query is without a key: its own, and those of the column 0.
    most = jnp.maximum(most_ref[...], scores.max(0, keepdims=True))
    p, so_far = jnp.exp(scores - most), jnp.exp(most_ref[...] - most)
    v = v_ref[...]
    sum_ref[...] = sum_ref[...] * so_far + p.sum(0, keepdims=True)
    out_sum_ref[...] = out_sum_ref[...] * so_far + _dot(
      'tn', v, p.astype(v.dtype)
    )
    most_ref[...] = most

  _on_either(row, column, step)

  @pl.when(row == column)
  def _():
    out_ref[...] = (out_sum_ref[...] / sum_ref[...]).astype(out_ref.dtype)
    logsumexp_ref[...] = most_ref[...] + jnp.log(sum_ref[...])


def _gradient_of_scores(
  q_ref, k_ref, v_ref, dout_ref, logsumexp_ref, shift_ref, scale, diagonal
):
  """Probabilities and the gradient of the scores, float32 [keys, queries]."""
  p = jnp.exp(_scores(q_ref, k_ref, scale, diagonal) - logsumexp_ref[...])
  dp = _dot('nn', v_ref[...], dout_ref[...])
  return p, p * (dp - shift_ref[...])


def _dq_kernel(
  row_ref, column_ref, q_ref, k_ref, v_ref, dout_ref, logsumexp_ref, shift_ref,
  dq_ref, sum_ref, *, scale,
):  # fmt: skip
  s = pl.program_id(2)
  row, column = row_ref[s], column_ref[s]

  @pl.when(column == 0)
  def _():
    sum_ref[...] = jnp.zeros_like(sum_ref)

  def step(diagonal):
    _, ds = _gradient_of_scores(
      q_ref, k_ref, v_ref, dout_ref, logsumexp_ref, shift_ref, scale, diagonal
    )
    k = k_ref[...]
    sum_ref[...] += _dot('tn', k, ds.astype(k.dtype))

  _on_either(row, column, step)

  @pl.when(row == column)
  def _():
    dq_ref[...] = (sum_ref[...] * scale).astype(dq_ref.dtype)


def _dkv_kernel(
  row_ref, column_ref, q_ref, k_ref, v_ref, dout_ref, logsumexp_ref, shift_ref,
  dk_ref, dv_ref, dk_sum_ref, dv_sum_ref, *, scale,
):  # fmt: skip
  s, g = pl.program_id(2), pl.program_id(3)
  row, column = row_ref[s], column_ref[s]
  last_row = row_ref[pl.num_programs(2) - 1]

  @pl.when((row == column) & (g == 0))
  def _():
    dk_sum_ref[...] = jnp.zeros_like(dk_sum_ref)
    dv_sum_ref[...] = jnp.zeros_like(dv_sum_ref)

  def step(diagonal):
    p, ds = _gradient_of_scores(
      q_ref, k_ref, v_ref, dout_ref, logsumexp_ref, shift_ref, scale, diagonal
    )
    q, dout = q_ref[...], dout_ref[...]
    dk_sum_ref[...] += _dot('nn', ds.astype(q.dtype), q)
    dv_sum_ref[...] += _dot('nt', p.astype(dout.dtype), dout)

  _on_either(row, column, step)

  @pl.when((row == last_row) & (g == pl.num_programs(3) - 1))
  def _():
    dk_ref[...] = (dk_sum_ref[...] * scale).astype(dk_ref.dtype)
    dv_ref[...] = dv_sum_ref[...].astype(dv_ref.dtype)
