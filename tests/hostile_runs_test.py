"""Workdirs whose files are damaged, lie, or are no files."""

import contextlib
import dataclasses
import json
import shutil

import hypothesis
from hypothesis import strategies as st
import pytest

from effllm_jax import atomic
from effllm_jax import checkpoint_writer
from effllm_jax import checkpoints
from effllm_jax import digests
from effllm_jax import environment
from effllm_jax import errors
from effllm_jax import events
from effllm_jax import figures
from effllm_jax import model_card
from effllm_jax import optimizers
from effllm_jax import report
from effllm_jax import runlog
from effllm_jax import sources
from effllm_jax import tables
from effllm_jax import untrusted
from effllm_jax import widths
from effllm_jax import workdir
from tests import checkpoints_test
from tests import environment_test
from tests import events_test
from tests import hostile
from tests import model_card_test
from tests import report_test


@contextlib.contextmanager
def kept(path):
  """Puts a file back."""
  whole = path.read_bytes()
  try:
    yield
  finally:
    path.write_bytes(whole)


def test_events():
  (first, _) = events_test.make_events()

  @hostile.fuzz(100)
  @hypothesis.given(data=hostile.changed(first.to_json()))
  def check(data):
    with contextlib.suppress(errors.InputError):
      record = untrusted.parse_json(data, 'event', 'restore it')
      with contextlib.suppress(KeyError, TypeError, ValueError):
        found = events.ShrinkEvent.from_json(record)
        assert found.after.num_params() > 0 and found.step >= 0

  check()


@pytest.fixture(scope='module', name='run')
def _run(place):
  """A workdir with an event: arrays, and JSON of both kinds."""
  folder = place / 'arrays'
  tx = optimizers.optimizer(lambda _: 1e-2, 0.9, 0.95, 0.1, 1.0)
  cfg = checkpoints_test.CFG
  writer = checkpoint_writer.Writer(folder, keep=2)
  writer.save_event(
    checkpoints_test.make_event(cfg),
    checkpoints_test.make_state(tx, 4),
    checkpoints_test.make_data(),
    {'train': 1},
    checkpoints_test.TRIALS,
  )
  writer.close()
  return folder


def sign(moment):
  """Digests that fit: else every reader stops at the first of them."""
  path = moment / 'digests.json'
  names = list(json.loads(path.read_text()))
  path.write_text(json.dumps(digests.of(moment, names)))


@pytest.mark.parametrize('part', ['arch', 'event'])
def test_json_of_a_checkpoint(run, part):
  path = run / 'events' / '0' / part / 'metadata'
  whole = path.read_bytes()

  @hostile.fuzz(60)
  @hypothesis.given(data=hostile.changed(json.loads(whole)))
  def check(data):
    path.write_bytes(data)
    sign(run / 'events' / '0')
    if part == 'event':
      hostile.answer(lambda: checkpoints.read_events(run), run)
    else:
      hostile.answer(lambda: checkpoints.read_moment(run / 'events' / '0'), run)

  with kept(path), kept(run / 'events' / '0' / 'digests.json'):
    check()


@pytest.mark.parametrize('letter', ['V', 'N', 'K', 'F', 'D'])
def test_an_architecture_larger_than_the_arrays(run, letter):
  """Orbax would fill arrays up with zeros, to whatever shape is asked for."""
  path = run / 'events' / '0' / 'arch' / 'metadata'
  whole = path.read_bytes()
  arch = json.loads(whole)
  arch['model'][letter] *= 10_000
  path.write_text(json.dumps(arch))
  sign(run / 'events' / '0')

  def read():
    moment = checkpoints.read_moment(run / 'events' / '0')
    return checkpoints.read_prune(moment), checkpoints.read_params(moment)

  assert 'cannot be read' in hostile.answer(read, run)
  path.write_bytes(whole)
  sign(run / 'events' / '0')


@pytest.mark.parametrize('thing', hostile.THINGS)
@pytest.mark.parametrize('part', ['arch/metadata', 'event/metadata', 'prune'])
def test_a_thing_in_a_checkpoint(run, tmp_path, part, thing):
  folder = shutil.copytree(run, tmp_path / 'run')
  path = folder / 'events' / '0' / part
  shutil.rmtree(path) if path.is_dir() else path.unlink()
  hostile.THINGS[thing](path)

  def read():
    moment = checkpoints.read_moment(folder / 'events' / '0')
    return checkpoints.read_events(folder), checkpoints.read_prune(moment)

  assert isinstance(hostile.answer(read, folder), str)


# Workdirs.


