"""What the benchmark of the kernels compares."""

import jax.numpy as jnp
import numpy as np
import pytest

from effllm_jax import errors
from experiments import bench_products


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


@pytest.mark.parametrize('letters', ['mk', 'km'])
def test_zeros_beyond_an_extent_of_k(letters):
  a = bench_products.zeroed(jnp.ones((6, 6)), letters, 4)
  k = letters.index('k')
  assert a.sum(1 - k).tolist() == [6] * 4 + [0] * 2
