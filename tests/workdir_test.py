import concurrent.futures
import contextlib
import errno
import fcntl
import json
import os
import pathlib
import threading
import time

import pytest

from effllm_jax import errors
from effllm_jax import workdir

CONFIG = {'seed': 0, 'prune': {'every': 2, 'floors': {'ffn': 1}}}


def claim(folder, config):
  with workdir.claimed(folder, config):
    pass


def test_a_workdir_belongs_to_one_config(tmp_path):
  folder = tmp_path / 'a' / 'b'
  claim(folder, CONFIG)
  claim(folder, CONFIG)
  other = {'seed': 0, 'prune': {'every': 4, 'floors': {'ffn': 1}}}
  with pytest.raises(
    errors.InputError, match=r'prune\.every=2 there, 4 now; use the same'
  ):
    claim(folder, other)
  assert json.loads((folder / 'config.json').read_text()) == CONFIG


def test_what_no_weight_depends_on_may_change(tmp_path):
  config = CONFIG | {
    'mesh': {'data': 1}, 'checkpoint': {'keep': 2}, 'data': {'timeout': 300.0}
  }  # fmt: skip
  claim(tmp_path, config)
  other = {
    'mesh': {'data': 8}, 'checkpoint': {'keep': 5}, 'data': {'timeout': 600.0}
  }  # fmt: skip
  claim(tmp_path, config | other)
  assert json.loads((tmp_path / 'config.json').read_text()) == config
  with pytest.raises(errors.InputError, match=r"data\.text='absent' there"):
    workdir.check(tmp_path, config | other | {'data': {'text': 'pypi'}})


def test_a_model_and_a_text_may_lie_elsewhere(tmp_path):
  """What they are is compared where they have been read."""
  config = lambda source, text, rest='a/b': {
    'source': source, 'data': {'text': text, 'seed': 0}, 'rest': rest
  }  # fmt: skip
  claim(tmp_path, config('runs/a/events/3', 'texts/a'))
  claim(tmp_path, config('/mnt/a/events/3', 'texts/a'))
  moved = config('/mnt/a/events/3', 'text/../a')
  claim(tmp_path, moved)
  known = json.loads((tmp_path / 'config.json').read_text())
  assert known == moved
  for other in (
    # No path: a name.
    config('smollm2-135m', 'texts/a'),
    config('runs/a/events/3', 'pypi'),
    config('runs/a/events/3', 'texts/a', 'a//b'),
  ):
    with pytest.raises(errors.InputError, match='another config'):
      claim(tmp_path, other)
  assert json.loads((tmp_path / 'config.json').read_text()) == moved


def test_a_check_writes_nothing(tmp_path):
  workdir.check(tmp_path / 'new' / 'run', CONFIG)
  assert not os.listdir(tmp_path)


def test_a_folder_with_other_files_is_refused(tmp_path):
  (tmp_path / 'thesis.tex').write_text('x')
  with pytest.raises(errors.InputError, match='holds other files'):
    claim(tmp_path, CONFIG)
  assert sorted(os.listdir(tmp_path)) == ['thesis.tex']


def test_a_run_at_work_keeps_its_config(tmp_path):
  """Whoever is refused has written nothing, also where only paths differ."""
  config = lambda source: {'source': source, 'seed': 0}
  with workdir.claimed(tmp_path / 'a', config('runs/a')):
    with pytest.raises(workdir.HeldError, match='another run is at work in'):
      claim(tmp_path / 'a', config('runs/b'))
    known = json.loads((tmp_path / 'a' / 'config.json').read_text())
    assert known == config('runs/a')
  claim(tmp_path / 'a', config('runs/b'))


def test_a_claim_that_went_no_further_than_its_lock_is_made_again(tmp_path):
  (tmp_path / workdir.LOCK).touch()
  claim(tmp_path, CONFIG)
  assert json.loads((tmp_path / 'config.json').read_text()) == CONFIG


