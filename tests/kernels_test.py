"""Masked matmul, SwiGLU and attention: value and gradient, every kernel."""

import functools
import inspect
import math
import re
import sys
import types

import jax
from jax.experimental.pallas import mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
import pytest

from effllm_jax import kernels
from effllm_jax.kernels import attention as attention_lib
from effllm_jax.kernels import bucket
from effllm_jax.kernels import dispatch
from effllm_jax.kernels import forms
from effllm_jax.kernels import swiglu as swiglu_lib
from effllm_jax.kernels import xla
from tests import conftest

# Kernels that a CPU runs; the last one where jax has its simulator.
ON_CPU = ('xla', 'xla_loop', 'bucket', 'pallas_tpu')
D, F, K, G, H = 24, 48, 3, 2, 4
B, T = 2, 6


@pytest.fixture(params=ON_CPU, name='name')
def _name(request, monkeypatch):
  if request.param == 'poison':
    monkeypatch.setitem(sys.modules, 'effllm_jax.kernels.poison', POISON)
    names = (*kernels.IMPLEMENTATIONS, 'poison')
    monkeypatch.setattr(dispatch, 'IMPLEMENTATIONS', names)
  interpret(monkeypatch, request.param, True)
  return request.param


def with_poison(a, b, form, extents, dtype, blocks=None):
  """The product of the contract's worst case: NaN beyond the extents."""
  c = xla.product(a, b, form, extents, dtype, blocks)
  m, n = (jnp.arange(size) for size in c.shape)
  return jnp.where((m < extents.m)[:, None] & (n < extents.n), c, jnp.nan)


POISON = types.SimpleNamespace(product=with_poison, ZERO_BEYOND_EXTENTS=False)


def interpret(monkeypatch, name, how):
  """Lets this CPU run a kernel of another machine."""
  module = forms.module(name)
  if 'interpret' in inspect.signature(module.product).parameters:
    monkeypatch.setattr(
      module, 'product', functools.partial(module.product, interpret=how)
    )
  if name in dispatch.PLATFORMS:
    attention = forms.module(f'{name}_attention')
    causal = functools.partial(attention.causal, interpret=how)
    monkeypatch.setattr(attention, 'causal', causal)


def draw(*shape, seed=0):
  return np.random.default_rng(seed).standard_normal(shape) * 0.5


def matmul(x, w, keep_in, keep_out, implementation=None):
  if implementation:
    return kernels.masked_matmul(
      x, w, keep_in, keep_out, implementation=implementation
    )
  return (x * keep_in) @ w * keep_out


def swiglu(x, w_gate, w_up, w_down, keep, implementation=None, hidden=False):
  if implementation:
    return kernels.masked_swiglu(
      x, w_gate, w_up, w_down, keep, implementation=implementation,
      hidden=hidden,
    )  # fmt: skip
  gate = x @ w_gate
  return (gate / (1 + jnp.exp(-gate)) * (x @ w_up) * keep) @ w_down


EPS = 0.1


def turns(T):
  """Cosines and sines of the rotary embedding, float64 [2, T, H / 2]."""
  angles = np.arange(T)[:, None] * np.array([1.0, 0.3])
  return np.stack([np.cos(angles), np.sin(angles)])


