"""What the benchmark of the kernels measures and compares."""

import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effllm_jax import errors
from experiments import bench_kernels


@pytest.mark.parametrize('platform', ['cpu', 'gpu'])
def test_calls_are_timed_many_at_a_time(monkeypatch, platform):
  """On an accelerator one wait for some 20 ms of them; not on a CPU."""
  monkeypatch.setattr(jax, 'default_backend', lambda: platform)
  queued, waits = [], []

  def wait(_):
    waits.append(len(queued))
    # A millisecond a call, and ten to be told of the end.
    time.sleep(0.001 * len(queued) + 0.01)
    queued.clear()

  monkeypatch.setattr(jax, 'block_until_ready', wait)
  seconds = bench_kernels._time(lambda: queued.append(None))
  assert waits == ([1] if platform == 'cpu' else [1, 2, 4, 8, 16])
  assert seconds >= (0.011 if platform == 'cpu' else 0.026 / 16)


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_a_wrong_product_is_one_line(dtype):
  rng = np.random.default_rng(0)
  want = jnp.asarray(rng.standard_normal((64, 96)), dtype)
  compare = lambda got: bench_kernels._compare('it', got, want, dtype)
  # Beyond the extents anything goes.
  padded = jnp.full((80, 128), jnp.nan, dtype)
  right = padded.at[:64, :96].set(want)
  compare(right)
  for wrong in (jnp.nan, want[7, 9] + 0.1):
    with pytest.raises(errors.InputError, match=r'^it differs .* 1 of 6,144'):
      compare(right.at[7, 9].set(wrong))


@pytest.mark.parametrize('letters', ['mk', 'km'])
def test_zeros_beyond_an_extent_of_k(letters):
  a = bench_kernels._zeroed(jnp.ones((6, 6)), letters, 4)
  k = letters.index('k')
  assert a.sum(1 - k).tolist() == [6] * 4 + [0] * 2