def test_many_claim_a_new_workdir_at_once(tmp_path):
  """One gets it, and the others hear of a lock, whatever is there by then."""
  several = 8
  barrier = threading.Barrier(several, timeout=60)

  def attempt(folder):
    barrier.wait()
    try:
      with workdir.claimed(folder, CONFIG):
        barrier.wait()
        return 'held'
    except workdir.HeldError:
      barrier.wait()
      return 'refused'

  with concurrent.futures.ThreadPoolExecutor(several) as pool:
    for i in range(20):
      found = [*pool.map(attempt, [tmp_path / str(i)] * several)]
      assert sorted(found) == ['held'] + ['refused'] * (several - 1)


def test_a_config_that_comes_while_the_folder_is_listed(tmp_path, monkeypatch):
  """That of a run which begins meanwhile: nothing else is there yet."""
  listed = pathlib.Path.iterdir

  def late(folder):
    workdir.write_json(tmp_path / 'config.json', CONFIG)
    return listed(folder)

  monkeypatch.setattr(pathlib.Path, 'iterdir', late)
  workdir.check(tmp_path, CONFIG)


def test_a_path_that_is_a_file_is_refused(tmp_path):
  (tmp_path / 'file').write_text('x')
  with pytest.raises(errors.InputError, match='choose another --workdir'):
    claim(tmp_path / 'file' / 'run', CONFIG)


def test_a_broken_config_is_named(tmp_path):
  (tmp_path / 'config.json').write_text('{')
  with pytest.raises(errors.InputError, match=r'config\.json is not JSON'):
    claim(tmp_path, CONFIG)


def test_rows_of_a_lost_future_are_dropped(tmp_path):
  path = tmp_path / 'metrics.jsonl'
  log = workdir.Log(path, -1)
  for step in range(5):
    log.write({'step': step})
  log.close()
  with path.open('a') as f:
    f.write('{"step": 5, "lo')
  assert [r['step'] for r in workdir.read(path)] == [0, 1, 2, 3, 4]
  log = workdir.Log(path, 2)
  log.write({'step': 3})
  log.close()
  assert [r['step'] for r in workdir.read(path)] == [0, 1, 2, 3]


def test_a_broken_line_in_the_middle_is_named(tmp_path):
  path = tmp_path / 'metrics.jsonl'
  path.write_text('{"step": 0}\nnonsense\n{"step": 2}\n')
  with pytest.raises(errors.InputError, match='line 2 is not JSON'):
    list(workdir.read(path))


def test_what_another_process_is_at_comes_last(tmp_path, monkeypatch):
  lock, other, order = tmp_path / 'lock', contextlib.ExitStack(), []
  other.enter_context(workdir.locked(lock, 'taken'))
  done = {}

  def attempt(task):
    order.append(task)
    if task == 'b' and 'other has ended' not in done:
      return lock
    done[task] = True
    return None

  def wait(message):
    assert message.endswith(f'holds {lock}')
    done['other has ended'] = True
    other.close()

  monkeypatch.setattr(workdir.logging, 'warning', wait)
  workdir.share(iter('abc'), attempt)
  assert order == [*'abc', *'abc']
  assert [*done] == ['a', 'c', 'other has ended', 'b']


def test_a_lock_is_held_once(tmp_path):
  path = tmp_path / 'lock'
  with (
    workdir.locked(path, 'taken'),
    pytest.raises(errors.InputError, match='taken'),
    workdir.locked(path, 'taken'),
  ):
    pass
  # Also an error lets go of it.
  with pytest.raises(ZeroDivisionError), workdir.locked(path, 'taken'):
    raise ZeroDivisionError
  with workdir.locked(path):
    pass


def test_a_file_system_without_locks_stops_nothing(tmp_path, monkeypatch):
  def flock(*_):
    raise OSError(errno.ENOLCK, 'No locks available')

  monkeypatch.setattr(fcntl, 'flock', flock)
  with workdir.locked(tmp_path / 'lock', 'taken'):
    assert os.listdir(tmp_path) == ['lock']


