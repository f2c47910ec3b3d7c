"""What the loop does when something inside it goes wrong."""

import dataclasses
import json
import shutil
import threading
import time
import types
from unittest import mock

import jax
import jax.numpy as jnp
import pytest
import safetensors.numpy

from effllm_jax import checkpoints
from effllm_jax import console
from effllm_jax import corpus
from effllm_jax import dataset
from effllm_jax import environment
from effllm_jax import errors
from effllm_jax import evaluate
from effllm_jax import finished
from effllm_jax import inputs
from effllm_jax import loop
from effllm_jax import model
from effllm_jax import ngrams
from effllm_jax import plan as plan_lib
from effllm_jax import pruning
from effllm_jax import runlog
from effllm_jax import sharding
from effllm_jax import sources
from effllm_jax import steps
from effllm_jax import text_folder
from effllm_jax import train
from effllm_jax import workdir as workdir_lib
from effllm_jax.kernels import autotune
from effllm_jax.kernels import pallas_tpu
from experiments.configs import smollm2_135m
from tests import budgets_test
from tests import conftest
from tests import ngrams_test


@pytest.fixture(scope='module', name='setting')
def _setting(tmp_path_factory):
  root = tmp_path_factory.mktemp('train')
  model = conftest.write_model_folder(root / 'model')
  text = conftest.write_text_folder(root / 'text')

  def run(workdir, **changes):
    config = smollm2_135m.get_config()
    config.update_from_flattened_dict(
      conftest.small_run(model, text, **changes)
    )
    train.run(config, root / workdir, root / 'cache')

  return run, root


def test_a_shrink_that_changes_the_loss_stops_the_run(setting, monkeypatch):
  run, root = setting
  # One shrink, after step 18.
  changes = {'shrink.threshold': 0.9}
  good, loss, precisions = steps.shrink_step, steps.batch_loss, set()

  def batch_loss(*arrays, **static):
    precisions.add(jax.config.jax_default_matmul_precision)
    return loss(*arrays, **static)

  def faulty(state, **arguments):
    state, kept = good(state, **arguments)
    layers = state.params.layers
    # As if values had been gathered with the indices of another layer.
    wrong = layers.replace(w_down=jnp.roll(layers.w_down, 1, axis=0))
    return state.replace(params=state.params.replace(layers=wrong)), kept

  monkeypatch.setattr(steps, 'batch_loss', batch_loss)
  monkeypatch.setattr(steps, 'shrink_step', faulty)
  with pytest.raises(RuntimeError, match=r'loss .* from \d\.\d+ to \d\.\d+'):
    run('shrink', **changes)
  # TF32 or bfloat16 would say less than the tolerance.
  assert precisions == {'highest'}
  assert checkpoints.read_events(root / 'shrink') == []
  # The last good checkpoint is there, and the mended code goes on from it.
  assert checkpoints.moments(root / 'shrink')[0].step == 15
  monkeypatch.undo()
  run('shrink', **changes)
  assert checkpoints.moments(root / 'shrink')[0].step == 24


@pytest.mark.parametrize('event', [None, 'an event'])
def test_rows_are_on_the_disk_before_the_moment_that_they_belong_to(event):
  """Or a resume would begin behind the end of its log."""
  run = mock.MagicMock()
  loop.Loop._save(run, 3, event)
  calls = [name for name, *_ in run.mock_calls]
  saved = calls.index('writer.save_event' if event else 'writer.save')
  assert {*calls[:saved]} >= {'metrics.sync', 'trace.sync'}


def test_the_last_evaluation_is_final_also_where_pruning_ends_with_it():
  config, cfg = smollm2_135m.get_config(), conftest.make_config(context=256)
  config.update_from_flattened_dict(
    conftest.small_run(
      '', '', **{'prune.end_tokens': 24 * 64, 'budget.target': 3500.0}
    )
  )
  run = types.SimpleNamespace(plan=plan_lib.make(config, cfg))
  assert run.plan.last_prune(run.plan.steps)
  assert loop.Loop._phase(run, run.plan.steps) == 'final'


