"""Whether the files of a folder are still what was written.

`digests.json` has the SHA-256 of all others. Orbax notices a file that is too
short, and not a bit that has flipped inside of an array. Digests of files do
not care how an array is split among them, or who reads it.
"""

from collections.abc import Collection
from collections.abc import Iterable
import concurrent.futures
import hashlib
import json
import pathlib

from effllm_jax import errors
from effllm_jax import untrusted

NAME = 'digests.json'
_REMEDY = 'choose another one'


def write(folder: pathlib.Path, but: Collection[str]) -> None:
  """Writes `digests.json`, of all files that are there.

  Args:
    folder: of the files, which must not change any more.
    but: names of some that may.
  """
  files = sorted(p for p in folder.rglob('*') if p.is_file())
  names = [p.relative_to(folder).as_posix() for p in files]
  digests = of(folder, [name for name in names if name not in but])
  (folder / NAME).write_text(json.dumps(digests, indent=0), encoding='utf-8')


def of(
  folder: pathlib.Path, names: Iterable[str], remedy: str = _REMEDY
) -> dict[str, str]:
  """SHA-256 of some files of a folder, by their names.

  Args:
    folder: of the files.
    names: paths within it.
    remedy: what to do where one of them cannot be read.

  Raises:
    errors.InputError: one of them cannot be read.
  """

  def digest(name):
    with untrusted.opened(folder / name, remedy) as file:
      return hashlib.file_digest(file, 'sha256').hexdigest()

  names = list(names)
  with concurrent.futures.ThreadPoolExecutor() as pool:
    return dict(zip(names, pool.map(digest, names), strict=True))


def identity(folder: pathlib.Path) -> str:
  """SHA-256 of `digests.json`, and so of all that it lists."""
  return of(folder, [NAME])[NAME]


def verify(folder: pathlib.Path, part: str = '') -> None:
  """Compares files with what was written.

  Args:
    folder: with a `digests.json`.
    part: how the names of the files begin; '': all.

  Raises:
    ValueError: a file is not what was written, or `digests.json` does not know
      the part; as an errors.InputError, one of them cannot be read.
  """
  saved = untrusted.read_json(folder / NAME, _REMEDY)
  names = [name for name in saved if name.startswith(part)]
  if part and not names:
    raise ValueError(f'{NAME} does not know {part}')
  found = of(folder, names)
  for name in names:
    if found[name] != saved[name]:
      raise ValueError(f'{name} is not what was written: its digest differs')


def check_same(path: pathlib.Path, now: str, key: str, value: str) -> None:
  """Checks that a text is the one that a run was started with.

  Args:
    path: of the run's record of it, a JSON object with a `digest`.
    now: the digest of what lies where the config says.
    key: of the config.
    value: what the config says.

  Raises:
    errors.InputError: it is another text, or the record is missing.
  """
  remedy = 'restore it or choose another --workdir'
  then = untrusted.read_shaped(path, {'digest': str}, remedy)['digest']
  if then != now:
    raise errors.InputError(
      f'{key} {value!r} is not the text that the run was started with: '
      f'digest={then[:12]!r} there, {now[:12]!r} now; put the old one back, or '
      'choose another --workdir'
    )
