"""The real commands on a small model and real text: run, resume, export."""

import json
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from effllm_jax import checkpoints
from effllm_jax import events
from effllm_jax import selection
from effllm_jax import workdir as workdir_lib
from tests import conftest


class Setting:
  """A small model, a text, a cache, and the command that prunes the model."""

  def __init__(self, root: pathlib.Path):
    self.root = root
    self.model = conftest.write_model_folder(root / 'model')
    self.text = conftest.write_text_folder(root / 'text')
    # As a user: what is compiled once is kept, below --cache.
    self.env = os.environ | {'JAX_ENABLE_COMPILATION_CACHE': 'true'}

  def arguments(self, workdir, *more, **changes) -> list[str]:
    flags = conftest.flags_of(
      conftest.small_run(self.model, self.text, **changes)
    )
    return [
      conftest.CONFIG_FILE,
      f'--workdir={workdir}',
      f'--cache={self.root / "cache"}',
      *flags,
      *more,
    ]

  def main(self, workdir, *more, **changes) -> subprocess.CompletedProcess:
    return conftest.command(
      'main', *self.arguments(workdir, *more, **changes), env=self.env
    )


@pytest.fixture(scope='module', name='setting')
def _setting(tmp_path_factory) -> Setting:
  return Setting(tmp_path_factory.mktemp('end_to_end'))


@pytest.fixture(scope='module', name='finished')
def _finished(setting) -> pathlib.Path:
  """The workdir of an undisturbed run."""
  done = setting.main(setting.root / 'run')
  assert done.returncode == 0, done.stderr
  return setting.root / 'run'


def rows(workdir, kind):
  return [
    row
    for row in workdir_lib.read(workdir / 'metrics.jsonl')
    if row['kind'] == kind
  ]


def refused(done: subprocess.CompletedProcess, *words: str) -> None:
  """Asserts one clear line and a non-zero exit."""
  lines = done.stderr.strip().splitlines()
  assert done.returncode == 2, done.stderr
  assert lines, done.stdout
  assert lines[-1].startswith('error: '), done.stderr
  assert 'Traceback' not in done.stderr
  for word in words:
    assert word in lines[-1], lines[-1]


def test_the_run_reaches_its_target_with_real_widths(finished):
  _, prune, cfg, step = checkpoints.restore_params(finished)
  assert step == 24
  assert cfg.num_params() <= 22_000
  # Nothing is masked any more: the arrays have the final shape.
  assert all(bool(m.all()) for m in jax.tree.leaves(prune.masks))
  assert cfg.F % 8 == 0
  assert cfg.D % 8 == 0
  assert len(checkpoints.read_events(finished)) >= 3


def test_live_parameters_never_exceed_the_schedule(finished):
  """Invariant 5, on the record of a real run."""
  trace = list(workdir_lib.read(finished / 'trace.jsonl'))
  assert len(trace) >= 8
  assert all(row['live_cost'] <= row['target_cost'] for row in trace)


def test_one_compile_between_two_shrinks(finished):
  """Invariant 6: and one more where scoring ends."""
  compiled = [row for row in rows(finished, 'train') if row['compile_seconds']]
  assert len(compiled) == len(rows(finished, 'shrink')) + 2


def test_shrinks_keep_the_loss(finished):
  shrinks = rows(finished, 'shrink')
  for row in shrinks:
    assert row['loss_after'] == pytest.approx(row['loss_before'], rel=1e-4)
    assert row['params_after'] < row['params_before']


def test_lineage_equals_the_trace(finished):
  """Survivors named by the events are those that no prune has removed."""
  record = checkpoints.read_events(finished)
  origin = events.lineage(record)
  _, prune, _, _ = checkpoints.restore_params(finished)
  jax.tree.map(np.testing.assert_array_equal, prune.origin, origin)
  removed = [
    row['removed'] for row in workdir_lib.read(finished / 'trace.jsonl')
  ]
  source = record[0].before
  for name, width in source.widths().items():
    gone = [item for row in removed for item in row[name]]
    kept = np.asarray(getattr(origin, name))
    if name == 'stem':
      assert sorted([*gone, *kept.tolist()]) == list(range(width))
      continue
    for n in range(source.N):
      of_layer = [index for layer, index in gone if layer == n]
      assert sorted([*of_layer, *kept[n].tolist()]) == list(range(width))


