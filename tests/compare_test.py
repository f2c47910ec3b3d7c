"""A whole comparison, on the small run: two arms, two seeds, both budgets."""

import contextlib
import dataclasses
import errno
import functools
import json
import math
import pathlib
import shutil
import types
from unittest import mock

import jax
import numpy as np
import pytest

from effllm_jax import atomic
from effllm_jax import checkpoints
from effllm_jax import comparison
from effllm_jax import errors
from effllm_jax import finished
from effllm_jax import plan as plan_lib
from effllm_jax import small_run
from effllm_jax import sources
from effllm_jax import train
from effllm_jax import untrusted
from experiments import arms
from experiments import choice_checks
from experiments import choices
from experiments import pretraining
from experiments import same_budget
from experiments import study_folder
from experiments.studies import small
from tests import budgets_test
from tests import comparison_test
from tests import conftest
from tests import hostile_runs_test
from tests import report_test
from tests import runs

# The dense arm gives the row of the source, and is the costliest.
ARMS = tuple(
  x for x in arms.ARMS if x.name in ('dense', 'ours_a', 'scratch_found')
)


@pytest.fixture(scope='module', name='root')
def _root(tmp_path_factory):
  root = tmp_path_factory.mktemp('compare')
  small_run.write_inputs(root)
  return root


def study_of(root, **changes) -> arms.Study:
  config = small_run.config(root / 'model', root / 'text')
  config.update_from_flattened_dict(
    # One shrink and one save: what costs time here is not the steps.
    {
      'prune.schedule': 'oneshot',
      'eval.tokens_per_domain': 128,
      'eval.every_tokens': 10_000,
      'checkpoint.every_steps': 100,
    }
    | changes
  )
  return arms.Study(config, ARMS)


def choose(*names, seeds=(0, 1), budgets=('tokens', 'flops')):
  chosen = tuple(x for x in ARMS if x.name in names)
  return choices.Choice(chosen, seeds, budgets)


def compare(root, choice, **changes):
  return same_budget.run(
    study_of(root, **changes), 'mini', root / 'runs', root / 'cache', choice
  )


def test_a_study_from_start_to_end(root, monkeypatch):
  live, train_run = [], train.run

  def run(*args):
    live.append(len(jax.local_devices()[0].client.live_executables()))
    train_run(*args)

  def ask(model):
    size = float(model.cfg.num_params())
    facts = {'metric': 'acc', 'items': 1, 'limit': 7, 'stderr': 0.0}
    return [{'task': 'piqa', 'value': size, **facts}]

  monkeypatch.setattr(train, 'run', run)
  runner = same_budget.Runner
  monkeypatch.setattr(
    same_budget, 'Runner', lambda *args: runner(*args[:-1], ask)
  )
  made = compare(root, choose('dense', 'ours_a'))
  # No run finds programs of those before it in memory, of which there is only
  # room for those of some thirty.
  assert len(live) == 6 and max(live) <= live[0]
  folder = root / 'runs' / 'mini'
  rows = comparison.read(folder / 'results.jsonl')
  keys = [row.key for row in rows]
  assert len({*keys}) == len(keys) == 2 * 2 * 2 + 2
  total = {row.key: row.total_flops for row in rows}
  most = max(total['tokens', 'dense', seed] for seed in (0, 1))
  for seed in (0, 1):
    assert total['tokens', 'ours_a', seed] < 0.9 * most
    for arm in ('dense', 'ours_a'):
      assert abs(total['flops', arm, seed] / most - 1) <= 0.02
  found = {row.key: row for row in rows}
  assert len({row.tokens for row in rows if row.budget == 'tokens'}) == 2
  assert (
    found['flops', 'ours_a', 0].tokens > found['tokens', 'ours_a', 0].tokens
  )
  for row in rows:
    assert math.isfinite(row.bits_per_byte)
    pruned = row.arm == 'ours_a'
    assert (row.live_params <= 20_000) == pruned, row.key
    # Each model was asked itself.
    assert [x['value'] for x in row.tasks] == [row.live_params], row.key
  source = found['tokens', 'source', 1]
  assert (source.tokens, source.total_flops) == (0, 0)
  assert source.bits_per_byte == found['tokens', 'source', 0].bits_per_byte
  assert [t.title.split(',')[0] for t in made[::4]] == [
    'Equal training tokens', 'Equal FLOPs',
  ]  # fmt: skip
  assert [x[0] for x in made[0].rows] == ['source', 'dense', 'ours_a']

  # What no other arm starts from is gone.
  kept = sorted(folder.glob('runs/*/*/*/checkpoints'))
  assert [p.parents[1].name for p in kept] == ['ours_a', 'ours_a']
  assert not list(folder.glob('runs/*/*/*/events'))

  # A second call does nothing.
  before = (folder / 'results.jsonl').read_bytes()
  monkeypatch.setattr(train, 'run', None)
  assert compare(root, choose('dense', 'ours_a')) == made
  assert (folder / 'results.jsonl').read_bytes() == before