@pytest.mark.parametrize('make', [os.mkdir, lambda x: os.symlink('other', x)])
def test_a_lock_that_is_no_file_is_refused(tmp_path, make):
  make(tmp_path / 'lock')
  with (
    pytest.raises(errors.InputError, match=r'cannot write .* another --wo'),
    workdir.locked(tmp_path / 'lock'),
  ):
    pass
  assert os.listdir(tmp_path) == ['lock']


@pytest.mark.parametrize('faster', [False, True])
def test_a_folder_is_made_once(tmp_path, faster):
  """By whoever is first; the other leaves it, and nothing of its own."""
  target = tmp_path / 'model'

  def write(new):
    (new / 'config.json').write_text('ours')
    if faster:
      target.mkdir()
      (target / 'config.json').write_text('theirs')

  workdir.once(target, write)
  workdir.once(target, lambda _: pytest.fail('it is there'))
  said = 'theirs' if faster else 'ours'
  assert (target / 'config.json').read_text() == said
  assert os.listdir(tmp_path) == ['model']


def test_a_folder_that_cannot_be_made_is_not_there(tmp_path):
  def write(new):
    (new / 'config.json').write_text('half of it')
    raise OSError(errno.ENOSPC, 'No space left on device')

  with pytest.raises(OSError, match='No space left'):
    workdir.once(tmp_path / 'model', write)
  # Nobody was faster.
  with pytest.raises(FileNotFoundError):
    workdir.once(tmp_path / 'model', os.rmdir)
  assert os.listdir(tmp_path) == []


def test_what_a_killed_process_has_left_goes(tmp_path):
  """But not what another one is at, or has made this moment."""
  for name in ('.new-killed', '.new-young', 'model'):
    (tmp_path / name).mkdir()
    (tmp_path / name / 'half').write_text('x')
  with workdir.scratch(tmp_path) as held:
    for name in (held, tmp_path / '.new-killed', tmp_path / 'model'):
      os.utime(name, (0, 0))
    with workdir.scratch(tmp_path) as mine:
      assert mine.is_dir()
      left = {*os.listdir(tmp_path)} - {mine.name}
    assert left == {'.new-young', 'model', held.name}
  assert {*os.listdir(tmp_path)} == {'.new-young', 'model'}


def test_a_turn_comes_to_one_at_a_time(tmp_path):
  """Also where the one before has removed the file that others wait for."""
  path, inside, most = tmp_path / 'lock', [], []

  def take(i):
    with workdir.in_turn(path):
      inside.append(i)
      most.append(len(inside))
      time.sleep(0.001)
      inside.remove(i)

  with concurrent.futures.ThreadPoolExecutor(8) as pool:
    list(pool.map(take, range(80)))
  assert most == [1] * 80 and not path.exists()


def test_who_waits_for_a_turn_says_so(tmp_path, caplog):
  path = tmp_path / 'lock'

  def take():
    with workdir.in_turn(path):
      return 'through'

  with concurrent.futures.ThreadPoolExecutor(1) as pool:
    with workdir.in_turn(path):
      assert not caplog.messages
      waits = pool.submit(take)
      while not caplog.messages:
        assert not waits.done()
        time.sleep(0.001)
    assert waits.result() == 'through'
  (message,) = caplog.messages
  assert message == f'waiting for another process, which holds {path}'


def test_a_turn_without_a_lock_is_everyones(tmp_path):
  (tmp_path / 'lock').mkdir()
  with workdir.in_turn(tmp_path / 'lock'), workdir.in_turn(tmp_path / 'lock'):
    pass
  # An error is the user's, and not of the lock.
  with (
    pytest.raises(errors.InputError, match='mine'),
    workdir.in_turn(tmp_path / 'turn'),
  ):
    raise errors.InputError('mine')
  assert os.listdir(tmp_path) == ['lock']
