"""Whole runs of every part of the method, in one process, on a small model."""

import json

import jax
import numpy as np
import pytest

from effllm_jax import accounting
from effllm_jax import budgets
from effllm_jax import calibration as calibration_lib
from effllm_jax import checkpoints
from effllm_jax import data
from effllm_jax import digests
from effllm_jax import errors
from effllm_jax import events
from effllm_jax import finished
from effllm_jax import loop
from effllm_jax import model
from effllm_jax import overlap
from effllm_jax import repair
from effllm_jax import report
from effllm_jax import runlog
from effllm_jax import selection
from effllm_jax import sources
from effllm_jax import steps
from effllm_jax import structure
from effllm_jax import train
from effllm_jax import widths
from effllm_jax import workdir as workdir_lib
from experiments.configs import smollm2_135m
from tests import conftest
from tests import model_files
from tests import runs

# Ragged with repair and distillation, priced and measured in FLOPs, falling in
# two cubic stages, on Adam's momentum, calibrated, by the kernels of a user.
ALL = {
  'model.kernels': 'auto',
  'budget.kind': 'flops',
  'budget.context': 32,
  'budget.target': 60_000.0,
  'prune.policy': 'ragged',
  'prune.floors.heads': 0,
  'prune.floors.ffn': 8,
  'prune.schedule': 'cubic',
  'prune.stages': 2,
  'prune.rest': 0.6,
  'prune.every': 1,
  'prune.saliency': 'taylor1_momentum',
  'prune.calibrate': True,
  'repair.enabled': True,
  'repair.batches': 3,
  'repair.damping': 0.0,
  'distill.weight': 0.5,
  'distill.temperature': 2.0,
  'distill.top_k': 16,
  'shrink.threshold': 0.15,
  'checkpoint.every_steps': 10,
}


# Twelve steps, the last prune after the eighth, one shrink.
BRIEF = {
  'train.tokens': 12 * 64, 'prune.end_tokens': 8 * 64, 'shrink.threshold': 0.9,
  'checkpoint.every_steps': 10,
}  # fmt: skip


class Stop(BaseException):
  pass


class Setting(runs.Setting):
  """That, and a run of it in this process."""

  def run(self, name, **changes):
    config = smollm2_135m.get_config()
    changes = {key.replace('__', '.'): x for key, x in changes.items()}
    config.update_from_flattened_dict(
      conftest.small_run(self.model, self.text, **changes)
    )
    train.run(config, self.root / name, self.root / 'cache')
    return self.root / name

  def run_until(self, step, name, **changes):
    """Stops before a step, as if the process had ended there."""

    def one_step(run, now, original=loop.Loop._one_step):
      if now == step:
        raise Stop
      original(run, now)

    with pytest.MonkeyPatch.context() as patch:
      patch.setattr(loop.Loop, '_one_step', one_step)
      with pytest.raises(Stop):
        self.run(name, **changes)
    return self.root / name


@pytest.fixture(scope='module', name='setting')
def _setting(tmp_path_factory):
  return Setting(tmp_path_factory.mktemp('variants'))


@pytest.fixture(scope='module', name='everything')
def _everything(setting):
  return setting.run('everything', **ALL)


@pytest.fixture(scope='module', name='reference')
def _reference(setting):
  """The same run with the dense products of XLA."""
  return setting.run('reference', **ALL | {'model.kernels': 'xla'})


def trace(workdir):
  return list(workdir_lib.read(workdir / 'trace.jsonl'))


def test_a_ragged_run_keeps_within_its_budget(everything):
  """Invariant 5, in FLOPs; and the layers differ, on multiples."""
  for row in trace(everything):
    assert row['live_cost'] <= row['target_cost']
  _, prune, cfg, _ = checkpoints.restore_params(everything)
  cost = budgets.flops(cfg, 32)
  assert cost.live(prune.masks) <= 60_000
  assert cost.live(prune.masks) == trace(everything)[-1]['live_cost']
  widths = selection.live_widths(prune.masks)
  assert (widths['ffn'] % 8 == 0).all()
  assert np.ptp(widths['ffn']) > 0
  # The arrays are as wide as the widest layer.
  assert widths['ffn'].max() == cfg.F
  assert widths['stem'] == cfg.D


def test_shrinks_of_a_ragged_run_keep_the_loss(everything):
  """Masked = shrunk, on a real run; `train` would have stopped otherwise."""
  shrinks = runs.rows(everything, 'shrink')
  assert shrinks
  for row in shrinks:
    assert row['loss_after'] == pytest.approx(row['loss_before'], rel=1e-4)


