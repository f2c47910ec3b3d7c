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

from kernels import forms

ZERO_BEYOND_EXTENTS = False

_REMEDY = "use implementation='bucket'"
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
# Registers a thread, fetching and computing: 40 + 2 * 232 fill the register
# file of an SM.
_FETCH_REGISTERS = 40
_COMPUTE_REGISTERS = 232
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
    raise ValueError(f'pallas_hopper {why}; {_REMEDY}')
  m, n, k = forms.sizes(a, b, form)
  dtype = jnp.dtype(dtype)
  if a.dtype != b.dtype or a.dtype not in (jnp.bfloat16, jnp.float16):
    raise ValueError(
      f'operands of {a.dtype} and {b.dtype} are not both bfloat16 or both '
      f'float16; {_REMEDY}'
    )
  if dtype not in (a.dtype, jnp.float32):
    raise ValueError(
      f'a result of {dtype} is neither {a.dtype}, as the operands, nor '
      f'float32; {_REMEDY}'
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
      ring_a=_shared((blocks.stages, *(tile[x] for x in left)), a.dtype),
      ring_b=_shared((blocks.stages, *(tile[x] for x in right)), b.dtype),
      staging=_shared((warpgroups, _STAGING, _UNIT, row), dtype),
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
      f'{_REMEDY}'
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


def _shared(shape: tuple[int, ...], dtype: jnp.dtype):
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
  tile = blocks.tile()
  left, right = forms.AXES[form]
  tiles_m = pl.cdiv(live_m[0], tile['m'])
  tiles_n = pl.cdiv(live_n[0], tile['n'])
  steps = pl.cdiv(live_k[0], tile['k'])

  def live_tiles(body):
    """Calls body(i, j, steps done before it); returns the steps done."""

    @plgpu.nd_loop(
      (tiles_m * tiles_n,), collective_axes='sm', init_carry=jnp.int32(0)
    )
    def done(info, carry):
      i, j = plgpu.planar_snake(
        info.index[0], (tiles_m, tiles_n), minor_dim=1, tile_width=_COLUMNS
      )
      body(i, j, carry)
      return carry + steps

    return done

  def fetch():
    plgpu.set_max_registers(_FETCH_REGISTERS, action='decrease')

    def body(i, j, done):
      @pl.loop(0, steps)
      def _(step):
        slot = lax.rem(done + step, blocks.stages)

        @pl.when(done + step >= blocks.stages)
        def _():
          plgpu.barrier_wait(empty.at[slot])

        at = {'m': i, 'n': j, 'k': step}
        for source, ring, axes in (a, ring_a, left), (b, ring_b, right):
          window = tuple(pl.ds(at[x] * tile[x], tile[x]) for x in axes)
          plgpu.copy_gmem_to_smem(
            source.at[window], ring.at[slot], full.at[slot]
          )

    done = live_tiles(body)

    # The barriers end in the state that they began in.
    @pl.loop(lax.max(done - blocks.stages, 0), done)
    def _(step):
      plgpu.barrier_wait(empty.at[lax.rem(step, blocks.stages)])

  def compute():
    plgpu.set_max_registers(_COMPUTE_REGISTERS, action='increase')
    warpgroup = lax.axis_index('warpgroup')
    parts_m, parts_n = blocks.parts()
    part = {'m': tile['m'] // parts_m, 'n': tile['n'] // parts_n}
    mine = {
      'm': pl.ds(warpgroup * part['m'] if parts_m > 1 else 0, part['m']),
      'n': pl.ds(warpgroup * part['n'] if parts_n > 1 else 0, part['n']),
      'k': pl.ds(0, tile['k']),
    }

    def operand(ring, slot, axes, wanted):
      ref = ring.at[slot].at[tuple(mine[x] for x in axes)]
      return ref if axes == wanted else ref.transpose((1, 0))

    def body(i, j, done):
      @functools.partial(
        pl.run_scoped, acc=plgpu.ACC((part['m'], part['n']), jnp.float32)
      )
      def _(acc):
        def free(step):
          plgpu.barrier_arrive(empty.at[lax.rem(done + step, blocks.stages)])

        @pl.loop(0, steps)
        def _(step):
          slot = lax.rem(done + step, blocks.stages)
          plgpu.barrier_wait(full.at[slot])
          plgpu.wgmma(
            acc,
            operand(ring_a, slot, left, 'mk'),
            operand(ring_b, slot, right, 'kn'),
          )
          # This step goes on while the one before it is known to be over. No
          # test without a GPU sees a wait that is missing.
          plgpu.wgmma_wait(1)
          pl.when(step > 0)(lambda: free(step - 1))

        plgpu.wgmma_wait(0)
        pl.when(steps > 0)(lambda: free(steps - 1))
        store(acc[...], i, j)

    def store(value, i, j):
      mine_out = staging.at[warpgroup]
      width = staging.shape[-1]
      top = i * tile['m'] + mine['m'].start
      first = j * tile['n'] + mine['n'].start
      chunks = [
        (row, column)
        for row in range(0, part['m'], _UNIT)
        for column in range(0, part['n'], width)
      ]
      for number, (row, column) in enumerate(chunks):
        buffer = mine_out.at[number % _STAGING]
        # Before it is filled again, its last copy has been read: within a tile
        # that leaves the one other buffer in flight, between tiles none.
        plgpu.wait_smem_to_gmem(
          _STAGING - 1 if number else 0, wait_read_only=True
        )
        buffer[...] = value[row : row + _UNIT, column : column + width].astype(
          c.dtype
        )
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(
          buffer,
          c.at[pl.ds(top + row, _UNIT), pl.ds(first + column, width)],
        )

    live_tiles(body)
    plgpu.wait_smem_to_gmem(0)

  lax.cond(
    lax.axis_index('warpgroup') < math.prod(blocks.parts()), compute, fetch
  )
