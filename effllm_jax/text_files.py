"""The rows of one file of text: plain, JSON lines or Parquet; packed or not."""

import codecs
from collections.abc import Callable
from collections.abc import Iterator
import hashlib
import io
import itertools
import pathlib
from typing import Any
from typing import BinaryIO

from effllm_jax import documents
from effllm_jax import errors
from effllm_jax import untrusted

# Bytes that are read at a time.
_BLOCK = 2**20
# Bytes of a document that comes out of a packed file, which may be tiny.
_MOST = documents.MOST_BYTES
# How the name of a packed file ends -> what pyarrow calls that.
_PACKED = {'.gz': 'gzip', '.zst': 'zstd'}
_REMEDY = 'fetch it again or move it away'


def kind(path: pathlib.PurePath) -> str:
  """'.txt', '.jsonl' or '.parquet', by how a name ends; '': none of these.

  What is packed and called .json is lines, as of C4 and Dolma; what is not may
  be one object.
  """
  if not _packing(path):
    suffix = path.suffix.lower()
    return suffix if suffix in ('.txt', '.jsonl', '.parquet') else ''
  inner = path.with_suffix('').suffix.lower()
  return {'.txt': '.txt', '.jsonl': '.jsonl', '.json': '.jsonl'}.get(inner, '')


def is_plain(path: pathlib.PurePath) -> bool:
  """Whether a file of text is as large as the text."""
  return kind(path) != '.parquet' and not _packing(path)


def _packing(path) -> str | None:
  return _PACKED.get(path.suffix.lower())


class Digested(io.RawIOBase):
  """A file that is read, and the SHA-256 of all of it in the end."""

  def __init__(self, file: BinaryIO):
    """Takes a file at its beginning."""
    self._file, self._sha = file, hashlib.sha256()

  def readable(self) -> bool:
    """It is."""
    return True

  def seekable(self) -> bool:
    """It is, and then it is read once more for the digest."""
    return True

  def readinto(self, buffer) -> int:
    """As that of the file."""
    count = self._file.readinto(buffer)
    if self._sha:
      self._sha.update(memoryview(buffer)[:count])
    return count

  def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
    """As that of the file."""
    self._sha = None
    return self._file.seek(offset, whence)

  def tell(self) -> int:
    """As that of the file."""
    return self._file.tell()

  def digest(self) -> str:
    """In hexadecimal digits; leaves the file at its end."""
    if not self._sha:
      self._file.seek(0)
      return hashlib.file_digest(self._file, 'sha256').hexdigest()
    while block := self._file.read(_BLOCK):
      self._sha.update(block)
    return self._sha.hexdigest()


def rows(
  file: io.RawIOBase, path: pathlib.PurePath
) -> Iterator[tuple[int, Any]]:
  """What a file holds, a part of it in memory at a time.

  Args:
    file: open for reading, at its beginning.
    path: its name, which says what it is, for errors.

  Yields:
    The number of a line, or row, from 1 on, and its value: of a .txt file,
    which is one row, and of a Parquet file an object with the key "text", of
    JSON lines whatever stands there. Blank lines are left out.

  Raises:
    errors.InputError: it is damaged, no UTF-8, no JSON, has a NUL or no column
      of texts, or a document that is packed is too large.
  """
  if kind(path) == '.parquet':
    yield from _parquet(file, path)
    return
  stream = io.BufferedReader(file, _BLOCK)
  if packing := _packing(path):
    # Starts a thread, which most texts do not need.
    import pyarrow

    packed = pyarrow.PythonFile(stream, mode='r')
    stream = io.BufferedReader(
      pyarrow.CompressedInputStream(packed, packing), _BLOCK
    )
  if kind(path) == '.txt':
    yield 1, {'text': _decoded(_read(stream.read, path), path, 1)}
    return
  lines = iter(lambda: _read(stream.readline, path), b'')
  for number, line in enumerate(lines, 1):
    content = _decoded(line, path, number)
    if content.strip():
      where = f'{path}:{number}'
      yield (
        number,
        untrusted.parse_json(
          content.removesuffix('\n'), where, 'write one object a line'
        ),
      )


def _read(read: Callable[..., bytes], path: pathlib.PurePath) -> bytes:
  """What `read` gives, of a packed file no more than fits in memory."""
  if not _packing(path):
    return read()
  with untrusted.parsing(f'{path} is damaged', _REMEDY):
    data = read(_MOST + 1)
  _check_size(len(data), path)
  return data


def _decoded(data: bytes, path: pathlib.PurePath, line: int) -> str:
  """The text of a file, or of one line of it."""
  marked = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
  at = -1 if marked else data.find(b'\0')
  if at >= 0:
    # As UTF-8 it would pass. It is one of the two bytes of a letter of ASCII.
    coding = 'utf-16le' if at % 2 else 'utf-16be'
    line += data.count(b'\n', 0, at)
    raise errors.InputError(
      f'{path}:{line}: byte 0x00 is in no text; convert the file, if it is in '
      f'UTF-16, with: iconv -f {coding} -t utf-8, or else take the byte out'
    )
  try:
    return data.decode('utf-8-sig' if line == 1 else 'utf-8')
  except UnicodeDecodeError as e:
    coding = 'utf-16' if marked else 'latin1'
    line += data.count(b'\n', 0, e.start)
    raise errors.InputError(
      f'{path}:{line}: byte 0x{data[e.start]:02x} is not UTF-8; convert the '
      f'file with: iconv -f {coding} -t utf-8'
    ) from e


def _parquet(file, path) -> Iterator[tuple[int, dict[str, Any]]]:
  """The rows of a Parquet file, without columns that nobody asks for."""
  import pyarrow
  from pyarrow import parquet

  damaged = f'{path} is no Parquet file that is read here'
  with untrusted.parsing(damaged, _REMEDY):
    # Pages by parts of a column, not whole columns of a group of rows.
    table = parquet.ParquetFile(file, buffer_size=_BLOCK)
    texts = {
      field.name
      for field in table.schema_arrow
      if pyarrow.types.is_string(field.type)
      or pyarrow.types.is_large_string(field.type)
    }
    columns = [x for x in ('text', 'domain') if x in table.schema_arrow.names]
    # One row: a page of few bytes may be a large text, and stand in each.
    batches = table.iter_batches(1, columns=columns, use_threads=False)
  if 'text' not in texts:
    raise errors.InputError(
      f'{path} has no column "text" of strings; rename the one that is meant, '
      'or move the file away'
    )
  for number in itertools.count(1):
    with untrusted.parsing(damaged, _REMEDY):
      batch = next(batches, None)
      if batch is None:
        return
      _check_size(batch.nbytes, path)
      (row,) = batch.to_pylist()
    yield number, row


def _check_size(num_bytes, path) -> None:
  if num_bytes > _MOST:
    raise errors.InputError(
      f'{path} has more than {_MOST:,} bytes in one document; split it'
    )
