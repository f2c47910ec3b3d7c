"""What runs on the device at hand, on that device: `make test-device`.

Elsewhere kernels of a TPU or a GPU run in simulators; here they meet their
hardware, beside all else that runs on it. Sizes and dtypes are those that every
implementation takes. Of a CPU, which other files test, one has to do: that this
file works.
"""

import contextlib
import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effllm_jax import kernels
from effllm_jax import model
from effllm_jax.kernels import autotune
from effllm_jax.kernels import forms
from experiments import bench_blocks
from tests import causal
from tests import conftest
from tests import products_test

ON_CPU = jax.default_backend() == 'cpu'
NAMES = ['xla_loop'] if ON_CPU else kernels.runnable()
ATTENTIONS = [
  f'{name}_attention' for name in NAMES if name in kernels.PLATFORMS
]
# Several tiles of each axis, and no two sizes alike.
SIZES = {'m': 256, 'n': 384, 'k': 320}
TOKENS, D, F, K, G, H = 192, 128, 384, 3, 2, 64
BLOCKS = [
  case
  for case in bench_blocks.cases(D, F, (K, G, H), 2, TOKENS)
  if case.what == 'with gradient'
]


def exact(dtype):
  """TPUs and GPUs round the operands of float32 products otherwise."""
  if dtype == 'float32':
    return jax.default_matmul_precision('highest')
  return contextlib.nullcontext()


def on_the_cpu():
  return jax.default_device(jax.devices('cpu')[0])


def dtypes(name):
  """Hopper's kernels take no float32."""
  one = ON_CPU or name == 'pallas_hopper'
  return ['bfloat16'] if one else ['bfloat16', 'float32']


EACH = pytest.mark.parametrize(
  ('name', 'dtype'), [(name, x) for name in NAMES for x in dtypes(name)]
)


