"""Files and folders that are there whole or not at all, and their locks.

Of processes on one machine, and of others on a file system that has locks.
"""

from collections.abc import Callable
from collections.abc import Iterable
from collections.abc import Iterator
import contextlib
import fcntl
import json
import logging
import os
import pathlib
import shutil
import tempfile
import time
from typing import Any
from typing import TypeVar

from effllm_jax import errors

_T = TypeVar('_T')

# How the names of folders begin that are there while something is made.
_SCRATCH = '.effllm-'


class HeldError(errors.InputError):
  """Another process holds a lock."""


def write_json(path: pathlib.Path, record: Any) -> None:
  """Writes a JSON file as `write_text` does."""
  write_text(path, json.dumps(record, indent=2) + '\n')


def write_text(path: pathlib.Path, text: str) -> None:
  """Writes a file at once: readers see the old one or the new one."""
  scratch = path.with_name(path.name + '.tmp')
  # A link of that name would lead the text out of the folder.
  scratch.unlink(missing_ok=True)
  scratch.write_text(text, encoding='utf-8')
  scratch.replace(path)


def sync(path: pathlib.Path) -> None:
  """Returns when a file's bytes, or a folder's names, survive a power cut."""
  file = os.open(path, os.O_RDONLY)
  try:
    os.fsync(file)
  except OSError:
    # Not all file systems do this for folders.
    if not path.is_dir():
      raise
  finally:
    os.close(file)


@contextlib.contextmanager
def scratch(above: pathlib.Path) -> Iterator[pathlib.Path]:
  """A new folder in `above`, which is gone afterwards.

  So are those that killed processes have left there, where locks are to be had.
  """
  for stale in above.glob(f'{_SCRATCH}*'):
    with contextlib.suppress(OSError), _alone(stale):
      # In its first moment nobody holds it.
      if stale.stat().st_mtime < time.time() - 60:
        shutil.rmtree(stale)
  with (
    tempfile.TemporaryDirectory(dir=above, prefix=_SCRATCH) as made,
    contextlib.ExitStack() as stack,
  ):
    with contextlib.suppress(OSError):
      stack.enter_context(_alone(made))
    yield pathlib.Path(made)


@contextlib.contextmanager
def _alone(folder) -> Iterator[None]:
  """Holds a lock on a folder; OSError: another process does."""
  file = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
  try:
    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    yield
  finally:
    os.close(file)


def once(target: pathlib.Path, write: Callable[[pathlib.Path], None]) -> None:
  """Makes a folder that is there only when all of it is; else leaves it.

  Args:
    target: the folder; the one above it must exist.
    write: fills the folder that it is given, which is empty.
  """
  if target.exists():
    return
  with scratch(target.parent) as made:
    new = made / 'new'
    new.mkdir()
    write(new)
    # A rename may survive a power cut that the files do not: they would be of
    # zeros for ever, since nobody writes again what is there.
    for path in (*new.rglob('*'), new):
      if not path.is_symlink():
        sync(path)
    try:
      new.rename(target)
    except OSError:
      # Another process was faster; what it wrote is the same.
      if not target.exists():
        raise


@contextlib.contextmanager
def locked(
  path: pathlib.Path, refusal: str = '', waiting: str = ''
) -> Iterator[int]:
  """Holds a lock, which a killed process lets go of; gives its open file.

  A file system that has no locks costs the protection and nothing else.

  Args:
    path: of the lock, a file of no content that stays.
    refusal: what to say where it is held already; '': wait until it is not.
    waiting: what to log before that; '': nothing.

  Raises:
    HeldError: it is held already.
    errors.InputError: it cannot be written.
  """
  remedy = f'make {path.parent} writable or choose another --workdir'
  with errors.writing(path, remedy):
    # No link of that name leads out of the folder.
    file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
  try:
    # A file system without locks raises another OSError.
    with contextlib.suppress(OSError):
      try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
      except BlockingIOError as e:
        if refusal:
          raise HeldError(refusal) from e
        if waiting:
          logging.warning(waiting)
        fcntl.flock(file, fcntl.LOCK_EX)
    yield file
  finally:
    os.close(file)


@contextlib.contextmanager
def in_turn(path: pathlib.Path) -> Iterator[None]:
  """Lets one process through at a time, also of others on a file system.

  Those that wait say so, and look afterwards for what the first has made. Where
  no lock can be made or held, all go through at once.

  Args:
    path: of the lock, which is gone afterwards.
  """
  with contextlib.ExitStack() as stack:
    with contextlib.suppress(errors.InputError):
      waiting = f'waiting for another process, which holds {path}'
      held = lambda: stack.enter_context(locked(path, waiting=waiting))
      while not _lies_at(held(), path):
        # Who held it has removed it; the next one makes another.
        stack.close()
      stack.callback(_remove, path)
    yield


def share(
  tasks: Iterable[_T], attempt: Callable[[_T], pathlib.Path | None]
) -> None:
  """Sees to tasks in their order; those that other processes are at come last.

  These are waited for, and attempted again: one may have died before its end.

  Args:
    tasks: what there is to do.
    attempt: sees to one that is not done yet, or gives the lock of another
      process that is at it, or at what it follows from.
  """
  tasks = [*tasks]
  while held := [lock for lock in map(attempt, tasks) if lock]:
    waiting = f'waiting for another process, which holds {held[0]}'
    with locked(held[0], waiting=waiting):
      pass


def _remove(path: pathlib.Path) -> None:
  # What was made is there, also on a disk that has become read-only meanwhile.
  with contextlib.suppress(OSError):
    path.unlink()


def _lies_at(file: int, path: pathlib.Path) -> bool:
  try:
    return os.path.samestat(os.fstat(file), os.stat(path))
  except OSError:
    return False
