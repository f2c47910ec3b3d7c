"""What repairs give back, as the benchmark of them measures it."""

import re

import numpy as np
import pytest

from effllm_jax import selection
from experiments import repair_trials
from experiments.configs import smollm2_135m
from tests import conftest
from tests import runs


@pytest.fixture(name='setting', scope='module')
def _setting(tmp_path_factory):
  return runs.Setting(tmp_path_factory.mktemp('trials'))


@pytest.fixture(name='trials', scope='module')
def _trials(setting):
  changes = conftest.small_run(setting.model, setting.text)
  config = smollm2_135m.get_config()
  config.update_from_flattened_dict(changes)
  return repair_trials.Trials(config, setting.root / 'cache', 64)


def test_a_repair_gives_back_what_a_prune_took(trials):
  batches = trials.batches(seed=0, count=3)
  assert [b.shape for b in batches] == [(2, 33)] * 3
  again = trials.batches(seed=0, count=3)
  assert all(map(np.array_equal, batches, again))
  assert not np.array_equal(trials.batches(seed=1, count=1)[0], batches[0])
  masks = trials.prune(batches, 0.1)
  left = selection.live_params(masks, trials.cfg) / trials.cfg.num_params()
  assert 0.85 < left <= 0.9
  # As many as the command repairs on: a program that both have.
  windows = np.concatenate(batches[:2])
  masked, found = trials.masked(masks), trials.repaired(masks, windows, 1.0)
  assert (masked.error_left, masked.seconds) == (1, 0)
  assert 0 < found.error_left < 1
  assert found.seconds > 0
  # Neither has touched the source.
  assert trials.masked(masks) == masked
  assert trials.repaired(masks, windows, 1.0)[:2] == found[:2]
  # A choice is one of its own, and strong damping repairs next to nothing.
  chosen = trials.repaired(masks, windows, 0.0)
  assert 0 < chosen.error_left < 1
  weak = trials.repaired(masks, windows, 1e9)
  assert weak.error_left == pytest.approx(1)
  assert weak.loss == pytest.approx(masked.loss, rel=1e-5)


def test_a_text_of_its_own_is_scored(setting, trials, tmp_path):
  text = tmp_path / 'mine.txt'
  text.write_text('Nothing that the model was trained on.')
  config = smollm2_135m.get_config()
  config.update_from_flattened_dict(
    conftest.small_run(setting.model, setting.text, **{'eval.text': str(text)})
  )
  mine = repair_trials.Trials(config, setting.root / 'cache', 64)
  batches = mine.batches(seed=0, count=1)
  np.testing.assert_array_equal(batches, trials.batches(seed=0, count=1))
  masks = mine.prune(batches, 0.1)
  assert mine.masked(masks).loss != trials.masked(masks).loss


def bench(setting, *flags):
  return conftest.command(
    'bench_repair', conftest.CONFIG_FILE, '--seeds=1', '--batches=2',
    '--tokens=64', f'--cache={setting.root / "cache"}', *flags,
    *conftest.flags_of(conftest.small_run(setting.model, setting.text)),
  )  # fmt: skip


def test_the_command(setting):
  done = bench(setting, '--share=0.1', '--damping=1')
  assert done.returncode == 0, done.stderr
  lines = done.stdout.partition('nats per token')[2].splitlines()
  rows = [re.split(r'  +', line.strip()) for line in lines if '.' in line]
  # On one batch and on both, of 64 tokens each.
  names = ['before', 'masked only', 'damping 1', 'damping 1']
  assert [row[0] for row in rows] == names
  assert [row[1] for row in rows[2:]] == ['64', '128']
  # Loss of the seed and mean, shares of the damage and of the error.
  assert rows[1][1] == rows[1][2]
  assert rows[1][3:5] == ['1.00', '1.00']
  assert all(0 < float(row[5]) < 1 for row in rows[2:])


def test_what_removes_nothing_is_refused(setting):
  runs.refused(bench(setting, '--share=0'), '--share=0 removes nothing')


@pytest.mark.parametrize(
  'flags, words',
  [
    (['--damping=1,x'], "--damping: could not convert string to float: 'x'"),
    (['--damping=-1'], '--damping=-1 has a number below 0'),
    (['--damping=nan'], '--damping=nan has a number below 0, or none'),
    (
      ['--config.data.batch_size=1', '--config.train.accumulate=1'],
      'data.batch_size 1: a damping is chosen',
    ),
  ],
)
def test_what_cannot_be_measured_is_refused(flags, words):
  done = conftest.command('bench_repair', conftest.CONFIG_FILE, *flags)
  runs.refused(done, words)
