import jax
import numpy as np
import pytest

from experiments import bench_setup
from experiments.configs import smollm2_135m
from tests import conftest


@pytest.mark.parametrize('kernels', [None, 'xla_loop'])
@pytest.mark.parametrize('score', [False, True])
def test_a_step_can_be_called_again_and_again(kernels, score):
  """A config with a teacher is timed without it."""
  config = smollm2_135m.get_config()
  changes = {
    key: value
    for key, value in conftest.small_run('', '').items()
    if key not in ('source', 'data.text')
  }
  config.update_from_flattened_dict(changes | {'distill.weight': 0.5})
  cfg = conftest.make_config(V=259, D=32, F=48, K=2, G=2, H=8)
  bench = bench_setup.make(config, cfg)
  state = bench.fresh(cfg)
  before = jax.tree.map(np.array, state.params)
  step = bench.step(state, cfg, score=score, kernels=kernels)
  for _ in range(2):
    state, numbers = step(state)
  assert int(state.step) == 2
  assert np.isfinite(numbers['loss'])
  assert int(state.prune.count) == 2 * score
  assert np.any(before.layers.wo != state.params.layers.wo)