def attention(x, wq, wk, wv, wo, *extras, implementation=None, hidden=False):
  """Of Llama; with biases and norms between weights and mask, of Qwen."""
  *extras, keep = extras
  bq, bk, bv, q_norm, k_norm = extras or [None] * 5
  T = x.shape[1]
  if implementation:
    return kernels.masked_attention(
      x, wq, wk, wv, wo, keep, jnp.asarray(turns(T), jnp.float32),
      bq=bq, bk=bk, bv=bv, q_norm=q_norm, k_norm=k_norm, norm_eps=EPS,
      implementation=implementation, hidden=hidden,
    )  # fmt: skip

  def project(w, bias, scale):
    z = jnp.einsum('btd,dk...h->btk...h', x, w)
    z = z if bias is None else z + bias
    if scale is None:
      return z
    return z / jnp.sqrt((z**2).mean(-1, keepdims=True) + EPS) * scale

  def rotate(z):
    a, b = z[..., : H // 2], z[..., H // 2 :]
    shape = (T, *(1,) * (z.ndim - 3), H // 2)
    cos, sin = turns(T).reshape(2, *shape)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1)

  q = rotate(project(wq, bq, q_norm))
  k = rotate(project(wk, bk, k_norm))
  v = project(wv, bv, None)
  score = jnp.einsum('btkgh,bskh->bkgts', q, k) / H**0.5
  score = jnp.where(np.tri(T, dtype=bool), score, -jnp.inf)
  out = jnp.einsum('bkgts,bskh->btkgh', jax.nn.softmax(score), v)
  return jnp.einsum('btkgh,kghd->btd', out * keep[:, None, None], wo)


LLAMA = [
  draw(B, T, D), draw(D, K, G, H, seed=1), draw(D, K, H, seed=2),
  draw(D, K, H, seed=3), draw(K, G, H, D, seed=4),
]  # fmt: skip
QWEN = [
  *LLAMA, draw(K, G, H, seed=5), draw(K, H, seed=6), draw(K, H, seed=7),
  1 + draw(H, seed=8), 1 + draw(H, seed=9),
]  # fmt: skip
# Op, its arrays, its masks.
OPS = {
  'matmul': (
    matmul, [draw(B, T, D), draw(D, F, seed=1)], [('in', D), ('out', F)],
  ),
  'swiglu': (
    swiglu,
    [draw(B, T, D), draw(D, F, seed=1), draw(D, F, seed=2), draw(F, D, seed=3)],
    [('out', F)],
  ),
  'attention': (attention, LLAMA, [('out', K)]),
  'attention with biases and norms': (attention, QWEN, [('out', K)]),
}  # fmt: skip


def masks(op):
  """All, none, the first, all but the last, and scattered ones."""
  sizes = [size for _, size in OPS[op][2]]
  rng = np.random.default_rng(7)
  for pick in (
    lambda n: np.ones(n, bool),
    lambda n: np.zeros(n, bool),
    lambda n: np.arange(n) == 0,
    lambda n: np.arange(n) < n - 1,
    lambda n: np.arange(n) < n // 2,
    lambda n: rng.random(n) < 0.5,
  ):
    yield tuple(pick(n) for n in sizes)


@functools.cache
def graded(op, implementation):
  """Value and gradient by every array, for a weighted sum of the result."""
  weights = draw(B, T, F if op == 'matmul' else D, seed=9)

  def loss(arrays, keeps):
    y = OPS[op][0](*arrays, *keeps, implementation=implementation)
    return (y * jnp.asarray(weights, y.dtype)).sum(), y

  return jax.jit(jax.value_and_grad(loss, has_aux=True))


@functools.cache
def reference(op):
  """Masks, and what `graded` should give for each, in float64."""
  with jax.enable_x64(True):
    run = graded(op, None)
    return [(keeps, run(OPS[op][1], keeps)) for keeps in masks(op)]


@pytest.mark.parametrize('name', [*ON_CPU, 'poison'], indirect=True)
@pytest.mark.parametrize('op', OPS)
def test_value_and_gradient_against_float64(op, name):
  """Also: dead outputs and gradients exactly zero, one trace for all masks."""
  arrays = OPS[op][1]
  run = graded(op, name)
  for keeps, ((_, want), wants) in reference(op):
    (_, y), grads = run([jnp.asarray(x, jnp.float32) for x in arrays], keeps)
    np.testing.assert_allclose(y, want, rtol=1e-4, atol=1e-5)
    for grad, expected in zip(grads, wants, strict=True):
      np.testing.assert_allclose(grad, expected, rtol=1e-4, atol=1e-5)
      # The reference multiplies by the mask: what is dead is exactly zero.
      assert not np.any(np.asarray(grad)[np.asarray(expected) == 0])
    assert not np.any(np.asarray(y)[np.asarray(want) == 0])
  assert run._cache_size() == 1


@pytest.mark.parametrize('op', OPS)
def test_nan_beyond_the_extent_does_no_harm(op, name):
  """In weights and in what comes from above, far beyond any block."""
  if name in ('xla', 'pallas_tpu') or (
    name == 'xla_loop' and 'attention' in op
  ):
    pytest.skip('reads this small an axis whole')
  arrays = [np.asarray(x, np.float32) for x in OPS[op][1]]
  keeps = tuple(np.arange(n) < 1 for _, n in OPS[op][2])
  run = graded(op, name)
  clean = run(arrays, keeps)
  poisoned = [arrays[0], *(np.array(x) for x in arrays[1:])]
  for w in poisoned[1:]:
    for axis, size in enumerate(w.shape):
      if size == keeps[-1].size:
        index = [slice(None)] * w.ndim
        index[axis] = slice(size // 2 + 1, None)
        w[tuple(index)] = np.nan
  (_, y), grads = run(poisoned, keeps)
  np.testing.assert_array_equal(y, clean[0][1])
  for grad, want in zip(grads, clean[1], strict=True):
    np.testing.assert_array_equal(grad, want)


def test_overflow_in_a_dead_head_does_no_harm(name):
  """Its weights are finite, what they come to is not."""
  arrays = [np.asarray(x, np.float32) for x in LLAMA]
  keep = np.array([False, True, False])
  large = [np.array(x) for x in arrays]
  for w in large[1:4]:
    w[:, 0] *= 1e20
  run = graded('attention', name)
  (_, want), wants = run(arrays, (keep,))
  (_, y), grads = run(large, (keep,))
  np.testing.assert_array_equal(y, want)
  for grad, expected in zip(grads, wants, strict=True):
    np.testing.assert_array_equal(grad, expected)


def test_angles_have_no_gradient(name):
  """In no implementation: most would have to be asked for it."""
  arrays = [jnp.asarray(x, jnp.float32) for x in LLAMA]

  def loss(cos_sin):
    return kernels.masked_attention(
      *arrays, jnp.ones(K, bool), cos_sin, implementation=name
    ).sum()

  found = jax.jit(jax.grad(loss))(jnp.asarray(turns(T), jnp.float32))
  assert not np.any(found)


def test_two_masks_make_no_branch_for_every_pair_of_widths():
  x, w = jnp.ones((32, 768)), jnp.ones((768, 768))
  keep = jnp.arange(768) < 500

  def dots(keep_in, keep_out):
    run = functools.partial(kernels.masked_matmul, implementation='bucket')
    text = str(jax.make_jaxpr(run)(x, w, keep_in, keep_out))
    return text.count('dot_general')

  assert dots(keep, None) == 12
  assert dots(keep, keep) <= 16


def test_nan_in_the_bias_of_a_dead_head_does_no_harm(name):
  """Also of one before the last that lives, up to which a bucket reads."""
  op = 'attention with biases and norms'
  arrays = [np.asarray(x, np.float32) for x in OPS[op][1]]
  keep = np.array([False, True, False])
  poisoned = [np.array(x) for x in arrays]
  for bias in poisoned[5:8]:
    bias[~keep] = np.nan
  run = graded(op, name)
  (_, want), wants = run(arrays, (keep,))
  (_, y), grads = run(poisoned, (keep,))
  np.testing.assert_array_equal(y, want)
  for grad, expected in zip(grads, wants, strict=True):
    np.testing.assert_array_equal(grad, expected)


def test_attention_has_a_branch_for_each_number_of_live_heads(
  name, monkeypatch
):
  """The cost follows the extent, forward and back; only xla runs all heads.

  The kernels for a TPU have no branch: see pallas_tpu_attention_test.py.
  """
  seen, each_way = [], []
  attend = jax.nn.dot_product_attention

  def recorded(q, k, v, **kwargs):
    seen.append(k.shape[-2])
    return attend(q, k, v, **kwargs)

  monkeypatch.setattr(jax.nn, 'dot_product_attention', recorded)

  def traced(arrays, keep):
    run = lambda *arrays: attention(*arrays, keep, implementation=name)
    _, pull = jax.vjp(run, *arrays)
    each_way.append(set(seen))
    seen.clear()
    grads = pull(arrays[0])
    each_way.append(set(seen))
    return grads

  jax.eval_shape(
    traced, [jnp.asarray(x, jnp.float32) for x in LLAMA], jnp.ones(K, bool)
  )
  widths = {'xla': {K}, 'pallas_tpu': set()}.get(name, set(range(1, K + 1)))
  assert each_way == [widths, widths]


def long_attention(implementation):
  """A text of three blocks, the last of 88 rows: result, gradient, kept.

  And the size of the largest array of the program.
  """
  x64 = implementation is None
  with jax.enable_x64(x64):
    dtype = jnp.float64 if x64 else jnp.float32
    x, weights = draw(2, 1, 600, D)
    arrays = [jnp.asarray(w, dtype) for w in (x, *LLAMA[1:], weights)]
    keep = np.array([True, True, False])

    @jax.jit
    def both_ways(*arrays):
      *arrays, weights = arrays
      run = lambda *arrays: attention(
        *arrays, keep, implementation=implementation
      )
      keeps_all = jax.checkpoint_policies.everything_saveable
      y, pull = jax.vjp(jax.checkpoint(run, policy=keeps_all), *arrays)
      kept.extend(x.size for x in jax.tree.leaves(pull))
      return y, *pull(weights)

    kept = []
    lowered = both_ways.lower(*arrays)
    shapes = re.findall(r'tensor<([\dx]+)xf', lowered.as_text())
    largest = max(math.prod(map(int, shape.split('x'))) for shape in shapes)
    return lowered.compile()(*arrays), kept, largest


@pytest.fixture(scope='module', name='exact_long_attention')
def _exact_long_attention():
  results, _, _ = long_attention(None)
  return results


# A block has up to 256 x 512 scores of a head, and may hold them, or goes
# through 86, 43 and 30 rows at a time: the last part of each is filled up.
@pytest.mark.parametrize('most', [2**22, 25_600], ids=['whole', 'in parts'])
def test_attention_over_more_rows_than_a_block_has(
  name, most, exact_long_attention, monkeypatch
):
  monkeypatch.setattr(attention_lib, 'MOST_SCORES', most)
  results, kept, largest = long_attention(name)
  for result, want in zip(results, exact_long_attention, strict=True):
    np.testing.assert_allclose(result, want, rtol=1e-4, atol=1e-4)
  # No probability of any block is kept for the backward pass.
  assert max(kept) < K * G * 88 * 600
  if name == 'pallas_tpu':
    # Two blocks of rows, of which a step has the scores of one head.
    assert largest == 384**2
  else:
    assert largest == K * G * (256 * 512 if most == 2**22 else 86 * 256)


def test_gradients_of_many_parts_are_summed_in_float32(monkeypatch):
  """With each sum of 256 rounded to bfloat16 they are five times as far off."""
  q, k, v, dout = (
    draw(1, 256, heads, 16, seed=i) for i, heads in enumerate((4, 1, 1, 4))
  )

  def gradients(dtype, most):
    monkeypatch.setattr(attention_lib, 'MOST_SCORES', most)
    arrays = [
      x.astype(jnp.bfloat16).astype(dtype) for x in (q, k, v, abs(dout))
    ]

    @jax.jit
    def pulled(*arrays):
      *arrays, dout = arrays
      return jax.vjp(attention_lib._causal, *arrays)[1](dout)

    return [np.asarray(x, np.float32) for x in pulled(*arrays)]

  exact = gradients(jnp.float32, 2**22)
  whole, parts = (
    [np.linalg.norm(x - y) for x, y in zip(found, exact, strict=True)]
    for found in (gradients(jnp.bfloat16, 2**22), gradients(jnp.bfloat16, 256))
  )
  assert all(x < 2 * y for x, y in zip(parts, whole, strict=True))


def test_what_a_block_of_attention_holds_grows_with_its_text(name, monkeypatch):
  """Not with its square: as many rows fewer as there are more keys."""
  read = []
  attend = jax.nn.dot_product_attention

  def recorded(q, k, v, **kwargs):
    read.append(q.shape[1] * k.shape[1])
    return attend(q, k, v, **kwargs)

  monkeypatch.setattr(jax.nn, 'dot_product_attention', recorded)
  run = lambda *arrays: attention(
    *arrays, np.ones(K, bool), implementation=name
  )
  most = {}
  for length in (4096, 16384, 131072):
    read.clear()
    jax.eval_shape(run, jnp.zeros((1, length, D)), *LLAMA[1:])
    most[length] = max(read, default=0)
  if name == 'pallas_tpu':
    assert not any(most.values())
    return
  assert all(2**21 < x <= 2**22 for x in most.values()), most


def test_a_block_of_attention_reads_no_key_after_its_last_row(
  name, monkeypatch
):
  """Four blocks read 5/8 of the square; a short text is one block.

  The kernels for a TPU read less: see pallas_tpu_attention_test.py.
  """
  read = []
  attend = jax.nn.dot_product_attention

  def recorded(q, k, v, **kwargs):
    read.append((q.shape[1], k.shape[1]))
    return attend(q, k, v, **kwargs)

  monkeypatch.setattr(jax.nn, 'dot_product_attention', recorded)
  for length, want in (
    (256, {(256, 256)}),
    (600, {(256, 256), (256, 512), (88, 600)}),
    (2048, {(512, 512), (512, 1024), (512, 1536), (512, 2048)}),
  ):
    read.clear()
    jax.eval_shape(
      lambda *arrays: attention(*arrays, np.ones(K, bool), implementation=name),
      jnp.zeros((1, length, D)), *LLAMA[1:],
    )  # fmt: skip
    assert set(read) == (set() if name == 'pallas_tpu' else want)


def test_a_mask_of_groups_is_one_of_their_channels(name):
  x, w = (jnp.asarray(a, jnp.float32) for a in OPS['matmul'][1])
  groups_in, groups_out = np.array([1, 0, 1, 1], bool), np.arange(8) < 5
  few = matmul(x, w, groups_in, groups_out, name)
  many = matmul(x, w, groups_in.repeat(D // 4), groups_out.repeat(F // 8), name)
  np.testing.assert_array_equal(few, many)
  assert np.any(few)


def test_master_weights_get_a_float32_gradient(name):
  """bfloat16 activations: dw is what float32 makes of them, not rounded."""
  x = jnp.asarray(draw(64, D), jnp.bfloat16)
  w = jnp.asarray(draw(D, F, seed=1), jnp.float32)
  keep = jnp.arange(F) < F // 2

  def loss(w):
    y = kernels.masked_matmul(x, w, keep_out=keep, implementation=name)
    assert y.dtype == jnp.bfloat16
    return y.astype(jnp.float32).sum()

  dw = jax.grad(loss)(w)
  assert dw.dtype == jnp.float32
  exact = np.asarray(x, np.float64).sum(0)[:, None] * np.asarray(keep)
  np.testing.assert_allclose(dw, exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('op', ['swiglu', 'attention with biases and norms'])
def test_no_master_weight_has_a_gradient_in_bfloat16(op, name):
  """Nor a bias or a norm: each has digits that bfloat16 has not."""
  x, *weights = (jnp.asarray(a, jnp.float32) for a in OPS[op][1])
  keep = np.ones(OPS[op][2][0][1], bool)

  @jax.jit
  @jax.grad
  def gradient(weights):
    y = OPS[op][0](x.astype(jnp.bfloat16), *weights, keep, implementation=name)
    assert y.dtype == jnp.bfloat16
    return jnp.square(y.astype(jnp.float32)).sum()

  for i, dw in enumerate(gradient(weights)):
    assert dw.dtype == jnp.float32
    assert np.any(dw != np.asarray(dw).astype(jnp.bfloat16)), i


def halved(jaxpr):
  """Products of bfloat16 by dtype, and those rounded after they are stored."""
  dots, late, made = [], [], {}
  for eqn in jaxpr.eqns:
    read = [x.aval.dtype for x in eqn.invars if hasattr(x.aval, 'dtype')]
    if eqn.primitive.name == 'dot_general' and {*read} == {
      jnp.dtype(jnp.bfloat16)
    }:
      made[eqn.outvars[0]] = eqn
      dots.append(eqn.outvars[0].aval.dtype.name)
    elif eqn.primitive.name == 'convert_element_type':
      if eqn.invars[0] in made and eqn.outvars[0].aval.dtype == jnp.bfloat16:
        late.append(eqn)
    elif eqn.primitive.name == 'transpose' and eqn.invars[0] in made:
      made[eqn.outvars[0]] = eqn
    inners = [*jax.extend.core.jaxprs_in_params(eqn.params)]
    if platforms := eqn.params.get('branches_platforms'):
      # What is not a CPU runs the branch of no name.
      inners = [inners[platforms.index(None)]]
    for inner in inners:
      more = halved(inner)
      dots, late = dots + more[0], late + more[1]
  return dots, late


@pytest.mark.parametrize('name', ['xla', 'bucket'])
@pytest.mark.parametrize('op', OPS)
def test_no_product_of_bfloat16_is_stored_as_float32_and_converted(op, name):
  """On a GPU that is an array of float32 and a kernel more; dw is float32."""
  x, *weights = (jnp.asarray(a, jnp.float32) for a in OPS[op][1])
  keeps = [np.ones(size, bool) for _, size in OPS[op][2]]

  def loss(x, weights):
    y = OPS[op][0](x, *weights, *keeps, implementation=name)
    return jnp.square(y.astype(jnp.float32)).sum()

  run = jax.grad(loss, argnums=(0, 1))
  dots, late = halved(
    jax.make_jaxpr(run)(x.astype(jnp.bfloat16), weights).jaxpr
  )
  assert {*dots} == {'bfloat16', 'float32'}
  assert not late


@functools.cache
def scanned(op, remat, implementation):
  """Three layers of stacked weights, one mask a layer: value and gradient."""
  _, arrays, [(_, size)] = OPS[op]
  x = jnp.asarray(arrays[0], jnp.float32)
  stack = [
    jnp.asarray(np.stack([w, w[::-1], -w]), jnp.float32) for w in arrays[1:]
  ]
  keeps = np.array([np.arange(size) < n for n in (size, 1, size // 2)])

  def loss(stack):
    def layer(x, scanned):
      w, keep = scanned
      y = OPS[op][0](x, *w, keep, implementation=implementation)
      return x + y / (1 + jnp.square(y).mean()), None

    layer = jax.checkpoint(layer, prevent_cse=False) if remat else layer
    x_last, _ = jax.lax.scan(layer, x, (stack, keeps))
    return jnp.square(x_last).mean()

  return jax.jit(jax.value_and_grad(loss))(stack)


@pytest.mark.parametrize('op', ['swiglu', 'attention'])
@pytest.mark.parametrize('remat', [False, True])
def test_a_width_for_each_layer_of_a_scan(op, remat, name):
  (value, grads), (want, wants) = (
    scanned(op, remat, name),
    scanned(op, False, None),
  )
  np.testing.assert_allclose(value, want, rtol=1e-5)
  for a, b in zip(grads, wants, strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


@functools.cache
def with_hidden(op, implementation):
  """With two groups alive: the result, what is hidden, a gradient of both."""
  arrays = [jnp.asarray(x, jnp.float32) for x in OPS[op][1]]
  keep = jnp.arange(OPS[op][2][0][1]) < 2

  def loss(arrays):
    y, h = OPS[op][0](*arrays, keep, implementation=implementation, hidden=True)
    return jnp.square(h).sum() + y.sum(), (y, h)

  grads, (y, h) = jax.jit(jax.grad(loss, has_aux=True))(arrays)
  return y, h, grads


@pytest.mark.parametrize('op', [x for x in OPS if x != 'matmul'])
def test_hidden_is_what_the_last_product_reads(op, name):
  y, h, grads = with_hidden(op, name)
  w = OPS[op][1][3 if op == 'swiglu' else 4].reshape(-1, D)
  np.testing.assert_allclose(h.reshape(B, T, -1) @ w, y, rtol=1e-5, atol=1e-6)
  dead = h[..., 2:] if op == 'swiglu' else h[:, :, 2:]
  assert not np.any(dead) and np.any(h)
  # And its gradient counts too.
  for a, b in zip(grads, with_hidden(op, 'xla')[2], strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


@conftest.simulated
def test_the_hopper_kernel_in_the_simulator(monkeypatch):
  """A whole block and its gradient, races looked for; widths it can take."""
  how = plgpu.InterpretGPUParams(detect_races=True)
  interpret(monkeypatch, 'pallas_hopper', how)
  width, hidden, tokens = 64, 192, 64
  x = jnp.asarray(draw(tokens, width), jnp.bfloat16)
  weights = [
    jnp.asarray(draw(*shape, seed=i) / 4, jnp.float32)
    for i, shape in enumerate(
      [(width, hidden), (width, hidden), (hidden, width)]
    )
  ]
  keep = jnp.arange(hidden) < 100

  def loss(weights, implementation):
    y = kernels.masked_swiglu(x, *weights, keep, implementation=implementation)
    return jnp.square(y.astype(jnp.float32)).mean()

  got, want = (
    jax.grad(loss)(weights, name) for name in ('pallas_hopper', 'xla')
  )
  for a, b in zip(got, want, strict=True):
    np.testing.assert_allclose(a, b, rtol=2e-2, atol=1e-4)
    np.testing.assert_array_equal(a == 0, b == 0)


def test_what_is_chosen_for_a_platform(monkeypatch):
  assert kernels.resolve(None) == 'bucket'
  assert kernels.runnable() == ['xla', 'xla_loop', 'bucket']
  for name in kernels.IMPLEMENTATIONS:
    assert kernels.resolve(name) == name
  # Measured nowhere else yet.
  for platform in ('gpu', 'tpu'):
    monkeypatch.setattr(jax, 'default_backend', lambda p=platform: p)
    assert kernels.resolve(None) == 'xla'


def test_bad_arguments():
  x, w = jnp.zeros((2, D)), jnp.zeros((D, F))
  with pytest.raises(ValueError, match="'cuda' is not one of xla, xla_loop"):
    kernels.masked_matmul(x, w, implementation='cuda')
  with pytest.raises(ValueError, match=r'keep_out is bool\[7\]; .* divides 48'):
    kernels.masked_matmul(x, w, keep_out=jnp.ones(7, bool))
  with pytest.raises(ValueError, match='keep_in is float32'):
    kernels.masked_matmul(x, w, keep_in=jnp.ones(D))
  with pytest.raises(ValueError, match=r'keep_out is bool\[0\]; it takes'):
    kernels.masked_matmul(x, w, keep_out=jnp.ones(0, bool))
  for a, b in ((x[:, 1:], w), (x[0, 0], w), (x, w[0])):
    with pytest.raises(ValueError, match=r'they take \[..., I\], \[I, O\]'):
      kernels.masked_matmul(a, b)
  assert kernels.masked_matmul(x[:, :0], w[:0]).shape == (2, F)


def test_integers_are_refused(name):
  """To their type the weights would be rounded."""
  whole = lambda x: jnp.asarray(x).astype(jnp.int32)
  keeps = lambda op: [np.ones(size, bool) for _, size in OPS[op][2]]
  for op, (run, (x, *weights), _) in OPS.items():
    with pytest.raises(ValueError, match='masked ops take floating-point'):
      run(whole(x), *weights, *keeps(op), implementation=name)
    with pytest.raises(ValueError, match='masked ops take floating-point'):
      run(x, whole(weights[0]), *weights[1:], *keeps(op), implementation=name)


@pytest.mark.parametrize('name', ['pallas_tpu', 'pallas_hopper'])
def test_a_kernel_of_another_machine_fails_loudly(name):
  """Without the simulator: no quiet fallback."""
  x = jnp.zeros((64, 64), jnp.bfloat16)
  with pytest.raises(ValueError, match='Only interpret mode is supported on C'):
    jax.block_until_ready(
      kernels.masked_matmul(x, jnp.zeros((64, 64)), implementation=name)
    )


@pytest.mark.parametrize(
  ('kind', 'platform', 'capability'),
  [
    ('NVIDIA A100-SXM4-80GB', 'gpu', '8.0'),
    ('NVIDIA B200', 'gpu', '10.0'),
    ('AMD Instinct MI300X', 'gpu', 'gfx942'),
    ('AMD Instinct MI300X', 'rocm', None),
    ('NVIDIA H100 80GB HBM3', 'gpu', '9.0'),
  ],
)
def test_the_hopper_kernel_is_for_hopper(
  monkeypatch, kind, platform, capability
):
  device = types.SimpleNamespace(device_kind=kind, platform=platform)
  if capability:
    device.compute_capability = capability
  monkeypatch.setattr(jax, 'default_backend', lambda: platform)
  monkeypatch.setattr(jax, 'devices', lambda *_: [device])
  x = jnp.zeros((64, 64), jnp.bfloat16)
  run = functools.partial(
    jax.eval_shape,
    functools.partial(kernels.masked_matmul, implementation='pallas_hopper'),
  )
  others = ['xla', 'xla_loop', 'bucket']
  if capability == '9.0':
    assert kernels.runnable() == [*others, 'pallas_hopper']
    assert run(x, x).shape == (64, 64)
    return
  assert kernels.runnable() == others
  assert kernels.refusal('pallas_hopper')
  with pytest.raises(ValueError, match=f"a {kind} .*; use .*'bucket'") as error:
    run(x, x)
  assert '\n' not in str(error.value)


@pytest.mark.parametrize('op', OPS)
def test_no_tokens_at_all(op, name):
  """Nothing comes of them, and a gradient of zero for every weight."""
  x, *weights = (jnp.asarray(a, jnp.float32) for a in OPS[op][1])
  x = x[:, :0] if op == 'matmul' else x[:0]
  keeps = [np.arange(size) < 2 for _, size in OPS[op][2]]
  hidden = {} if op == 'matmul' else {'hidden': True}

  def loss(arrays):
    y = OPS[op][0](*arrays, *keeps, implementation=name, **hidden)
    y, h = y if hidden else (y, 0.0)
    return y.sum() + jnp.sum(h), y

  grads, y = jax.grad(loss, has_aux=True)([x, *weights])
  assert y.shape == (*x.shape[:2], F if op == 'matmul' else D)
  for grad in grads:
    assert not np.any(grad)


@pytest.mark.parametrize('name', ['xla', 'xla_loop', 'bucket'])
def test_bad_arguments_of_whole_blocks(name):
  x, w_gate, w_up, w_down = OPS['swiglu'][1]
  keep = np.ones(F, bool)
  for wrong in (w_down[:, 1:], w_down[1:], w_down.T):
    with pytest.raises(ValueError, match=r'w_down are .* they take'):
      swiglu(x, w_gate, w_up, wrong, keep, name)
  with pytest.raises(ValueError, match='they take'):
    swiglu(x[..., 1:], w_gate, w_up, w_down, keep, name)
  with pytest.raises(ValueError, match=r'keep is int32\[3\]; it takes bool'):
    attention(*LLAMA, np.ones(K, np.int32), implementation=name)


def test_the_narrowest_bucket_that_holds_an_extent_is_taken():
  chosen = [int(bucket.choose([0, 16, 32, 40], e)) for e in (0, 1, 16, 17, 40)]
  assert chosen == [0, 1, 1, 2, 3]


def test_many_heads_have_a_dozen_branches(monkeypatch):
  seen = set()
  attend = jax.nn.dot_product_attention

  def recorded(q, k, v, **kwargs):
    seen.add(k.shape[-2])
    return attend(q, k, v, **kwargs)

  monkeypatch.setattr(jax.nn, 'dot_product_attention', recorded)
  shapes = (1, 4, 8), (8, 30, 1, 4), (8, 30, 4), (8, 30, 4), (30, 1, 4, 8)
  arrays = [jnp.ones(shape) for shape in shapes]
  run = functools.partial(kernels.masked_attention, implementation='bucket')
  jax.eval_shape(run, *arrays, jnp.ones(30, bool), jnp.ones((2, 4, 2)))
  # One for the shape of nothing, too.
  assert seen == {1, *range(3, 31, 3)}


@pytest.mark.parametrize('name', ['xla', 'xla_loop', 'bucket'])
def test_a_mask_of_groups_is_that_of_their_channels(name):
  arrays = [jnp.asarray(x, jnp.float32) for x in OPS['swiglu'][1]]
  loss = lambda arrays, keep: jnp.square(swiglu(*arrays, keep, name)).sum()
  run = jax.jit(jax.value_and_grad(loss))
  for live in (np.arange(F // 12) < 2, np.arange(F // 12) == 1):
    few, many = run(arrays, live), run(arrays, live.repeat(12))
    conftest.check_close(few, many, 1e-4, 1e-5)


def test_silu_and_norm_of_bfloat16_are_rounded_once():
  gate, up = (jnp.asarray(4 * draw(64, 64, seed=s), 'bfloat16') for s in (0, 1))
  found = jax.jit(swiglu_lib._activation)(gate, up, np.ones(64, bool))
  assert {x.dtype for x in found} == {jnp.dtype('float32')}
  g, u = (np.asarray(x, np.float64) for x in (gate, up))
  np.testing.assert_allclose(found[0], g / (1 + np.exp(-g)) * u, 1e-5, 1e-6)
  x, scale = jnp.asarray(draw(2, 3, 2, 64), 'bfloat16'), jnp.ones(64)
  got = jax.jit(attention_lib._rms_norm, static_argnums=2)(x, scale, 1e-6)
  z = np.asarray(x, np.float64)
  want = z / np.sqrt(np.square(z).mean(-1, keepdims=True) + 1e-6)
  off = np.asarray(got) != want.astype(np.float32).astype(jnp.bfloat16)
  assert off.mean() < 0.02
