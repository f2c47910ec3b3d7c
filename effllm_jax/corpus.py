"""Real text, read, cleaned, split and written once as a dataset.

Documents stay whole and keep their domain. A share of each domain's documents,
picked by the hash of their ids, is held out; what the two splits have in
common is removed. Nothing that was downloaded is ever imported or run.
"""

from collections.abc import Callable
from collections.abc import Iterable
from collections.abc import Iterator
from collections.abc import Sequence
import contextlib
import hashlib
import json
import logging
import os
import pathlib
import re
import time

from effllm_jax import atomic
from effllm_jax import console
from effllm_jax import dataset
from effllm_jax import digests as digests_lib
from effllm_jax import documents as documents_lib
from effllm_jax import errors
from effllm_jax import packages as packages_lib
from effllm_jax import splitting
from effllm_jax import text_files
from effllm_jax import text_folder
from effllm_jax import untrusted

Document = documents_lib.Document

# Part of every dataset's key: raise it when a reader or the split changes, so
# that a cache built by older code is not taken for the new one.
RECIPE = 4
# Of 'pypi', for which everything since has given the same documents.
_PYPI_RECIPE = 1
# Of a folder of more bytes, or of files that do not say how many they hold. It
# is not sorted.
_LARGE_RECIPE, _LARGE = 5, 2**28
# How the parts of a path begin that a data set keeps for a test.
_TESTS = re.compile(
  r'(test|validation|valid|val|dev|eval)(?![^\W\d_])', re.IGNORECASE
)
# Seconds in which a file may be written twice and have one time: file systems
# count them in steps of up to so many.
_SETTLED = 2.0


def prepare(
  text: str,
  cache: str | os.PathLike,
  remedy: str = 'set --config.data.text',
) -> pathlib.Path:
  """Builds the dataset of a text once and returns its folder.

  The folder is keyed by what went in, so a second call is instant and a
  changed folder is built anew. It holds the ArrayRecord files and
  `manifest.json` (where the text comes from, what each split holds, what was
  dropped). One process of those that share a cache builds it; the others wait.
  It reads a folder several times, a document at a time. A text is read again,
  to be compared, where its files are no longer those that lay there: by name,
  size, times and inode.

  Args:
    text: `'pypi'`; `'debian'`, which adds the packages of DEBIAN through
      apt-get, without installing them; or a folder, whose `.txt` files are
      documents and whose `.jsonl` files hold one a line (`text`, and optionally
      `domain`), either packed as `.gz` or `.zst` or not, and `.parquet` files
      one a row, by columns. A document's domain is otherwise the name of the
      subfolder it is in, or of the folder. Links to files are followed; links
      to folders are not, and names that begin with a dot are not read.
    cache: folder outside the repository; created when missing.
    remedy: what to do where there is no such text.

  Raises:
    errors.InputError: no such text, nothing usable in it, a file that cannot be
      read or that changes meanwhile, a package that cannot be had, or a cache
      that cannot be written.
  """
  root = pathlib.Path(cache).expanduser() / 'corpus'
  packages = _packages().get(text, ())
  if not packages:
    return _prepare_folder(text, root, remedy)
  made_of = [(p.name, p.files) for p in packages]
  made_of += [
    p.version for p in packages_lib.PYPI
  ]  # Debian serves one version: newest
  recipe = _PYPI_RECIPE if text == 'pypi' else RECIPE

  def read():
    found = [packages_lib.read(package, cache) for package in packages]
    documents = [document for documents, _ in found for document in documents]
    return documents, {'packages': [entry for _, entry in found]}

  final = _final(root, recipe, text, made_of)
  if not dataset.is_built(final):
    with _turn(root, text):
      _build(final, text, read)
  return final


def _packages() -> dict[str, tuple[packages_lib.Package, ...]]:
  """What the texts that are no folder are made of, by their names."""
  return {
    'pypi': packages_lib.PYPI,
    'debian': packages_lib.PYPI + packages_lib.DEBIAN,
  }


def _prepare_folder(text: str, root: pathlib.Path, remedy: str) -> pathlib.Path:
  """The dataset of a user's folder."""
  label, files, others = text_folder.listed(text, remedy)
  known = _known(root, label, _stamp(label, files))
  if known:
    return known
  with _turn(root, label):
    stamp = _stamp(label, files)
    known = _known(root, label, stamp)
    if known:
      return known
    folder = pathlib.Path(text).expanduser()
    digests = digests_lib.of(folder, files, text_folder.UNREADABLE)
    large = sum(map(os.path.getsize, files.values())) > _LARGE or not all(
      map(text_files.is_plain, files.values())
    )
    recipe = _LARGE_RECIPE if large else RECIPE
    final = _final(root, recipe, label, [*digests.items()])

    def read():
      _warn(text, files, others)
      documents = text_folder.Documents(text, label, files, digests)
      return documents, {'packages': [], 'files': digests}

    _build(final, label, read, large)
    if stamp:
      # A cache that cannot be written is read all the same.
      with contextlib.suppress(OSError):
        (final / f'of-{stamp}').touch()
  return final


