"""The contract of `kernels/forms.py`, for what runs on every platform."""

import functools
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effllm_jax.kernels import bucket
from effllm_jax.kernels import forms
from effllm_jax.kernels import matmul
from effllm_jax.kernels import xla
from effllm_jax.kernels import xla_loop

SIZES = {'m': 24, 'n': 40, 'k': 32}
STEP = 8
BLOCKS = {
  'xla': None,
  'xla_loop': xla_loop.Blocks(STEP, STEP, STEP),
  'bucket': bucket.Blocks(STEP, STEP, STEP),
}
# Which axes a layer masks: its outputs, its inputs, or both.
MASKED = {
  'nn': ('n', 'k', 'nk'),
  'nt': ('k', 'n', 'nk'),
  'tn': ('n', 'm', 'mn'),
}
CASES = [(f, axes) for f in forms.FORMS for axes in MASKED[f]]


def operands(form, dtype=np.float32, seed=0):
  rng = np.random.default_rng(seed)
  left, right = forms.AXES[form]
  return (
    rng.standard_normal([SIZES[x] for x in left]).astype(dtype),
    rng.standard_normal([SIZES[x] for x in right]).astype(dtype),
  )


def beyond(x, letters, limits, value):
  """x with `value` wherever one of its axes is beyond its limit."""
  x = np.array(x)
  for axis, letter in enumerate(letters):
    index = [slice(None)] * 2
    index[axis] = slice(limits[letter], None)
    x[tuple(index)] = value
  return x