def rounded(extents, blocks):
  """Extents up to the blocks: beyond, nothing is read."""
  if blocks is None:
    return SIZES
  steps = blocks.tile() if hasattr(blocks, 'tile') else vars(blocks)
  return {
    x: min(-(-extent // steps[x]) * steps[x], SIZES[x])
    for x, extent in extents.items()
  }


@pytest.mark.parametrize(
  ('form', 'axes'), [('nn', 'nk'), ('nt', 'nk'), ('tn', 'mn')]
)
@EACH
def test_products(name, dtype, form, axes):
  """Against float64, NaN beyond the blocks, one trace for all extents."""
  module, traces = forms.module(name), []
  blocks = None
  if name != 'xla':
    blocks = module.default_blocks(form, *SIZES.values(), dtype)

  @jax.jit
  def run(a, b, extents):
    traces.append(1)
    some = forms.Extents(**SIZES | extents)
    return module.product(a, b, form, some, jnp.float32, blocks)

  rng = np.random.default_rng(0)
  left, right = forms.AXES[form]
  a, b = (
    np.asarray(
      jnp.asarray(rng.standard_normal([SIZES[x] for x in letters]), dtype),
      np.float64,
    )
    for letters in (left, right)
  )
  for chosen in itertools.product(
    *(sorted({0, 1, 63, 64, 200, SIZES[x]}) for x in axes)
  ):
    extents = SIZES | dict(zip(axes, chosen, strict=True))
    limits = rounded(extents, blocks)
    # Of k, one side is zero beyond its extent: the caller masks activations.
    x = products_test.beyond(a, left, SIZES | {'k': extents['k']}, 0)
    want = np.einsum(f'{left},{right}->mn', x, b)
    operands = (
      jnp.asarray(products_test.beyond(y, letters, limits, np.nan), dtype)
      for y, letters in ((x, left), (b, right))
    )
    with exact(dtype):
      c = run(*operands, {z: jnp.int32(extents[z]) for z in axes})
    inside = np.s_[: extents['m'], : extents['n']]
    np.testing.assert_allclose(c[inside], want[inside], rtol=1e-3, atol=1e-3)
  assert len(traces) == 1


@pytest.mark.parametrize('case', BLOCKS, ids=lambda x: x.name)
@EACH
def test_blocks_of_a_layer(name, dtype, case):
  """Value and gradient against XLA's of cut arrays, in float32 on the CPU.

  Which other tests hold against float64. Where it is dead, it is zero.
  """
  operands = [x.draw(i, dtype) for i, x in enumerate(case.operands)]
  traces = []

  @jax.jit
  def run(*arrays):
    traces.append(1)
    return case.run(name, *arrays)

  for width in (0, 1, case.size // 2 + 1, case.size):
    with exact(dtype):
      y, *grads = run(*operands, jnp.int32(width))
    # Of all operands but the gradient of the result.
    for operand, grad in zip(case.operands[:-1], grads, strict=True):
      if operand.axis is not None:
        dead = np.moveaxis(np.asarray(grad), operand.axis, 0)[width:]
        assert not np.any(dead)
    if not width:
      assert not np.any(np.asarray(y))
      continue
    with on_the_cpu():
      wants = jax.jit(case.dense)(
        *(
          x.cut(jnp.asarray(np.asarray(array, np.float32)), width)
          for x, array in zip(case.operands, operands, strict=True)
        )
      )
    live = [
      x.cut(grad, width)
      for x, grad in zip(case.operands[:-1], grads, strict=True)
    ]
    for have, want in zip([y, *live], wants, strict=True):
      have, want = (np.asarray(z, np.float64) for z in (have, want))
      limit = {'bfloat16': 0.02, 'float32': 1e-4}[dtype]
      assert np.linalg.norm(have - want) <= limit * np.linalg.norm(want)
  assert len(traces) == 1


@pytest.mark.skipif(not ATTENTIONS, reason='kernels of a TPU or a GPU')
@pytest.mark.parametrize('module', ATTENTIONS or [None])
def test_attention_in_every_candidate_s_blocks(module):
  """Against float64; what is in dead heads does no harm."""
  module = forms.module(module)
  for T, size in itertools.product((60, 300, 1024), (64, 128)):
    clean = causal.draw(T, K, G, size, dtype='bfloat16')
    known = [
      module.candidates(form, T, T, size, 'bfloat16')
      for form in forms.ATTENTION
    ]
    for live in (1, K):
      with on_the_cpu():
        wants = causal.exact(*clean, live)
      drawn = [x.at[:, :, live * x.shape[2] // K :].set(jnp.nan) for x in clean]
      for blocks in itertools.zip_longest(*known):
        run = functools.partial(module.causal, blocks=blocks)
        found = causal.both_ways(run)(*drawn, live)
        for x, want in zip(found, wants, strict=True):
          off = np.abs(np.asarray(x, np.float64) - want).max()
          assert off <= 0.02 * np.abs(want).max()
          assert not np.any(np.asarray(x)[:, :, live * x.shape[2] // K :])


@pytest.mark.parametrize('name', NAMES)
def test_a_model_with_its_gradient(name):
  """Scanned, with remat; its layers are of different widths."""
  cfg = conftest.make_config(D=D, H=H, F=F, V=256, context=TOKENS)
  arrays = jax.device_get(
    (
      conftest.make_params(cfg),
      conftest.make_masks(cfg),
      conftest.make_tokens(cfg, batch=2, length=TOKENS + 1),
    )
  )

  def run(name, dtype):
    compute = model.Compute(kernels=name, dtype=dtype, remat='full')
    loss = functools.partial(model.loss, cfg=cfg, compute=compute)
    return jax.jit(jax.value_and_grad(loss))(*arrays)

  value, grads = run(name, 'bfloat16')
  with on_the_cpu():
    want, wants = run('xla', 'float32')
  np.testing.assert_allclose(value, want, rtol=0.01)
  for x, y in zip(jax.tree.leaves(grads), jax.tree.leaves(wants), strict=True):
    x, y = (np.asarray(z, np.float64) for z in (x, y))
    assert np.linalg.norm(x - y) <= 0.1 * np.linalg.norm(y)


@pytest.mark.parametrize('name', [x for x in NAMES if x != 'xla'])
def test_blocks_are_timed_and_used(name, tmp_path):
  """By a clock that runs."""
  path = tmp_path / 'blocks.json'
  rows = [autotune.tune(name, 'nn', *SIZES.values(), 'bfloat16', 'n')]
  if name in kernels.PLATFORMS:
    shape = 1, TOKENS, K, G, H
    rows += [
      autotune.tune_attention(f'{name}_attention', form, shape, 'bfloat16')
      for form in forms.ATTENTION
    ]
  autotune.store(path, rows)
  try:
    assert autotune.use(path) == len(rows)
    for row in rows:
      assert 0 < row['seconds'] < 10
      key = [row[x] for x in ('implementation', 'form', 'm', 'n', 'k', 'dtype')]
      assert dataclasses.asdict(autotune.choice(*key)) == row['blocks']
  finally:
    autotune.use(None)
