"""What the benchmark of the kernels compares, and how it times."""

import jax.numpy as jnp
import numpy as np
import pytest

from effllm_jax import errors
from experiments import bench_products
from kernels import autotune
from tests import conftest
from tests import runs


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_a_wrong_product_is_one_line(dtype):
  rng = np.random.default_rng(0)
  want = jnp.asarray(rng.standard_normal((64, 96)), dtype)
  compare = lambda got: bench_products.compare('it', got, want, dtype)
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


def test_the_command_times_a_layer_of_any_shape():
  done = conftest.command(
    'bench_kernels', '--model=16x48', '--tokens=8', '--live=1,0.01',
    '--repeats=1', '--implementations=xla',
  )  # fmt: skip
  assert done.returncode == 0, done.stderr
  assert '8 48 16' in done.stdout and '16 48 8' in done.stdout


@pytest.mark.parametrize('letters', ['mk', 'km'])
def test_zeros_beyond_an_extent_of_k(letters):
  a = bench_products.zeroed(jnp.ones((6, 6)), letters, 4)
  k = letters.index('k')
  assert a.sum(1 - k).tolist() == [6] * 4 + [0] * 2


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
