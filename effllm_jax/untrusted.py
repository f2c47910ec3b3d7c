"""Files that others wrote: read and parsed as a whole, or refused in one line.

A path may lead to a pipe, which blocks, or to a device, which never ends; JSON
may nest deeper than Python recurses; a parser in Rust may panic, which is no
`Exception`. All readers of what a user gives go through here.
"""

from collections.abc import Iterator
import contextlib
import json
import os
import re
import stat
from typing import Any
from typing import BinaryIO

from effllm_jax import errors

# Levels of JSON; ours and those of Hugging Face have less than ten.
_DEPTH = 64
# No count of tokens, parameters or FLOPs comes near it.
_LARGEST = 1e30


def read(path: str | os.PathLike, remedy: str) -> bytes:
  """The bytes of a regular file, or of one that a link leads to.

  Args:
    path: the file.
    remedy: end of the message, as in 'fetch it again'.

  Raises:
    errors.InputError: it is not there, no regular file, or not readable.
  """
  with opened(path, remedy) as file:
    return file.read()


@contextlib.contextmanager
def opened(path: str | os.PathLike, remedy: str) -> Iterator[BinaryIO]:
  """A regular file, open for reading; as `read`, for what is read in parts."""
  try:
    if not stat.S_ISREG(os.stat(path).st_mode):
      raise errors.InputError(f'{path} is not a regular file; {remedy}')
    with open(path, 'rb') as file:
      yield file
  except (OSError, MemoryError) as e:
    reason = getattr(e, 'strerror', None) or type(e).__name__
    raise errors.InputError(f'cannot read {path}: {reason}; {remedy}') from e


def read_text(path: str | os.PathLike, remedy: str) -> str:
  """The text of a file in UTF-8, without a byte order mark.

  Raises:
    errors.InputError: as `read`, or it is not UTF-8.
  """
  data = read(path, remedy)
  try:
    return data.decode('utf-8-sig')
  except UnicodeDecodeError as e:
    raise errors.InputError(f'{path} is not UTF-8 ({e}); {remedy}') from e


def read_json(path: str | os.PathLike, remedy: str) -> dict[str, Any]:
  """The object in a JSON file.

  Raises:
    errors.InputError: as `read`, or it is not a JSON object.
  """
  value = parse_json(read(path, remedy), str(path), remedy)
  if not isinstance(value, dict):
    raise errors.InputError(f'{path} is not a JSON object; {remedy}')
  return value


def read_shaped(
  path: str | os.PathLike, shape: dict[str, Any], remedy: str
) -> dict[str, Any]:
  """The object in a JSON file, checked where `shape` says what is expected.

  Args:
    path: the file.
    shape: as `shaped`; a key whose shape is a tuple may be missing: None.
    remedy: end of the message.

  Raises:
    errors.InputError: as `read_json`, or a key is missing or something else.
  """
  known = read_json(path, remedy)
  try:
    return known | {
      key: shaped(
        x, known.get(key) if isinstance(x, tuple) else known[key], key
      )
      for key, x in shape.items()
    }
  except (KeyError, TypeError, ValueError) as e:
    raise errors.InputError(f'{path} lacks or misspells {e}; {remedy}') from e


def shaped(shape: Any, value: Any, name: str = 'row') -> Any:
  """The part of a JSON value that `shape` describes.

  Args:
    shape: `float` accepts any number. `{str: x}` is an object with any keys,
      all values of shape x; any other dict is an object with at least those
      keys. `[x]` is a list of any length. `(x, None)` also accepts null.
    value: of `parse_json`.
    name: of the value, in errors.

  Raises:
    KeyError, TypeError, ValueError: what is missing, or is something else.
  """
  if isinstance(shape, tuple):
    return None if value is None else shaped(shape[0], value, name)
  if isinstance(shape, list):
    if not isinstance(value, list):
      raise TypeError(f'{name}, a list')
    return [shaped(shape[0], x, name) for x in value]
  if isinstance(shape, dict):
    if not isinstance(value, dict):
      raise TypeError(f'{name}, an object')
    if str in shape:
      return {key: shaped(shape[str], x, key) for key, x in value.items()}
    return {key: shaped(x, value[key], key) for key, x in shape.items()}
  kinds = (int, float) if shape is float else shape
  if not isinstance(value, kinds) or isinstance(value, bool):
    raise TypeError(name)
  if shape is not str and not abs(value) < _LARGEST:
    raise ValueError(f'{name} {value}')
  return value


def parse_json(text: str | bytes, where: str, remedy: str) -> Any:
  """The value of a JSON text.

  Args:
    text: in UTF-8, if bytes.
    where: file, or file and line, named in errors.
    remedy: end of the message.

  Raises:
    errors.InputError: it is not JSON, or nested too deeply.
  """
  try:
    if isinstance(text, bytes):
      text = text.decode('utf-8-sig')
    value = json.loads(text)
  except RecursionError as e:
    raise _too_deep(where, remedy) from e
  except ValueError as e:  # Not JSON, not UTF-8, an integer of 5,000 digits.
    raise errors.InputError(f'{where} is not JSON ({e}); {remedy}') from e
  level = [value]
  for _ in range(_DEPTH):
    level = [
      child
      for node in level
      if isinstance(node, (dict, list))
      for child in (node.values() if isinstance(node, dict) else node)
    ]
    if not level:
      break
  else:
    raise _too_deep(where, remedy)
  # Python takes half a surrogate pair for text, and fails where it is written.
  if re.search(r'\\u[dD][89a-fA-F]', text):
    try:
      json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as e:
      raise errors.InputError(
        f'{where} is not JSON (half a surrogate pair in a string); {remedy}'
      ) from e
  return value


def _too_deep(where, remedy):
  return errors.InputError(
    f'{where} is not JSON that is read here (nested more than {_DEPTH} deep); '
    f'{remedy}'
  )


@contextlib.contextmanager
def parsing(what: str, remedy: str) -> Iterator[None]:
  """Refuses a file with whatever its parser raises; for bindings of Rust.

  Args:
    what: the file, and what it should be, as in 'a.json is not a tokenizer'.
    remedy: end of the message.

  Raises:
    errors.InputError: instead of any other exception of the file's parser.
  """
  try:
    yield
  except errors.InputError:
    raise
  except BaseException as e:
    # pyo3's PanicException, which has no public name, is a BaseException.
    if not isinstance(e, Exception) and type(e).__name__ != 'PanicException':
      raise
    reason = ' '.join(str(e).split())[:200] or type(e).__name__
    raise errors.InputError(f'{what} ({reason}); {remedy}') from e