def test_the_rate_of_a_row_is_that_of_the_last_update(monkeypatch):
  """Of seven steps of which two were skipped: the fifth, counted from 0."""
  monkeypatch.setattr(pruning, 'sizes', lambda *_: {})
  run = mock.MagicMock(busy_seconds=6.0, unlogged=3, rate=float)
  run.state.skipped = 2
  row = loop.Loop._row(run, 7, {'loss': float('nan')}, 0.5)
  assert (row['learning_rate'], row['skipped']) == (4.0, 2)
  assert (row['seconds'], row['data_seconds'], row['loss']) == (2.0, 0.5, None)


def test_says_so_where_the_layers_would_have_to_go(setting, monkeypatch):
  run, _ = setting
  said = []

  def say(_, text):
    said.append(text)
    if 'embedding' in text:
      raise ZeroDivisionError

  monkeypatch.setattr(console.Progress, 'say', say)
  with pytest.raises(ZeroDivisionError):
    run('price', **{'budget.target': 20_560.0})
  # 2 x 257 x 32 weights.
  assert said[-1].startswith('the embeddings of the whole stem are 80% of ')
  assert said[-1].endswith('consider --config.prune.price_embedding=True')


@pytest.mark.parametrize('text', [None, '{', '[1]'])
def test_blocks_that_cannot_be_used_are_refused(setting, text):
  run, root = setting
  path = root / 'blocks.json'
  path.unlink(missing_ok=True)
  if text:
    path.write_text(text)
  with pytest.raises(errors.InputError, match=r'model\.blocks .* cannot'):
    run('refused', **{'model.blocks': str(path)})
  assert not (root / 'refused').exists()


def test_one_run_at_a_time_in_a_workdir(setting, monkeypatch):
  run, root = setting
  refused = []

  class Busy:
    """A run that another one comes into."""

    def __init__(self, *_):
      pass

    def train(self, _):
      before = sorted((root / 'busy').rglob('*'))
      with pytest.raises(errors.InputError, match='another run is at work in'):
        run('busy')
      assert sorted((root / 'busy').rglob('*')) == before
      refused.append(before)
      raise ZeroDivisionError

  monkeypatch.setattr(loop, 'Loop', Busy)
  # An error lets go of the workdir.
  for _ in range(2):
    with pytest.raises(ZeroDivisionError):
      run('busy')
  assert len(refused) == 2


@pytest.fixture(name='swapped')
def _swapped(setting, tmp_path, monkeypatch):
  """A run up to its first checkpoint, and the models that it is made from."""
  _, root = setting
  models = {
    name: shutil.copytree(root / 'model', tmp_path / name)
    for name in ('source', 'teacher')
  }

  class Begun:
    """A run that has got as far."""

    def __init__(self, config, workdir, *_):
      self.workdir = workdir

    def train(self, _):
      begun.append(self.workdir)

  def run(**changes):
    config = smollm2_135m.get_config()
    config.update_from_flattened_dict(
      conftest.small_run(models['source'], root / 'text', **changes)
    )
    train.run(config, tmp_path / 'run', root / 'cache')

  begun = []
  monkeypatch.setattr(loop, 'Loop', Begun)
  monkeypatch.setattr(checkpoints, 'any_left', lambda workdir: bool(begun))
  return run, models, tmp_path / 'run'


def other_weights(folder):
  path = folder / 'model.safetensors'
  tensors = safetensors.numpy.load_file(path)
  tensors['model.norm.weight'] += 1
  safetensors.numpy.save_file(tensors, path)


def other_shape(folder):
  path = folder / 'config.json'
  config = json.loads(path.read_text())
  path.write_text(json.dumps(config | {'rope_theta': 123.0}))


