"""The real commands on a small model and real text: run, resume, export."""

import json
import pathlib
import shutil

import jax
import ml_collections
import numpy as np
import pytest

from effllm_jax import checkpoints
from effllm_jax import events
from effllm_jax import forecast
from effllm_jax import plan as plan_lib
from effllm_jax import selection
from effllm_jax import sources
from effllm_jax import workdir as workdir_lib
from tests import conftest
from tests import runs


@pytest.fixture(scope='module', name='setting')
def _setting(tmp_path_factory) -> runs.Setting:
  return runs.Setting(tmp_path_factory.mktemp('end_to_end'))


@pytest.fixture(scope='module', name='finished')
def _finished(setting) -> pathlib.Path:
  """The workdir of an undisturbed run."""
  done = setting.main(setting.root / 'run')
  assert done.returncode == 0, done.stderr
  return setting.root / 'run'


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


def test_a_forecast_is_what_came(finished):
  """Prunes where it says, and no more operations than it says."""
  config = json.loads((finished / 'config.json').read_text())
  config = ml_collections.ConfigDict(config)
  cfg = sources.load_saved(finished / 'source').cfg
  found = forecast.of(
    plan_lib.make(config, cfg),
    cfg,
    seq_len=config.data.seq_len,
    accumulate=config.train.accumulate,
    batches=1,
  )
  trace = list(workdir_lib.read(finished / 'trace.jsonl'))
  assert found.prunes == tuple(row['step'] for row in trace)
  *_, last = runs.rows(finished, 'train')
  assert found.steps == last['step']
  # It shrank meanwhile.
  for purpose in ('train', 'score'):
    spent = last['flops'][purpose]
    assert 0.5 * found.flops[purpose] < spent < found.flops[purpose]
  assert not found.flops['repair'] and not found.flops['teacher']


def test_one_compile_between_two_shrinks(finished):
  """Invariant 6: and one more where scoring ends."""
  compiled = [
    row for row in runs.rows(finished, 'train') if row['compile_seconds']
  ]
  assert len(compiled) == len(runs.rows(finished, 'shrink')) + 2


def test_shrinks_keep_the_loss(finished):
  shrinks = runs.rows(finished, 'shrink')
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
  phases = [row['phase'] for row in runs.rows(finished, 'eval')]
  assert phases == ['source', 'pruned', 'final']
  # 24 steps teach a random model a little, pruned or not.
  first, _, last = (row['bits_per_byte'] for row in runs.rows(finished, 'eval'))
  assert last < first


def test_the_same_command_again_changes_nothing(setting, finished):
  before = (finished / 'metrics.jsonl').read_text()
  done = setting.main(finished)
  assert done.returncode == 0, done.stderr
  assert (finished / 'metrics.jsonl').read_text() == before


def test_another_config_is_refused_with_the_difference(setting, finished):
  done = setting.main(finished, **{'budget.target': 25_000.0})
  runs.refused(done, 'budget.target=22000.0 there, 25000.0 now', '--workdir')


def test_another_worker_count_is_refused(setting, finished):
  """Through the input pipeline itself, should a config have been edited."""
  workdir = setting.root / 'workers'
  shutil.copytree(finished, workdir)
  config = json.loads((workdir / 'config.json').read_text())
  config['data']['workers'] = 2
  (workdir / 'config.json').write_text(json.dumps(config))
  done = setting.main(workdir, **{'data.workers': 2})
  runs.refused(done, 'workers 0', '2')


@pytest.mark.parametrize(
  ('flag', 'words'),
  [
    (
      '--config.budget.targt=5',
      ("no key 'budget.targt'", "did you mean 'budget.target'?"),
    ),
    ('--config.bugdet.target=5', ("did you mean 'budget.target'?",)),
    ('--config.eval.txt=a.txt', ("did you mean 'eval.text'?",)),
    ('--config=no/such.py', ('no/such.py is not a file; set --config',)),
    ('--config=', ("'' is not a file; set --config",)),
    # A user's own may take the argument that follows a colon.
    (
      '--config=experiments/configs/smollm2_135m.py:8b',
      ('get_config() takes 0 positional arguments',),
    ),
    (
      '--config=experiments/configs/smolm2_135.py',
      (
        'smolm2_135.py is not a file; set --config; did you mean '
        'experiments/configs/smollm2_135m.py?',
      ),
    ),
    ('surplus', ("unexpected argument 'surplus'",)),
    (
      '--config.data.weights.text=1',
      ('are one value', '--config.data.weights="{'),
    ),
    (
      "--config.data.weights={'en.wiki': 1}",
      ("'en.wiki' has a dot", 'another name in the text'),
    ),
    ('--config.prune.every=soon', ('every', 'soon', 'write a whole number')),
    ('--config.budget.target=200M', ("'200M'", 'such as 0.5 or 200e6')),
    ('--config.repair.enabled=maybe', ("'maybe'", 'write true or false')),
    ('--config.budget.target=99999999', ('99,999,999', 'not below')),
    ('--config.budget.target=10', ('target 10 ', 'floors')),
    ('--config.source=no/such/model', ('no/such/model', '--config.source')),
    ('--config.data.text=no/such/text', ('no/such/text',)),
    ('--config.data.seq_len=4096', ('4096', '--config.data.seq_len')),
    ('--profile=20', ("--profile '20' is not first:last", '=20:24')),
    ('--profile=20:25', ('no step 25 to profile', 'ends with 24')),
  ],
)
def test_bad_values_end_in_one_line(setting, flag, words):
  workdir = setting.root / 'bad'
  done = setting.main(workdir, flag)
  runs.refused(done, *words)
  # Nothing was written: the corrected command can use the same workdir.
  assert not workdir.exists()


def test_an_unwritable_workdir_ends_in_one_line(setting):
  # A file where a folder should be: also root cannot write below it.
  (setting.root / 'file').write_text('')
  done = setting.main(setting.root / 'file' / 'run')
  runs.refused(done, 'cannot write', 'choose another --workdir')


def test_export_and_report_of_the_run(setting, finished):
  done = conftest.command('report', f'--workdir={finished}')
  assert done.returncode == 0, done.stderr
  assert 'held-out bits per byte' in done.stdout
  assert (finished / 'report' / 'index.html').stat().st_size > 10_000

  pytest.importorskip('torch', reason='export opens the folder in PyTorch')
  for arguments, size in (([], 24), (['--event=0'], None)):
    out = setting.root / f'out{len(arguments)}'
    done = conftest.command(
      'export', f'--workdir={finished}', f'--out={out}', *arguments,
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
  )  # fmt: skip
  runs.refused(done, 'is not empty', '--out')
  done = conftest.command(
    'export', f'--workdir={finished}', f'--out={setting.root / "x"}',
    '--event=99',
  )  # fmt: skip
  runs.refused(done, 'no event 99')


def test_selection_on_the_record_is_uniform(finished):
  _, prune, _, _ = checkpoints.restore_params(finished, event=0)
  live = selection.live_widths(prune.masks)
  assert len(set(live['ffn'].tolist())) == 1
  assert len(set(live['heads'].tolist())) == 1