@pytest.fixture(scope='module', name='done')
def _done(place):
  """A workdir with everything that a report reads."""
  folder = place / 'done'
  report_test.write_run(folder, until=45, ragged=True)
  report_test.goes_on(folder)
  for name, content in (
    (runlog.EDGE, {**model_card_test.SPEEDS, 'step': 40}),
    (runlog.TEXT, model_card_test.TEXT),
    (runlog.EVAL_TEXT, {'digest': 'abc', 'shared': {'mine': 0.01}}),
    (runlog.BENCHMARKS, model_card_test.BENCHMARKS),
  ):
    (folder / name).write_text(json.dumps(content))
  (folder / environment.STARTS).write_text(
    ''.join(
      json.dumps(environment_test.ROW | {'step': step}) + '\n'
      for step in (0, 20)
    )
  )
  config = json.loads((folder / 'config.json').read_bytes())
  config['eval'] = {'text': 'mine.txt'}
  (folder / 'config.json').write_text(json.dumps(config))
  return folder


@pytest.fixture(name='read_run')
def _read_run(monkeypatch, place):
  """Writes the report of a workdir, but no figures, and its model card."""
  monkeypatch.setattr(figures, 'draw', lambda run: ())
  gguf_file = place / 'tiny.gguf'
  gguf_file.write_bytes(hostile.tiny_gguf())
  model = sources.load(gguf_file, place, params=False)
  model = dataclasses.replace(model, masks=widths.whole(None, model.cfg))

  def read(folder):
    report.build(folder)
    run = runlog.read(folder)
    made = model_card.Made(step=40, params=1, pruning={'events': []}, run=run)
    return tables.compare(run), model_card.text(model, made, {}, {})

  return read


@pytest.mark.parametrize(
  'name',
  [
    'config.json',
    'source/source.json',
    'edge.json',
    'text.json',
    'eval_text.json',
    'benchmarks.json',
  ],
)
def test_json_of_a_workdir(done, read_run, name):
  path = done / name
  whole = path.read_bytes()
  config = json.loads((done / 'config.json').read_bytes())

  @hostile.fuzz(40)
  @hypothesis.given(data=hostile.changed(json.loads(whole)))
  def check(data):
    path.write_bytes(data)
    # Of every group of the largest source that is believed, 8 bytes, twice.
    hostile.answer(lambda: read_run(done), done, more=2**28)
    hostile.answer(lambda: workdir.check(done, config), done)

  with kept(path):
    check()


@pytest.mark.parametrize(
  'name', ['metrics.jsonl', 'trace.jsonl', 'starts.jsonl']
)
def test_rows_of_a_workdir(done, read_run, name, tmp_path):
  path = done / name
  whole = path.read_bytes()
  lines = whole.splitlines(keepends=True)
  kinds = {json.loads(x).get('kind'): i for i, x in enumerate(lines)}

  @hostile.fuzz(120)
  @hypothesis.given(data=st.data())
  def check(data):
    at = data.draw(st.sampled_from(sorted(kinds.values())))
    row = data.draw(hostile.changed(json.loads(lines[at])))
    path.write_bytes(b''.join([*lines[:at], row, b'\n', *lines[at + 1 :]]))
    hostile.answer(lambda: read_run(done), done)
    copy = tmp_path / name
    copy.write_bytes(path.read_bytes())
    log = hostile.answer(lambda: workdir.Log(copy, 10), copy)
    if not isinstance(log, str):
      log.close()

  with kept(path):
    check()


@pytest.mark.parametrize('thing', hostile.THINGS)
@pytest.mark.parametrize(
  'name',
  ['config.json', 'metrics.jsonl', 'trace.jsonl', 'starts.jsonl', 'edge.json',
   'text.json', 'eval_text.json', 'benchmarks.json', 'source/source.json',
   'source'],
)  # fmt: skip
def test_a_thing_in_a_workdir(done, read_run, tmp_path, name, thing):
  folder = shutil.copytree(done, tmp_path / 'run')
  config = json.loads((done / 'config.json').read_bytes())
  path = folder / name
  shutil.rmtree(path) if path.is_dir() else path.unlink()
  hostile.THINGS[thing](path)
  hostile.answer(lambda: read_run(folder), folder)
  hostile.answer(lambda: workdir.check(folder, config), folder)
  if name.endswith('.jsonl'):
    log = hostile.answer(lambda: workdir.Log(path, 10), path)
    if not isinstance(log, str):
      log.close()


def test_links_do_not_lead_out_of_a_workdir(tmp_path):
  """Of what is written beside a file before it takes its place."""
  folder, outside = tmp_path / 'run', tmp_path / 'precious'
  folder.mkdir()
  outside.write_text('of the user')
  for name in ('config.json', 'metrics.jsonl', 'text.json'):
    (folder / f'{name}.tmp').symlink_to(outside)
    (folder / name).symlink_to(outside)
  (folder / 'config.json').unlink()
  (folder / 'metrics.jsonl').unlink()
  atomic.write_json(folder / 'config.json', {})
  atomic.write_json(folder / 'text.json', {})
  workdir.Log(folder / 'metrics.jsonl', -1).close()
  assert outside.read_text() == 'of the user'
  assert not (folder / 'text.json').is_symlink()