def test_a_model_that_is_kept_can_be_asked_later(root, tmp_path, monkeypatch):
  """Of what was asked before nothing is lost, and nothing is run again."""
  study = study_of(root)
  folder = study_folder.StudyFolder(
    study, tmp_path / 'mini', root / 'cache', study.config.source
  )
  choice = choose('dense', seeds=(0,))

  def run(*tasks, ask=None, **changes):
    asked = dataclasses.replace(choice, tasks=tasks, **changes)
    choice_checks.check_folder(folder, asked)
    runner = same_budget.Runner(folder, asked, ask)
    runner.run()
    assert not runner.failed

  def asking(*tasks):
    facts = {'metric': 'acc', 'items': 1, 'limit': 100, 'stderr': 0.0}

    def ask(model):
      size = float(sum(np.abs(x).sum() for x in jax.tree.leaves(model.params)))
      return [{'task': task, 'value': size, **facts} for task in tasks]

    return ask

  run('piqa', ask=asking('piqa'), keep=True)
  first = folder.rows
  assert first.keys() == choice.keys | {('tokens', 'source', 0)}
  # The costliest arm's equal FLOPs are its run at equal tokens.
  left = {folder.left(key) for key in choice.keys}
  assert left == {*folder.path.glob('runs/tokens/dense/0-*')}
  values = {key: row.tasks[0]['value'] for key, row in first.items()}
  assert len({*values.values()}) == 2

  # A call that keeps nothing takes nothing from those before it.
  monkeypatch.setattr(train, 'run', None)
  run('piqa', 'boolq', ask=asking('piqa', 'boolq'))
  run('boolq')
  assert {
    key: [(x['task'], x['value']) for x in row.tasks]
    for key, row in folder.rows.items()
  } == {key: [('piqa', x), ('boolq', x)] for key, x in values.items()}

  # Equal FLOPs that are made of a row which was not asked.
  first.pop(('flops', 'dense', 0))
  comparison.write(folder.results, first.values())
  run('boolq', ask=asking('boolq'), budgets=('flops',))
  added = folder.rows['flops', 'dense', 0].tasks
  assert [x['task'] for x in added] == ['piqa', 'boolq']

  folder.mark(('tokens', 'dense', 0), None)
  folder.tidy()
  with pytest.raises(
    errors.InputError, match='dense, seed 0, was not asked mmlu with --limit='
  ):
    run('mmlu')


def test_of_runs_at_equal_flops_the_newest_keeps_its_model(root, tmp_path):
  """Those of a lower budget, which a costlier arm has raised, lose theirs."""
  compare(root, choose('ours_a', seeds=(0,), budgets=('tokens',)))
  ours = next((root / 'runs' / 'mini').glob('runs/tokens/ours_a/0-*'))
  rows = [
    comparison_test.row('ours_b', 0, 2.0, budget, tokens=tokens)
    for budget, tokens in (('tokens', 90), ('flops', 99))
  ]
  comparison.write(tmp_path / 'results.jsonl', rows)
  folder = study_folder.StudyFolder(study_of(root), tmp_path, None, None)
  key = ('flops', 'ours_b', 0)
  for tokens in (95, 99):
    run = shutil.copytree(ours, folder.workdir(key, tokens))
    folder.mark(key, run)
  folder.tidy()
  kept = {x.parent for x in tmp_path.glob('runs/*/*/*/checkpoints')}
  assert kept == {folder.left(key)} == {folder.workdir(key, 99)}


