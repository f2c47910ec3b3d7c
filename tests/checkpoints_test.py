import dataclasses
import errno
import hashlib
import itertools
import json
import logging
import os
import re
import types

import grain
import jax
from jax.experimental import multihost_utils
import jax.numpy as jnp
import numpy as np
import pytest

from effllm_jax import checkpoint_writer
from effllm_jax import checkpoints
from effllm_jax import digests
from effllm_jax import errors
from effllm_jax import events
from effllm_jax import optimizers
from effllm_jax import resume
from effllm_jax import sharding
from effllm_jax import state as state_lib
from effllm_jax import structure
from tests import conftest

CFG = conftest.make_config()
# A damaged file leaves Orbax's other reads unfinished; Python reports each.
pytestmark = pytest.mark.filterwarnings(
  'ignore::pytest.PytestUnraisableExceptionWarning'
)
FLOPS = {'train': 10**18, 'score': 3}
TRIALS = {'sums': {'heads': [0.1, 1e-30]}, 'broken': {'ffn': 1 / 3}}


@pytest.fixture(scope='module', name='tx')
def _tx():
  return optimizers.optimizer(lambda _: 1e-2, 0.9, 0.95, 0.1, 1.0)


def make_data():
  return iter(grain.MapDataset.range(100).to_iter_dataset())


