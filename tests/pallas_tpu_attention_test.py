"""Attention for a TPU: run by Pallas' interpreters, lowered for a TPU."""

import functools
import math
import re

import jax
from jax.experimental.pallas import tpu as pltpu
import jax.numpy as jnp
import numpy as np
import pytest

from effllm_jax.kernels import forms
from effllm_jax.kernels import pallas_tpu_attention as attention
from tests import causal

K, G, H = 3, 2, 16
ROWS = 128
# One block, half empty; two of them, the last half empty; three full ones.
LENGTHS = (60, 200, 384)
EACH_LENGTH = pytest.mark.parametrize('T', LENGTHS)


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch):
  monkeypatch.setattr(attention, '_MOST_ROWS', ROWS)


def draw(T, B=1, dtype=np.float32):
  return causal.draw(T, K, G, H, B, dtype)


def both_ways(how=True, traces=None):
  run = functools.partial(attention.causal, interpret=how)
  return causal.both_ways(run, traces)


@EACH_LENGTH
def test_value_and_gradient_against_float64(T):
  """For any number of live heads in one trace; the dead are exactly zero."""
  arrays, traces = draw(T, B=2), []
  run = both_ways(traces=traces)
  for live in range(K + 1):
    found = run(*arrays, live)
    for x, want in zip(found, causal.exact(*arrays, live), strict=True):
      np.testing.assert_allclose(x, want, rtol=1e-4, atol=1e-5)
      heads = live * x.shape[2] // K
      assert not np.any(x[:, :, heads:])
      assert np.all(np.any(x[:, :, :heads], (0, 1, 3)))
  assert len(traces) == 1


def test_blocks_are_those_of_the_length(monkeypatch):
  monkeypatch.undo()
  rows = lambda T, form='forward': [
    x.rows for x in attention.candidates(form, T, T, H, 'float32')
  ]
  assert {T: rows(T) for T in (1, 129, 512, 600, 1300, 2048)} == {
    1: [128], 129: [256], 512: [512, 256], 600: [384, 768, 256],
    1300: [512, 768, 256], 2048: [512, 1024, 256],
  }  # fmt: skip
  assert rows(512, 'nn') == []
  assert attention.candidates('dq', 512, 256, H, 'float32') == []
  assert attention.candidates('dq', 512, 512, H, 'float16') == []
  default = forms.attention_blocks(
    attention.candidates, [None] * 3, 600, H, 'float32'
  )
  assert default == (attention.Blocks(384),) * 3
  check_blocks(600, [None] * 3)
  with pytest.raises(ValueError, match=r'=640\) of dq: texts of 600 tokens'):
    check_blocks(600, [None, attention.Blocks(640), None])


@pytest.mark.parametrize('rows', [(384, 128, 128), (128, 384, 128)])
def test_each_kernel_has_blocks_of_its_own(rows):
  check_blocks(300, [attention.Blocks(x) for x in rows])


def check_blocks(T, blocks):
  """Asserts that results and gradients are those of float64."""
  run = functools.partial(attention.causal, blocks=blocks, interpret=True)
  arrays = draw(T)
  for x, want in zip(
    causal.both_ways(run)(*arrays, 2), causal.exact(*arrays, 2), strict=True
  ):
    np.testing.assert_allclose(x, want, rtol=1e-4, atol=1e-5)


def test_bfloat16_is_as_near_as_that_of_xla():
  arrays = draw(200, dtype=jnp.bfloat16)
  found = both_ways()(*arrays, K)
  assert all(x.dtype == jnp.bfloat16 for x in found)
  causal.check_as_near_as_xla(found, *arrays)


@pytest.mark.parametrize('live', [0, 1, K])
def test_right_on_memory_that_starts_as_nan(live):
  """Blocks are copied as on a TPU, to buffers that are NaN before."""
  arrays = draw(200)
  found = both_ways(pltpu.InterpretParams())(*arrays, live)
  for x, want in zip(found, causal.exact(*arrays, live), strict=True):
    np.testing.assert_allclose(x, want, rtol=1e-4, atol=1e-5)