def test_what_a_model_is_asked(root, monkeypatch):
  pytest.importorskip('lm_eval')
  from effllm_jax import harness

  monkeypatch.setattr(harness, 'Model', lambda model, *_: model)
  monkeypatch.setattr(harness, 'run', lambda *args: args)
  model = sources.load(root / 'model', root / 'cache')
  choice = dataclasses.replace(choose('dense'), tasks=('piqa',), limit=7)
  asked, *rest = same_budget._ask('manager', choice, model)
  assert asked.cfg == model.cfg
  assert rest == ['manager', ('piqa',), 7]


def test_from_scratch_in_the_shape_that_was_found(root):
  """It is a run of its own weights; it exports as its last checkpoint."""
  compare(root, choose('ours_a', seeds=(0,), budgets=('tokens',)))
  choice = choose('scratch_found', seeds=(0,), budgets=('tokens',))
  folder = root / 'runs' / 'mini'
  ours = checkpoints.moments(next(folder.glob('runs/tokens/ours_a/0-*')))[0]
  config = arms.config(
    choice.arms[0], study_of(root).config, 0, {'found': ours.path}
  )
  train.run(config, root / 'scratch', root / 'cache')
  model, made = finished.read(root / 'scratch', None)
  assert made.step == 24
  assert made.pruning['events'] == []
  assert model.cfg == ours.cfg
  assert model.description.startswith('from scratch, in the shape of')
  first = made.run.last_eval('source')
  pruned = sources.load(ours.path, root / 'cache')
  assert made.params == pruned.cfg.num_params() == first['live_params']


def test_the_last_state_of_ours_is_kept_of_either_kind(root, tmp_path):
  """A run whose last step shrinks saves what it ended with as an event."""
  compare(root, choose('ours_a', seeds=(0,), budgets=('tokens',)))
  ours = next((root / 'runs' / 'mini').glob('runs/tokens/ours_a/0-*'))
  run = tmp_path / ours.relative_to(root / 'runs' / 'mini')
  event, older = run / 'events' / '0', run / 'checkpoints' / '20'
  for folder in (event, older):
    shutil.copytree(checkpoints.moments(ours)[0].path, folder)
  path = older / 'arch' / 'metadata'
  path.write_text(json.dumps(json.loads(path.read_text()) | {'step': 20}))
  hostile_runs_test.sign(older)
  rows = comparison.read(root / 'runs' / 'mini' / 'results.jsonl')
  row = next(x for x in rows if x.key == ('tokens', 'ours_a', 0))
  comparison.write(tmp_path / 'results.jsonl', [row])
  for name in ('config.json', 'text.json'):
    shutil.copy(ours / name, run)
  shutil.copytree(ours / 'source', run / 'source')
  study = study_of(root)
  folder = study_folder.StudyFolder(
    study, tmp_path, root / 'cache', study.config.source
  )
  folder.tidy()
  assert [x.path for x in checkpoints.moments(run)] == [event]
  (found,) = choose('scratch_found').arms
  assert folder.config(found, 0).source == str(event)
  # As those are who have lost it.
  folder.rows[row.key] = dataclasses.replace(row, live_params=1)
  with pytest.raises(errors.InputError, match='ended with 1; its last state'):
    folder.config(found, 0)
  # Which is of no concern to others, though its row is in the table.
  key = ('tokens', 'scratch_found', 0)
  folder.rows[key] = dataclasses.replace(row, arm='scratch_found')
  choice_checks.check_folder(folder, choose('dense', seeds=(0,)))
  with pytest.raises(errors.InputError, match='ended with 1; its last state'):
    choice_checks.check_folder(folder, choose('scratch_found', seeds=(0,)))


