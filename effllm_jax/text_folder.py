"""The documents of a user's folder: `.txt` and `.jsonl` files."""

import codecs
from collections.abc import Iterator
import dataclasses
import hashlib
import os
import pathlib

from effllm_jax import documents
from effllm_jax import errors
from effllm_jax import untrusted

Document = documents.Document

# What to do about a file that cannot be read.
UNREADABLE = 'make it readable or move it away'


def listed(text: str) -> tuple[str, dict[str, pathlib.Path], list[str]]:
  """A user's folder.

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
      f"data.text {text!r} is neither 'pypi', 'debian' nor a folder of .txt "
      'or .jsonl files; set --config.data.text'
    )
  files, others = {}, []
  for path in sorted(folder.rglob('*')):
    name = path.relative_to(folder)
    if any(part.startswith('.') for part in name.parts):
      continue
    if _suffix(path) in ('.txt', '.jsonl') and path.is_file():
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


def _suffix(path: pathlib.Path) -> str:
  return path.suffix.lower()


@dataclasses.dataclass(frozen=True)
class Documents:
  """The documents of a user's folder, read again in every iteration.

  Attributes:
    text: the folder, as the user calls it.
    label: its name.
    files: what to read, by path within it.
    digests: SHA-256 of each, which is to be the same every time.
  """

  text: str
  label: str
  files: dict[str, pathlib.Path]
  digests: dict[str, str]

  def __iter__(self) -> Iterator[Document]:
    found = False
    for name in self.files:
      rows = self._txt if _suffix(pathlib.Path(name)) == '.txt' else self._jsonl
      for row in rows(name):
        body = row.text.replace('\r\n', '\n').strip()
        if body:
          found = True
          yield row._replace(text=body)
    if not found:
      raise errors.InputError(
        f'{self.text} holds no text; put .txt files (one document each) or '
        '.jsonl files (one a line, key "text") into it, or set '
        '--config.data.text'
      )

  def _txt(self, name: str) -> Iterator[Document]:
    data = untrusted.read(self.files[name], UNREADABLE)
    self._check(name, hashlib.sha256(data).hexdigest())
    text = _decoded(data, pathlib.Path(self.text, name), 1)
    yield Document(self._domain(name), name, text)

  def _jsonl(self, name: str) -> Iterator[Document]:
    path, domain = pathlib.Path(self.text, name), self._domain(name)
    digest = hashlib.sha256()
    with untrusted.opened(self.files[name], UNREADABLE) as file:
      for i, line in enumerate(file, 1):
        digest.update(line)
        try:
          content = _decoded(line, path, i)
          row = content.strip() and _row(
            f'{path}:{i}',
            content.removesuffix('\n'),
            Document(domain, f'{name}:{i}', ''),
          )
        except errors.InputError:
          # Of a file that is still being written, that is what is wrong.
          digest.update(file.read())
          self._check(name, digest.hexdigest())
          raise
        if row:
          yield row
    self._check(name, digest.hexdigest())

  def _domain(self, name: str) -> str:
    folder, *rest = pathlib.PurePath(name).parts
    return folder if rest else self.label

  def _check(self, name: str, digest: str) -> None:
    if digest != self.digests[name]:
      raise errors.InputError(
        f'{pathlib.Path(self.text, name)} has changed while it was read; run '
        'again once it is written'
      )


def _decoded(data: bytes, path: pathlib.Path, line: int) -> str:
  """The text of a file, or of one line of it."""
  try:
    return data.decode('utf-8-sig' if line == 1 else 'utf-8')
  except UnicodeDecodeError as e:
    marks = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
    coding = 'utf-16' if data.startswith(marks) else 'latin1'
    line += data.count(b'\n', 0, e.start)
    raise errors.InputError(
      f'{path}:{line}: byte 0x{data[e.start]:02x} is not UTF-8; convert the '
      f'file with: iconv -f {coding} -t utf-8'
    ) from e


def _row(where: str, line: str, default: Document) -> Document:
  """One line of a .jsonl file."""
  row = untrusted.parse_json(line, where, 'write one object a line')
  if not isinstance(row, dict) or not isinstance(row.get('text'), str):
    raise errors.InputError(
      f'{where}: no string under the key "text"; write {{"text": "..."}}'
    )
  domain = row.get('domain', default.domain)
  if not isinstance(domain, str) or not domain:
    raise errors.InputError(
      f'{where}: domain {domain!r} is not a name; give a string, or leave the '
      'key out'
    )
  return default._replace(domain=domain, text=row['text'])