@pytest.mark.parametrize(
  ('changes', 'swap', 'edit', 'match'),
  [
    ({}, 'source', other_weights, r"^source source .*: sha256='\w+' there"),
    ({}, 'source', other_shape, r'rope_theta=\S+ there, 123\.0 now; put the'),
    # Of which only the shape is taken.
    ({'init': 'random'}, 'source', other_weights, None),
    ({'init': 'random'}, 'source', other_shape, r'rope_theta=\S+ there'),
    (
      {'init': 'random', 'distill.weight': 0.5},
      'source',
      other_weights,
      r"sha256='\w+' there",
    ),
    (
      {'distill.weight': 0.5, 'distill.teacher': 'teacher'},
      'teacher',
      other_weights,
      r"^distill\.teacher teacher .*: sha256='\w+' there",
    ),
  ],
)
def test_a_run_goes_on_with_the_models_that_it_was_started_with(
  swapped, changes, swap, edit, match
):
  run, models, workdir = swapped
  if 'distill.teacher' in changes:
    changes = changes | {'distill.teacher': str(models['teacher'])}
  run(**changes)
  run(**changes)
  kept = shutil.copytree(models[swap], workdir.parent / 'kept')
  edit(models[swap])
  if match:
    with pytest.raises(errors.InputError, match=match) as caught:
      run(**changes)
    assert '\n' not in str(caught.value)
    assert 'or choose another --workdir' in str(caught.value)
    shutil.rmtree(models[swap])
    kept.rename(models[swap])
  run(**changes)


def test_a_model_and_a_text_that_have_moved_are_the_same(swapped, setting):
  run, models, workdir = swapped
  run()
  config = lambda: json.loads((workdir / 'config.json').read_text())
  before = config()
  moved = models['source'].rename(models['source'].with_name('moved'))
  text = shutil.copytree(setting[1] / 'text', workdir.parent / 'there' / 'text')
  run(source=str(moved), **{'data.text': str(text)})
  assert config()['source'] == str(moved) != before['source']
  assert config()['data'] == before['data'] | {'text': str(text)}
  # Another one at a new place is no other than at the old one.
  with pytest.raises(errors.InputError, match=r"sha256='\w+' there, '\w+' now"):
    other_weights(models['teacher'])
    run(source=str(models['teacher']), **{'data.text': str(text)})
  next(text.rglob('*.txt')).write_text('Other words.\n\nAnd more of them.\n')
  with pytest.raises(errors.InputError, match=r"digest='\w+' there, '\w+' no"):
    run(source=str(moved), **{'data.text': str(text)})
  assert config()['source'] == str(moved)


def test_a_run_is_scored_on_a_text_of_its_own(
  setting, tmp_path, caplog, monkeypatch
):
  """Whatever it is trained on, and the same one after a resume."""
  run, root = setting
  text = tmp_path / 'mine'
  text.mkdir()
  trained = [*dataset.documents(
    corpus.prepare(str(root / 'text'), root / 'cache'), 'train'
  )]  # fmt: skip
  bodies = {
    'a': trained[0].text[:900], 'b': ' '.join(map(str, range(50))),
    'c': 'Und noch etwas.',
  }  # fmt: skip
  known = {run for x in trained for run in ngrams_test.runs_of(x.text)}
  found = [x in known for y in bodies.values() for x in ngrams_test.runs_of(y)]
  shared = sum(found) / len(found)
  assert 0.1 < shared < 0.9
  for name, body in bodies.items():
    (text / f'{name}.txt').write_text(f'{body}\n')
  short = {
    'prune.policy': 'none', 'train.tokens': 6 * 64, 'checkpoint.every_steps': 6
  }  # fmt: skip
  own = short | {'eval.text': str(text), 'eval.tokens_per_domain': 0}
  run('held-out', **short)
  run('own', **own)
  workdir = root / 'own'
  rows = {
    name: [*workdir_lib.read(root / name / 'metrics.jsonl')]
    for name in ('held-out', 'own')
  }
  of = lambda name, kind: [x for x in rows[name] if x['kind'] == kind]
  losses = [[x['loss'] for x in of(name, 'train')] for name in rows]
  assert losses[0] == losses[1] and len(losses[0]) == 6
  found, made = finished.read(workdir, None)
  held = finished.heldout(workdir, made, found, root / 'cache', 0)
  (domain,) = held
  assert domain == 'mine'
  size = sum(len(x.strip().encode()) for x in bodies.values())
  assert held['mine'].num_bytes == size
  want = evaluate.bits_per_byte(
    found.params, found.masks, held, found.cfg, model.Compute(), 2
  )
  last = of('own', 'eval')[-1]
  assert last['heldout_bytes'] == size
  assert last['domains'] == pytest.approx(want['domains'], rel=1e-5)
  assert {*of('held-out', 'eval')[-1]['domains']} == {'text'}

  run('own', **own)
  record = (workdir / 'eval_text.json').read_text()
  assert json.loads(record)['shared'] == {'mine': pytest.approx(shared)}
  # When the run began, and no more.
  (told,) = [x for x in caplog.messages if x.startswith('eval.text')]
  assert f"domain 'mine', {100 * shared:.1f} % stand in the train" in told
  # The next run does not look again.
  monkeypatch.setattr(ngrams, 'shared', None)
  run('another', **own)
  assert (root / 'another' / 'eval_text.json').read_text() == record
  assert caplog.messages.count(told) == 2
  # Of the same name at another place.
  moved = shutil.copytree(text, tmp_path / 'there' / 'mine')
  run('own', **own | {'eval.text': str(moved)})
  (moved / 'b.txt').write_text('Something else.')
  other = (
    r"^eval\.text .* is not the text .*: digest='\w+' there, '\w+' now; put"
  )
  with pytest.raises(errors.InputError, match=other):
    run('own', **own | {'eval.text': str(moved)})
  with pytest.raises(errors.InputError, match=r"eval\.text='/.* there, '' now"):
    run('own', **own | {'eval.text': ''})
  (workdir / 'eval_text.json').unlink()
  with pytest.raises(errors.InputError, match=r'eval_text\.json: .*restore it'):
    run('own', **own)
  (workdir / 'eval_text.json').write_text(record)
  run('own', **own)


