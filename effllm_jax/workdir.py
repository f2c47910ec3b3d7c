"""The plain files of a run: config.json, metrics.jsonl, trace.jsonl."""

from collections.abc import Iterator
from collections.abc import Mapping
import contextlib
import json
import os
import pathlib
from typing import Any

from effllm_jax import atomic
from effllm_jax import errors
from effllm_jax import untrusted

# Of a config: where models, text and a table lie, and which of their values are
# no path; '': none, as where an older version knew no such key. `train` and the
# checkpoints compare what lies there.
_PATHS = {
  'source': ('smollm2-135m',),
  'distill.teacher': ('', 'smollm2-135m'),
  'data.text': ('pypi', 'debian'),
  'eval.text': ('',),
  'budget.table': ('',),
}
# Keys of a config, or how they begin, that a run may go on with otherwise.
_FREE = ('mesh.', 'data.timeout', 'checkpoint.')
# For a config.json that cannot be read.
_REMEDY = 'restore it or choose another --workdir'
# Of a workdir, held by the run that is at work in it.
LOCK = 'lock'


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
  none = {key: '' for key, known in _PATHS.items() if '' in known}
  old, new = none | _flat(old), none | _flat(new)
  return '; '.join(
    f'{key}={old.get(key, "absent")!r} there, {new.get(key, "absent")!r} now'
    for key in sorted(old.keys() | new.keys())
    if old.get(key) != new.get(key)
    and not key.startswith(_FREE)
    and not _are_paths(key, old.get(key), new.get(key))
  )


def _are_paths(key, *values) -> bool:
  return key in _PATHS and all(
    isinstance(x, str) and x not in _PATHS[key] for x in values
  )


@contextlib.contextmanager
def claimed(
  workdir: str | os.PathLike, config: Mapping[str, Any]
) -> Iterator[None]:
  """Holds a workdir for one run, whose config it writes where there is none.

  Of one that is there the paths become those of now. A folder that is refused
  is not made, and not written to.

  Raises:
    errors.InputError: as `check`, or the disk refuses.
    atomic.HeldError: another run is at work there.
  """
  check(workdir, config)
  folder = pathlib.Path(workdir)
  with errors.writing(workdir, 'choose another --workdir'):
    folder.mkdir(parents=True, exist_ok=True)
  refusal = (
    f'another run is at work in {workdir}; wait for its end or choose another '
    '--workdir'
  )
  with atomic.locked(folder / LOCK, refusal):
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
      atomic.write_json(path, config)


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
          f'{path} row {number} has no integer as step; take that line out'
        )
      if row['step'] <= resume_step:
        kept.append(row)
    atomic.write_text(path, ''.join(json.dumps(row) + '\n' for row in kept))
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
  # A deleted log would be made again without what is in it by now.
  with untrusted.opened(path, 'restore it') as file:
    for number, line in enumerate(file, 1):
      try:
        row = untrusted.parse_json(
          line, f'{path} line {number}', 'take that line out'
        )
      except errors.InputError:
        if not line.endswith(b'\n'):
          return
        raise
      yield row