@pytest.mark.parametrize('phase', ['source', 'final'])
def test_a_log_without_an_evaluation_is_told(
  root, tmp_path, monkeypatch, phase
):
  """The run keeps its states: with the line put back its row is made."""
  study, lines = study_of(root), {}
  folder = study_folder.StudyFolder(
    study, tmp_path, root / 'cache', study.config.source
  )

  def run(config, workdir, cache):
    del config, cache
    path = workdir / 'metrics.jsonl'
    if not lines:
      report_test.write_run(workdir, steps=24)
      lines['all'] = path.read_text().splitlines(keepends=True)
      path.write_text(''.join(x for x in lines['all'] if phase not in x))
    else:
      path.write_text(''.join(lines['all']))

  monkeypatch.setattr(train, 'run', run)
  key = ('tokens', 'dense', 0)
  for _ in range(2):
    choice = choose('dense', seeds=(0,), budgets=('tokens',))
    runner = same_budget.Runner(folder, choice, None)
    runner.run()
    if runner.failed:
      said = f"has no '{phase}' evaluation, as after lines of it were lost; put"
      assert said in str(runner.failed.pop(key))
      assert not folder.rows
  assert {*folder.rows} == {key, ('tokens', 'source', 0)}


def test_a_state_that_cannot_be_read_is_not_tidied_away(
  root, tmp_path, monkeypatch
):
  """Nor those before it: nobody knows which of them is the last."""
  compare(root, choose('ours_a', seeds=(0,), budgets=('tokens',)))
  ours = next((root / 'runs' / 'mini').glob('runs/tokens/ours_a/0-*'))
  run = tmp_path / ours.relative_to(root / 'runs' / 'mini')
  shutil.copytree(ours, run)
  last = checkpoints.moments(run)[0].path
  # As a run leaves it that was killed before it was tidied.
  older = shutil.copytree(last, run / 'checkpoints' / '20')
  path = older / 'arch' / 'metadata'
  path.write_text(json.dumps(json.loads(path.read_text()) | {'step': 20}))
  hostile_runs_test.sign(older)
  rows = comparison.read(root / 'runs' / 'mini' / 'results.jsonl')
  row = next(x for x in rows if x.key == ('tokens', 'ours_a', 0))
  comparison.write(tmp_path / 'results.jsonl', [row])
  study = study_of(root)
  folder = study_folder.StudyFolder(
    study, tmp_path, root / 'cache', study.config.source
  )
  opened = untrusted.opened

  def stale(path, remedy):
    if pathlib.Path(path) == last / 'digests.json':
      raise errors.InputError('stale') from OSError(errno.ESTALE, 'Stale')
    return opened(path, remedy)

  monkeypatch.setattr(untrusted, 'opened', stale)
  before = sorted(run.rglob('*'))
  folder.tidy()
  assert sorted(run.rglob('*')) == before
  monkeypatch.setattr(untrusted, 'opened', opened)
  folder.tidy()
  assert [x.path for x in checkpoints.moments(run)] == [last]
  assert folder.found(0) == last
  # Gone all the same, it is told of, and nothing else goes with it.
  shutil.rmtree(last)
  before = sorted(run.rglob('*'))
  folder.tidy()
  assert sorted(run.rglob('*')) == before
  with pytest.raises(
    errors.InputError, match=r'ended as is gone; put it back, or delete .*line'
  ):
    folder.found(0)
  # An arm that was run from it is in the table, and is asked for no start.
  key = ('tokens', 'scratch_found', 0)
  folder.rows[key] = dataclasses.replace(row, arm='scratch_found')
  choice_checks.check_folder(folder, choose('scratch_found', seeds=(0,)))


