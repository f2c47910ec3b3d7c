"""The products of `forms` on NVIDIA Hopper, by Pallas Mosaic GPU.

One program per SM walks over the live tiles of c. Its last warpgroup fetches:
it copies tiles of a and b by TMA into a ring in shared memory. The others
compute: they multiply what has arrived with wgmma, accumulate in float32
registers, and copy the finished tile out. The ring runs on from one tile of c
to the next, so that fetching goes on while a tile is written. Trip counts come
from the extents, which the kernel reads from memory: one compile serves all.
"""

import dataclasses
import functools
import itertools
import math

import jax
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
import jax.numpy as jnp

from effllm_jax.kernels import forms

ZERO_BEYOND_EXTENTS = False

DTYPES = jnp.bfloat16, jnp.float16
REMEDY = "use implementation='bucket'"
# Of Hopper: no later GPU has wgmma, no earlier one TMA.
_CAPABILITY = '9.0'
# Of an H100 or H200 SXM, for a compile without a device.
_SMS = 132
_SHARED_BYTES = 227 * 1024
# wgmma multiplies 64 rows; 64 elements of 16 bits are a row of 128 bytes, the
# widest pattern that TMA and wgmma agree on.
_UNIT = 64
_ROW_BYTES = 128
# Buffers of _UNIT rows, for each computing warpgroup, between registers and c.
_STAGING = 2
# Barriers, and what the compiler reserves: 145 bytes are the most seen.
_OVERHEAD_BYTES = 2048
_TILES = (256, 192, 128, 64)
# More accumulators a warpgroup than this spill; up to it no candidate does.
_ACCUMULATORS = 128 * 128
# Registers a thread, fetching and computing: 24 + 2 * 240 fill the register
# file of an SM.
FETCH_REGISTERS = 24
COMPUTE_REGISTERS = 240
# Columns of tiles that the SMs work on together, so that the rows of a and
# columns of b in use stay in the L2 cache.
_COLUMNS = 8


@dataclasses.dataclass(frozen=True)
class Blocks:
  """How the work is cut.

  tile_m x tile_n of c is the work of one program at a time, tile_k the depth
  of one step; each a multiple of 64 that divides its axis. Two warpgroups
  compute, each half of the rows where tile_m is a multiple of 128, else half
  of the columns where tile_n is; a tile of neither is the work of one.
  `stages` is the number of steps in the ring.
  """

  tile_m: int
  tile_n: int
  tile_k: int = _UNIT
  stages: int = 4

  def parts(self) -> tuple[int, int]:
    """Into how many parts the warpgroups split the rows and the columns."""
    if self.tile_m % (2 * _UNIT) == 0:
      return 2, 1
    return (1, 2) if self.tile_n % (2 * _UNIT) == 0 else (1, 1)

  def shared_bytes(self) -> int:
    """Shared memory of one program."""
    ring = 2 * self.stages * self.tile_k * (self.tile_m + self.tile_n)
    staging = math.prod(self.parts()) * _STAGING * _UNIT * _ROW_BYTES
    return ring + staging + _OVERHEAD_BYTES

  def tile(self) -> dict[str, int]:
    """The tile along each axis."""
    return {'m': self.tile_m, 'n': self.tile_n, 'k': self.tile_k}


def refusal() -> str | None:
  """Why the machine at hand cannot run this kernel; None: it can.

  A machine without a GPU is not asked: it may lower for another one.
  """
  device = jax.devices()[0]
  has = getattr(device, 'compute_capability', None)
  if device.platform in ('cpu', 'tpu') or has == _CAPABILITY:
    return None
  return (
    f'needs a Hopper GPU (compute capability {_CAPABILITY}), this machine has '
    f'a {device.device_kind} ({has or device.platform})'
  )


def candidates(
  form: str, m: int, n: int, k: int, dtype: jax.typing.DTypeLike
) -> list[Blocks]:
  """All blocks worth timing: they divide m, n, k and fit shared memory.

  Of each tile the deepest ring up to 8 steps. One of 2 is not among them: as a
  slot is freed a step late, it would not fetch ahead.
  """
  del form, dtype  # Operands have 16 bits; staging is as large for any result.
  found = []
  for tiles in itertools.product(_TILES, _TILES, (64, 128)):
    for stages in range(8, 2, -1):
      blocks = Blocks(*tiles, stages)
      if not _fault(blocks, m, n, k):
        found.append(blocks)
        break
  return found