def _warn(text: str, files: Iterable[str], others: Sequence[str]) -> None:
  """Of what a folder has that its user may not know to be read, or not."""
  is_test = lambda name: any(map(_TESTS.match, pathlib.PurePath(name).parts))
  for names, what in (
    (
      others,
      'files and linked folders are passed over, the first is %r; what is read '
      'are .txt, .jsonl and .parquet files, and links to such',
    ),
    (
      [*filter(is_test, files)],
      'files are called as if they were kept for a test, the first is %r; they '
      'are trained on too, move them away to keep them for one',
    ),
  ):
    if names:
      logging.warning(f'%s: %d {what}', text, len(names), names[0])


def _final(root, recipe, label, made_of) -> pathlib.Path:
  """The folder of a dataset, by what goes in."""
  key = _digest([recipe, label, made_of])
  return root / f'{_slug(label)}-{key}'


def _digest(made_of) -> str:
  """16 hexadecimal digits of what can be written as JSON."""
  return hashlib.sha256(json.dumps(made_of).encode()).hexdigest()[:16]


def _sorted(split: str, documents: Iterable[Document]) -> list[Document]:
  """In the order of TFDS's own builder, which wrote such texts before.

  So that a run of an older version goes on, and figures stay as published.
  """

  def key(document):
    domain = document.domain.replace('%', '%25').replace('/', '%2f')
    name = f'{split}{domain}/{document.id}'.replace('\\', '/')
    return hashlib.md5(name.encode()).hexdigest()

  return sorted(documents, key=key)


def _slug(label: str) -> str:
  return re.sub(r'[^a-z0-9]+', '-', label.lower())


@contextlib.contextmanager
def _turn(root: pathlib.Path, label: str) -> Iterator[None]:
  """Alone at work on a text; what the cache refuses to be written is told."""
  remedy = 'free some space, or set --cache'
  with errors.writing(f'the dataset to {root}', remedy):
    root.mkdir(parents=True, exist_ok=True)
    with atomic.in_turn(root / f'.{_slug(label)}.lock'):
      yield


def _build(
  final: pathlib.Path,
  label: str,
  read: Callable[[], tuple[Iterable[Document], dict]],
  large: bool = False,
) -> None:
  """Writes a dataset where there is none.

  Args:
    final: its folder.
    label: the name of the text.
    read: gives its documents, and where they come from for the manifest.
    large: whether they may not fit in memory, and are written as they come.
  """

  # The folder is made first: a cache that cannot be written shall not cost the
  # reading.
  def write(folder):
    documents, origin = read()
    splits, notes = splitting.split(_Shown(label, documents))
    if not large:
      splits = {name: _sorted(name, found) for name, found in splits.items()}
    dataset.write(folder, splits, {'text': label, **origin, **notes})

  atomic.once(final, write)
  if not dataset.is_built(final):
    raise errors.InputError(
      f'{final} has lost its manifest.json; delete the folder, and it is built '
      'again'
    )


class _Shown:
  """Documents of which every iteration shows how far it is."""

  def __init__(self, label: str, documents: Iterable[Document]):
    self._label, self._documents = label, documents
    self._passes = self._bytes = 0

  def __iter__(self) -> Iterator[Document]:
    self._passes += 1
    what = f'reading {self._label}, pass {self._passes}'
    self._bytes = yield from console.passing(
      what, self._documents, lambda document: document.size, self._bytes
    )


def _known(
  root: pathlib.Path, label: str, stamp: str | None
) -> pathlib.Path | None:
  """The dataset that was made of files of this stamp, if there is one."""
  marks = root.glob(f'{_slug(label)}-*/of-{stamp}') if stamp else ()
  return next(
    (mark.parent for mark in marks if dataset.is_built(mark.parent)), None
  )


def _stamp(label: str, files: dict[str, pathlib.Path]) -> str | None:
  """Another one when a file has changed; None: one could, and it would not."""
  rows, newest = [], 0.0
  for name, path in files.items():
    # Opened, as NFS then asks its server.
    with untrusted.opened(path, text_folder.UNREADABLE) as file:
      stat = os.fstat(file.fileno())
    newest = max(newest, stat.st_mtime, stat.st_ctime)
    # Programs set the one time as they like, but not the other.
    rows.append(
      [name, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]
    )
  if newest > time.time() - _SETTLED:
    return None
  return _digest([RECIPE, label, rows])
