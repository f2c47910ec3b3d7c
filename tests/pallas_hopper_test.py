"""Products on Hopper: in the simulator, and lowered on any machine."""

import functools

import jax
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
import pytest

from effllm_jax.kernels import forms
from effllm_jax.kernels import pallas_hopper
from experiments import aot_hopper
from tests import conftest

# One computing warpgroup and two, by rows and by columns; rings that come
# round within a tile and rings that do not.
BLOCKS = {
  'nn': pallas_hopper.Blocks(128, 64, 64, stages=2),
  'nt': pallas_hopper.Blocks(64, 128, 64, stages=3),
  'tn': pallas_hopper.Blocks(64, 64, 128, stages=2),
}
TILES = 2
# The axes of a linear layer that masks: its inputs and outputs.
MASKED = [
  (form, x)
  for form, axes in {'nn': 'nk', 'nt': 'nk', 'tn': 'mn'}.items()
  for x in axes
]
EXTENTS = {
  '0': lambda tile: 0,
  '1': lambda tile: 1,
  'b-1': lambda tile: tile - 1,
  'b': lambda tile: tile,
  'b+1': lambda tile: tile + 1,
  'full': lambda tile: TILES * tile,
}
# (D, F, tokens) of SmolLM2; its heads together are as wide as D.
SHAPES = {'135m': (576, 1536, 512), '1.7b': (2048, 8192, 8192)}


def full(form) -> dict[str, int]:
  """Sizes of two tiles along each axis."""
  return {x: TILES * tile for x, tile in BLOCKS[form].tile().items()}


