"""What the benchmark of the kernels compares, and how it times."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effllm_jax import errors
from effllm_jax.kernels import autotune
from experiments import bench_blocks
from experiments import bench_products
from tests import conftest
from tests import runs


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_a_wrong_product_is_one_line(dtype):
  rng = np.random.default_rng(0)
  want = jnp.asarray(rng.standard_normal((64, 96)), dtype)
  limit = bench_products.TOLERANCE[dtype]
  compare = lambda got: bench_products.compare('it', [got], [want], limit)
  # Beyond the extents anything goes.
  padded = jnp.full((80, 128), jnp.nan, dtype)
  right = padded.at[:64, :96].set(want)
  compare(right)
  for wrong in (jnp.nan, want[7, 9] + 0.1):
    with pytest.raises(errors.InputError, match=r'^it differs .* 1 of 6,144'):
      compare(right.at[7, 9].set(wrong))


@pytest.mark.parametrize('model', ['3b', '960x', '0x64', '64x64x64'])
def test_a_layer_of_no_shape_is_one_line(model):
  done = conftest.command('bench_kernels', f'--model={model}')
  runs.refused(done, f'--model={model} is none of 135m, 1.7b')


def test_channels_that_make_no_pairs_are_one_line():
  done = conftest.command('bench_kernels', '--model=64x64x2x1x7')
  runs.refused(done, '--model=64x64x2x1x7 has 7 channels in a head, which are ')


def test_the_command_times_a_layer_of_any_shape():
  done = conftest.command(
    'bench_kernels', '--model=16x48x2x1x8', '--tokens=8', '--seq_len=4',
    '--live=0.01', '--repeats=1', '--implementations=xla',
  )  # fmt: skip
  assert done.returncode == 0, done.stderr
  for sizes in ('8 48 16', '16 48 8', '2x4 2x1x8 16'):
    assert sizes in done.stdout
  for live in ('n 2%', 'k 2%', 'm 2%', 'heads 50%'):
    assert live in done.stdout


def test_texts_that_do_not_fill_a_micro_batch_are_one_line():
  done = conftest.command('bench_kernels', '--tokens=8', '--seq_len=3')
  runs.refused(done, '--tokens=8 are no whole number of texts of --seq_len=3')


def cases():
  """Of a layer that is small, but not all of one size."""
  products = bench_products.cases(32, 48, 16)
  return products + bench_blocks.cases(32, 48, (3, 2, 8), 2, 8)


@pytest.mark.parametrize('case', cases(), ids=lambda x: f'{x.name} {x.what}')
def test_every_implementation_is_compared_at_every_width(case, monkeypatch):
  once = lambda run, *_: (autotune.repeated(run, 1), 1)
  monkeypatch.setattr(autotune, 'enough', once)
  monkeypatch.setattr(autotune, 'seconds', lambda call: 2.0)
  medians = lambda case: bench_products.medians(
    case, [1, 0.6, 0.001], ['xla', 'bucket'], 'float32', 1
  )
  third, size = case.size // 3, case.size
  widths = [size, round(0.6 * size), 1]
  assert third >= 1
  times = dict.fromkeys(('cut', 'xla', 'bucket'), 2.0)
  assert [*medians(case)] == [(width, times) for width in widths]

  def wrong(name, *arrays):
    *same, last = jax.tree.leaves(case.run(name, *arrays))
    return [*same, last * (1.01 + 0.01 * (name == 'bucket'))]

  where = f'^xla of {case.name} {case.size_text()}, {case.masked} 100%, differs'
  with pytest.raises(errors.InputError, match=where):
    next(medians(dataclasses.replace(case, run=wrong)))


def test_operations_are_those_that_xla_counts():
  """Who reads whole squares of scores, so twice those below the diagonal."""
  tokens, heads = 128, (3, 2, 16)
  swiglu, _, _, _ = bench_blocks.cases(64, 96, heads, 1, tokens)
  *_, attention, _ = bench_blocks.cases(64, 96, heads, 1, 2 * tokens)
  *_, shorter, _ = bench_blocks.cases(64, 96, heads, 1, tokens)

  def counted(case, width):
    arrays = [x.draw(0, 'float32') for x in case.operands]
    cut = [x.cut(y, width) for x, y in zip(case.operands, arrays, strict=True)]
    return jax.jit(case.dense).lower(*cut).compile().cost_analysis()['flops']

  for width in (48, 96):
    assert 1 < counted(swiglu, width) / swiglu.flops(width) < 1.05
  for width in (1, 3):
    # Half of the tokens, each with as many keys.
    ratio = counted(shorter, width) / (attention.flops(width) / 2)
    assert 1 < ratio < 1.1
  for case in (swiglu, shorter):
    assert case.flops(3) == pytest.approx(3 * case.flops(1))


def test_the_roofline_counts_what_is_alive_once():
  by_hand = {
    # x and dy, gate, up and down, and as much again that is written.
    'swiglu': 2 * (2 * 16 * 32 * 2 + 3 * 32 * 24 * 4),
    # x and dy; wq, wk, wv and wo of two heads.
    'attention': 2 * (2 * 16 * 32 * 2 + 2 * (2 + 1 + 1 + 2) * 32 * 8 * 4),
  }
  for case in bench_blocks.cases(32, 48, (3, 2, 8), 2, 8):
    if case.what != 'alone':
      width = {'swiglu': 24, 'attention': 2}[case.name]
      seconds = case.roofline(width, 'bfloat16', math.inf, 1.0)
      assert seconds == by_hand[case.name] == pytest.approx(seconds)
      assert case.roofline(width, 'bfloat16', 1.0, math.inf) == (
        case.flops(width)
      )
  product, *_ = bench_products.cases(32, 48, 16)
  moved = (16 * 32 + 32 * 24 + 16 * 24) * 2
  assert product.roofline(24, 'bfloat16', math.inf, 1.0) == moved


@pytest.mark.parametrize('axis', [0, 1])
def test_zeros_beyond_an_extent_of_k(axis):
  a = bench_products.zeroed(jnp.ones((6, 6)), axis, 4)
  assert a.sum(1 - axis).tolist() == [6] * 4 + [0] * 2


def test_the_peak_is_that_of_random_numbers(monkeypatch):
  """A GPU that its power limits multiplies ones faster."""
  seen = []
  monkeypatch.setattr(
    bench_products,
    'timed',
    lambda product, *operands: seen.append(operands) or (lambda: 2.0),
  )
  peak, bandwidth = bench_products.peak(jnp.dtype('bfloat16'))
  (a, b), (long,) = seen
  for x in (a, b):
    assert x.dtype == jnp.bfloat16
    assert abs(x.mean()) < 0.1 and 0.9 < x.std() < 1.1
  assert not jnp.array_equal(a, b)
  assert peak == len(a) ** 3 and bandwidth == long.nbytes


def test_the_time_is_that_of_one_product(monkeypatch):
  monkeypatch.setattr(
    autotune, 'enough', lambda product, *_: (autotune.repeated(product, 8), 8)
  )
  monkeypatch.setattr(autotune, 'seconds', lambda call: float(call()))
  assert bench_products.timed(lambda x: 2 * x, jnp.float32(4.0))() == 1.0