def test_an_arm_that_fails_keeps_no_other_from_running(
  root, tmp_path, monkeypatch
):
  """But those that start from it, and equal FLOPs, which follow from all."""
  ran = []

  def one(runner, budget, arm, seed):
    ran.append((budget, arm.name, seed))
    if (arm.name, seed) == ('ours_a', 0):
      raise errors.InputError('1 steps in a row were skipped')
    runner.folder.keep(
      comparison_test.row(arm.name, seed, 2.0, budget, tokens=24 * 64)
    )

  monkeypatch.setattr(same_budget.Runner, '_one', one)
  choice = choose('ours_a', 'scratch_found', 'dense')
  call = lambda: same_budget.run(
    study_of(root), 'mini', tmp_path, root / 'cache', choice
  )
  named = '^tokens, ours_a, 0: 1 steps in a row were skipped; the others are'
  with pytest.raises(errors.InputError, match=named):
    call()
  assert sorted(ran) == [
    ('tokens', 'dense', 0),
    ('tokens', 'dense', 1),
    ('tokens', 'ours_a', 0),
    ('tokens', 'ours_a', 1),
    ('tokens', 'scratch_found', 1),
  ]
  assert 'dense' in (tmp_path / 'mini' / 'summary.md').read_text()
  # Called again, it is tried again, and it alone.
  ran.clear()
  with pytest.raises(errors.InputError, match=named):
    call()
  assert ran == [('tokens', 'ours_a', 0)]


def test_what_is_left_out_of_equal_flops_can_be_run_again(root, tmp_path):
  """Whatever arm is asked for, all that is left out of the tables is to do."""
  rows = [
    comparison_test.row(arm, 0, 2.0, budget)
    for budget in ('tokens', 'flops')
    for arm in ('ours_a', 'dense')
  ]
  costly = rows[1].flops | {'train': 2 * 10**13}
  rows[1] = dataclasses.replace(rows[1], flops=costly)
  comparison.write(tmp_path / 'results.jsonl', rows)
  folder = study_folder.StudyFolder(study_of(root), tmp_path, None, None)
  for arm in ('ours_a', 'dense'):
    runner = same_budget.Runner(folder, choose(arm, seeds=(0,)), None)
    assert runner._pending() == {('flops', arm, 0)}
  left = comparison.left_out(rows)
  assert left.endswith('run them again with --arms=ours_a,dense --seeds=0')


def test_a_run_that_replaces_a_row_goes_on(root, tmp_path):
  """Interrupted, it goes on from them; those of finished runs go."""
  rows = [
    comparison_test.row(arm, 0, 2.0, budget)
    for budget in ('tokens', 'flops')
    for arm in ('ours_b', 'dense')
  ]
  rows[1] = dataclasses.replace(
    rows[1], flops=rows[1].flops | {'train': 2 * 10**13}
  )
  comparison.write(tmp_path / 'results.jsonl', rows)
  states = [
    tmp_path / 'runs' / budget / 'ours_b' / '0-99' / 'checkpoints' / '40'
    for budget in ('tokens', 'flops')
  ]
  for folder in states:
    folder.mkdir(parents=True)
  study_folder.StudyFolder(study_of(root), tmp_path, None, None).tidy()
  assert [x.exists() for x in states] == [False, True]


def test_a_log_of_one_row_is_refused(root, tmp_path):
  """Before its run is trained."""
  for log_every in (23, 24):
    study = study_of(root, **{'train.log_every': log_every})
    folder = study_folder.StudyFolder(
      study, tmp_path, root / 'cache', study.config.source
    )
    if log_every == 23:
      choice_checks.check_folder(folder, choose('dense'))
    else:
      with pytest.raises(
        errors.InputError, match='24 leaves one row of the 24'
      ):
        choice_checks.check_folder(folder, choose('dense'))