def test_what_texts_share_is_told_whatever_the_cache_holds(
  setting, tmp_path, monkeypatch
):
  _, root = setting
  folder = corpus.prepare(str(root / 'text'), root / 'cache')
  mine = tmp_path / 'mine.txt'
  mine.write_text(next(dataset.documents(folder, 'train')).text)
  text = text_folder.read(str(mine), 'set it')
  before = {*folder.iterdir()}
  full = mock.Mock(side_effect=OSError('read-only'))
  with monkeypatch.context() as m:
    m.setattr(inputs.atomic, 'write_json', full)
    record = inputs.eval_record(text, folder)
  assert full.called and {*folder.iterdir()} == before
  assert record == text.record | {'shared': {'mine': 1.0}}
  assert inputs.eval_record(text, folder) == record
  (kept,) = {*folder.iterdir()} - before
  for damaged in ('', '{}', '{"shared": {"mine": "all"}}'):
    kept.write_text(damaged)
    with pytest.raises(errors.InputError, match=f'{kept.name}.*; delete it'):
      inputs.eval_record(text, folder)


def test_a_text_to_score_on_that_cannot_be_is_refused_first(
  setting, tmp_path, monkeypatch
):
  """Before the other text is built, or a folder made."""
  run, root = setting
  monkeypatch.setattr(train.corpus, 'prepare', mock.Mock(side_effect=KeyError))
  inside = next((root / 'text').rglob('*.txt'))
  (tmp_path / 'empty.txt').touch()
  common = r'^eval\.text .* and data\.text .* in common, .*; move them apart$'
  for text, message in (
    ('no/such', r"^'no/such' is neither .*; set --config\.eval\.text$"),
    (str(tmp_path / 'empty.txt'), 'holds no text; .* or set --config'),
    (str(inside), common),
    (str(root / 'text'), common),
    (str(root), common),
  ):
    with pytest.raises(errors.InputError, match=message):
      run('new', **{'eval.text': text})
  assert not (root / 'new').exists()