def test_survivors_of_every_layer_move_to_the_front(everything):
  """After the last shrink an extent is a width: kernels go no further."""
  _, prune, _, _ = checkpoints.restore_params(everything)
  live = selection.live_widths(prune.masks)
  reached = selection.extents(prune.masks)
  for t in live:
    np.testing.assert_array_equal(live[t], reached[t])
  event = checkpoints.read_events(everything)[-1]
  assert event.live.ffn == live['ffn'].tolist()


def test_nothing_is_pruned_during_a_rest(everything):
  """Between the two stages, and again after the second."""
  # A rest is 0.6 of a stage, and the second stage has none: of the 16 steps
  # behind the second one 1.4 stages, of 4.6 steps and a rest of 6.9 each.
  stage = 16 / 1.4
  rest = 2 + 0.4 * stage, 2 + stage
  # A step after which the size is below that after the step before it.
  falls = [s for s in range(3, 19) if not rest[0] <= s - 1 < s <= rest[1]]
  assert falls == [3, 4, 5, 6, 7, 14, 15, 16, 17, 18]
  assert [row['step'] for row in trace(everything)] == falls
  sizes = {
    row['step']: row['live_params'] for row in runs.rows(everything, 'train')
  }
  for step, size in sizes.items():
    assert size == sizes[max((s for s in falls if s <= step), default=1)]


def test_prices_are_in_what_trials_measured(everything):
  """A live type costs next to nothing where no trial raised the loss."""
  found = {row['step']: row for row in trace(everything)}
  assert all(x['groups'] for x in found[min(found)]['trials'].values())
  calibration = calibration_lib.Calibration(0.9)
  for row in runs.rows(everything, 'train'):
    step = row['step']
    if step < min(found) or step > max(found):
      assert row['price'] is None
      continue
    if step in found:
      trials = found[step]['trials']
      calibration.add(trials)
    for t, (change, _) in calibration._sums.items():
      if trials[t]['groups']:
        prices = [row['price'][t]]
        if step in found:
          prices.append(found[step]['price'][t])
        assert {price < 1e-13 for price in prices} == {change <= 0}, (step, t)


def test_repair_never_raises_the_error_of_a_layer(everything):
  # Some prunes take nothing: one block had saved what several ask for.
  for row in trace(everything):
    assert ('repair' in row) == any(row['removed'].values())
  repaired = [row['repair'] for row in trace(everything) if 'repair' in row]
  found = [fit for row in repaired for fit in row.values()]
  _, _, cfg, _ = checkpoints.restore_params(everything)
  assert {len(fit['damping']) for fit in found} == {cfg.N}
  worked = [fit for fit in found if any(fit['damping'])]
  assert worked
  candidates = np.float32(repair.CANDIDATES)
  for fit in worked:
    assert np.isin(np.float32(fit['damping']), (0, *candidates)).all()
    assert 0 <= fit['error_with'] <= fit['error_without'] * (1 + 1e-4)
  # Pays: not only rounding.
  assert any(f['error_with'] < 0.9 * f['error_without'] for f in worked)


def test_the_divergence_from_the_teacher_is_logged(everything):
  train_rows = runs.rows(everything, 'train')
  # Before the first update the student is its own teacher.
  assert train_rows[0]['divergence'] == pytest.approx(0, abs=1e-5)
  assert train_rows[-1]['divergence'] > 1e-3


def test_flops_are_those_of_the_arrays_of_each_step(reference):
  """Summed again from the record: architectures, prunes and repairs."""
  meter = accounting.Meter(32, 64, remat='none')
  teacher = sources.load(
    json.loads((reference / 'config.json').read_text())['source'],
    '', params=False,
  ).cfg  # fmt: skip
  record = {e.step: e for e in checkpoints.read_events(reference)}
  pruned = {row['step']: row for row in trace(reference)}
  last = max(pruned)
  cfg = teacher
  for row in runs.rows(reference, 'train'):
    step = row['step']
    meter.step(cfg, step <= last, teacher)
    if step in pruned:
      meter.calibrate(cfg)
      fits = pruned[step].get('repair', {})
      solved = {k: np.count_nonzero(x['damping']) for k, x in fits.items()}
      # Heads and channels of a layer are inputs of a matrix of that layer.
      for t in ('heads', 'ffn') if fits else ():
        assert {n for n, x in enumerate(fits[t]['damping']) if x} == {
          n for n, _ in pruned[step]['removed'][t]
        }
      if fits:
        meter.repair(cfg, solved, 3, len(repair.CANDIDATES))
    assert row['flops'] == meter.spent
    if step in record:
      cfg = record[step].after
  assert all(x > 0 for x in meter.spent.values())


