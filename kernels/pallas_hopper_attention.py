"""Causal attention over the live heads on NVIDIA Hopper, by Pallas Mosaic GPU.

FlashAttention-2 (arXiv 2307.08691), as three kernels. A program has 128 rows of
one head: two warpgroups compute, 64 rows each, by wgmma into float32 registers;
a third copies what they meet, tile after tile, by TMA into a ring in shared
memory.

    forward          rows are queries, tiles are keys and values; the softmax of
                     a row is carried from tile to tile
    dq               likewise, by the probabilities computed again
    dk, dv           rows are keys, tiles are queries and the gradients of what
                     they gave, of every query head of the group

Tiles above the diagonal are not read, and no array grows with the square of a
text. How many heads are alive is read from memory: one compile serves all, and
the programs of dead heads end at once. (`jax.experimental.pallas.ops.gpu` has
such a forward pass; its backward pass takes no causal attention.)
"""

from collections.abc import Callable
from collections.abc import Sequence
import dataclasses
import functools
import math

import jax
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
import jax.numpy as jnp

from effllm_jax.kernels import forms
from effllm_jax.kernels import pallas_hopper

# Rows of a warpgroup, and of a program.
_ROWS = 64
_BLOCK = 2 * _ROWS
# Slots of a ring at most, and the bytes that two rings of matrices may take.
_MOST_STAGES = 4
_RING_BYTES = 2**17
# Sums of 64 x 128 are 64 registers of a thread.
_MOST_CHANNELS = 128
_LOG2_E = math.log2(math.e)


@dataclasses.dataclass(frozen=True)
class Blocks:
  """How many rows a tile has, which a program meets at a time: 64 or 128."""

  tile: int


def causal(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  live: int | jax.Array,
  blocks: Sequence[Blocks | None] = (None, None, None),
  interpret: object = None,
) -> jax.Array:
  """Causal softmax attention of the live heads, scaled by 1 / sqrt(H).

  Scores and sums are float32; probabilities meet `v` in its dtype. Only one
  derivative, and none by `live`.

  Args:
    q: [B, T, K * G, H], bfloat16 or float16.
    k, v: [B, T, K, H], in the dtype of q.
    live: int32 scalar, at most K; it may be traced. Heads of k and v from here
      on, and the query heads that read them, are dead and are not read.
    blocks: of each of `forms.ATTENTION`; the first of `candidates` where None.
    interpret: a `plgpu.InterpretGPUParams` runs the simulator, on any machine.

  Returns:
    [B, T, K * G, H] in the dtype of q; dead heads, and their gradients, are
    exactly zero.

  Raises:
    ValueError: a GPU of another kind; dtypes that differ, or that the kernel
      does not take; heads of more than 128 channels; blocks that are no
      candidates.
  """
  if interpret is None and (why := pallas_hopper.refusal()):
    raise ValueError(
      f'the attention of pallas_hopper {why}; {pallas_hopper.REMEDY}'
    )
  if len({q.dtype, k.dtype, v.dtype}) > 1 or (
    q.dtype not in pallas_hopper.DTYPES
  ):
    raise ValueError(
      f'q, k, v are {q.dtype}, {k.dtype}, {v.dtype}; the attention of '
      'pallas_hopper takes one dtype, bfloat16 or float16'
    )
  _, T, _, H = q.shape
  if H > _MOST_CHANNELS:
    raise ValueError(
      f'heads of {H} channels: the attention of pallas_hopper takes up to '
      f'{_MOST_CHANNELS}; {pallas_hopper.REMEDY}'
    )
  if not q.size:
    # No grid can be cut out of nothing.
    return jnp.zeros_like(q)
  blocks = forms.attention_blocks(candidates, blocks, T, H, q.dtype)
  # What fills up the last block is seen by no row before it, and channels of
  # zero change no score.
  ends = [(0, 0), (0, -T % _BLOCK), (0, 0), (0, -H % _ROWS)]
  filled = (
    jnp.pad(forms.live_heads(x, live, k.shape[2]), ends) for x in (q, k, v)
  )
  count = jnp.asarray(live, jnp.int32).reshape(1)
  out = _attend(H**-0.5, blocks, interpret, count, *filled)
  return forms.live_heads(out[:, :T, :, :H], live, k.shape[2])