def test_a_run_goes_on_with_the_table_that_it_was_started_with(
  swapped, setting
):
  run, models, workdir = swapped
  cfg = sources.load(models['source'], setting[1] / 'cache', params=False).cfg

  def time(k, f, d):
    return d * (3e-4 * k + 2e-6 * f + 1e-3) + 1e-3 * k + 1e-4 * f + 0.01

  table, copy = workdir.parent / 'table.json', workdir / 'budget.json'
  write = lambda path, time: budgets_test.write_table(path, cfg, time)
  go = lambda table: run(
    **{
      'budget.kind': 'ms', 'budget.table': str(table),
      'budget.target': 0.8 * time(cfg.K, cfg.F, cfg.D),
    }
  )  # fmt: skip
  write(table, time)
  go(table)
  assert json.loads(copy.read_text()) == json.loads(table.read_text())
  # Measured again at the same path, or at another one.
  slow = lambda k, f, d: time(k, f, d) + 1e-3 * k
  for path in (table, workdir.parent / 'again.json'):
    write(path, slow)
    with pytest.raises(
      errors.InputError, match=r"digest='\w+' there, '\w+' now"
    ) as caught:
      go(path)
    assert f'of which {copy} is a copy' in str(caught.value)
  # What is told to do: the copy is as good, and so is the old one elsewhere.
  go(copy)
  write(table, time)
  go(table.rename(workdir.parent / 'moved.json'))
  config = json.loads((workdir / 'config.json').read_text())
  assert config['budget']['table'].endswith('moved.json')
  # A run of before tables were copied goes on with what lies at its path.
  copy.unlink()
  go(workdir.parent / 'moved.json')
  write(table, time)
  with pytest.raises(errors.InputError, match='the workdir has no copy; put'):
    go(table)


@pytest.mark.parametrize(
  'lost', ['teacher.json', 'source/source.json', 'text.json']
)
def test_a_workdir_without_a_record_is_refused(swapped, lost):
  """Nobody could say whether the run goes on with what it began with."""
  run, models, workdir = swapped
  changes = {'distill.weight': 0.5, 'distill.teacher': str(models['teacher'])}
  run(**changes)
  (workdir / lost).unlink()
  with pytest.raises(
    errors.InputError, match=f'{lost}: .*restore it or choose'
  ):
    run(**changes)


def test_a_run_whose_checkpoints_are_gone_is_not_begun_again(setting):
  """Its logs are all that is left; with the checkpoints back, it goes on."""
  run, root = setting
  short = {
    'prune.policy': 'none', 'train.tokens': 6 * 64, 'checkpoint.every_steps': 2
  }  # fmt: skip
  run('gone', **short)
  workdir, kept = root / 'gone', root / 'kept'
  logs = [workdir / name for name in ('metrics.jsonl', 'trace.jsonl')]
  before = [path.read_bytes() for path in logs]
  names = ('checkpoints', 'events')
  kept.mkdir()
  for name in names:
    (workdir / name).rename(kept / name)
  with pytest.raises(errors.InputError, match='checkpoints of this run are'):
    run('gone', **short)
  for name in names:
    (workdir / name).symlink_to(root / 'not mounted' / name)
  with pytest.raises(errors.InputError, match='mount its disk or mend the'):
    run('gone', **short)
  assert not any((workdir / name).exists() for name in names)
  assert [path.read_bytes() for path in logs] == before
  kept.rename(root / 'not mounted')
  run('gone', **short)
  assert [path.read_bytes() for path in logs] == before


@pytest.mark.parametrize(
  'error',
  [MemoryError(), jax.errors.JaxRuntimeError('RESOURCE_EXHAUSTED: Out of')],
  ids=lambda x: type(x).__name__,
)
def test_out_of_memory_is_told_in_one_line(swapped, monkeypatch, error):
  run, _, _ = swapped

  def fail(*_):
    raise error

  monkeypatch.setattr(loop.Loop, 'train', fail)
  with pytest.raises(errors.InputError, match='micro-batches of 2 x 32 tokens'):
    run()
  error = jax.errors.JaxRuntimeError('INTERNAL: another one')
  with pytest.raises(jax.errors.JaxRuntimeError):
    run()


def test_all_processes_are_refused_with_the_first(tmp_path, monkeypatch):
  monkeypatch.setattr(jax, 'process_index', lambda: 1)
  monkeypatch.setattr(sharding, 'of_the_first', lambda _: False)
  with (
    pytest.raises(errors.InputError, match='the first process is refused'),
    train._claimed(tmp_path / 'run', {}),
  ):
    pass
  assert not (tmp_path / 'run').exists()