def test_a_cost_that_still_falls_at_the_end_is_refused(root, tmp_path):
  """How much longer to train follows from what the last steps cost."""
  # Rows after 20 and 24 steps of 64 tokens; the last prune after 20 or 21.
  for end, refused in ((20 * 64, False), (20 * 64 + 1, True)):
    study = study_of(
      root,
      **{
        'prune.schedule': 'linear',
        'prune.end_tokens': end,
        'train.log_every': 5,
      },
    )
    folder = study_folder.StudyFolder(
      study, tmp_path, root / 'cache', study.config.source
    )
    check = functools.partial(choice_checks.check_folder, folder)
    check(choose('dense', 'ours_a', budgets=('tokens',)))
    check(choose('dense'))
    if refused:
      with pytest.raises(errors.InputError, match='ours_a still prunes after'):
        check(choose('ours_a'))
    else:
      check(choose('ours_a'))


def test_tokens_that_are_no_whole_step_are_rounded_up_as_in_a_run(
  root, tmp_path
):
  study = study_of(root, **{'train.tokens': 24 * 64 - 1})
  plan = plan_lib.make(study.config, small_run.CFG)
  assert plan.tokens(plan.steps) == 24 * 64

  def check(tokens):
    rows = [comparison_test.row('dense', 0, 2.0, tokens=tokens)]
    comparison.write(tmp_path / 'results.jsonl', rows)
    folder = study_folder.StudyFolder(
      study, tmp_path, root / 'cache', study.config.source
    )
    choice_checks.check_folder(folder, choose('dense', seeds=(0,)))

  check(24 * 64)
  with pytest.raises(errors.InputError, match='the study says 1,536'):
    check(23 * 64)


def test_a_seed_that_made_the_source_is_told(root, monkeypatch, capsys):
  study = study_of(root)
  made = dataclasses.replace(
    study,
    pretrained=pretraining.Recipe('here', small_run.CFG, study.config),
  )
  monkeypatch.setattr(
    same_budget.pretraining, 'make', lambda *_: study.config.source
  )
  monkeypatch.setattr(same_budget.Runner, 'run', lambda *_: None)
  monkeypatch.setattr(choice_checks, 'check_plans', lambda *_: None)
  for seeds, told in (((1, 2), False), ((0, 1), True)):
    choice = choose('dense', seeds=seeds)
    same_budget.run(made, 'mini', root / 'told', root / 'cache', choice)
    assert ('seed 0 is that of here too' in capsys.readouterr().err) == told


@pytest.mark.parametrize('finished_there', [True, False])
def test_processes_share_the_runs_of_a_workdir(
  root, tmp_path, monkeypatch, finished_there
):
  """What another one is at comes last, and is run where that one dies."""
  folder, other = (
    study_folder.StudyFolder(study_of(root), tmp_path, None, None)
    for _ in range(2)
  )
  choice = choose('dense', 'ours_a', 'scratch_found')
  runner = same_budget.Runner(folder, choice, None)
  at_work = contextlib.ExitStack()
  key = ('tokens', 'ours_a', 0)
  at_work.enter_context(atomic.locked(folder.lock(key), 'held'))
  ran, waited = [], []

  def one(budget, arm, seed):
    # Nobody else can take it.
    with pytest.raises(atomic.HeldError):
      at_work.enter_context(
        atomic.locked(folder.lock((budget, arm.name, seed)), 'held')
      )
    ran.append((budget, arm.name, seed))
    folder.keep(comparison_test.row(arm.name, seed, 2.0, budget))

  def warning(message):
    waited.append(message)
    if finished_there:
      other.keep(comparison_test.row('ours_a', 0, 1.5))
    at_work.close()

  monkeypatch.setattr(runner, '_one', one)
  monkeypatch.setattr(atomic.logging, 'warning', warning)
  runner.run()
  tokens = [
    *(('tokens', x, s) for s in (0, 1) for x in ('dense', 'ours_a')),
    ('tokens', 'scratch_found', 1),
  ]  # fmt: skip
  tokens.remove(key)
  assert {*ran[:4]} == {*tokens}
  last = ('tokens', 'scratch_found', 0)
  assert ran[4:6] == (
    [last, ('flops', 'dense', 0)] if finished_there else [key, last]
  )
  (said,) = waited
  assert said.endswith('holds ' + str(folder.lock(key)))
  rows = {x.key: x for x in comparison.read(tmp_path / 'results.jsonl')}
  assert len(rows) == 12 and len(ran) == 12 - finished_there
  assert rows[key].bits_per_byte == (1.5 if finished_there else 2.0)
  assert {x[0] for x in ran[5 if finished_there else 6 :]} == {'flops'}


