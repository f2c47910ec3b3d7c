"""What the benchmark beside PyTorch times: two steps of the same model."""

import multiprocessing
import threading

import pytest

from effllm_jax import errors
from experiments import bench_setup
from experiments import bench_workers
from experiments.configs import efficientllm_a
from tests import conftest


@pytest.fixture(name='config')
def _config(monkeypatch):
  cfg = conftest.make_config(V=512, D=32, N=2, K=2, G=2, H=8, F=64)
  monkeypatch.setitem(bench_setup.SHAPES, '135m', cfg)
  config = efficientllm_a.get_config()
  config.update_from_flattened_dict(
    {
      'budget.target': cfg.num_params() * 0.8,
      'prune.multiple_of.ffn': 8,
      'prune.multiple_of.stem': 8,
      'prune.floors.stem': 8,
      'data.seq_len': 16,
    }
  )
  return config.to_dict()


def served(work, *arguments, requests=('step', 'step', 'end')):
  """All that the process of one variant says, in a thread of this one."""
  ours, theirs = multiprocessing.Pipe()

  def serve():
    # Nobody is asked in vain, whatever went wrong.
    with theirs:
      bench_workers.serve(theirs, work, *arguments)

  thread = threading.Thread(target=serve)
  thread.start()
  facts = bench_workers.ask(ours)
  said = []
  for request in requests:
    ours.send(request)
    said.append(bench_workers.ask(ours))
  thread.join()
  return facts, said


def test_both_train_the_same_model(config):
  pytest.importorskip('torch')
  ours, first = served(bench_workers.ours, config, '135m', True)
  rival, second = served(bench_workers.rival, config, '135m')
  assert ours['params'] == rival['params'] > 0
  # Three forward passes and Adam, by hand in accounting_test.
  assert ours['flops'] > 6 * ours['tokens'] * ours['params'] * 0.5
  for *seconds, peak in (first, second):
    assert all(x > 0 for x in seconds) and peak > 10**7


def test_a_product_has_its_operations():
  facts, (seconds, _, _) = served(bench_workers.product, 'float32')
  assert facts['flops'] == 2 * 4096**3 and seconds > 0


def test_what_cannot_start_is_told(config):
  pytest.importorskip('torch')
  config['model']['dtype'] = 'bfloat16'
  with pytest.raises(errors.InputError, match='--rival=false'):
    served(bench_workers.rival, config, '135m')


def test_a_profile_names_what_a_step_computes(config):
  """Products among it, neither loops nor what the executor does itself."""
  requests = ('profile', 'step', 'end')
  _, (spent, _, _) = served(
    bench_workers.ours, config, '135m', False, requests=requests
  )
  assert any(kind.startswith(('dot', 'ynn')) for kind in spent), spent
  assert not any(kind.startswith(('while', 'Thunk', 'end')) for kind in spent)
  assert all(value > 0 for value in spent.values())
