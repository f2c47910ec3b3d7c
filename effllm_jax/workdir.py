"""The plain files of a run: config.json, metrics.jsonl, trace.jsonl."""

from collections.abc import Callable
from collections.abc import Iterable
from collections.abc import Iterator
from collections.abc import Mapping
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
from effllm_jax import untrusted

_T = TypeVar('_T')

# Of a config: where models and text lie. `train` and the checkpoints compare
# what they are.
_PATHS = ('source', 'distill.teacher', 'data.text')
# Keys of a config, or how they begin, that a run may go on with otherwise.
_FREE = ('mesh.', 'data.timeout', 'checkpoint.')
# How the names of folders begin that are there while something is made.
_SCRATCH = '.new-'
# For a config.json that cannot be read.
_REMEDY = 'restore it or choose another --workdir'


# Of a workdir, held by the run that is at work in it.
LOCK = 'lock'


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
    try:
      new.rename(target)
    except OSError:
      # Another process was faster; what it wrote is the same.
      if not target.exists():
        raise


def check(workdir: str | os.PathLike, config: Mapping[str, Any]) -> None:
  """Checks that a run of `config` can use this workdir; writes nothing.

  Raises:
    errors.InputError: the folder cannot be written, holds something else, or
      was started with another config (each different key is named, with both
      values).
  """
  folder = pathlib.Path(workdir).absolute()
  path = folder / 'config.json'
  above = next(p for p in (folder, *folder.parents) if p.exists())
  if not (above.is_dir() and os.access(above, os.W_OK | os.X_OK)):
    raise errors.InputError(
      f'cannot write {workdir}: {above} is not a folder that you may write; '
      'choose another --workdir'
    )
  # Looked for first: a run that begins meanwhile writes its config before all
  # else.
  other = folder.exists() and any(
    p.suffix != '.tmp' and p.name != LOCK for p in folder.iterdir()
  )
  if not path.exists():
    if other:
      raise errors.InputError(
        f'{workdir} holds other files and no config.json; choose an empty or '
        'new --workdir'
      )
    return
  known = untrusted.read_json(path, _REMEDY)
  # Through JSON, so that a tuple equals the list that it was written as.
  changed = changes(known, json.loads(json.dumps(config)))
  if changed:
    raise errors.InputError(
      f'{workdir} belongs to another config: {changed}; use the same values, '
      'or another --workdir'
    )


def changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
  """What differs between nested dicts, each key with both values; '': nothing.

  Not what a run may go on with otherwise: its devices, how long it waits for
  text, how often it is saved, in which folder a model or a text lies. No weight
  depends on that.
  """
  old, new = _flat(old), _flat(new)
  return '; '.join(
    f'{key}={old.get(key, "absent")!r} there, {new.get(key, "absent")!r} now'
    for key in sorted(old.keys() | new.keys())
    if old.get(key) != new.get(key)
    and not key.startswith(_FREE)
    and not _are_paths(key, old.get(key), new.get(key))
  )


def _are_paths(key, *values) -> bool:
  return key in _PATHS and all(isinstance(x, str) and '/' in x for x in values)


@contextlib.contextmanager
def claimed(
  workdir: str | os.PathLike, config: Mapping[str, Any]
) -> Iterator[None]:
  """Holds a workdir for one run, whose config it writes where there is none.

  Of one that is there the paths become those of now. A folder that is refused
  is not made, and not written to.

  Raises:
    errors.InputError: as `check`, or the disk refuses.
    HeldError: another run is at work there.
  """
  check(workdir, config)
  folder = pathlib.Path(workdir)
  with errors.writing(workdir, 'choose another --workdir'):
    folder.mkdir(parents=True, exist_ok=True)
  refusal = (
    f'another run is at work in {workdir}; wait for its end or choose another '
    '--workdir'
  )
  with locked(folder / LOCK, refusal):
    # Another run may have come and gone meanwhile.
    check(workdir, config)
    _write_config(folder, config)
    yield


def _write_config(workdir, config) -> None:
  path, known = workdir / 'config.json', None
  if path.exists():
    known = untrusted.read_json(path, _REMEDY)
    config = _with_paths_of(config, known)
  if config != known:
    with errors.writing(workdir, 'choose another --workdir'):
      write_json(path, config)


def _with_paths_of(config, known, above='') -> dict[str, Any]:
  """What is known of a config, but where models and text lie."""
  return {
    name: _with_paths_of(config[name], value, f'{above}{name}.')
    if isinstance(value, dict)
    else config[name]
    if f'{above}{name}' in _PATHS
    else value
    for name, value in known.items()
  }


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


def _flat(tree, prefix='') -> dict[str, Any]:
  if not isinstance(tree, dict):
    return {prefix: tree}
  return {
    key: value
    for name, child in tree.items()
    for key, value in _flat(
      child, f'{prefix}.{name}' if prefix else name
    ).items()
  }


class Log:
  """Appends JSON lines; after a resume, without the rows of a lost future."""

  def __init__(self, path: pathlib.Path, resume_step: int):
    """Opens `path` and drops rows later than `resume_step` (-1: all).

    Raises:
      errors.InputError: as `read`, or a row without a step.
    """
    kept = []
    for number, row in enumerate(read(path), 1):
      if not isinstance(row, dict) or not isinstance(row.get('step'), int):
        raise errors.InputError(
          f'{path} row {number} has no integer as step; restore or delete it'
        )
      if row['step'] <= resume_step:
        kept.append(row)
    write_text(path, ''.join(json.dumps(row) + '\n' for row in kept))
    self._file = path.open('a', buffering=1, encoding='utf-8')

  def write(self, row: Mapping[str, Any]) -> None:
    """Appends one row, which must have a `step`."""
    self._file.write(json.dumps(row) + '\n')

  def sync(self) -> None:
    """Returns when every row survives a power cut."""
    os.fsync(self._file.fileno())

  def close(self) -> None:
    """Closes the file."""
    self._file.close()


class NoLog(Log):
  """A log that another process keeps."""

  def __init__(self, path: pathlib.Path, resume_step: int):
    """Takes what `Log` takes, and opens nothing."""

  def write(self, row: Mapping[str, Any]) -> None:
    """Writes nothing."""

  def sync(self) -> None:
    """Has nothing to wait for."""

  def close(self) -> None:
    """Closes nothing."""


def read(path: pathlib.Path) -> Iterator[dict[str, Any]]:
  """Rows of a log; a torn last line, of a killed process, is left out.

  Raises:
    errors.InputError: no regular file, or a line that is not the torn last one
      and not JSON.
  """
  if not path.exists():
    return
  remedy = 'restore or delete it'
  with untrusted.opened(path, remedy) as file:
    for number, line in enumerate(file, 1):
      try:
        row = untrusted.parse_json(line, f'{path} line {number}', remedy)
      except errors.InputError:
        if not line.endswith(b'\n'):
          return
        raise
      yield row