def test_kernels_prune_the_same_groups(everything, reference):
  """Ragged, the whole method: the choice for this CPU against plain XLA."""
  check_same_run(everything, reference)
  spent, dense = (
    [row['flops']['train'] for row in runs.rows(run, 'train')]
    for run in (everything, reference)
  )
  # Until the first prune all is alive; later what is dead is skipped.
  assert spent[0] == dense[0] and spent[-1] < dense[-1]


def check_same_run(a, b):
  """Bits differ, and so does the order in which a prune lists its groups."""
  for left, right in zip(trace(a), trace(b), strict=True):
    for t in left['removed']:
      assert sorted(left['removed'][t]) == sorted(right['removed'][t])
  losses = [[row['loss'] for row in runs.rows(run, 'train')] for run in (a, b)]
  np.testing.assert_allclose(*losses, rtol=1e-3)


@pytest.fixture(scope='module', name='plain')
def _plain(setting):
  """Variant A, where the arrays shrink as well; 12 steps, one shrink."""
  return setting.run('plain', **BRIEF)


def test_kernels_prune_the_same_groups_uniformly(setting, plain):
  done = setting.run('buckets', **BRIEF | {'model.kernels': 'bucket'})
  assert runs.rows(done, 'shrink')
  check_same_run(done, plain)


def test_a_teacher_that_waits_changes_nothing_before(setting, plain):
  """Every prune has the bits of a run without one; then it speaks."""
  late = setting.run(
    'late', **BRIEF | {'distill.weight': 0.5, 'distill.when': 'recovery'}
  )
  assert trace(late) == trace(plain)
  last = trace(late)[-1]['step']
  both = (runs.rows(run, 'train') for run in (late, plain))
  for row, want in zip(*both, strict=True):
    taught = row['step'] > last
    assert taught == ('divergence' in row) == (row['flops']['teacher'] > 0)
    # The loss before the first update that the teacher had a part in.
    if row['step'] <= last + 1:
      assert row['loss'] == want['loss']
  assert (
    runs.rows(late, 'train')[-1]['loss']
    != runs.rows(plain, 'train')[-1]['loss']
  )


def test_the_same_seed_gives_the_same_bits_also_across_a_stop(
  setting, everything
):
  """Invariant 8 for the whole method: stopped after step 13, and resumed.

  A checkpoint is all that this takes: what was logged before it may be lost.
  """
  setting.run_until(14, 'stopped', **ALL)
  log = setting.root / 'stopped' / 'trace.jsonl'
  pruned = {row['step']: row for row in trace(log.parent)}
  log.unlink()
  stopped = setting.run('stopped', **ALL)
  pruned |= {row['step']: row for row in trace(stopped)}
  for a, b in zip(
    checkpoints.restore_params(everything)[:2],
    checkpoints.restore_params(stopped)[:2],
    strict=True,
  ):
    jax.tree.map(np.testing.assert_array_equal, a, b)
  assert len(trace(stopped)) < len(pruned)
  assert trace(everything) == [*pruned.values()]
  both = (runs.rows(run, 'train') for run in (everything, stopped))
  for row, again in zip(*both, strict=True):
    assert row['flops'] == again['flops']
    assert row['price'] == again['price']


def test_in_bfloat16_a_teacher_is_its_student_and_checks_are_float32(
  setting, monkeypatch
):
  checks, batch_loss = [], steps.batch_loss

  def spied(*args, compute, **kwargs):
    checks.append((compute.dtype, compute.kernels))
    return batch_loss(*args, compute=compute, **kwargs)

  monkeypatch.setattr(steps, 'batch_loss', spied)
  # It ends with its last prune.
  half = setting.run(
    'half',
    **BRIEF
    | {
      'train.tokens': 8 * 64,
      'model.dtype': 'bfloat16',
      'distill.weight': 0.5,
    },
  )
  assert runs.rows(half, 'train')[0]['divergence'] == pytest.approx(0, abs=1e-5)
  (shrink,) = runs.rows(half, 'shrink')
  assert shrink['loss_after'] == pytest.approx(shrink['loss_before'], abs=1e-4)
  assert len(checks) == 2 and {*checks} == {('float32', 'xla')}


def test_a_report_can_be_drawn(everything):
  folder = report.build(everything)
  assert (folder / 'layers.png').stat().st_size > 1000