def test_a_dead_head_has_no_step():
  """No kernel writes a block of it: its memory is the NaN that it was."""
  q, k, v, dout = (jnp.moveaxis(x, 1, 2) for x in draw(2 * ROWS))

  blocks = (attention.Blocks(ROWS),) * 3

  @jax.jit
  def run(q, k, v, dout, live):
    fn = functools.partial(attention._attend, blocks, True, live)
    out, pull = jax.vjp(fn, q, k, v)
    return out, *pull(jnp.moveaxis(dout, 2, 3))

  for live in range(K + 1):
    for x in run(q, k, v, dout, live):
      heads = live * x.shape[1] // K
      assert np.all(np.isfinite(x[:, :heads]))
      assert np.all(np.isnan(x[:, heads:]))


def test_nan_in_a_dead_head_does_no_harm():
  arrays = draw(200)
  dead = [x.at[:, :, x.shape[2] // K :].set(jnp.nan) for x in arrays]
  run = both_ways()
  for x, want in zip(run(*dead, 1), run(*arrays, 1), strict=True):
    np.testing.assert_array_equal(x, want)


def test_no_block_above_the_diagonal_is_read():
  """Forward no later key, backward no earlier query: NaN there is not seen."""
  q, k, v, dout = draw(3 * ROWS)
  run = both_ways()
  out, dq, dk, dv = run(q, k, v, dout, K)
  k_late, v_late = (x.at[:, 2 * ROWS :].set(jnp.nan) for x in (k, v))
  found, dq_found, *_ = run(q, k_late, v_late, dout, K)
  for x, want in ((found, out), (dq_found, dq)):
    np.testing.assert_array_equal(x[:, : 2 * ROWS], want[:, : 2 * ROWS])
    assert np.all(np.isnan(x[:, 2 * ROWS :]))
  q_early, dout_early = (x.at[:, :ROWS].set(jnp.nan) for x in (q, dout))
  _, _, *found = run(q_early, k, v, dout_early, K)
  for x, want in zip(found, (dk, dv), strict=True):
    np.testing.assert_array_equal(x[:, ROWS:], want[:, ROWS:])
    assert np.all(np.isnan(x[:, :ROWS]))


@EACH_LENGTH
def test_same_bits_as_arrays_without_the_dead_heads(T):
  """What a shrink does: fewer heads, all alive."""
  arrays, live = draw(T), 2
  cut = [x[:, :, : live * x.shape[2] // K] for x in arrays]
  run = both_ways()
  for x, want in zip(run(*arrays, live), run(*cut, live), strict=True):
    np.testing.assert_array_equal(x[:, :, : want.shape[2]], want)


lowered = functools.partial(causal.lowered, attention.causal, 'tpu')


@pytest.mark.parametrize('dtype', ['bfloat16', 'float32'])
@pytest.mark.parametrize('T', [100, 512, 2048, 8192])
@pytest.mark.parametrize(
  'heads', [(3, 3, 64), (32, 1, 64), (8, 4, 128)], ids=str
)
def test_lowers_for_a_tpu(T, dtype, heads, monkeypatch):
  monkeypatch.undo()
  text = lowered(T, dtype, heads)
  # Forward, again in the backward pass, and two gradients.
  assert text.count('tpu_custom_call') == 4
  for name in ('causal_forward', 'causal_dq', 'causal_dkv'):
    assert name in text


def test_no_array_grows_with_the_square_of_a_text(monkeypatch):
  monkeypatch.undo()

  def largest(T):
    shapes = re.findall(r'tensor<([\dx]+)x(?:bf16|f32)>', lowered(T))
    return max(math.prod(map(int, shape.split('x'))) for shape in shapes)

  assert largest(2048) == 32 * 2048 * 64
  assert largest(32768) == 16 * largest(2048)


def test_the_longest_text(monkeypatch):
  monkeypatch.undo()
  assert 'causal_dkv' in lowered(2**17)
  with pytest.raises(
    ValueError, match=r'of 131,073 tokens: .* up to 131,072; '
  ):
    lowered(2**17 + 1)


@pytest.mark.parametrize(
  ('dtypes', 'said'),
  [
    (('float16',) * 3, 'float16, float16, float16'),
    (('float32', 'bfloat16', 'float32'), 'float32, bfloat16, float32'),
  ],
)
def test_a_dtype_that_it_does_not_take(dtypes, said):
  arrays = [x.astype(dtype) for x, dtype in zip(draw(8), dtypes, strict=False)]
  with pytest.raises(ValueError, match=f'q, k, v are {said}; the attention'):
    attention.causal(*arrays, K)