@pytest.mark.parametrize('log_every', [1, 3])
def test_seconds_are_those_of_the_devices(setting, monkeypatch, log_every):
  """Not those of asking for a step: here each takes 0.1 s and says so late."""
  run, root = setting
  good_step, good_wait = steps.train_step, jax.block_until_ready
  waits, here = threading.Event(), threading.current_thread()

  def block_until_ready(tree):
    waits.set()
    try:
      return good_wait(tree)
    finally:
      waits.clear()

  monkeypatch.setattr(jax, 'block_until_ready', block_until_ready)

  def nap(x):
    # Not beside the input of the next step, which is not counted. A step whose
    # parameters are there already may be taken in the thread that asks for it.
    assert threading.current_thread() is here or waits.wait(20)
    time.sleep(0.1)
    return x

  @jax.jit
  def late(x):
    return jax.pure_callback(nap, jax.ShapeDtypeStruct(x.shape, x.dtype), x)

  class Slow:
    """The real step, compiled as ever; one parameter takes its time."""

    def lower(self, *args, **kwargs):
      compiled = good_step.lower(*args, **kwargs).compile()

      class Compiled:
        def compile(self):
          def call(*args):
            state, numbers = compiled(*args)
            norm = late(state.params.final_norm)
            params = state.params.replace(final_norm=norm)
            return state.replace(params=params), numbers

          return call

      return Compiled()

  monkeypatch.setattr(steps, 'train_step', Slow())
  workdir = f'slow{log_every}'
  changes = {'prune.policy': 'none', 'train.tokens': 6 * 64}
  run(workdir, **changes | {'train.log_every': log_every})
  rows = list(workdir_lib.read(root / workdir / 'metrics.jsonl'))
  seconds = [row['seconds'] for row in rows if row['kind'] == 'train']
  assert len(seconds) == 6 // log_every
  assert min(seconds) >= 0.1


def test_says_so_where_a_prune_breaks_the_model(setting, monkeypatch):
  """Of that one alone: those before it harm as little as they should."""
  run, root = setting
  said, prune = [], loop.Loop._prune

  def broken(self, step, windows_ABT):
    prune(self, step, windows_ABT)
    if step == 16:
      # The last that takes something, as if all others had needed that.
      params = self.state.params
      self.state = self.state.replace(
        params=params.replace(embed=20 * params.embed)
      )

  monkeypatch.setattr(loop.Loop, '_prune', broken)
  monkeypatch.setattr(console.Progress, 'say', lambda _, x: said.append(x))
  # One shrink, after what is looked at.
  run('broken', **{'shrink.threshold': 0.9})
  (line,) = [x for x in said if x.startswith('the loss is ')]
  rows = workdir_lib.read(root / 'broken' / 'metrics.jsonl')
  rows = [x for x in rows if x['kind'] == 'train']
  old, new = rows[14]['widths'], rows[15]['widths']
  share, t = min((new[t] / old[t], t) for t in old)
  assert share < 1
  assert f'is {rows[16]["loss"]:.2f} nats per token' in line
  assert f' {t} {old[t]:g} -> {new[t]:g}' in line
  assert f'--config.prune.floors.{t}={old[t]:.0f} or' in line


def test_another_event_of_the_same_root_is_another_model(tmp_path):
  path, cfg = tmp_path / 'source.json', conftest.make_config()
  record = lambda **digests: {
    'name': '0', 'description': '', 'cfg': dataclasses.asdict(cfg), **digests,
  }  # fmt: skip
  path.write_text(json.dumps(record(sha256=64 * 'a', saved=64 * 'b')))
  for now in ({'sha256': 64 * 'a', 'saved': 64 * 'b'},
              {'sha256': None, 'saved': None}):  # fmt: skip
    sources.check_same(path, record(**now), 'source')
  now = record(sha256=64 * 'a', saved=64 * 'c')
  with pytest.raises(errors.InputError, match=r"saved='b{12}' there, 'c{12}'"):
    sources.check_same(path, now, 'source')