def test_a_family_goes_on_from_an_event(setting, everything, capsys):
  """A second, smaller target; survivors are still named by the first source."""
  parent = everything / 'events' / '0'
  child = setting.run(
    'child',
    **ALL
    | {
      'source': str(parent),
      'budget.target': 50_000.0,
      # One shrink, at the end.
      'shrink.threshold': 0.9,
    },
  )
  assert 'this run reads that text again' in capsys.readouterr().err
  # Its teacher is that event, dead groups and all: they agree before step 1.
  assert runs.rows(child, 'train')[0]['divergence'] == pytest.approx(
    0, abs=1e-5
  )
  params, prune, cfg, _ = checkpoints.restore_params(child)
  assert budgets.flops(cfg, 32).live(prune.masks) <= 50_000
  start = sources.load(parent, '')
  # What the child starts from is what the event recorded, dead groups and all.
  _, before, _, _ = checkpoints.restore_params(everything, 0)
  jax.tree.map(np.testing.assert_array_equal, start.masks, before.masks)
  known = sources.load_saved(child / 'source')
  # A resume tells it from another event: both have the digest of the root.
  assert start.saved == known.saved == digests.identity(parent)
  jax.tree.map(np.testing.assert_array_equal, known.origin, before.origin)
  # Every survivor of the child was a survivor of the parent.
  origin = events.compose(known.origin, prune.origin)
  alive = np.asarray(prune.masks.ffn)
  for n in range(cfg.N):
    mine = set(np.asarray(origin.ffn)[n][alive[n]].tolist())
    theirs = np.asarray(before.origin.ffn)[n][np.asarray(before.masks.ffn)[n]]
    assert mine <= set(theirs.tolist())
  exported, made = finished.read(child, None)
  for t in structure.TYPES:
    mask = np.asarray(getattr(exported.masks, t))
    slots = np.asarray(made.pruning['origin'][t])
    assert (slots[~mask] == -1).all()
    # The same groups, layer by layer, in another order.
    for row, live, of in zip(
      *map(np.atleast_2d, (slots, getattr(prune.masks, t), getattr(origin, t))),
      strict=True,
    ):
      assert sorted(row[row >= 0]) == sorted(of[live])
  # Its report tells what it did, not what its parent had done.
  assert selection.live_params(start.masks, start.cfg) < start.cfg.num_params()
  log, rest = runlog.read(child), selection.live_widths(prune.masks)
  cost = budgets.flops(start.cfg, 32).live(start.masks)
  assert log.source_cost() == cost
  assert log.source_params() == selection.live_params(start.masks, start.cfg)
  for t, width in selection.live_widths(start.masks).items():
    assert log.source_widths()[t] == width.mean()
    if t != 'stem':
      began, ended = log.layer_widths(t, [0, np.inf])
      np.testing.assert_array_equal(began, width)
      np.testing.assert_array_equal(ended, rest[t])
  assert overlap.read(child).start == overlap.read(everything, 0).alive
  # And still works: an embedding row of the child is made of live channels.
  assert params.embed.shape == (cfg.V, cfg.D)


def test_a_trimmed_export_goes_on_like_an_event(setting, everything):
  """As it may have been trained further in PyTorch meanwhile."""
  made, _ = finished.read(everything, 0)
  folder = setting.root / 'trimmed'
  model_files.write_trimmed(made, folder)
  changes = {'budget.target': 50_000.0, 'shrink.threshold': 0.9}
  child = setting.run('on', **ALL | {'source': str(folder)} | changes)
  start = sources.load(folder, '')
  assert np.ptp(widths.of_layers(start.masks)['ffn']) > 0
  # Its teacher is that folder: they agree before step 1.
  first = runs.rows(child, 'train')[0]
  assert first['divergence'] == pytest.approx(0, abs=1e-5)
  tokens = conftest.make_tokens(start.cfg)
  here, there = (
    conftest.forward(x.params, x.masks, tokens, x.cfg)[0] for x in (start, made)
  )
  np.testing.assert_allclose(here, there, atol=1e-5)
  log = runlog.read(child)
  assert log.source_params() == selection.live_params(start.masks, start.cfg)
  _, prune, cfg, _ = checkpoints.restore_params(child)
  assert budgets.flops(cfg, 32).live(prune.masks) <= 50_000
  began = overlap.read(child).start
  for t, live in widths.of_layers(start.masks).items():
    assert [sorted(x) for x in began[t]] == [list(range(k)) for k in live]


