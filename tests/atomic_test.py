"""Files that are there whole, and locks that a killed process lets go of."""

import concurrent.futures
import contextlib
import errno
import fcntl
import os
import time

import pytest

from effllm_jax import atomic
from effllm_jax import errors


def test_what_another_process_is_at_comes_last(tmp_path, monkeypatch):
  lock, other, order = tmp_path / 'lock', contextlib.ExitStack(), []
  other.enter_context(atomic.locked(lock, 'taken'))
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

  monkeypatch.setattr(atomic.logging, 'warning', wait)
  atomic.share(iter('abc'), attempt)
  assert order == [*'abc', *'abc']
  assert [*done] == ['a', 'c', 'other has ended', 'b']


def test_a_lock_is_held_once(tmp_path):
  path = tmp_path / 'lock'
  with (
    atomic.locked(path, 'taken'),
    pytest.raises(errors.InputError, match='taken'),
    atomic.locked(path, 'taken'),
  ):
    pass
  # Also an error lets go of it.
  with pytest.raises(ZeroDivisionError), atomic.locked(path, 'taken'):
    raise ZeroDivisionError
  with atomic.locked(path):
    pass


def test_a_file_system_without_locks_stops_nothing(tmp_path, monkeypatch):
  def flock(*_):
    raise OSError(errno.ENOLCK, 'No locks available')

  monkeypatch.setattr(fcntl, 'flock', flock)
  with atomic.locked(tmp_path / 'lock', 'taken'):
    assert os.listdir(tmp_path) == ['lock']


@pytest.mark.parametrize('make', [os.mkdir, lambda x: os.symlink('other', x)])
def test_a_lock_that_is_no_file_is_refused(tmp_path, make):
  make(tmp_path / 'lock')
  with (
    pytest.raises(errors.InputError, match=r'cannot write .* another --wo'),
    atomic.locked(tmp_path / 'lock'),
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

  atomic.once(target, write)
  atomic.once(target, lambda _: pytest.fail('it is there'))
  said = 'theirs' if faster else 'ours'
  assert (target / 'config.json').read_text() == said
  assert os.listdir(tmp_path) == ['model']


def test_a_folder_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
  synced = []

  def sync(path):
    assert not (tmp_path / 'model').exists()
    synced.append((path.name, path.read_text() if path.is_file() else None))

  def write(new):
    (new / 'part').mkdir()
    (new / 'part' / 'a').write_text('1')
    (new / 'b').write_text('2')
    (new / 'link').symlink_to('nowhere')

  monkeypatch.setattr(atomic, 'sync', sync)
  atomic.once(tmp_path / 'model', write)
  assert {*synced} == {('part', None), ('a', '1'), ('b', '2'), ('new', None)}


def test_a_folder_that_cannot_be_made_is_not_there(tmp_path):
  def write(new):
    (new / 'config.json').write_text('half of it')
    raise OSError(errno.ENOSPC, 'No space left on device')

  with pytest.raises(OSError, match='No space left'):
    atomic.once(tmp_path / 'model', write)
  # Nobody was faster.
  with pytest.raises(FileNotFoundError):
    atomic.once(tmp_path / 'model', os.rmdir)
  assert os.listdir(tmp_path) == []


def test_what_a_killed_process_has_left_goes(tmp_path):
  """But not what another one is at, or has made this moment."""
  for name in ('.effllm-killed', '.effllm-young', 'model'):
    (tmp_path / name).mkdir()
    (tmp_path / name / 'half').write_text('x')
  with atomic.scratch(tmp_path) as held:
    for name in (held, tmp_path / '.effllm-killed', tmp_path / 'model'):
      os.utime(name, (0, 0))
    with atomic.scratch(tmp_path) as mine:
      assert mine.is_dir()
      left = {*os.listdir(tmp_path)} - {mine.name}
    assert left == {'.effllm-young', 'model', held.name}
  assert {*os.listdir(tmp_path)} == {'.effllm-young', 'model'}


def test_a_turn_comes_to_one_at_a_time(tmp_path):
  """Also where the one before has removed the file that others wait for."""
  path, inside, most = tmp_path / 'lock', [], []

  def take(i):
    with atomic.in_turn(path):
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
    with atomic.in_turn(path):
      return 'through'

  with concurrent.futures.ThreadPoolExecutor(1) as pool:
    with atomic.in_turn(path):
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
  with atomic.in_turn(tmp_path / 'lock'), atomic.in_turn(tmp_path / 'lock'):
    pass
  # An error is the user's, and not of the lock.
  with (
    pytest.raises(errors.InputError, match='mine'),
    atomic.in_turn(tmp_path / 'turn'),
  ):
    raise errors.InputError('mine')
  assert os.listdir(tmp_path) == ['lock']