def rounded(form, extents) -> dict[str, int]:
  tile = BLOCKS[form].tile()
  return {x: -(-extents[x] // tile[x]) * tile[x] for x in extents}


def make(form, extents, dtype=jnp.bfloat16, seed=0):
  """Arrays of `full` sizes as the contract has them: NaN where not read.

  Between the extent of k and the end of its tile a is zero, b is not.
  """
  rng = np.random.default_rng(seed)
  arrays = []
  for axes in forms.AXES[form]:
    array = rng.standard_normal([full(form)[x] for x in axes])
    for axis, x in enumerate(axes):
      along = np.moveaxis(array, axis, 0)
      if x == 'k' and not arrays:
        along[extents[x] :] = 0
      along[rounded(form, extents)[x] :] = np.nan
    arrays.append(jnp.asarray(array, dtype))
  return arrays


def traced(extents) -> dict[str, jax.Array]:
  return {x: jnp.int32(extent) for x, extent in extents.items()}


def cut(array, axes, to):
  return array[tuple(slice(to[x]) for x in axes)]


@functools.cache
def simulator(form, dtype=jnp.float32):
  """The product as a function of a, b and the extents; and its traces."""
  traces = []

  @jax.jit
  def run(a, b, extents):
    traces.append(1)
    return pallas_hopper.product(
      a,
      b,
      form,
      forms.Extents(**extents),
      dtype,
      BLOCKS[form],
      interpret=plgpu.InterpretGPUParams(detect_races=True),
    )

  return run, traces


def check(run, form, extents, dtype=jnp.bfloat16, rtol=1e-5):
  """Asserts the contract: the value within the extents, whatever is beyond."""
  a, b = make(form, extents, dtype)
  c = run(a, b, traced(extents))
  live = [
    cut(np.asarray(array, np.float64), axes, extents)
    for array, axes in zip((a, b), forms.AXES[form], strict=True)
  ]
  left, right = forms.AXES[form]
  expected = np.einsum(f'{left},{right}->mn', *live)
  assert c.shape == (full(form)['m'], full(form)['n'])
  np.testing.assert_allclose(
    cut(np.asarray(c, np.float64), 'mn', extents),
    expected,
    rtol=rtol,
    atol=rtol * np.sqrt(full(form)['k']),
  )


@conftest.simulated
@pytest.mark.parametrize('extent', EXTENTS)
@pytest.mark.parametrize(('form', 'axis'), MASKED)
def test_within_any_extent_the_value_is_right(form, axis, extent):
  tile = BLOCKS[form].tile()[axis]
  check(simulator(form)[0], form, full(form) | {axis: EXTENTS[extent](tile)})


@conftest.simulated
def test_a_tile_of_more_chunks_than_staging_buffers():
  """The default of the 1.7B model, to the bit: sums of integers are exact.

  Each warpgroup stores two rows and two columns of chunks from two buffers.
  """
  form, sizes = 'nn', dict(m=512, n=256, k=320)
  blocks = pallas_hopper.Blocks(256, 128, 64, stages=4)
  assert blocks in [
    pallas_hopper.default_blocks(form, **layer, dtype=jnp.bfloat16)
    for layer in linear_layers(form, '1.7b')
  ]
  rng = np.random.default_rng(0)
  left, right = forms.AXES[form]
  a, b = (
    rng.integers(-4, 5, [sizes[x] for x in axes]).astype(np.float64)
    for axes in (left, right)
  )
  c = pallas_hopper.product(
    jnp.asarray(a, jnp.bfloat16),
    jnp.asarray(b, jnp.bfloat16),
    form,
    forms.Extents(**sizes),
    jnp.bfloat16,
    blocks,
    interpret=plgpu.InterpretGPUParams(detect_races=True),
  )
  want = np.einsum(f'{left},{right}->mn', a, b)
  np.testing.assert_array_equal(c, want.astype(jnp.bfloat16))


@conftest.simulated
@pytest.mark.parametrize('axis', 'mn')
def test_no_zeros_are_promised_that_nobody_writes(axis):
  zeros = [jnp.zeros(x.shape, x.dtype) for x in struct('tn', full('tn'))]
  extents = full('tn') | {axis: BLOCKS['tn'].tile()[axis]}
  c = simulator('tn')[0](*zeros, traced(extents))
  filled = not np.any(c)
  assert filled == pallas_hopper.ZERO_BEYOND_EXTENTS


@conftest.simulated
@pytest.mark.parametrize('form', forms.FORMS)
def test_two_axes_may_be_masked_at_once(form):
  tile = BLOCKS[form].tile()
  axes = [axis for other, axis in MASKED if other == form]
  check(simulator(form)[0], form, full(form) | {x: tile[x] - 3 for x in axes})


@conftest.simulated
@pytest.mark.parametrize('form', forms.FORMS)
def test_one_trace_serves_all_extents(form):
  run, traces = simulator(form)
  # The first run of the simulator, where no test ran it before, changes what
  # jax keys its caches by.
  for _ in range(2):
    check(run, form, full(form))
  before = len(traces)
  for extent in 0, 1, 70:
    check(run, form, full(form) | {'n': extent})
  assert len(traces) == before


@conftest.simulated
def test_float16_and_a_result_of_the_dtype_of_the_operands():
  check(
    simulator('nn', jnp.float16)[0],
    'nn',
    full('nn') | {'k': 65},
    jnp.float16,
    rtol=2e-3,
  )


@conftest.simulated
@pytest.mark.parametrize('form', forms.FORMS)
def test_an_extent_is_as_good_as_a_slice(form):
  run, _ = simulator(form)
  extents = {x: tile - 1 for x, tile in BLOCKS[form].tile().items()}
  a, b = make(form, extents)
  masked = run(a, b, traced(extents))
  left, right = forms.AXES[form]
  to = rounded(form, extents)
  sliced = run(cut(a, left, to), cut(b, right, to), traced(to))
  np.testing.assert_array_equal(cut(masked, 'mn', to), sliced)


@conftest.simulated
def test_each_layer_of_a_scan_has_its_own_extent():
  form = 'nn'
  run, _ = simulator(form)
  widths = 0, 100, 65
  layers = [make(form, full(form) | {'n': n}, seed=n) for n in widths]

  @jax.jit
  def scan(a_s, b_s, ns):
    def layer(carry, x):
      a, b, n = x
      return carry, run(a, b, full(form) | {'n': n})

    return lax.scan(layer, None, (a_s, b_s, ns))[1]

  a_s, b_s = (jnp.stack(arrays) for arrays in zip(*layers, strict=True))
  c_s = scan(a_s, b_s, jnp.asarray(widths, jnp.int32))
  for n, (a, b), c in zip(widths, layers, c_s, strict=True):
    alone = run(a, b, traced(full(form) | {'n': n}))
    np.testing.assert_array_equal(c[:, :n], alone[:, :n])
    assert not np.isnan(c[:, :n]).any()


@conftest.simulated
@pytest.mark.parametrize(
  ('wrong', 'axis'),
  [
    (lambda extent, tile: extent + tile, 'k'),  # Reads on, into the poison.
    (lambda extent, tile: extent - tile, 'k'),  # Forgets the last tile.
    (lambda extent, tile: extent - tile, 'n'),
  ],
  ids=['poison', 'short of k', 'short of n'],
)
@pytest.mark.parametrize('form', forms.FORMS)
def test_the_check_catches_a_wrong_extent(form, wrong, axis):
  run, _ = simulator(form)
  tile = BLOCKS[form].tile()[axis]

  def broken(a, b, extents):
    return run(a, b, extents | {axis: wrong(extents[axis], tile)})

  extents = full(form) | {axis: tile}
  check(run, form, extents)
  with pytest.raises(AssertionError):
    check(broken, form, extents)


@conftest.simulated
@pytest.mark.parametrize('forgotten', ['barrier_wait', 'wait_smem_to_gmem'])
def test_the_simulator_catches_a_race(monkeypatch, forgotten):
  from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks

  # Not the cached one: what is traced here must not stay.
  run, _ = simulator.__wrapped__('nn')
  monkeypatch.setattr(plgpu, forgotten, lambda *args, **kwargs: None)
  try:
    with pytest.raises(jax.errors.JaxRuntimeError, match='race'):
      check(run, 'nn', full('nn'))
  finally:
    # There is no public way back from an error inside the simulator.
    gpu_callbacks.reset_gpu_interpret_mode_state()


def struct(form, sizes, dtype=jnp.bfloat16):
  return [
    jax.ShapeDtypeStruct([sizes[x] for x in axes], dtype)
    for axes in forms.AXES[form]
  ]


def linear_layers(form, shape):
  """m, n, k of the products in attention and in both halves of the ffn."""
  d, f, tokens = SHAPES[shape]
  for width_in, width_out in (d, d), (d, f), (f, d):
    yield {
      'nn': dict(m=tokens, n=width_out, k=width_in),
      'nt': dict(m=tokens, n=width_in, k=width_out),
      'tn': dict(m=width_in, n=width_out, k=tokens),
    }[form]


def lowered(function, *args) -> str:
  lowering = jax.jit(function).trace(*args)
  return lowering.lower(lowering_platforms=('cuda',)).as_text()


@pytest.mark.parametrize('shape', SHAPES)
@pytest.mark.parametrize('form', forms.FORMS)
def test_every_product_of_the_models_lowers_for_cuda(form, shape):
  # The gradient of a weight is float32.
  dtype = jnp.float32 if form == 'tn' else jnp.bfloat16

  def run(a, b, extent):
    extents = forms.Extents(extent, extent, extent)
    return pallas_hopper.product(a, b, form, extents, dtype)

  extent = jax.ShapeDtypeStruct((), jnp.int32)
  for sizes in linear_layers(form, shape):
    text = lowered(run, *struct(form, sizes), extent)
    assert text.count('custom_call @mosaic_gpu') == 1, sizes


def test_lowers_for_cuda_in_a_scan_under_shard_map():
  sizes = dict(m=256, n=128, k=64)

  def scan(a, b, ns):
    def layer(carry, n):
      extents = forms.Extents(a.shape[0], n, sizes['k'])
      return carry, pallas_hopper.product(a, b, 'nn', extents, jnp.bfloat16)

    return lax.scan(layer, None, ns)[1]

  mesh = jax.sharding.AbstractMesh(
    (2,), ('data',), axis_types=(jax.sharding.AxisType.Auto,)
  )
  P = jax.sharding.PartitionSpec
  run = jax.shard_map(
    scan, mesh=mesh, in_specs=(P('data'), P(), P()),
    out_specs=P(None, 'data'), check_vma=False,
  )  # fmt: skip
  text = lowered(
    run, *struct('nn', sizes), jax.ShapeDtypeStruct((3,), jnp.int32)
  )
  [call] = [x for x in text.splitlines() if 'custom_call @mosaic_gpu' in x]
  # Half of the rows: nobody gathers them for a device to multiply.
  types = 'tensor<128x64xbf16>, tensor<64x128xbf16>) -> tensor<128x128xbf16>'
  assert call.endswith(types)


@pytest.mark.parametrize('shape', SHAPES)
@pytest.mark.parametrize('form', forms.FORMS)
def test_candidates_and_defaults_divide_and_fit(form, shape):
  for sizes in linear_layers(form, shape):
    choice = pallas_hopper.candidates(form, **sizes, dtype=jnp.bfloat16)
    for blocks in choice:
      assert all(sizes[x] % tile == 0 for x, tile in blocks.tile().items())
      assert blocks.shared_bytes() <= 227 * 1024
    default = pallas_hopper.default_blocks(form, **sizes, dtype=jnp.bfloat16)
    assert default in choice


GOOD = dict(m=128, n=128, k=128)
BAD = {
  'float32': (GOOD, jnp.float32, jnp.float32, None, 'bucket'),
  'result': (GOOD, jnp.bfloat16, jnp.float16, None, 'bucket'),
  'rows': (GOOD | {'n': 72}, jnp.bfloat16, jnp.bfloat16, None, 'bucket'),
  'empty': (GOOD | {'k': 0}, jnp.bfloat16, jnp.bfloat16, None, 'bucket'),
  'divide': (GOOD, jnp.bfloat16, jnp.bfloat16, (192, 64), 'divides m = 128'),
  'deep': (GOOD, jnp.bfloat16, jnp.bfloat16, (64, 64, 64, 16), 'shared memory'),
  'shallow': (GOOD, jnp.bfloat16, jnp.bfloat16, (64, 64, 64, 1), 'stages 1'),
  'wide': (
    GOOD | {'m': 256, 'n': 256}, jnp.bfloat16, jnp.bfloat16, (256, 256),
    'accumulators',
  ),
}  # fmt: skip


@pytest.mark.parametrize('case', BAD)
def test_what_it_cannot_take_is_one_line_with_a_remedy(case):
  sizes, dtype, result, blocks, words = BAD[case]
  if blocks:
    blocks = pallas_hopper.Blocks(*blocks)
  run = functools.partial(
    pallas_hopper.product,
    form='nn', extents=forms.Extents(**sizes), dtype=result, blocks=blocks,
  )  # fmt: skip
  with pytest.raises(ValueError, match=words) as caught:
    jax.eval_shape(run, *struct('nn', sizes, dtype))
  assert '\n' not in str(caught.value)
  assert '; ' in str(caught.value)


# What jax 0.12 and ptxas print of one kernel; jax 0.10.2 has no first line.
RESOURCES = (
  'Resources(smem_scratch_bytes=147456, tmem_scratch_cols=0, '
  'barrier_counts=Counter({Barrier(arrival_count=1, num_barriers=8, '
  'orders_tensor_core=False): 1, Barrier(arrival_count=2, num_barriers=8, '
  'orders_tensor_core=False): 1}), scoped_gmem_semaphores={})\n'
)
PTXAS = """\
ptxas warning : Registers are spilled, 8 bytes spill stores, 4 bytes spill loads
ptxas info    : (C7519) warpgroup.arrive is injected in around line 756
    0 bytes stack frame, 8 bytes spill stores, 4 bytes spill loads
ptxas info    : Used 232 registers, used 16 barriers, 1 bytes smem
"""


@pytest.mark.parametrize(
  ('log', 'shared'),
  [(RESOURCES + PTXAS, 147456 + 8 * 16 + 1), (PTXAS, 149504)],
)
def test_what_a_compiler_prints_with_and_without_shared_memory(log, shared):
  compiled = aot_hopper.parse(log, 149504)
  assert compiled == aot_hopper.Compiled(
    registers=232,
    spilled_bytes=12,
    shared_bytes=shared,
    remarks=frozenset(
      ['(C7519) warpgroup.arrive is injected in around line 756']
    ),
  )
  assert compiled.faults() == ['spills 12 bytes']


def test_of_several_kernels_the_most_and_all_that_is_spilled():
  second = RESOURCES.replace('147456', '1024') + PTXAS.replace('232', '168')
  compiled = aot_hopper.parse(second + RESOURCES + PTXAS)
  assert compiled.registers == 232
  assert compiled.spilled_bytes == 24
  assert compiled.shared_bytes == 147456 + 8 * 16 + 1
  with pytest.raises(ValueError, match='no shared memory in the log'):
    aot_hopper.parse(PTXAS)


def test_without_a_size_the_reckoned_shared_memory_is_judged():
  _, takes = aot_hopper.parse(PTXAS, 227 * 1024 + 1).faults()
  assert 'takes 232449 bytes of shared memory of 232448' in takes
  with pytest.raises(ValueError, match='no registers, stores, loads, static'):
    aot_hopper.parse(RESOURCES, 0)