def test_new_weights_in_a_ragged_shape(setting, everything):
  """Where a layer was cut it stays cut, and nothing of the source is left."""
  source = checkpoints.moments(everything)[0]
  # Four steps at rates at which no weight gets far.
  scratch = setting.run(
    'scratch',
    **{
      'source': str(source.path),
      'init': 'random',
      'seed': 3,
      'prune.policy': 'none',
      'train.tokens': 4 * 64,
      'optimizer.warmup_tokens': 0,
      'optimizer.peak': 1e-9,
      'optimizer.end': 1e-9,
    },
  )
  params, prune, cfg, step = checkpoints.restore_params(scratch)
  assert step == 4 and cfg == source.cfg
  masks = checkpoints.read_prune(source).masks
  assert np.ptp(np.asarray(masks.ffn).sum(-1)) > 0
  jax.tree.map(np.testing.assert_array_equal, prune.masks, masks)
  close = lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6)
  jax.tree.map(close, params, model.init(jax.random.key(3), cfg))
  trained = runs.rows(scratch, 'train')
  assert {row['target_cost'] for row in trained} == {None}
  assert trained[-1]['flops']['score'] == 0
  assert [row['phase'] for row in runs.rows(scratch, 'eval')] == [
    'source',
    'final',
  ]
  assert not checkpoints.read_events(scratch)
  page = report.build(scratch) / 'index.html'
  assert 'none: training only' in page.read_text()


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    ({'budget.target': 1e9}, 'is not below'),
    ({'prune.policy': 'uniform', 'prune.floors.heads': 1,
      'prune.floors.ffn': 8}, "'uniform' cannot go on from a source"),
  ],
)  # fmt: skip
def test_what_cannot_follow_an_event_is_refused(
  setting, everything, changes, message
):
  source = str(everything / 'checkpoints' / '24')
  with pytest.raises(errors.InputError, match=message):
    setting.run(
      'refused',
      **ALL | {'source': source, 'budget.target': 30_000.0} | changes,
    )
  assert not (setting.root / 'refused').exists()


def test_a_folder_that_is_no_event_is_refused(setting, everything, tmp_path):
  (tmp_path / 'arch').mkdir()
  with pytest.raises(errors.InputError, match='is not a complete checkpoint'):
    setting.run('no', source=str(tmp_path))


def test_a_teacher_with_another_vocabulary_is_refused(setting, tmp_path):
  cfg = conftest.make_config(V=300, D=16, N=1, K=1, G=1, H=8, F=16)
  other = conftest.write_model_folder(tmp_path / 'teacher', cfg)
  with pytest.raises(errors.InputError, match='has another vocabulary'):
    setting.run('no', **{'distill.weight': 1.0, 'distill.teacher': str(other)})
  remedy = "'typo' is not known; set --config.distill.teacher to smollm2-135m"
  with pytest.raises(errors.InputError, match=remedy):
    setting.run('no', **{'distill.weight': 1.0, 'distill.teacher': 'typo'})


@pytest.mark.parametrize(('damping', 'share'), [(0.0, 0.25), (1.0, 0.0)])
def test_what_decides_on_a_damping_is_not_what_is_fitted(
  setting, monkeypatch, damping, share
):
  """Though a first prune comes before all batches that it asks for."""
  asked, recent = [], data.TrainIterator.recent

  def recorded(self, apart=0.0):
    asked.append((apart, len(self._recent)))
    return recent(self, apart)

  monkeypatch.setattr(data.TrainIterator, 'recent', recorded)
  # Prunes after steps 4 and 6.
  done = setting.run_until(
    7,
    f'apart-{damping:g}',
    **BRIEF
    | {
      'repair.enabled': True,
      'repair.batches': 8,
      'repair.damping': damping,
    },
  )
  shares, read = zip(*asked, strict=True)
  assert {*shares} == {share} and min(read) < 8
  assert [x for row in trace(done) for x in row.get('repair', [])]


def test_uniform_bytes_and_a_whole_repair(setting):
  """Variant B as in the paper, in bytes of a block format; one shot."""
  # Until its one prune has left smaller arrays.
  done = setting.run_until(
    4,
    'uniform',
    **BRIEF
    | {
      'budget.kind': 'bytes',
      'budget.format': 'q8_0',
      'budget.target': 28_000.0,
      'prune.schedule': 'oneshot',
      'prune.saliency': 'taylor2',
      'prune.multiple_of.ffn': 32,
      'prune.multiple_of.stem': 32,
      'prune.floors.stem': 32,
      'repair.enabled': True,
    },
  )
  (row,) = trace(done)
  assert row['tokens'] == 192
  assert row['live_cost'] <= 28_000
  _, prune, cfg, _ = checkpoints.restore_params(done)
  assert all(m.all() for m in jax.tree.leaves(prune.masks))
  assert budgets.stored_bytes(cfg, 'q8_0').of_config(cfg) <= 28_000 * 16