def candidates(
  form: str, m: int, n: int, k: int, dtype: jax.typing.DTypeLike
) -> list[Blocks]:
  """All blocks worth timing: those for which ptxas finds registers.

  The first and default one is the longest. Where both operands of wgmma are in
  shared memory, its 64 x 64 read twice as long as they multiply, and 64 x 128
  one and a half times.

  Args:
    form: one of `forms.ATTENTION`.
    m, n: queries and keys: tokens of a text.
    k: channels of a head.
    dtype: of the operands.
  """
  if form not in forms.ATTENTION or m != n or k > _MOST_CHANNELS:
    return []
  if jnp.dtype(dtype) not in pallas_hopper.DTYPES:
    return []
  # Longer tiles would spill: in dkv, which knows a row of numbers for each of
  # its columns, and in dq where heads have 128 channels.
  short = form == 'dkv' or (form == 'dq' and k > _ROWS)
  return [Blocks(tile) for tile in ((64,) if short else (128, 64))]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _attend(scale, blocks, interpret, live, q, k, v):
  """[B, T, K * G, H] of q, likewise, on k, v [B, T, K, H].

  Of the result nothing is kept for the backward pass, in which it is computed
  again, as in `kernels/attention.py`.
  """
  return _result(scale, blocks, interpret, live, q, k, v)[0]


def _forward(scale, blocks, interpret, live, q, k, v):
  return _attend(scale, blocks, interpret, live, q, k, v), (live, q, k, v)


def _result(scale, blocks, interpret, live, q, k, v):
  """See `_attend`; and of each softmax the log2 of its sum, [B, K * G, T]."""
  B, T, heads, _ = q.shape
  return _call(
    functools.partial(_forward_kernel, scale=scale),
    own=[q],
    ring=[k, v],
    outputs=[q, jax.ShapeDtypeStruct((B, heads, T), jnp.float32)],
    blocks=blocks[0],
    interpret=interpret,
    log_sum_buffer=plgpu.SMEM((_BLOCK,), jnp.float32),
  )(live, q, k, v)


def _backward(scale, blocks, interpret, saved, dout):
  live, q, k, v = saved
  out, log_sum = _result(scale, blocks, interpret, *saved)
  # What the softmax takes off each gradient of a score.
  shift = jnp.moveaxis((out.astype(jnp.float32) * dout).sum(-1), 1, 2)
  queries, keys = [q, dout, log_sum, shift], [k, v]
  (dq,) = _call(
    functools.partial(_dq_kernel, scale=scale),
    own=queries,
    ring=keys,
    outputs=[q],
    blocks=blocks[1],
    interpret=interpret,
  )(live, *queries, *keys)
  dk, dv = _call(
    functools.partial(_dkv_kernel, scale=scale),
    own=keys,
    ring=queries,
    outputs=keys,
    blocks=blocks[2],
    interpret=interpret,
  )(live, *keys, *queries)
  return None, dq, dk, dv


_attend.defvjp(_forward, _backward)


