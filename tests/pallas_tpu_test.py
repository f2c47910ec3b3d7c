"""The TPU kernel: run by Pallas' interpreters, lowered for a TPU.

Operands are small integers, so that a float32 sum is exact in any order and
results are compared to the bit; a sum in bfloat16 would be off.
"""

import dataclasses
import itertools

import jax
from jax.experimental.pallas import tpu as pltpu
import jax.numpy as jnp
import numpy as np
import pytest

from effllm_jax.kernels import forms
from effllm_jax.kernels import pallas_tpu

B = 128
BLOCKS = pallas_tpu.Blocks(m=B, n=B, k=B)
WHOLE = {'m': 2 * B, 'n': 3 * B, 'k': 3 * B}
# No block divides them: 64, 72 and 88 are left over.
RAGGED = {'m': 2 * B + 64, 'n': B + 72, 'k': 2 * B + 88}
# SmolLM2-135M and -1.7B: tokens, and every linear layer's (in, out).
LAYERS = [
  (512, 576, 576),
  (512, 576, 1536),
  (512, 1536, 576),
  (8192, 2048, 2048),
  (8192, 2048, 8192),
  (8192, 8192, 2048),
]
EACH_FORM = pytest.mark.parametrize('form', forms.FORMS)
EACH_DTYPE = pytest.mark.parametrize('dtype', ['bfloat16', 'float32'])


