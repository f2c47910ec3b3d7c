import itertools

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


def test_calls_take_turns_and_the_first_round_does_not_count(monkeypatch):
  clock = [0.0]
  monkeypatch.setattr(bench_setup.time, 'perf_counter', lambda: clock[0])
  made = {'a': [], 'b': []}

  def call(name, seconds):
    # The first one compiles.
    clock[0] += seconds if made[name] else 100.0
    made[name].append(clock[0])

  calls = {'a': lambda: call('a', 1.0), 'b': lambda: call('b', 2.0)}
  assert bench_setup.medians(calls, 2) == {'a': 1.0, 'b': 2.0}
  assert [len(x) for x in made.values()] == [3, 3]
  rounds = list(zip(*made.values(), strict=True))
  # One round ends before the next one begins.
  assert all(max(x) < min(y) for x, y in itertools.pairwise(rounds))