def rounded(extents, name):
  if name == 'xla':
    return SIZES
  return {x: min(-(-e // STEP) * STEP, SIZES[x]) for x, e in extents.items()}


def product(name, form, dtype=jnp.float32):
  """The jitted product, of a dict of extents; and how often it was traced."""
  module = forms.module(name)
  traces = []

  @jax.jit
  def run(a, b, extents):
    traces.append(1)
    return module.product(
      a, b, form, forms.Extents(**(SIZES | extents)), dtype, BLOCKS[name]
    )

  return run, traces


def values(size):
  return sorted({0, 1, STEP - 1, STEP, STEP + 1, size})


@pytest.mark.parametrize(('form', 'axes'), CASES)
@pytest.mark.parametrize('name', BLOCKS)
def test_every_extent(name, form, axes):
  """Value within the extents, NaN beyond the blocks, one trace for all."""
  run, traces = product(name, form)
  left, right = forms.AXES[form]
  a, b = operands(form)
  for chosen in itertools.product(*(values(SIZES[x]) for x in axes)):
    extents = SIZES | dict(zip(axes, chosen, strict=True))
    limits = rounded(extents, name)
    # Of k, one side is zero beyond its extent: the caller masks activations.
    x = beyond(a, left, {'m': 99, 'k': extents['k']}, 0)
    want = np.einsum(
      f'{left},{right}->mn', x.astype(np.float64), b.astype(np.float64)
    )
    x, y = beyond(x, left, limits, np.nan), beyond(b, right, limits, np.nan)
    c = np.asarray(run(x, y, {z: jnp.int32(extents[z]) for z in axes}))
    inside = np.s_[: extents['m'], : extents['n']]
    np.testing.assert_allclose(c[inside], want[inside], rtol=1e-4, atol=1e-5)
  assert len(traces) == 1


@pytest.mark.parametrize('name', BLOCKS)
def test_an_extent_that_is_too_small_is_noticed(name):
  """The test above can fail: one block short is another result."""
  if name == 'xla':
    pytest.skip('reads everything')
  run, _ = product(name, 'nn')
  a, b = operands('nn')
  c = run(a, b, {'k': jnp.int32(SIZES['k'] - STEP)})
  assert np.abs(c - a @ b).max() > 0.1


@pytest.mark.parametrize(('form', 'axes'), CASES)
@pytest.mark.parametrize('name', BLOCKS)
def test_accumulates_in_float32(name, form, axes):
  """bfloat16 operands, whose sums bfloat16 would round away."""
  run, _ = product(name, form, jnp.float32)
  a, b = (jnp.asarray(x, jnp.bfloat16) for x in operands(form))
  c = run(a, b, {x: jnp.int32(SIZES[x]) for x in axes})
  assert c.dtype == jnp.float32
  left, right = forms.AXES[form]
  want = np.einsum(
    f'{left},{right}->mn', np.asarray(a, np.float64), np.asarray(b, np.float64)
  )
  np.testing.assert_allclose(c, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('axis', 'mn')
@pytest.mark.parametrize('name', BLOCKS)
def test_zeros_beyond_the_extents_are_as_promised(name, axis):
  """Also in the rest of a block, where one of the operands is zero."""
  module = forms.module(name)
  run, _ = product(name, 'tn')
  for extent in (0, STEP + 1):
    a, b = (
      beyond(x, letters, SIZES | {axis: extent}, 0)
      for x, letters in zip(operands('tn'), forms.AXES['tn'], strict=True)
    )
    c = run(a, b, {axis: jnp.int32(extent)})
    dead = np.take(c, range(extent, SIZES[axis]), 'mn'.index(axis))
    filled = not np.any(dead)
    assert filled == module.ZERO_BEYOND_EXTENTS


@pytest.mark.parametrize('form', forms.FORMS)
@pytest.mark.parametrize('name', BLOCKS)
def test_only_the_result_is_rounded(name, form):
  """To the bit in bfloat16, though k is four chunks: float32 holds the sums."""
  run, _ = product(name, form, jnp.bfloat16)
  rng = np.random.default_rng(0)
  a, b = (
    # Integers that bfloat16 holds; it does not hold the sum of two products.
    jnp.asarray(rng.integers(-128, 129, [SIZES[x] for x in axes]), jnp.bfloat16)
    for axes in forms.AXES[form]
  )
  c = run(a, b, {'k': jnp.int32(SIZES['k'])})
  assert c.dtype == jnp.bfloat16
  left, right = forms.AXES[form]
  want = np.einsum(
    f'{left},{right}->mn', np.asarray(a, np.float64), np.asarray(b, np.float64)
  )
  np.testing.assert_array_equal(c, want.astype(jnp.bfloat16))


@pytest.mark.parametrize('form', forms.FORMS)
def test_a_long_sum_of_bfloat16_is_rounded_once(form):
  """Not as it goes: next to no entry is off what float64 rounds to."""
  rng = np.random.default_rng(0)
  sizes = {'m': 64, 'n': 96, 'k': 8192}
  a, b = (
    jnp.asarray(rng.standard_normal([sizes[x] for x in axes]), jnp.bfloat16)
    for axes in forms.AXES[form]
  )
  c = forms.dense(a, b, form, jnp.bfloat16)
  assert c.dtype == jnp.bfloat16
  left, right = forms.AXES[form]
  want = np.einsum(
    f'{left},{right}->mn',
    *(np.asarray(x, np.float64) for x in (a, b)),
    optimize=True,
  )
  # A few are so near the middle of two that the order of sums decides.
  off = np.asarray(c) != want.astype(jnp.bfloat16)
  assert off.mean() < 0.005


@pytest.mark.parametrize(
  ('operands', 'result', 'asked'),
  [
    ('float32', 'float32', 'float32'),
    ('float32', 'bfloat16', 'float32'),
    ('float16', 'float16', 'float32'),
    ('bfloat16', 'float32', 'float32'),
    ('bfloat16', 'bfloat16', 'bfloat16'),
  ],
)
def test_only_bfloat16_of_bfloat16_is_asked_for_as_it_is(
  operands, result, asked
):
  """All else is the float32 program that it was, to the bit."""
  a, b = jnp.ones((2, 3), operands), jnp.ones((3, 4), operands)
  run = functools.partial(forms.dense, form='nn', dtype=jnp.dtype(result))
  before = lambda a, b: jnp.einsum(
    'mk,kn->mn', a, b, preferred_element_type=asked
  ).astype(result)
  found, want = (dots(f, a, b, 'cuda') for f in (run, before))
  assert found == want
  assert found[0].endswith({'float32': 'xf32>', 'bfloat16': 'xbf16>'}[asked])
  if operands != 'bfloat16':
    found, want = (str(jax.make_jaxpr(f)(a, b)) for f in (run, before))
    assert found == want
    assert f'preferred_element_type={asked}' in found


def dots(run, a, b, platform):
  """Products and conversions of a program, as written for a platform."""
  lowered = jax.jit(run).trace(a, b).lower(lowering_platforms=(platform,))
  return re.findall(
    r'stablehlo\.(?:dot_general|convert|transpose|custom_call @\w+).*',
    re.sub(r'%\w+', '', lowered.as_text()),
  )


@pytest.mark.parametrize('result', ['float32', 'bfloat16'])
@pytest.mark.parametrize(
  ('spec', 'rows_first'),
  [
    ('mk,kn->mn', None),
    ('mk,nk->mn', None),
    ('km,kn->mn', '[1, 0]'),
    # The result has the axes of the right operand first.
    ('km,kn->nm', '[1, 0]'),
    ('mk,kn->nm', '[1, 0]'),
    ('jmk,jkn->mn', '[1, 0, 2]'),
    ('jmk,jknl->mnl', '[1, 0, 2]'),
    # Not in the order of the alphabet.
    ('mkj,kjn->mn', None),
    ('mkj,nkj->mn', None),
  ],
)
def test_a_cpu_reads_what_is_summed_from_the_last_axes(
  spec, rows_first, result
):
  """What its library multiplies as bfloat16; see `forms._on_cpu`."""
  sizes = {'m': 5, 'n': 4, 'l': 2, 'k': 3, 'j': 7}
  left, right = spec.split('->')[0].split(',')
  rng = np.random.default_rng(0)
  a, b = (
    # Integers whose sums bfloat16 holds too.
    jnp.asarray(rng.integers(-2, 3, [sizes[x] for x in axes]), jnp.bfloat16)
    for axes in (left, right)
  )
  run = functools.partial(forms.einsum, spec, dtype=jnp.dtype(result))
  want = np.einsum(spec, *(np.asarray(x, np.float64) for x in (a, b)))
  c = jax.jit(run)(a, b)
  assert c.dtype == result
  np.testing.assert_array_equal(c, want.astype(result))
  text = '\n'.join(dots(run, a, b, 'cpu'))
  assert ('@LayoutConstraint' in text) == (rows_first is not None)
  if rows_first:
    assert f'dims = {rows_first}' in text
  (product,) = re.findall('dot_general.*', text)
  assert product.endswith('xf32>')
  summed, shape = re.search(
    r'contracting_dims = \[([\d, ]+)\] x .* : \(tensor<([\dx]+)xbf16>', product
  ).groups()
  rank = shape.count('x') + 1
  summed = [int(x) for x in summed.split(', ')]
  assert summed == [*range(rank - len(summed), rank)]


@pytest.mark.parametrize(('form', 'axes'), CASES)
@pytest.mark.parametrize('name', ['xla_loop', 'bucket'])
def test_the_same_bits_as_arrays_cut_to_a_block(name, form, axes):
  width = 2 * STEP
  run, _ = product(name, form)
  left, right = forms.AXES[form]
  a, b = operands(form)
  cut = lambda x, letters: x[
    tuple(slice(width if z in axes else None) for z in letters)
  ]
  a, b = cut(a, left), cut(b, right)
  whole = lambda x, letters: np.pad(
    x, [(0, SIZES[z] - x.shape[i]) for i, z in enumerate(letters)]
  )
  c = run(whole(a, left), whole(b, right), {z: jnp.int32(width) for z in axes})
  module = forms.module(name)
  small = SIZES | dict.fromkeys(axes, width)
  # Masked too: a loop adds up k in chunks, one product of it all does not.
  extents = SIZES | {z: jnp.int32(width) for z in axes}
  want = jax.jit(
    lambda a, b: module.product(
      a, b, form, forms.Extents(**extents), jnp.float32, BLOCKS[name]
    )
  )(a, b)
  np.testing.assert_array_equal(c[: small['m'], : small['n']], want)


@pytest.mark.parametrize('name', ['xla_loop', 'bucket'])
def test_less_is_computed_where_less_is_alive(name):
  """What saves time: NaN in a block that is not read does not come through,
  and does in the next extent."""
  run, _ = product(name, 'nn')
  a, b = operands('nn')
  b = beyond(b, 'kn', {'k': STEP, 'n': 99}, np.nan)
  assert np.isfinite(run(a, b, {'k': jnp.int32(STEP)})).all()
  assert np.isnan(run(a, b, {'k': jnp.int32(STEP + 1)})).all()


@pytest.mark.parametrize('name', BLOCKS)
def test_default_blocks_take_any_size(name):
  module = forms.module(name)
  rng = np.random.default_rng(0)
  for m, n, k in ((1, 1, 1), (7, 1409, 13), (3, 192, 576)):
    a = rng.standard_normal((m, k)).astype(np.float32)
    b = rng.standard_normal((k, n)).astype(np.float32)
    c = module.product(
      a, b, 'nn', forms.Extents(m, jnp.int32(n), jnp.int32(k)), jnp.float32
    )
    np.testing.assert_allclose(c, a @ b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('name', ['xla_loop', 'bucket'])
def test_candidates_are_right(name):
  module = forms.module(name)
  a, b = operands('nn')
  found = module.candidates('nn', SIZES['m'], SIZES['n'], SIZES['k'], a.dtype)
  assert found
  for blocks in found:
    c = module.product(
      a, b, 'nn', forms.Extents(SIZES['m'], jnp.int32(9), SIZES['k']),
      jnp.float32, blocks,
    )  # fmt: skip
    np.testing.assert_allclose(c[:, :9], (a @ b)[:, :9], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
  ('a', 'b', 'form', 'message'),
  [
    ((2, 3), (4, 5), 'nn', 'k differs'),
    ((2, 3), (3, 5), 'tt', "form 'tt' is not one of nn, nt, tn"),
    ((2, 3, 1), (3, 5), 'nn', 'not matrices'),
  ],
)
def test_shapes_that_do_not_belong_together(a, b, form, message):
  with pytest.raises(ValueError, match=message):
    forms.sizes(jnp.zeros(a), jnp.zeros(b), form)


def test_sizes_and_dtypes_are_what_a_layer_asks_for(monkeypatch):
  """And its gradient; the three widths differ."""
  asked, product = {}, xla.product

  def note(a, b, form, extents, dtype, blocks=None):
    asked[form] = (*forms.sizes(a, b, form), jnp.dtype(dtype))
    return product(a, b, form, extents, dtype, blocks)

  monkeypatch.setattr(xla, 'product', note)
  x, w = jnp.ones((5, 7), jnp.bfloat16), jnp.ones((7, 11), jnp.float32)
  run = lambda x, w: matmul.masked_matmul(x, w, implementation='xla')
  y, gradients = jax.vjp(run, x, w)
  gradients(jnp.ones_like(y))
  assert asked == {
    form: (
      *forms.layer_sizes(form, 5, 7, 11),
      jnp.dtype(forms.result_dtype(form, x.dtype)),
    )
    for form in forms.FORMS
  }


def test_blocks_that_do_not_fit():
  a, b = operands('nn')
  extents = forms.Extents(SIZES['m'], SIZES['n'], jnp.int32(3))
  bad = functools.partial(xla_loop.product, a, b, 'nn', extents, jnp.float32)
  with pytest.raises(ValueError, match='a chunk of 7 does not divide k 32'):
    bad(xla_loop.Blocks(8, 8, 7))
  with pytest.raises(ValueError, match='k: widths 0 apart'):
    bucket.product(a, b, 'nn', extents, jnp.float32, bucket.Blocks(8, 8, 0))