def default_blocks(
  form: str, m: int, n: int, k: int, dtype: jax.typing.DTypeLike
) -> Blocks:
  """The blocks to use where nothing was timed.

  The tile with the least work on the busiest SM, counting the operands that
  it reads. Of equals, nn and nt take the one that is wide in tokens (m), since
  an extent of n is rounded up to the tile; in tn both are channels, and b and
  c are read and written in longer rows by the one that is wide in n.

  Raises:
    ValueError: an axis is not a multiple of 64.
  """
  _check_sizes(form, m, n, k)

  def cost(blocks):
    tiles = (m // blocks.tile_m) * (n // blocks.tile_n)
    area = blocks.tile_m * blocks.tile_n
    # An operand element costs about as much as 64 products: an SM does 2048
    # of these a cycle and has some 64 bytes a cycle of L2.
    work = area + 64 * (blocks.tile_m + blocks.tile_n)
    wide = blocks.tile_n if form == 'tn' else blocks.tile_m
    return -(-tiles // _SMS) * work, -wide

  deep = [b for b in candidates(form, m, n, k, dtype) if b.tile_k == _UNIT]
  return min(deep, key=cost)


def product(
  a: jax.Array,
  b: jax.Array,
  form: str,
  extents: forms.Extents,
  dtype: jax.typing.DTypeLike,
  blocks: Blocks | None = None,
  interpret: object = None,
) -> jax.Array:
  """One product of `forms`, under its contract.

  Args:
    a: the left array of the form, bfloat16 or float16.
    b: the right array, of the same dtype.
    form: nn, nt or tn.
    extents: how far each axis is alive.
    dtype: of the result, that of the operands or float32.
    blocks: how to cut the work; None takes `default_blocks`.
    interpret: a `plgpu.InterpretGPUParams` runs the simulator, on any machine.

  Returns:
    c[m, n] in `dtype`.

  Raises:
    ValueError: a GPU of another kind, shapes that do not belong together,
      another dtype, an axis that is not a multiple of 64, or blocks that do not
      divide or fit.
  """
  if interpret is None and (why := refusal()):
    raise ValueError(f'pallas_hopper {why}; {REMEDY}')
  m, n, k = forms.sizes(a, b, form)
  dtype = jnp.dtype(dtype)
  if a.dtype != b.dtype or a.dtype not in DTYPES:
    raise ValueError(
      f'operands of {a.dtype} and {b.dtype} are not both bfloat16 or both '
      f'float16; {REMEDY}'
    )
  if dtype not in (a.dtype, jnp.float32):
    raise ValueError(
      f'a result of {dtype} is neither {a.dtype}, as the operands, nor '
      f'float32; {REMEDY}'
    )
  _check_sizes(form, m, n, k)
  blocks = blocks or default_blocks(form, m, n, k, dtype)
  if fault := _fault(blocks, m, n, k):
    raise ValueError(f'{fault}; take blocks from candidates()')

  left, right = forms.AXES[form]
  tile = blocks.tile()
  row = _ROW_BYTES // dtype.itemsize
  warpgroups = math.prod(blocks.parts())
  run = plgpu.kernel(
    functools.partial(_program, form=form, blocks=blocks),
    out_type=jax.ShapeDtypeStruct((m, n), dtype),
    scratch_types=dict(
      ring_a=shared((blocks.stages, *(tile[x] for x in left)), a.dtype),
      ring_b=shared((blocks.stages, *(tile[x] for x in right)), b.dtype),
      staging=shared((warpgroups, _STAGING, _UNIT, row), dtype),
      # One arrival for a, one for b.
      full=plgpu.Barrier(num_arrivals=2, num_barriers=blocks.stages),
      empty=plgpu.Barrier(num_arrivals=warpgroups, num_barriers=blocks.stages),
    ),
    grid=(min(_programs(interpret), m // tile['m'] * (n // tile['n'])),),
    grid_names=('sm',),
    num_threads=warpgroups + 1,
    thread_name='warpgroup',
    compiler_params=plgpu.CompilerParams(
      lowering_semantics=plgpu.LoweringSemantics.Warpgroup
    ),
    interpret=interpret,
  )
  # Three arrays of one element: a reshape is free, a stack is a kernel.
  lives = (extents.m, extents.n, extents.k)
  return run(*(jnp.asarray(x, jnp.int32).reshape(1) for x in lives), a, b)


def _check_sizes(form: str, m: int, n: int, k: int) -> None:
  if any(size < _UNIT or size % _UNIT for size in (m, n, k)):
    raise ValueError(
      f'{form} with m, n, k = {m}, {n}, {k}: not all are multiples of {_UNIT}; '
      f'{REMEDY}'
    )


def _fault(blocks: Blocks, m: int, n: int, k: int) -> str | None:
  """What is wrong with the blocks for a product of this size, if anything."""
  sizes = {'m': m, 'n': n, 'k': k}
  for x, tile in blocks.tile().items():
    if tile < _UNIT or tile % _UNIT or sizes[x] % tile:
      return (
        f'tile_{x} {tile} is not a multiple of {_UNIT} that divides '
        f'{x} = {sizes[x]}'
      )
  accumulators = blocks.tile_m * blocks.tile_n // math.prod(blocks.parts())
  if accumulators > _ACCUMULATORS:
    return (
      f'tile {blocks.tile_m} x {blocks.tile_n} needs {accumulators} '
      f'accumulators a warpgroup of at most {_ACCUMULATORS}'
    )
  # A slot is freed one step late: with a single one the program would wait for
  # itself.
  if blocks.stages < 2:
    return f'stages {blocks.stages} is less than 2'
  if blocks.shared_bytes() > _SHARED_BYTES:
    return (
      f'{blocks} takes {blocks.shared_bytes()} bytes of shared memory of '
      f'{_SHARED_BYTES}'
    )
  return None


def shared(shape: tuple[int, ...], dtype: jnp.dtype):
  """Shared memory in the pattern that TMA and wgmma agree on."""
  return plgpu.SMEM(
    shape,
    dtype,
    transforms=(
      plgpu.TilingTransform((8, _ROW_BYTES // jnp.dtype(dtype).itemsize)),
      plgpu.SwizzleTransform(_ROW_BYTES),
    ),
  )


def _programs(interpret: object) -> int:
  if interpret is not None:
    # The simulator runs them one after another; two show that they share.
    return 2
  return getattr(jax.devices()[0], 'core_count', None) or _SMS


def _program(
  live_m, live_n, live_k, a, b, c, *,
  ring_a, ring_b, staging, full, empty, form, blocks,
):  # fmt: skip
  """What one SM does: its share of the live tiles of c."""
  left, right = forms.AXES[form]
  sm = _Sm(
    blocks=blocks,
    tiles=tuple(
      pl.cdiv(live[0], blocks.tile()[x])
      for live, x in ((live_m, 'm'), (live_n, 'n'))
    ),
    steps=pl.cdiv(live_k[0], blocks.tile()['k']),
    left=_Operand(a, ring_a, left),
    right=_Operand(b, ring_b, right),
    c=c,
    staging=staging,
    full=full,
    empty=empty,
  )
  lax.cond(
    lax.axis_index('warpgroup') < math.prod(blocks.parts()),
    sm.compute,
    sm.fetch,
  )


@dataclasses.dataclass(frozen=True, eq=False)
class _Operand:
  """An operand: in memory, its ring in shared memory, and its axes."""

  source: jax.Ref
  ring: jax.Ref
  axes: str


@dataclasses.dataclass(frozen=True, eq=False)
class _Sm:
  """The program of one SM, of which each warpgroup runs one method.

  Attributes:
    blocks: how the work is cut.
    tiles: how many of c are alive, along m and n.
    steps: how many steps of k a tile of c takes.
    left, right: the operands.
    c: the result, in memory.
    staging: buffers for parts of a finished tile, on their way to c.
    full, empty: of each slot of the rings, a barrier.
  """

  blocks: Blocks
  tiles: tuple[jax.Array, jax.Array]
  steps: jax.Array
  left: _Operand
  right: _Operand
  c: jax.Ref
  staging: jax.Ref
  full: jax.Ref
  empty: jax.Ref

  def fetch(self):
    """Copies the tiles of a and b into the rings, as slots become empty."""
    plgpu.set_max_registers(FETCH_REGISTERS, action='decrease')
    stages, tile = self.blocks.stages, self.blocks.tile()

    def fetch_tile(i, j, done):
      @pl.loop(0, self.steps)
      def _(step):
        slot = lax.rem(done + step, stages)

        @pl.when(done + step >= stages)
        def _():
          plgpu.barrier_wait(self.empty.at[slot])

        at = {'m': i, 'n': j, 'k': step}
        for x in (self.left, self.right):
          window = tuple(pl.ds(at[y] * tile[y], tile[y]) for y in x.axes)
          plgpu.copy_gmem_to_smem(
            x.source.at[window], x.ring.at[slot], self.full.at[slot]
          )

    done = self._live_tiles(fetch_tile)

    # The barriers end in the state that they began in.
    @pl.loop(lax.max(done - stages, 0), done)
    def _(step):
      plgpu.barrier_wait(self.empty.at[lax.rem(step, stages)])

  def compute(self):
    """Multiplies what is in the rings, and writes finished tiles of c."""
    plgpu.set_max_registers(COMPUTE_REGISTERS, action='increase')
    tile = self.blocks.tile()
    warpgroup = lax.axis_index('warpgroup')
    part, mine = self._part(warpgroup)

    def compute_tile(i, j, done):
      @functools.partial(
        pl.run_scoped, acc=plgpu.ACC((part['m'], part['n']), jnp.float32)
      )
      def _(acc):
        self._multiply(acc, mine, done)
        value = acc[...]
        top = i * tile['m'] + mine['m'].start
        first = j * tile['n'] + mine['n'].start
        self._store(value, self.staging.at[warpgroup], top, first)

    self._live_tiles(compute_tile)
    plgpu.wait_smem_to_gmem(0)

  def _live_tiles(self, body):
    """Calls body(i, j, steps done before it); returns the steps done."""

    @plgpu.nd_loop(
      (self.tiles[0] * self.tiles[1],),
      collective_axes='sm',
      init_carry=jnp.int32(0),
    )
    def done(info, carry):
      i, j = plgpu.planar_snake(
        info.index[0], self.tiles, minor_dim=1, tile_width=_COLUMNS
      )
      body(i, j, carry)
      return carry + self.steps

    return done

  def _part(self, warpgroup):
    """Sizes of what a warpgroup computes of a tile, and where that is."""
    tile = self.blocks.tile()
    parts_m, parts_n = self.blocks.parts()
    part = {'m': tile['m'] // parts_m, 'n': tile['n'] // parts_n}
    mine = {
      'm': pl.ds(warpgroup * part['m'] if parts_m > 1 else 0, part['m']),
      'n': pl.ds(warpgroup * part['n'] if parts_n > 1 else 0, part['n']),
      'k': pl.ds(0, tile['k']),
    }
    return part, mine

  def _multiply(self, acc, mine, done):
    """Adds all steps of one tile up in `acc`, and gives their slots back."""

    def operand(x, slot, wanted):
      ref = x.ring.at[slot].at[tuple(mine[y] for y in x.axes)]
      return ref if x.axes == wanted else ref.transpose((1, 0))

    def free(step):
      slot = lax.rem(done + step, self.blocks.stages)
      plgpu.barrier_arrive(self.empty.at[slot])

    @pl.loop(0, self.steps)
    def _(step):
      slot = lax.rem(done + step, self.blocks.stages)
      plgpu.barrier_wait(self.full.at[slot])
      plgpu.wgmma(
        acc, operand(self.left, slot, 'mk'), operand(self.right, slot, 'kn')
      )
      # This step goes on while the one before it is known to be over. No test
      # without a GPU sees a wait that is missing.
      plgpu.wgmma_wait(1)
      pl.when(step > 0)(lambda: free(step - 1))

    plgpu.wgmma_wait(0)
    pl.when(self.steps > 0)(lambda: free(self.steps - 1))

  def _store(self, value, buffers, top, first):
    """Copies a warpgroup's part of a tile into c, from row and column on."""
    rows, columns = value.shape
    width = buffers.shape[-1]
    chunks = itertools.product(range(0, rows, _UNIT), range(0, columns, width))
    for number, (row, column) in enumerate(chunks):
      buffer = buffers.at[number % _STAGING]
      # Before it is filled again, its last copy has been read: within a tile
      # that leaves the one other buffer in flight, between tiles none.
      plgpu.wait_smem_to_gmem(
        _STAGING - 1 if number else 0, wait_read_only=True
      )
      chunk = value[row : row + _UNIT, column : column + width]
      buffer[...] = chunk.astype(self.c.dtype)
      plgpu.commit_smem()
      plgpu.copy_smem_to_gmem(
        buffer,
        self.c.at[pl.ds(top + row, _UNIT), pl.ds(first + column, width)],
      )