def test_evaluations_are_where_they_belong(finished):
  phases = [row['phase'] for row in rows(finished, 'eval')]
  assert phases == ['source', 'pruned', 'final']
  # 24 steps teach a random model a little, pruned or not.
  first, _, last = (row['bits_per_byte'] for row in rows(finished, 'eval'))
  assert last < first


def test_the_same_command_again_changes_nothing(setting, finished):
  before = (finished / 'metrics.jsonl').read_text()
  done = setting.main(finished)
  assert done.returncode == 0, done.stderr
  assert (finished / 'metrics.jsonl').read_text() == before


def same_result(a: pathlib.Path, b: pathlib.Path) -> None:
  """Asserts bit-identical models and equal records of two runs."""
  left, right = checkpoints.restore_params(a), checkpoints.restore_params(b)
  jax.tree.map(np.testing.assert_array_equal, left[:2], right[:2])
  assert left[2:] == right[2:]
  assert checkpoints.read_events(a) == checkpoints.read_events(b)
  assert (a / 'trace.jsonl').read_text() == (b / 'trace.jsonl').read_text()
  for kind in ('train', 'eval'):
    for x, y in zip(rows(a, kind), rows(b, kind), strict=True):
      for key in ('step', 'loss', 'bits_per_byte', 'live_params', 'grad_norm'):
        assert x.get(key) == y.get(key), (key, x, y)