def test_a_run_says_where_it_is_computed(setting, monkeypatch, capsys):
  """Begun with another jax, killed, and gone on with until its end."""
  run, root = setting
  changes = {
    'prune.policy': 'none', 'train.tokens': 6 * 64, 'checkpoint.every_steps': 2
  }  # fmt: skip
  good = loop.Loop._one_step

  def one_step(self, step):
    if step == 4:
      raise ZeroDivisionError
    good(self, step)

  monkeypatch.setattr(loop.Loop, '_one_step', one_step)
  with pytest.raises(ZeroDivisionError):
    run('moved', **changes)
  monkeypatch.undo()
  (first,) = environment.read(root / 'moved')
  version = first['packages']['jax']
  assert (first['step'], version) == (0, jax.__version__)
  path = root / 'moved' / environment.STARTS
  path.write_text(path.read_text().replace(f'"{version}"', '"0.0.1"'))
  capsys.readouterr()
  run('moved', **changes)
  said = ' '.join(capsys.readouterr().err.split())
  assert f'otherwise than before: jax {version} for 0.0.1' in said
  assert 'from step 3 on, digits may differ' in said
  assert [x['step'] for x in environment.read(root / 'moved')] == [0, 2]
  assert environment.text(runlog.read(root / 'moved').starts).endswith(
    f'jax 0.0.1, then {environment.text([first])}'
  )
  # At its end nothing is computed any more.
  before = path.read_bytes()
  run('moved', **changes)
  assert path.read_bytes() == before
  assert 'otherwise' not in capsys.readouterr().err


def test_blocks_that_a_run_finds_no_use_for_are_said(tmp_path, capsys):
  """Other tokens, widths, types, another device, kernels without blocks."""
  path = tmp_path / 'blocks.json'
  cfg = conftest.make_config(F=64, D=48)
  row = autotune.tune('xla_loop', 'nn', 32, 64, 48, 'float32', 'n')
  autotune.store(path, [row])

  def said(name, tokens, dtype='float32', **changes):
    compute = model.Compute(dtype=dtype, kernels=name)
    other = dataclasses.replace(cfg, **changes)
    train._use_blocks(str(path), compute, tokens, 16, other)
    return capsys.readouterr().err

  try:
    assert said('xla_loop', 32) == ''
    none = 'no row for xla_loop, 48 x 64 in float32, 64 tokens'
    assert none in said('xla_loop', 64)
    made = (
      f'--model=48x64x{cfg.K}x{cfg.G}x{cfg.H} --tokens=64 --seq_len=16 '
      '--dtype=float32 --tune='
    )
    assert made in said('xla_loop', 64)
    assert 'xla_loop, 48 x 64 in bfloat16' in said('xla_loop', 32, 'bfloat16')
    assert 'xla_loop, 48 x 96 in float32' in said('xla_loop', 32, F=96)
    autotune.store(path, [row | {'implementation': 'bucket'}])
    none = 'is not used: model.kernels bucket has no blocks in a model'
    assert none in said('bucket', 32)
    # Of attention too, where that has kernels.
    neither = 'not used: it has no row for pallas_tpu, 48 x 64 or attention in '
    assert neither in said('pallas_tpu', 32)
    blocks = pallas_tpu.default_blocks('nn', 32, 64, 48, 'float32')
    blocks = {'blocks': dataclasses.asdict(blocks)}
    autotune.store(path, [row | {'implementation': 'pallas_tpu'} | blocks])
    one = 'used in part: it has no row for pallas_tpu, attention in texts of 16'
    assert one in said('pallas_tpu', 32)
    name = {'implementation': 'pallas_tpu_attention', 'form': 'forward'}
    square = {'m': 16, 'n': 16, 'k': cfg.H, 'blocks': {'rows': 128}}
    autotune.store(path, [row | name | square])
    assert said('pallas_tpu', 32) == ''
    path.unlink()
    autotune.store(path, [row | {'device': 'NVIDIA H100'}])
    here = jax.devices()[0].device_kind
    assert f'on one device, and {here}' in said('xla_loop', 32)
  finally:
    autotune.use(None)
