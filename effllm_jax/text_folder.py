"""The documents of a user's folder, of all its files of text, or of a file."""

from collections.abc import Iterator
import dataclasses
import hashlib
import json
import os
import pathlib
from typing import Any

from effllm_jax import digests as digests_lib
from effllm_jax import documents
from effllm_jax import errors
from effllm_jax import text_files
from effllm_jax import untrusted

Document = documents.Document

# What to do about a file that cannot be read.
UNREADABLE = 'make it readable or move it away'


def listed(
  text: str, remedy: str = 'set --config.data.text'
) -> tuple[str, dict[str, pathlib.Path], list[str]]:
  """A user's folder.

  Args:
    text: its path.
    remedy: what to do where there is none.

  Returns:
    Its name, the files to read by path within it, and the paths of other files
    and of linked folders.

  Raises:
    errors.InputError: there is none, or the name of a file is not UTF-8.
  """
  try:
    folder = pathlib.Path(text).expanduser()
  except RuntimeError:  # '~nobody'
    folder = pathlib.Path(text)
  if not text or not os.path.isdir(folder):
    raise errors.InputError(
      f"data.text {text!r} is neither 'pypi', 'debian' nor a folder of .txt, "
      f'.jsonl or .parquet files; {remedy}'
    )
  files, others = {}, []
  for path in sorted(folder.rglob('*')):
    name = path.relative_to(folder)
    if any(part.startswith('.') for part in name.parts):
      continue
    if text_files.kind(path) and path.is_file():
      try:
        name.as_posix().encode()
      except UnicodeEncodeError as e:
        raise errors.InputError(
          f'the name of {path} is not UTF-8; rename it'
        ) from e
      files[name.as_posix()] = path
    elif path.is_symlink() or not path.is_dir():
      others.append(name.as_posix())
  return folder.resolve().name, files, others


@dataclasses.dataclass(frozen=True)
class Documents:
  """The documents of a user's folder, read again in every iteration.

  Attributes:
    text: the folder, as the user calls it.
    label: its name.
    files: what to read, by path within it.
    digests: SHA-256 of each, which is to be the same every time.
    remedy: what else to do where there is no text.
  """

  text: str
  label: str
  files: dict[str, pathlib.Path]
  digests: dict[str, str]
  remedy: str = 'set --config.data.text'

  def __iter__(self) -> Iterator[Document]:
    found = False
    for name in self.files:
      for document in self._documents(name):
        body = document.text.replace('\r\n', '\n').strip()
        if body:
          found = True
          yield document._replace(text=body)
    if not found:
      raise errors.InputError(
        f'{self.text} holds no text; put .txt files (one document each), '
        '.jsonl files (one a line, key "text") or .parquet files (column '
        f'"text") into it, or {self.remedy}'
      )

  @property
  def record(self) -> dict[str, Any]:
    """What tells it from another text; `digest` is of all the rest."""
    about = {'text': self.label, 'files': self.digests}
    digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode())
    return about | {'digest': digest.hexdigest()}

  def _documents(self, name: str) -> Iterator[Document]:
    """Those of a file, which in the end must be the one that it was."""
    path = pathlib.Path(self.text, name)
    with untrusted.opened(self.files[name], UNREADABLE) as file:
      file = text_files.Digested(file)
      try:
        for number, row in text_files.rows(file, path):
          yield self._document(name, number, row)
      except errors.InputError:
        # Of a file that is still being written, that is what is wrong.
        self._check(name, file.digest())
        raise
      self._check(name, file.digest())

  def _document(self, name: str, number: int, row: Any) -> Document:
    """The document of a row."""
    if text_files.kind(pathlib.PurePath(name)) == '.txt':
      return Document(self._domain(name), name, row['text'])
    said = f'{pathlib.Path(self.text, name)}:{number}'
    if not isinstance(row, dict) or not isinstance(row.get('text'), str):
      raise errors.InputError(
        f'{said}: no string under the key "text"; write {{"text": "..."}}'
      )
    domain = row.get('domain')
    if domain is None:  # As a column has it of rows without one.
      domain = self._domain(name)
    if not isinstance(domain, str) or not domain:
      raise errors.InputError(
        f'{said}: domain {domain!r} is not a name; give a string, or leave the '
        'key out'
      )
    return Document(domain, f'{name}:{number}', row['text'])

  def _domain(self, name: str) -> str:
    folder, *rest = pathlib.PurePath(name).parts
    return folder if rest else self.label

  def _check(self, name: str, digest: str) -> None:
    if digest != self.digests[name]:
      raise errors.InputError(
        f'{pathlib.Path(self.text, name)} has changed while it was read; run '
        'again once it is written'
      )


def read(text: str, remedy: str) -> Documents:
  """What lies at a path, all of it, to be measured and not trained on.

  Args:
    text: a folder as in `corpus.prepare`, or one such file.
    remedy: what to do where it is neither.

  Raises:
    errors.InputError: it is neither, or a file cannot be read.
  """
  path = pathlib.Path(os.path.expanduser(text))
  if text and os.path.isdir(path):
    folder, (label, files, _) = path, listed(text, remedy)
  elif os.path.isfile(path) and text_files.kind(path):
    folder, label, files = path.parent, path.stem, {path.name: path}
  else:
    raise errors.InputError(
      f'{text!r} is neither a .txt, .jsonl or .parquet file nor a folder of '
      f'such; {remedy}'
    )
  digests = digests_lib.of(folder, files, UNREADABLE)
  return Documents(str(folder), label, files, digests, remedy)