def test_ten_kills_at_random_moments_change_nothing(setting, finished):
  """Invariant 8: SIGKILL, the same command again, the same bits at the end."""
  rng = random.Random(0)
  workdir = setting.root / 'killed'
  kills = 0
  command = [sys.executable, '-m', 'experiments.main',
             *setting.arguments(workdir)]  # fmt: skip
  deaths = []
  while True:
    process = subprocess.Popen(
      command, cwd=conftest.ROOT, env=setting.env,
      stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    if kills < 10:
      # A step later than the last death, or before the first: each kill hits
      # another part of the run (compiling, a step, a shrink, a save).
      wanted = len(deaths) * 2 + rng.randrange(3)
      deadline = time.monotonic() + 120
      while process.poll() is None and time.monotonic() < deadline:
        if reached(workdir) >= wanted:
          break
        time.sleep(0.01)
      time.sleep(rng.random() * 0.5)
      process.send_signal(signal.SIGKILL)
      process.wait()
      process.stderr.close()
      deaths.append(reached(workdir))
      kills += 1
      continue
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    break
  # The kills were spread over the run, and it was at work between them.
  assert len(set(deaths)) >= 5, deaths
  same_result(workdir, finished)


def reached(workdir) -> int:
  """Last step in the metrics of a running process; -1 before the first."""
  path = workdir / 'metrics.jsonl'
  if not path.exists():
    return -1
  # Not through workdir.read: the file may change under the reader.
  lines = path.read_bytes().split(b'\n')[:-1]
  return json.loads(lines[-1])['step'] if lines else -1


def test_another_config_is_refused_with_the_difference(setting, finished):
  done = setting.main(finished, **{'budget.target': 25_000.0})
  refused(done, 'budget.target=22000.0 there, 25000.0 now', '--workdir')


def test_another_worker_count_is_refused(setting, finished):
  """Through the input pipeline itself, should a config have been edited."""
  workdir = setting.root / 'workers'
  shutil.copytree(finished, workdir)
  config = json.loads((workdir / 'config.json').read_text())
  config['data']['workers'] = 2
  (workdir / 'config.json').write_text(json.dumps(config))
  done = setting.main(workdir, **{'data.workers': 2})
  refused(done, 'workers 0', '2')


def test_a_corrupted_newest_checkpoint_falls_back(setting, finished):
  workdir = setting.root / 'corrupted'
  shutil.copytree(finished, workdir)
  for path in (workdir / 'checkpoints' / '24').rglob('d/*'):
    os.truncate(path, path.stat().st_size // 2)
  done = setting.main(workdir)
  assert done.returncode == 0, done.stderr
  assert 'cannot be read' in done.stderr
  assert 'taking the one before' in done.stderr
  same_result(workdir, finished)


@pytest.mark.parametrize(
  ('flag', 'words'),
  [
    (
      '--config.budget.targt=5',
      ("no key 'budget.targt'", "did you mean 'target'?"),
    ),
    ('--config=no/such.py', ('--config cannot be read', 'no/such.py')),
    ('surplus', ("unexpected argument 'surplus'",)),
    ('--config.prune.every=soon', ('every', 'soon')),
    ('--config.budget.target=99999999', ('99,999,999', 'not below')),
    ('--config.budget.target=10', ('target 10 ', 'floors')),
    ('--config.source=no/such/model', ('no/such/model', '--config.source')),
    ('--config.data.text=no/such/text', ('no/such/text',)),
    ('--config.data.seq_len=4096', ('4096', '--config.data.seq_len')),
  ],
)
def test_bad_values_end_in_one_line(setting, flag, words):
  workdir = setting.root / 'bad'
  done = setting.main(workdir, flag)
  refused(done, *words)
  # Nothing was written: the corrected command can use the same workdir.
  assert not workdir.exists()


def test_an_unwritable_workdir_ends_in_one_line(setting):
  # A file where a folder should be: also root cannot write below it.
  (setting.root / 'file').write_text('')
  done = setting.main(setting.root / 'file' / 'run')
  refused(done, 'cannot write', 'choose another --workdir')


def test_a_full_disk_ends_in_one_line_and_loses_nothing(setting, finished):
  """On a real file system of 2.6 MB that fills up while the run goes on."""
  disk = setting.root / 'disk'
  disk.mkdir()
  mounted = subprocess.run(
    ['mount', '-t', 'tmpfs', '-o', 'size=2600k', 'tmpfs', str(disk)],
    capture_output=True, check=False,
  )  # fmt: skip
  if mounted.returncode:
    pytest.skip('mounting a small file system needs root')
  try:
    done = setting.main(disk / 'run')
    refused(done, 'the disk is full')
    assert checkpoints.moments(disk / 'run')
    # With room again, the same command goes on to the same bits.
    subprocess.run(['mount', '-o', 'remount,size=64m', str(disk)], check=True)
    done = setting.main(disk / 'run')
    assert done.returncode == 0, done.stderr
    same_result(disk / 'run', finished)
  finally:
    subprocess.run(['umount', str(disk)], check=True)


def test_export_and_report_of_the_run(setting, finished):
  done = conftest.command('report', f'--workdir={finished}', env=setting.env)
  assert done.returncode == 0, done.stderr
  assert 'held-out bits per byte' in done.stdout
  assert (finished / 'report' / 'index.html').stat().st_size > 10_000

  pytest.importorskip('torch', reason='export opens the folder in PyTorch')
  for arguments, size in (([], 24), (['--event=0'], None)):
    out = setting.root / f'out{len(arguments)}'
    done = conftest.command(
      'export', f'--workdir={finished}', f'--out={out}', *arguments,
      env=setting.env,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    pruning = json.loads((out / 'pruning.json').read_text())
    assert size is None or pruning['step'] == size
    assert set(pruning['origin']) == {'heads', 'ffn', 'stem'}
    card = (out / 'README.md').read_text()
    for domain in json.loads((finished / 'text.json').read_text())['domains']:
      assert f'| {domain} ' in card
  done = conftest.command(
    'export', f'--workdir={finished}', f'--out={setting.root / "out0"}',
    env=setting.env,
  )  # fmt: skip
  refused(done, 'is not empty', '--out')
  done = conftest.command(
    'export', f'--workdir={finished}', f'--out={setting.root / "x"}',
    '--event=99', env=setting.env,
  )  # fmt: skip
  refused(done, 'no event 99')


def test_selection_on_the_record_is_uniform(finished):
  _, prune, _, _ = checkpoints.restore_params(finished, event=0)
  live = selection.live_widths(prune.masks)
  assert len(set(live['ffn'].tolist())) == 1
  assert len(set(live['heads'].tolist())) == 1