def test_a_source_is_made_once(root, tmp_path, monkeypatch):
  """By the first process; others wait for it."""
  held = []

  def make(recipe, folder, cache):
    with pytest.raises(atomic.HeldError):
      stack = contextlib.ExitStack()
      stack.enter_context(atomic.locked(folder / 'lock', 'held'))
    held.append(recipe)
    raise errors.InputError('made')

  monkeypatch.setattr(same_budget.pretraining, 'make', make)
  study = small.study(small.CFG.num_params() // 2, 256_000)
  choice = choices.Choice(study.arms[:1], (1,), ('tokens',))
  with pytest.raises(errors.InputError, match='made'):
    same_budget.run(study, 'mini', tmp_path, root / 'cache', choice)
  assert held == [study.pretrained]


@pytest.mark.parametrize(
  ('choice', 'message'),
  [
    (choose('scratch_found', seeds=(7,)), 'add ours_a to --arms and tokens'),
    (choose('ours_a', seeds=(7,), budgets=('flops',)), 'add tokens to --budg'),
  ],
)
def test_an_arm_whose_start_is_missing_is_refused(
  root, monkeypatch, choice, message
):
  # Before a source is made, which would ask for its recipe here.
  monkeypatch.setattr(same_budget.pretraining, 'make', None)
  study = dataclasses.replace(study_of(root), pretrained=object())
  with pytest.raises(errors.InputError, match=message):
    same_budget.run(study, 'mini', root / 'new', root / 'cache', choice)
  assert not (root / 'new').exists()


def test_a_target_out_of_reach_is_refused_before_a_source_is_made(
  root, monkeypatch
):
  monkeypatch.setattr(same_budget.pretraining, 'make', None)
  floors = {'heads': 3, 'ffn': 512, 'stem': 192}
  study = small.study(small.CFG.num_params() // 2, 256_000, floors=floors)
  choice = choose('ours_a', budgets=('tokens',))
  with pytest.raises(
    errors.InputError, match=r'the size at the floors \(heads 3'
  ):
    same_budget.run(study, 'mini', root / 'new', root / 'cache', choice)
  assert not (root / 'new').exists()


@pytest.mark.parametrize('arm', ['dense', 'scratch_found'])
def test_a_target_out_of_reach_is_refused_whatever_is_chosen(
  root, tmp_path, arm
):
  """The study's own, which `ours_a` has, and the shape made by hand."""
  study = study_of(root, **{'budget.target': 10})
  folder = study_folder.StudyFolder(
    study, tmp_path, root / 'cache', study.config.source
  )
  with pytest.raises(errors.InputError, match=r'^budget\.target 10'):
    choice_checks.check_folder(folder, choose(arm, budgets=('tokens',)))


def test_a_shape_is_made_by_hand_where_an_arm_starts_from_it(
  root, tmp_path, capsys
):
  """And before any run, which a full disk would end."""
  study = study_of(root)
  (uniform,) = (x for x in arms.ARMS if x.name == 'scratch_uniform')
  choice = choices.Choice((uniform,), (0,), ('tokens',))
  new = lambda: study_folder.StudyFolder(
    study, tmp_path, root / 'cache', study.config.source
  )
  choice_checks.check_folder(new(), choose('dense', 'ours_a'))
  assert list(tmp_path.iterdir()) == []
  choice_checks.check_folder(new(), choice)
  (made,) = tmp_path.iterdir()
  cfg = sources.load(made, root / 'cache', params=False).cfg
  assert cfg.num_params() <= study.config.budget.target
  assert made.name == f'uniform-{cfg.num_params()}'
  assert capsys.readouterr().err.startswith('made by hand: heads ')
  # Another process, or a later call, finds it there.
  assert new().config(uniform, 0).source == str(made)
  assert capsys.readouterr().err == ''


def test_results_of_other_settings_are_refused(root, tmp_path):
  once = {'seeds': (0,), 'budgets': ('tokens',)}
  compare(root, choose('ours_a', **once))
  with pytest.raises(errors.InputError, match=r'0\.003 there, 0\.1 now'):
    compare(root, choose('ours_a', seeds=(0,)), **{'optimizer.peak': 0.1})
  # The table would be of both, whatever is run now.
  with pytest.raises(errors.InputError, match=r'0\.003 there, 0\.1 now'):
    compare(root, choose('dense', seeds=(5,)), **{'optimizer.peak': 0.1})
  tokens = 2 * study_of(root).config.train.tokens
  with pytest.raises(errors.InputError, match=f'the study says {tokens:,}'):
    compare(root, choose('dense', seeds=(5,)), **{'train.tokens': tokens})
  # Of the same path, or of another one.
  for key, name in (('source', 'model'), ('data.text', 'text')):
    other = shutil.copytree(root / name, tmp_path / name)
    compare(root, choose('ours_a', **once), **{key: str(other)})
    for path in other.rglob('*'):
      if path.suffix in ('.safetensors', '.txt'):
        data = bytearray(path.read_bytes())
        data[-5] ^= 1
        path.write_bytes(data)
    with pytest.raises(errors.InputError, match=r'(sha256|digest)=.* there'):
      compare(root, choose('ours_a', **once), **{key: str(other)})


def test_results_of_another_table_or_text_are_refused(
  root, tmp_path, monkeypatch
):
  """Only the loop of a run is left out."""
  cfg = sources.load(root / 'model', root / 'cache', params=False).cfg
  table = tmp_path / 'table.json'
  time = lambda k, f, d: d * (3e-4 * k + 2e-6 * f + 1e-3) + 1e-3 * k + 0.01
  more = lambda k, f, d: time(k, f, d) + 1e-4 * f
  budgets_test.write_table(table, cfg, more)
  text = tmp_path / 'mine.txt'
  text.write_text('To be scored on.')
  study = study_of(
    root,
    **{
      'budget.kind': 'ms',
      'budget.table': str(table),
      'eval.text': str(text),
      'budget.target': 0.8 * more(cfg.K, cfg.F, cfg.D),
    },
  )
  folder = study_folder.StudyFolder(
    study, tmp_path / 'runs', root / 'cache', study.config.source
  )
  choice = choose('ours_a', seeds=(0,), budgets=('tokens',))
  config = folder.config(choice.arms[0], 0)
  key = ('tokens', 'ours_a', 0)
  loop = types.SimpleNamespace(Loop=mock.MagicMock())
  monkeypatch.setattr(train, 'loop', loop)
  train.run(config, folder.workdir(key, config.train.tokens), root / 'cache')
  folder.keep(comparison_test.row('ours_a', 0, 2.0, tokens=24 * 64))
  choice_checks.check_folder(folder, choice)
  budgets_test.write_table(table, cfg, time)
  with pytest.raises(
    errors.InputError, match=r'^budget\.table .* is not known'
  ):
    choice_checks.check_folder(folder, choice)
  budgets_test.write_table(table, cfg, more)
  text.write_text('Another one.')
  with pytest.raises(
    errors.InputError, match=r'^eval\.text .* is not the text'
  ):
    choice_checks.check_folder(folder, choice)


def test_the_command_refuses_in_one_line(tmp_path):
  done = conftest.command(
    'compare',
    '--study=experiments/studies/small.py',
    '--arms=x',
    f'--workdir={tmp_path}/w',
  )
  runs.refused(done, "arm 'x' is not one of all, sensitivity, dense, ours_a")
  assert not (tmp_path / 'w').exists()