def up(extent):
  return -(-extent // B) * B


def operands(form, size, extent, dtype, seed=0):
  """Two arrays that keep the contract, and no more than that.

  a is 0 from the extent of k on, b is not; beyond the last block that an extent
  reaches into, every axis of both is NaN.
  """
  rng = np.random.default_rng(seed)
  arrays = []
  for letters in forms.AXES[form]:
    x = rng.integers(-4, 5, [size[i] for i in letters]).astype('float32')
    if not arrays:
      np.moveaxis(x, letters.index('k'), 0)[extent['k'] :] = 0
    for axis, i in enumerate(letters):
      np.moveaxis(x, axis, 0)[up(extent[i]) :] = np.nan
    arrays.append(jnp.asarray(x, dtype))
  return arrays


def cut(x, letters, extent):
  # By numpy: jax would compile a slice for every extent.
  return np.asarray(x)[tuple(slice(extent[i]) for i in letters)]


def expected(a, b, form, extent, dtype):
  """In float64 within the extents; only the result is rounded to `dtype`."""
  a, b = (
    cut(x, letters, extent).astype('float64')
    for x, letters in zip((a, b), forms.AXES[form], strict=True)
  )
  subscripts = {'nn': 'mk,kn', 'nt': 'mk,nk', 'tn': 'km,kn'}[form]
  return np.einsum(f'{subscripts}->mn', a, b).astype(jnp.dtype(dtype))


def out_dtype(form, dtype):
  # As in a linear layer: dw is float32 whatever x and dy are.
  return 'float32' if form == 'tn' else dtype


def compiled(form, dtype, interpret=True, traces=None):
  """(a, b, {'m': ..}) -> c; every extent is traced."""

  @jax.jit
  def fn(a, b, m, n, k):
    if traces is not None:
      traces.append(form)
    return pallas_tpu.product(
      a, b, form, forms.Extents(m, n, k), dtype, BLOCKS, interpret
    )

  return lambda a, b, extent: fn(a, b, *(extent[i] for i in 'mnk'))


def check(form, size, extent, dtype, product):
  a, b = operands(form, size, extent, dtype)
  c = product(a, b, extent)
  assert c.shape == (size['m'], size['n'])
  assert c.dtype == out_dtype(form, dtype)
  np.testing.assert_array_equal(
    cut(c, 'mn', extent), expected(a, b, form, extent, c.dtype), f'{extent}'
  )


@pytest.mark.parametrize('size', [WHOLE, RAGGED], ids=['whole', 'ragged'])
@EACH_DTYPE
@EACH_FORM
def test_right_within_the_extents_in_one_trace(form, dtype, size):
  traces = []
  product = compiled(form, out_dtype(form, dtype), traces=traces)
  one_masked = [
    {**size, i: e} for i in 'mnk' for e in (0, 1, B - 1, B, B + 1, size[i])
  ]
  two_masked = [
    {**size, i: 1, j: B + 1} for i, j in itertools.permutations('mnk', 2)
  ]
  for extent in one_masked + two_masked:
    check(form, size, extent, dtype, product)
  assert traces == [form]


@EACH_DTYPE
@EACH_FORM
def test_right_on_memory_that_starts_as_nan(form, dtype):
  """Blocks are copied as on a TPU, to buffers that are NaN before."""
  size = {'m': 2 * B, 'n': B, 'k': 2 * B}
  product = compiled(form, out_dtype(form, dtype), pltpu.InterpretParams())
  for i, e in (('m', B), ('k', 0), ('k', 1), ('k', B + 1), ('n', 0)):
    check(form, size, {**size, i: e}, dtype, product)


@pytest.mark.parametrize('axis', 'mn')
def test_no_zeros_are_promised_that_nobody_writes(axis):
  """A block beyond the extents keeps the NaN that its memory starts with."""
  zeros = [jnp.zeros(x.shape, x.dtype) for x in shapes('tn', WHOLE, 'float32')]
  c = compiled('tn', 'float32')(*zeros, {**WHOLE, axis: B})
  filled = not np.any(c)
  assert filled == pallas_tpu.ZERO_BEYOND_EXTENTS


@EACH_FORM
@pytest.mark.parametrize(
  ('masked', 'shared'), [('m', 0), ('n', 1), ('k', 2), ('', 2)]
)
def test_cores_share_what_is_not_masked(form, masked, shared, monkeypatch):
  """In any order of the shared blocks, on memory that starts as NaN."""
  said, params = [], pltpu.CompilerParams
  monkeypatch.setattr(
    pltpu, 'CompilerParams', lambda **kw: said.append(kw) or params(**kw)
  )
  size = {'m': 2 * B, 'n': 3 * B, 'k': 2 * B}
  extent = size | ({masked: B + 1} if masked else {})
  a, b = operands(form, size, extent, 'float32')

  @jax.jit
  def product(a, b, traced):
    extents = forms.Extents(**size | ({masked: traced} if masked else {}))
    how = pltpu.InterpretParams(random_seed=3)
    return pallas_tpu.product(a, b, form, extents, 'float32', BLOCKS, how)

  c = product(a, b, extent.get(masked, 0))
  np.testing.assert_array_equal(
    cut(c, 'mn', extent), expected(a, b, form, extent, c.dtype)
  )
  semantics = said[0]['dimension_semantics']
  assert semantics == ('parallel',) * shared + ('arbitrary',) * (3 - shared)


@EACH_FORM
def test_whole_axes_and_extents_that_are_ints(form):
  """Blocks longer than an axis are the axis, whatever its size."""
  size = {'m': 9, 'n': 200, 'k': 77}
  a, b = operands(form, size, size, 'float32')
  for extents in (forms.Extents(**size), forms.Extents(9, 200, np.int32(77))):
    for blocks in (None, pallas_tpu.Blocks(512, 512, 512)):
      c = pallas_tpu.product(a, b, form, extents, 'float32', blocks, True)
      np.testing.assert_array_equal(c, expected(a, b, form, size, c.dtype))


@EACH_FORM
def test_same_bits_as_arrays_cut_to_whole_blocks(form):
  """What a shrink does: shorter arrays, nothing masked."""
  extent = {'m': B + 3, 'n': B, 'k': 2 * B - 1}
  short = {i: up(e) for i, e in extent.items()}
  left, right = forms.AXES[form]
  rng = np.random.default_rng(0)
  a, b = (
    rng.normal(size=[RAGGED[i] for i in letters]).astype('float32')
    for letters in (left, right)
  )
  np.moveaxis(a, left.index('k'), 0)[extent['k'] :] = 0
  product = compiled(form, 'float32')
  np.testing.assert_array_equal(
    cut(product(a, b, extent), 'mn', extent),
    cut(
      product(cut(a, left, short), cut(b, right, short), short), 'mn', extent
    ),
  )


@EACH_DTYPE
def test_one_scan_over_layers_of_many_widths(dtype):
  """Each layer has its own extent of n and of k, as in the ragged policy."""
  layers = [
    {**WHOLE, 'n': n, 'k': k}
    for n, k in ((WHOLE['n'], B + 1), (B - 1, WHOLE['k']), (1, 0), (B, B))
  ]
  pairs = [
    operands('nn', WHOLE, extent, dtype, seed)
    for seed, extent in enumerate(layers)
  ]
  a, b = (jnp.stack(x) for x in zip(*pairs, strict=True))
  extents = {i: jnp.asarray([e[i] for e in layers]) for i in 'nk'}
  traces = []

  @jax.jit
  def run(a, b, n, k):
    def layer(_, xs):
      traces.append(None)
      a, b, n, k = xs
      extents = forms.Extents(WHOLE['m'], n, k)
      return None, pallas_tpu.product(
        a, b, 'nn', extents, dtype, BLOCKS, interpret=True
      )

    return jax.lax.scan(layer, None, (a, b, n, k))[1]

  for got, pair, extent in zip(
    run(a, b, **extents), pairs, layers, strict=True
  ):
    np.testing.assert_array_equal(
      cut(got, 'mn', extent), expected(*pair, 'nn', extent, dtype)
    )
  assert len(traces) == 1


def test_under_shard_map():
  mesh = jax.sharding.Mesh(jax.devices()[:1], ('data',))
  spec = jax.sharding.PartitionSpec
  a, b = operands('nn', WHOLE, WHOLE, 'float32')

  def local(a, b, k):
    extents = forms.Extents(a.shape[0], b.shape[1], k)
    return pallas_tpu.product(a, b, 'nn', extents, 'float32', BLOCKS, True)

  fn = jax.jit(
    jax.shard_map(
      local,
      mesh=mesh,
      in_specs=(spec('data'), spec(), spec()),
      out_specs=spec('data'),
      check_vma=False,
    )
  )
  np.testing.assert_array_equal(
    fn(a, b, WHOLE['k']), expected(a, b, 'nn', WHOLE, 'float32')
  )


def shapes(form, size, dtype):
  return [
    jax.ShapeDtypeStruct([size[i] for i in letters], dtype)
    for letters in forms.AXES[form]
  ]


def lower(form, layer, dtype):
  """For a TPU, with the default blocks; as text."""
  tokens, width_in, width_out = layer
  m, n, k = {
    'nn': (tokens, width_out, width_in),
    'nt': (tokens, width_in, width_out),
    'tn': (width_in, width_out, tokens),
  }[form]
  size = {'m': m, 'n': n, 'k': k}
  a, b = shapes(form, size, dtype)
  extent = jax.ShapeDtypeStruct((), jnp.int32)
  fn = jax.jit(
    lambda a, b, m, n, k: pallas_tpu.product(
      a, b, form, forms.Extents(m, n, k), out_dtype(form, dtype)
    )
  )
  traced = fn.trace(a, b, extent, extent, extent)
  return traced.lower(lowering_platforms=('tpu',)).as_text()


@pytest.mark.parametrize('layer', LAYERS, ids=lambda layer: f'{layer}')
@EACH_DTYPE
@EACH_FORM
def test_lowers_for_a_tpu(form, dtype, layer):
  assert 'tpu_custom_call' in lower(form, layer, dtype)


def test_highest_precision_reaches_the_kernel():
  with jax.default_matmul_precision('highest'):
    highest = lower('nn', LAYERS[0], 'float32')
  assert highest != lower('nn', LAYERS[0], 'float32')


@pytest.mark.parametrize(
  'size', [LAYERS[1], LAYERS[4], (1000, 1280, 1100), (1, 1, 1)]
)
@EACH_DTYPE
@EACH_FORM
def test_candidates_are_usable(form, dtype, size):
  """Whole tiles, different, in VMEM; the first is the default."""
  m, n, k = size
  found = pallas_tpu.candidates(form, m, n, k, dtype)
  assert found[0] == pallas_tpu.default_blocks(form, m, n, k, dtype)
  assert len(set(found)) == len(found) <= 6
  a, b = shapes(form, {'m': m, 'n': n, 'k': k}, dtype)
  for blocks in found:
    jax.eval_shape(
      lambda a, b, blocks=blocks: pallas_tpu.product(
        a, b, form, forms.Extents(m, n, k), 'float32', blocks
      ),
      a,
      b,
    )
    i, j, l = dataclasses.astuple(blocks)
    # a and b twice; c, in float32, twice, and its sum.
    held = 2 * (i + j) * l * jnp.dtype(dtype).itemsize + 3 * i * j * 4
    assert held <= 32 * 2**20


def test_an_operand_of_another_dtype():
  (a, _), (_, b) = (shapes('nn', WHOLE, x) for x in ('float32', 'bfloat16'))
  with pytest.raises(ValueError, match='a and b must have one dtype'):
    pallas_tpu.product(a, b, 'nn', forms.Extents(**WHOLE), 'float32')


@pytest.mark.parametrize(
  ('form', 'size', 'blocks'),
  [
    ('nn', (8192, 8192, 2048), (2048, 512, 512)),
    ('nt', (8192, 2048, 8192), (2048, 512, 512)),
    ('tn', (2048, 8192, 8192), (512, 1024, 1024)),
    # An axis of up to 1.5 blocks is left whole; 1536 is three, or two.
    ('nn', (512, 1536, 576), (512, 512, 576)),
    ('tn', (576, 1536, 512), (576, 768, 512)),
  ],
)
def test_default_blocks(form, size, blocks):
  got = pallas_tpu.default_blocks(form, *size, 'bfloat16')
  assert dataclasses.astuple(got) == blocks


@pytest.mark.parametrize(
  ('form', 'dtype', 'blocks', 'message'),
  [
    (
      'nn',
      'float32',
      (B, B, 100),
      'block k=100 of float32[256,384] is neither a multiple of 128 nor the '
      'whole 384',
    ),
    ('tn', 'bfloat16', (B, B, 8), r'block k=8 of bfloat16[384,256] .* of 16'),
    ('nt', 'float32', (B, 8, B), 'block n=8 of float32[256,384] .* of 128'),
    ('nn', 'float32', (0, B, B), 'block m=0 of float32[256,384] .* of 8'),
    ('nn', 'float16', (B, B, B), 'one of bfloat16, float32'),
    ('xx', 'float32', (B, B, B), "form 'xx' is not one of nn, nt, tn"),
  ],
)
def test_mistakes_end_in_one_line(form, dtype, blocks, message):
  a, b = shapes(form if form in forms.FORMS else 'nn', WHOLE, dtype)
  with pytest.raises(ValueError) as error:
    jax.eval_shape(
      lambda a, b: pallas_tpu.product(
        a,
        b,
        form,
        forms.Extents(**WHOLE),
        'float32',
        pallas_tpu.Blocks(*blocks),
        interpret=True,
      ),
      a,
      b,
    )
  text = str(error.value)
  assert '\n' not in text
  for part in message.split(' .* '):
    assert part in text
  with pytest.raises(ValueError, match="form 'xx' is not one of nn, nt, tn"):
    pallas_tpu.candidates('xx', 1, 1, 1, 'float32')


class TestTheseTestsCanFail:
  """What the tests above must notice, they do notice."""

  @pytest.mark.parametrize('axis', 'mnk')
  def test_an_extent_one_block_too_small(self, axis):
    product = compiled('nn', 'float32')
    short = lambda a, b, extent: product(
      a, b, {**extent, axis: extent[axis] - B}
    )
    with pytest.raises(AssertionError):
      check('nn', WHOLE, WHOLE, 'float32', short)

  @pytest.mark.parametrize('axis', 'mnk')
  def test_an_extent_one_block_too_large(self, axis):
    """Nothing may be read there: the poison is in what is computed."""
    product = compiled('nn', 'float32')
    extent = {**WHOLE, axis: B}
    a, b = operands('nn', WHOLE, extent, 'float32')
    large = product(a, b, {**extent, axis: B + 1})
    assert np.isnan(large).any()

  def test_a_last_block_of_k_that_is_not_masked(self, monkeypatch):
    kernel = pallas_tpu._kernel
    monkeypatch.setattr(
      pallas_tpu,
      '_kernel',
      lambda *refs, k_axes, k: kernel(*refs, k_axes=k_axes, k=up(k)),
    )
    with pytest.raises(AssertionError):
      check('nn', RAGGED, RAGGED, 'float32', compiled('nn', 'float32'))

  def test_a_sum_in_bfloat16(self):
    a, b = operands('nn', WHOLE, WHOLE, 'bfloat16')
    rough = sum(a[:, i : i + B] @ b[i : i + B] for i in range(0, WHOLE['k'], B))
    assert (rough != expected(a, b, 'nn', WHOLE, 'bfloat16')).any()