def _call(kernel, *, own, ring, outputs, blocks, interpret, **scratch):
  """A kernel with a program for each sequence, head and block of `own`.

  Args:
    kernel: see below; it takes `live`, `own`, `ring` and `outputs` in memory,
      and the scratch that is made here.
    own: arrays of whose first the grid is made; of each a program reads a
      block.
    ring: arrays of which a program reads tiles, as many as it has steps.
    outputs: what is like the results.
    blocks: of the kernel.
    interpret: see `causal`.
    **scratch: more of shared memory.
  """
  B, T, heads, H = own[0].shape
  tile = blocks.tile
  # Of what a program reads in tiles two are matrices.
  stages = min(_MOST_STAGES, _RING_BYTES // (2 * tile * H * 2))

  def shared(x, *sizes):
    if x.ndim == 3:
      return plgpu.SMEM(sizes, x.dtype)
    return pallas_hopper.shared((*sizes, H), x.dtype)

  return plgpu.kernel(
    kernel,
    out_type=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in outputs],
    scratch_types=dict(
      own_buffers=[shared(x, _BLOCK) for x in own],
      ring_buffers=[shared(x, stages, tile) for x in ring],
      simulated=(
        [] if interpret is None else [plgpu.SMEM((_BLOCK, tile), own[0].dtype)]
      ),
      **scratch,
      arrived=plgpu.Barrier(num_arrivals=len(own)),
      full=plgpu.Barrier(num_arrivals=len(ring), num_barriers=stages),
      empty=plgpu.Barrier(num_arrivals=2, num_barriers=stages),
    ),
    grid=(B, heads, T // _BLOCK),
    grid_names=('sequence', 'head', 'block'),
    num_threads=3,
    thread_name='warpgroup',
    compiler_params=plgpu.CompilerParams(
      lowering_semantics=plgpu.LoweringSemantics.Warpgroup
    ),
    interpret=interpret,
  )


def _window(x, head, start, size):
  """Some rows of one head of [B, T, heads, H] or [B, heads, T]."""
  sequence, rows = lax.axis_index('sequence'), pl.ds(start, size)
  if len(x.shape) == 3:
    return x.at[sequence, head, rows]
  return x.at[sequence, rows, head]


@dataclasses.dataclass(frozen=True, eq=False)
class _Program:
  """What a program reads, and how its warpgroups hand it to each other.

  Attributes:
    own, own_buffers: arrays in memory, of each of which it reads one block, and
      where that goes.
    ring, ring_buffers: arrays of which it reads tiles, and the rings of them.
    start: first row of the block.
    steps: how many tiles it reads.
    where: of a step, the head and the first row of the tile.
    arrived: barrier of its block.
    full, empty: of each slot of the rings, a barrier.
    simulated: shared memory in place of registers, of which the simulator (of
      jax 0.12) takes no operand; on a GPU none.
  """

  own: Sequence[jax.Ref]
  own_buffers: Sequence[jax.Ref]
  ring: Sequence[jax.Ref]
  ring_buffers: Sequence[jax.Ref]
  start: jax.Array
  steps: jax.Array
  where: Callable[[jax.Array], tuple[jax.Array, jax.Array]]
  arrived: jax.Ref
  full: jax.Ref
  empty: jax.Ref
  simulated: Sequence[jax.Ref]

  def run(self, compute, *sums):
    """Runs the three warpgroups: two do compute(first row in the block, ...).

    Further arguments are sums, of 64 rows of the arrays `sums`, at first zero.
    """

    def start():
      plgpu.set_max_registers(
        pallas_hopper.COMPUTE_REGISTERS, action='increase'
      )
      plgpu.barrier_wait(self.arrived)
      mine = lax.axis_index('warpgroup') * _ROWS
      scoped = [plgpu.ACC((_ROWS, x.shape[3]), jnp.float32) for x in sums]
      body = functools.partial(compute, mine)
      # Of nothing the simulator makes no scope.
      pl.run_scoped(body, *scoped) if scoped else body()

    lax.cond(lax.axis_index('warpgroup') < 2, start, self._fetch)

  def _fetch(self):
    plgpu.set_max_registers(pallas_hopper.FETCH_REGISTERS, action='decrease')
    head = lax.axis_index('head')
    for source, buffer in zip(self.own, self.own_buffers, strict=True):
      window = _window(source, head, self.start, _BLOCK)
      plgpu.copy_gmem_to_smem(window, buffer, self.arrived)
    stages = self.ring_buffers[0].shape[0]

    @pl.loop(0, self.steps)
    def _(step):
      slot = lax.rem(step, stages)

      @pl.when(step >= stages)
      def _():
        plgpu.barrier_wait(self.empty.at[slot])

      head, row = self.where(step)
      for source, buffer in zip(self.ring, self.ring_buffers, strict=True):
        window = _window(source, head, row, self.tile)
        plgpu.copy_gmem_to_smem(window, buffer.at[slot], self.full.at[slot])

    # The barriers end in the state that they began in.
    @pl.loop(lax.max(self.steps - stages, 0), self.steps)
    def _(step):
      plgpu.barrier_wait(self.empty.at[lax.rem(step, stages)])

  def operand(self, values):
    """Values in registers as the left operand of wgmma."""
    if not self.simulated:
      return values
    rows = pl.ds(lax.axis_index('warpgroup') * _ROWS, _ROWS)
    buffer = self.simulated[0].at[rows]
    buffer[...] = values
    return buffer

  @property
  def tile(self) -> int:
    """Rows of a tile."""
    return self.ring_buffers[0].shape[1]

  def meet(self, first, last, body, carry=()):
    """carry = body(carry, tiles, step) for some steps."""
    stages = self.ring_buffers[0].shape[0]

    def meet_one(step, carry):
      slot = lax.rem(step, stages)
      plgpu.barrier_wait(self.full.at[slot])
      carry = body(carry, [x.at[slot] for x in self.ring_buffers], step)
      plgpu.barrier_arrive(self.empty.at[slot])
      return carry

    return lax.fori_loop(first, last, meet_one, carry)

  def pass_by(self, first, last):
    """Leaves the tiles of some steps to the other warpgroup."""
    self.meet(first, last, lambda *_: ())


def _products(*pairs):
  """a @ b of each pair in float32, all at once; a, b are operands of wgmma."""

  def run(*sums):
    for ref, (a, b) in zip(sums, pairs, strict=True):
      plgpu.wgmma(ref, a, b)
    return tuple(ref[...] for ref in sums)

  shapes = [(a.shape[0], b.shape[1]) for a, b in pairs]
  return pl.run_scoped(run, *(plgpu.ACC(x, jnp.float32) for x in shapes))


def _causal(scores, ahead, queries=0):
  """-inf for a key that comes after its query.

  Args:
    scores: float32 [rows, columns].
    ahead: by how much the first column is ahead of the first row in the text;
      None: no key comes after any query.
    queries: the axis of the queries.
  """
  if ahead is None:
    return scores
  row, column = (
    lax.broadcasted_iota(jnp.int32, scores.shape, axis) for axis in (0, 1)
  )
  column += ahead
  seen = column <= row if queries == 0 else row <= column
  return jnp.where(seen, scores, -jnp.inf)


def _across(x, shape):
  """What there is one of for each row, [rows], as [rows, columns]."""
  return lax.broadcast_in_dim(x, shape, [0])


def _along(x, shape):
  """What there is one of for each column, [columns], as [rows, columns]."""
  return lax.broadcast_in_dim(x, shape, [1])


def _turned(x):
  return x.transpose((1, 0))


def _program_of_queries(own, ring, **scratch):
  """A program whose block is of queries, and whose tiles are of keys."""
  group = own[0].shape[2] // ring[0].shape[2]
  tile = scratch['ring_buffers'][0].shape[1]
  start = lax.axis_index('block') * _BLOCK
  head = lax.div(lax.axis_index('head'), group)
  return _Program(
    own=own,
    ring=ring,
    start=start,
    steps=lax.div(start + _BLOCK, tile),
    where=lambda step: (head, step * tile),
    **scratch,
  )


def _meet_keys(program, row, body, carry):
  """Meets the keys up to the last of 64 queries, of which `row` is the first.

  carry = body(carry, keys, values, ahead); see `_causal`.
  """
  tile = program.tile
  before, after = lax.div(row, tile), pl.cdiv(row + _ROWS, tile)
  carry = program.meet(
    0, before, lambda carry, tiles, _: body(carry, *tiles, None), carry
  )
  carry = program.meet(
    before,
    after,
    lambda carry, tiles, step: body(carry, *tiles, step * tile - row),
    carry,
  )
  program.pass_by(after, program.steps)
  return carry


def _forward_kernel(
  live, q, k, v, out, log_sum, *, log_sum_buffer, scale, **scratch
):
  program = _program_of_queries([q], [k, v], **scratch)

  def compute(mine):
    row = program.start + mine
    queries, log_sums = (
      x.at[pl.ds(mine, _ROWS)] for x in (*program.own_buffers, log_sum_buffer)
    )

    def meet(carry, keys, values, ahead):
      acc, most, total = carry
      (scores,) = _products((queries, _turned(keys)))
      scores = _causal(scores * (scale * _LOG2_E), ahead)
      # No query is without a key: its own, and those of the first tile.
      new_most = jnp.maximum(most, scores.max(1))
      p = jnp.exp2(scores - _across(new_most, scores.shape))
      so_far = jnp.exp2(most - new_most)
      (part,) = _products((program.operand(p.astype(v.dtype)), values))
      acc = acc * _across(so_far, acc.shape) + part
      return acc, new_most, total * so_far + p.sum(1)

    acc, most, total = _meet_keys(
      program,
      row,
      meet,
      (
        jnp.zeros((_ROWS, q.shape[3]), jnp.float32),
        jnp.full((_ROWS,), -jnp.inf, jnp.float32),
        jnp.zeros((_ROWS,), jnp.float32),
      ),
    )
    queries[...] = (acc / _across(total, acc.shape)).astype(out.dtype)
    log_sums[...] = most + jnp.log2(total)
    _write(row, (queries, out), (log_sums, log_sum))

  group = q.shape[2] // k.shape[2]
  pl.when(lax.axis_index('head') < live[0] * group)(
    lambda: program.run(compute)
  )


def _dq_kernel(live, q, dout, log_sum, shift, k, v, dq, *, scale, **scratch):
  program = _program_of_queries([q, dout, log_sum, shift], [k, v], **scratch)

  def compute(mine, acc):
    row = program.start + mine
    queries, douts, log_sums, shifts = (
      x.at[pl.ds(mine, _ROWS)] for x in program.own_buffers
    )
    log_sums, shifts = log_sums[...], shifts[...]

    def meet(nothing, keys, values, ahead):
      scores, dp = _products((queries, _turned(keys)), (douts, _turned(values)))
      scores = _causal(scores * (scale * _LOG2_E), ahead)
      p = jnp.exp2(scores - _across(log_sums, scores.shape))
      ds = p * (dp - _across(shifts, dp.shape))
      plgpu.wgmma(acc, program.operand(ds.astype(k.dtype)), keys)
      plgpu.wgmma_wait(0)
      return nothing

    _meet_keys(program, row, meet, ())
    queries[...] = (acc[...] * scale).astype(dq.dtype)
    _write(row, (queries, dq))

  group = q.shape[2] // k.shape[2]
  pl.when(lax.axis_index('head') < live[0] * group)(
    lambda: program.run(compute, q)
  )


def _dkv_kernel(
  live, k, v, q, dout, log_sum, shift, dk, dv, *, scale, **scratch
):
  tile = scratch['ring_buffers'][0].shape[1]
  group = q.shape[2] // k.shape[2]
  head, start = lax.axis_index('head'), lax.axis_index('block') * _BLOCK
  program = _Program(
    own=[k, v],
    ring=[q, dout, log_sum, shift],
    start=start,
    # From the block's first row to the end of the text, each of every query
    # head of the group.
    steps=lax.div(q.shape[1] - start, tile) * group,
    where=lambda step: (
      head * group + lax.rem(step, group),
      start + lax.div(step, group) * tile,
    ),
    **scratch,
  )

  def compute(mine, dk_sum, dv_sum):
    keys, values = (x.at[pl.ds(mine, _ROWS)] for x in program.own_buffers)

    def meet(queries, douts, log_sums, shifts, ahead):
      scores, dp = _products((keys, _turned(queries)), (values, _turned(douts)))
      scores = _causal(scores * (scale * _LOG2_E), ahead, queries=1)
      p = jnp.exp2(scores - _along(log_sums[...], scores.shape))
      ds = p * (dp - _along(shifts[...], dp.shape))
      plgpu.wgmma(dv_sum, program.operand(p.astype(dout.dtype)), douts)
      # What registers have read may be written again, by TMA.
      plgpu.commit_smem()
      plgpu.wgmma(dk_sum, program.operand(ds.astype(q.dtype)), queries)
      plgpu.wgmma_wait(0)
      return ()

    # A tile of queries is as long as what a warpgroup has of keys.
    before = lax.div(mine, tile) * group
    after = before + group
    program.pass_by(0, before)
    program.meet(before, after, lambda _, x, step: meet(*x, 0))
    program.meet(after, program.steps, lambda _, x, step: meet(*x, None))

    keys[...] = (dk_sum[...] * scale).astype(dk.dtype)
    values[...] = dv_sum[...].astype(dv.dtype)
    _write(start + mine, (keys, dk), (values, dv))

  pl.when(head < live[0])(lambda: program.run(compute, k, v))


def _write(row, *pairs):
  """Copies results of 64 rows, of which `row` is the first, out of buffers."""
  plgpu.commit_smem()
  for buffer, out in pairs:
    window = _window(out, lax.axis_index('head'), row, _ROWS)
    plgpu.copy_smem_to_gmem(buffer, window)
  plgpu.wait_smem_to_gmem(0)