def make_state(tx, step, cfg=CFG):
  state = state_lib.fresh_state(conftest.make_params(cfg, step), cfg, tx)
  noise = lambda x: x + step if x.dtype == jnp.float32 else x
  return state.replace(
    step=jnp.int32(step),
    skipped=jnp.int32(step // 2),
    in_a_row=jnp.int32(step // 3),
    opt_state=jax.tree.map(noise, state.opt_state),
  )


def equal(a, b):
  jax.tree.map(np.testing.assert_array_equal, a, b)


def write(workdir, tx, saved_steps, cfg=CFG):
  writer, data = checkpoint_writer.Writer(workdir, keep=2), make_data()
  for step in range(max(saved_steps) + 1):
    if step in saved_steps:
      writer.save(make_state(tx, step, cfg), cfg, data, 0, FLOPS, TRIALS)
    next(data)
  writer.close()


def make_event(cfg, index=0, step=4):
  kept = jax.tree.map(
    lambda m: np.broadcast_to(np.arange(m.shape[-1]), m.shape).tolist(),
    structure.all_alive(cfg),
  )
  live = structure.Groups([cfg.K] * cfg.N, [cfg.F] * cfg.N, cfg.D)
  return events.ShrinkEvent(
    index, step, 64 * step, cfg, cfg, live, kept, 3.0, 3.0
  )


def restore(workdir, tx):
  data = make_data()
  state, moment = resume.restore_latest(workdir, tx, data)
  assert (moment.flops, moment.trials) == (FLOPS, TRIALS)
  return state, moment.cfg, moment.num_events, next(data)


def test_round_trip_is_bit_identical(tmp_path, tx):
  write(tmp_path, tx, [1, 3, 5])
  state, cfg, count, item = restore(tmp_path, tx)
  equal(state, make_state(tx, 5))
  assert (cfg, count, item) == (CFG, 0, 5)
  # Only the newest two stay.
  assert sorted(os.listdir(tmp_path / 'checkpoints')) == ['3', '5']


def test_what_the_run_counts_on_is_saved_as_it_was(tmp_path, tx, monkeypatch):
  """Files are written in a thread, at times after the next step."""
  data = types.SimpleNamespace(get_state=lambda: live['data'])
  live = {'data': {'read': [1]}, 'flops': dict(FLOPS)}
  given, save = [], checkpoint_writer.ocp.args.JsonSave
  monkeypatch.setattr(
    checkpoint_writer.ocp.args, 'JsonSave', lambda x: given.append(x) or save(x)
  )
  writer = checkpoint_writer.Writer(tmp_path, keep=2)
  writer.save(make_state(tx, 1), CFG, data, 0, live['flops'], TRIALS)
  live['flops']['train'] += 1
  live['data']['read'].append(2)
  writer.close()
  arch, read = given
  assert arch['flops'] == FLOPS
  assert read == {'read': [1]}


def test_a_fresh_workdir_has_nothing(tmp_path, tx):
  assert resume.restore_latest(tmp_path, tx, make_data()) is None
  assert checkpoints.moments(tmp_path / 'missing') == []


def test_what_a_killed_process_left_is_gone_once_a_writer_is_closed(tmp_path):
  """No thread is left that still deletes, and has a traceback at the end."""
  for folder in (checkpoints.ROLLING, checkpoints.EVENTS):
    for i in range(300):
      left = tmp_path / folder / f'{i}.orbax-checkpoint-tmp'
      left.mkdir(parents=True)
      (left / 'a').touch()
  checkpoint_writer.Writer(tmp_path, keep=2).close()
  assert not list(tmp_path.rglob('*tmp*'))


def test_an_event_is_a_moment_to_go_on_from(tmp_path, tx):
  write(tmp_path, tx, [1, 3])
  writer = checkpoint_writer.Writer(tmp_path, keep=2)
  event = make_event(CFG)
  writer.save_event(event, make_state(tx, 4), make_data(), FLOPS, TRIALS)
  writer.close()
  state, _, count, _ = restore(tmp_path, tx)
  assert (int(state.step), count) == (4, 1)
  assert checkpoints.read_events(tmp_path) == [event]
  params, prune, cfg, step = checkpoints.restore_params(tmp_path, event=0)
  equal(params, make_state(tx, 4).params)
  equal(prune, make_state(tx, 4).prune)
  assert (cfg, step) == (CFG, 4)
  with pytest.raises(errors.InputError, match='there are: 0'):
    checkpoints.restore_params(tmp_path, event=3)


def test_the_tenth_event_follows_the_ninth(tmp_path, tx):
  writer = checkpoint_writer.Writer(tmp_path, keep=2)
  state, both = make_state(tx, 4), [make_event(CFG, index) for index in (9, 10)]
  for event in both:
    writer.save_event(event, state, make_data(), FLOPS, TRIALS)
  writer.close()
  assert checkpoints.read_events(tmp_path) == both


def test_a_save_does_not_ask_whether_to_stop(tmp_path, tx, monkeypatch):
  """jax would take an event's number for the step that the run is at."""
  asked = []
  monkeypatch.setattr(
    multihost_utils, 'reached_preemption_sync_point', asked.append
  )
  writer = checkpoint_writer.Writer(tmp_path, keep=2)
  event, state, data = make_event(CFG), make_state(tx, 4), make_data()
  writer.save(state, CFG, data, 0, FLOPS, TRIALS)
  writer.save_event(event, state, data, FLOPS, TRIALS)
  writer.close()
  assert len(checkpoints.moments(tmp_path)) == 2 and asked == []


def test_events_of_a_lost_future_are_removed(tmp_path, tx):
  """An event whose checkpoint is damaged must not stay in the lineage."""
  write(tmp_path, tx, [1, 3])
  writer = checkpoint_writer.Writer(tmp_path, keep=2)
  for index, step in ((0, 4), (1, 6)):
    event = make_event(CFG, index, step)
    writer.save_event(event, make_state(tx, step), make_data(), FLOPS, TRIALS)
  writer.close()
  spoil(tmp_path / 'events' / '0')
  spoil(tmp_path / 'events' / '1')
  state, _, count, _ = restore(tmp_path, tx)
  assert (int(state.step), count) == (3, 0)
  assert checkpoints.read_events(tmp_path) == []


def spoil(folder):
  """Truncates every data file, as a full disk or a broken copy would."""
  files = [p for p in folder.rglob('d/*') if p.is_file()]
  assert files
  for path in files:
    os.truncate(path, path.stat().st_size // 2)


def test_a_damaged_newest_checkpoint_falls_back_and_says_so(
  tmp_path, tx, caplog
):
  write(tmp_path, tx, [1, 3, 5])
  spoil(tmp_path / 'checkpoints' / '5')
  with caplog.at_level(logging.WARNING):
    state, _, _, item = restore(tmp_path, tx)
  equal(state, make_state(tx, 3))
  assert item == 3
  assert 'cannot be read' in caplog.text
  assert 'taking the one before' in caplog.text
  assert (tmp_path / 'damaged' / 'checkpoints-5').is_dir()
  # The run writes it again, to a disk that is no better.
  write(tmp_path, tx, [5])
  spoil(tmp_path / 'checkpoints' / '5')
  assert int(restore(tmp_path, tx)[0].step) == 3
  assert (tmp_path / 'damaged' / 'checkpoints-5').is_dir()


def test_a_damaged_architecture_file_falls_back(tmp_path, tx):
  write(tmp_path, tx, [1, 3])
  (tmp_path / 'checkpoints' / '3' / 'arch' / 'metadata').write_text('{"mo')
  assert int(restore(tmp_path, tx)[0].step) == 1


def test_a_reader_moves_nothing(tmp_path, tx, caplog):
  """The run may be deleting what a reader finds half of."""
  write(tmp_path, tx, [1, 3])
  (tmp_path / 'checkpoints' / '3' / 'arch' / 'metadata').unlink()
  before = sorted(tmp_path.rglob('*'))
  with caplog.at_level(logging.WARNING):
    assert [m.step for m in checkpoints.moments(tmp_path)] == [1]
    assert checkpoints.restore_params(tmp_path)[-1] == 1
  assert 'checkpoints/3 cannot be read' in caplog.text
  assert 'leaving it out' in caplog.text
  assert sorted(tmp_path.rglob('*')) == before


def test_what_is_gone_meanwhile_is_not_damaged(
  tmp_path, tx, monkeypatch, caplog
):
  write(tmp_path, tx, [1])
  listed = checkpoints.committed
  gone = lambda *x: [*listed(*x), tmp_path / 'checkpoints' / '0']
  monkeypatch.setattr(checkpoints, 'committed', gone)
  with caplog.at_level(logging.WARNING):
    assert [m.step for m in checkpoints.moments(tmp_path)] == [1]
  assert not [x for x in caplog.messages if 'cannot be read' in x]


def test_arrays_of_another_architecture_are_never_padded_or_cut(
  tmp_path, tx, monkeypatch
):
  """Where even the digests say that all is well."""
  monkeypatch.setattr(digests, 'verify', lambda *_: None)
  write(tmp_path, tx, [1, 3])
  path = tmp_path / 'checkpoints' / '3' / 'arch' / 'metadata'
  arch = json.loads(path.read_text())
  for width in (CFG.F - 4, CFG.F + 4):
    arch['model']['F'] = width
    path.write_text(json.dumps(arch))
    with pytest.raises(errors.InputError, match='cannot be read'):
      checkpoints.restore_params(tmp_path)
  assert int(restore(tmp_path, tx)[0].step) == 1


def test_nothing_readable_is_an_error_and_not_a_fresh_start(tmp_path, tx):
  write(tmp_path, tx, [1, 3])
  for step in '13':
    spoil(tmp_path / 'checkpoints' / step)
  with pytest.raises(errors.InputError, match='start again with an empty'):
    resume.restore_latest(tmp_path, tx, make_data())


@pytest.mark.parametrize(
  'error',
  [
    jax.errors.JaxRuntimeError('RESOURCE_EXHAUSTED: Out of memory'),
    MemoryError(),
    # TensorStore's.
    ValueError('RESOURCE_EXHAUSTED: Error opening file: Too many open files'),
    ValueError('UNKNOWN: Error reading from file: Input/output error'),
  ],
  ids=lambda x: type(x).__name__,
)
def test_what_does_not_fit_here_is_not_damaged(
  tmp_path, tx, monkeypatch, error
):
  """On a smaller device, or beside another job; all of it stays."""
  write(tmp_path, tx, [1, 3])
  before = sorted(tmp_path.rglob('*'))
  read = checkpoints.read_arrays

  def full(path, abstract):
    if path.name == 'optimizer':
      raise error
    return read(path, abstract)

  monkeypatch.setattr(checkpoints, 'read_arrays', full)
  with pytest.raises(
    errors.InputError, match=r'3 cannot be read here.*nothing of'
  ):
    restore(tmp_path, tx)
  assert sorted(tmp_path.rglob('*')) == before
  monkeypatch.undo()
  assert int(restore(tmp_path, tx)[0].step) == 3


@pytest.mark.parametrize(
  'error', [OSError(errno.ESTALE, 'Stale'), MemoryError()]
)
def test_a_disk_that_does_not_answer_damages_nothing(
  tmp_path, tx, monkeypatch, error
):
  """Whichever file it is: the first ones, or one of the arrays."""
  write(tmp_path, tx, [1, 3])
  before = sorted(tmp_path.rglob('*'))
  good = hashlib.file_digest
  for count in (0, 1, 3, 6):
    calls = itertools.count()

    def file_digest(*args, calls=calls, count=count):
      if next(calls) == count:
        raise error
      return good(*args)

    monkeypatch.setattr(hashlib, 'file_digest', file_digest)
    with pytest.raises(errors.InputError, match='cannot be read here'):
      restore(tmp_path, tx)
    assert sorted(tmp_path.rglob('*')) == before
    assert checkpoints.any_left(tmp_path)
  assert int(restore(tmp_path, tx)[0].step) == 3


def test_other_processes_go_on_from_what_the_first_has_chosen(
  tmp_path, tx, monkeypatch
):
  write(tmp_path, tx, [1, 3])
  monkeypatch.setattr(jax, 'process_index', lambda: 1)
  said = {'restore': 2 * 1, 'nothing': -1, 'refused': -2}
  first = lambda name: monkeypatch.setattr(
    sharding, 'of_the_first', lambda _: said[name]
  )
  first('restore')
  assert int(restore(tmp_path, tx)[0].step) == 1
  first('nothing')
  assert resume.restore_latest(tmp_path, tx, make_data()) is None
  first('refused')
  with pytest.raises(errors.InputError, match='the first process cannot go on'):
    restore(tmp_path, tx)
  (tmp_path / 'checkpoints' / '1' / 'arch' / 'metadata').unlink()
  first('restore')
  with pytest.raises(errors.InputError, match='1 cannot be read here'):
    restore(tmp_path, tx)


def log(folder, *kinds):
  rows = [{'kind': kind, 'step': i} for i, kind in enumerate(kinds)]
  rows += [{'kind': 'eval', 'step': 9, 'phase': 'final'}] * ('final' in kinds)
  path = folder / 'metrics.jsonl'
  path.write_text(''.join(json.dumps(row) + '\n' for row in rows))


@pytest.mark.parametrize(
  ('kinds', 'folders', 'gone'),
  [
    # Killed before a save, or in the first one.
    ([], True, False),
    (['train', 'eval'], True, False),
    (['train', 'save', 'train'], True, False),
    (['train', 'save', 'train', 'save'], True, True),
    (['train', 'final', 'save'], True, True),
    (['train', 'final'], True, False),
    # Moved without its folders, or after they were deleted.
    (['train'], False, False),
    (['train', 'save'], False, True),
  ],
)
def test_moments_that_are_gone_are_told_from_none(
  tmp_path, kinds, folders, gone
):
  log(tmp_path, *kinds)
  if folders:
    (tmp_path / 'checkpoints').mkdir()
    (tmp_path / 'events').mkdir()
  if not gone:
    resume.check_there(tmp_path)
    return
  with pytest.raises(errors.InputError, match='put them back, or choose'):
    resume.check_there(tmp_path)


def test_a_single_save_that_was_killed_is_not_gone(tmp_path):
  (tmp_path / 'checkpoints' / '9.orbax-checkpoint-tmp').mkdir(parents=True)
  (tmp_path / 'events').mkdir()
  log(tmp_path, 'train', 'final', 'save')
  resume.check_there(tmp_path)
  log(tmp_path, 'save', 'train', 'final', 'save')
  with pytest.raises(errors.InputError, match='tells of 2 saves'):
    resume.check_there(tmp_path)
  (tmp_path / 'checkpoints' / '5').mkdir()
  resume.check_there(tmp_path)


@pytest.mark.parametrize('name', ['checkpoints', 'events', 'checkpoints/5'])
def test_a_link_that_leads_nowhere_is_told(tmp_path, name):
  (tmp_path / 'checkpoints' / '3').mkdir(parents=True)
  path = tmp_path / name
  if name == 'checkpoints':
    path.rename(tmp_path / 'kept')
  path.symlink_to(tmp_path / 'not mounted')
  with pytest.raises(errors.InputError, match='not mounted, which is not ther'):
    resume.check_there(tmp_path)
  (tmp_path / 'not mounted').mkdir()
  resume.check_there(tmp_path)


def test_nothing_is_saved_before_what_is_there(tmp_path, tx):
  write(tmp_path, tx, [5])
  writer = checkpoint_writer.Writer(tmp_path, keep=2)
  with pytest.raises(RuntimeError, match='3 was not written: there is a newer'):
    writer.save(make_state(tx, 3), CFG, make_data(), 0, FLOPS, TRIALS)
  writer.close()


def test_a_moment_is_on_the_disk_before_it_has_its_name(
  tmp_path, tx, monkeypatch
):
  synced, fsync = set(), os.fsync

  def record(file):
    synced.add(os.readlink(f'/proc/self/fd/{file}'))
    fsync(file)

  monkeypatch.setattr(os, 'fsync', record)
  write(tmp_path, tx, [1])
  moment = tmp_path / 'checkpoints' / '1'
  names = [p.relative_to(moment).as_posix() for p in moment.rglob('*')]
  for name in ('digests.json', 'arch', 'arch/metadata', 'data/metadata'):
    assert name in names
    assert any(x.endswith(f'tmp/{name}') for x in synced), name
  # And the names of these.
  assert any(x.endswith('checkpoints/1.orbax-checkpoint-tmp') for x in synced)


def test_the_arrays_may_be_donated_right_after_a_save(tmp_path, tx):
  """On the CPU JAX copies what Orbax still reads, and donates the rest."""
  overwrite = jax.jit(
    lambda s: jax.tree.map(lambda x: x * 0, s), donate_argnums=0
  )
  other = make_state(tx, 8)
  overwrite(other)  # Compiles, so that Orbax still writes at the next call.
  assert all(x.is_deleted() for x in jax.tree.leaves(other.params))
  writer, data = checkpoint_writer.Writer(tmp_path, keep=2), make_data()
  state = make_state(tx, 7)
  writer.save(state, CFG, data, 0, FLOPS, TRIALS)
  overwrite(state)
  writer.close()
  equal(restore(tmp_path, tx)[0], make_state(tx, 7))


def test_shrunk_architectures_are_read_back_by_their_own_shape(tmp_path, tx):
  small = dataclasses.replace(CFG, F=CFG.F - 5, D=CFG.D - 3, K=1)
  write(tmp_path, tx, [2], cfg=small)
  state, cfg, _, _ = restore(tmp_path, tx)
  assert cfg == small
  structure.check_shapes(state.params, small)


def test_a_workdir_without_checkpoints_is_named(tmp_path):
  with pytest.raises(errors.InputError, match='give the --workdir of a run'):
    checkpoints.restore_params(tmp_path)
  (tmp_path / 'config.json').touch()
  with pytest.raises(errors.InputError, match='go on with the run first'):
    checkpoints.restore_params(tmp_path)


def test_a_half_written_folder_is_not_a_checkpoint(tmp_path, tx):
  """What a kill inside the very first save leaves behind."""
  half = tmp_path / 'checkpoints' / '5.orbax-checkpoint-tmp-0'
  (half / 'params').mkdir(parents=True)
  assert checkpoints.moments(tmp_path) == []
  assert resume.restore_latest(tmp_path, tx, make_data()) is None
  assert not (tmp_path / 'damaged').exists()
  # Nor in the way of the next one.
  write(tmp_path, tx, [1])
  assert os.listdir(tmp_path / 'checkpoints') == ['1']


def test_a_file_in_place_of_a_checkpoint_is_damage(tmp_path, tx):
  write(tmp_path, tx, [1])
  (tmp_path / 'checkpoints' / '3').write_text('')
  assert int(restore(tmp_path, tx)[0].step) == 1
  assert (tmp_path / 'damaged' / 'checkpoints-3').is_file()


def test_room_is_looked_for_when_the_last_save_is_over(tmp_path, monkeypatch):
  """Which takes of it until then."""
  done, usage = [], checkpoint_writer.shutil.disk_usage
  monkeypatch.setattr(
    checkpoint_writer.Writer, 'wait', lambda _: done.append('wait')
  )
  monkeypatch.setattr(
    checkpoint_writer.shutil, 'disk_usage',
    lambda path: done.append('look') or usage(path),
  )  # fmt: skip
  writer = checkpoint_writer.Writer(tmp_path, keep=2)
  writer._check_space(np.zeros(3))
  assert done == ['wait', 'look']
  writer.close()


@pytest.mark.parametrize(
  ('error', 'message'),
  [
    (errno.ENOSPC, 'the disk is full; free space'),
    (errno.EDQUOT, 'the disk is full; free space'),
    (ValueError('RESOURCE_EXHAUSTED: no\nroom'), 'the disk is full; free'),
    (ValueError('open\nPermission denied'), 'workdir: open Permission denied'),
    (errno.EACCES, r'Permission denied: .*; choose another --workdir'),
    (errno.EROFS, r'Read-only file system: .*; choose another --workdir'),
  ],
)
def test_what_cannot_be_written_is_told_in_one_line(error, message):
  if isinstance(error, int):
    error = OSError(error, os.strerror(error), 'checkpoints/3')
  told = checkpoint_writer.write_error(error)
  assert isinstance(told, errors.InputError) and '\n' not in str(told)
  assert re.search(message, str(told))


def test_another_failure_of_a_save_stays_what_it_is():
  error = ValueError('a shape')
  assert checkpoint_writer.write_error(error) is error


def flip(path, bit):
  """Flips one bit of a file."""
  content = bytearray(path.read_bytes())
  content[bit // 8] ^= 1 << bit % 8
  path.write_bytes(content)


def test_a_flipped_bit_anywhere_is_refused(tmp_path, tx):
  """One random bit of every file of a rolling checkpoint and of an event."""
  writer = checkpoint_writer.Writer(tmp_path, keep=2)
  writer.save(make_state(tx, 3), CFG, make_data(), 0, FLOPS, TRIALS)
  writer.save_event(
    make_event(CFG), make_state(tx, 4), make_data(), FLOPS, TRIALS
  )
  writer.close()
  rng = np.random.default_rng(0)
  for folder in ('checkpoints/3', 'events/0'):
    moment = tmp_path / folder
    files = [p for p in moment.rglob('*') if p.is_file()]
    assert len(files) > 20
    for path in files:
      bit = int(rng.integers(8 * path.stat().st_size))
      flip(path, bit)
      if path.parent == moment and path.name in checkpoint_writer._UNREAD:
        digests.verify(moment)
      else:
        with pytest.raises((ValueError, OSError)):
          digests.verify(moment)
      flip(path, bit)
    digests.verify(moment)


def test_a_flipped_bit_is_set_aside(tmp_path, tx, caplog):
  write(tmp_path, tx, [1, 3, 5])
  files = (tmp_path / 'checkpoints' / '5' / 'params').rglob('d/*')
  largest = max(files, key=lambda p: p.stat().st_size)
  flip(largest, 8 * largest.stat().st_size // 2)
  with pytest.raises(errors.InputError, match='digest differs') as refusal:
    checkpoints.restore_params(tmp_path)
  assert '\n' not in str(refusal.value)
  with caplog.at_level(logging.WARNING):
    state, _, _, item = restore(tmp_path, tx)
  equal(state, make_state(tx, 3))
  assert item == 3
  assert 'its digest differs' in caplog.text
  assert 'taking the one before' in caplog.text


@pytest.mark.parametrize('part', ['params', 'prune', 'arch', 'event'])
def test_every_reader_refuses_a_damaged_part(tmp_path, tx, part):
  writer = checkpoint_writer.Writer(tmp_path, keep=2)
  writer.save_event(
    make_event(CFG), make_state(tx, 4), make_data(), FLOPS, TRIALS
  )
  writer.close()
  path = tmp_path / 'events' / '0'
  files = [p for p in (path / part).rglob('*') if p.is_file()]
  flip(max(files, key=lambda p: p.stat().st_size), 300)

  def read():
    moment = checkpoints.read_moment(path)
    checkpoints.read_params(moment)
    checkpoints.read_prune(moment)
    checkpoints.read_events(tmp_path)

  with pytest.raises(errors.InputError, match=f'{part}/.* its digest differs'):
    read()


def test_a_moment_without_digests_is_not_one(tmp_path, tx):
  write(tmp_path, tx, [1, 3])
  (tmp_path / 'checkpoints' / '3' / 'digests.json').unlink()
  assert int(restore(tmp_path, tx)[0].step) == 1
