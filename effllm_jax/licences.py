"""The files about the licence of a model: they go where its weights go."""

from collections.abc import Mapping
import pathlib
import re
from typing import Any

from effllm_jax import untrusted

# As models on the Hub call them. None can be taken for another file of a model
# folder, or lead out of it.
_NAMES = re.compile(
  r'(\w[\w.-]*[_.-])?(licen[cs]e|notice|copying|use_policy)([_-][\w-]+)?'
  r'(\.(txt|md))?',
  re.ASCII | re.IGNORECASE,
)
# The longest that a file like that has been seen with is 35 kB (GPL-3.0).
_MOST_BYTES = 2**20


def read(folder: pathlib.Path) -> dict[str, str]:
  """What lies beside the weights in a folder, the text of each file by name.

  LICENSE, NOTICE, COPYING and USE_POLICY, in any spelling and with a word
  before or after, as plain text or Markdown; up to 1 MiB each.

  Raises:
    errors.InputError: one of them cannot be read.
  """
  return {
    path.name: untrusted.read(path, 'fetch it again').decode(errors='replace')
    for path in sorted(folder.iterdir())
    if _NAMES.fullmatch(path.name)
    and path.is_file()
    and path.stat().st_size <= _MOST_BYTES
  }


def checked(files: Any) -> dict[str, str]:
  """What `read` returned, after it was on disk.

  Raises:
    TypeError, ValueError: it is something else.
  """
  for name in untrusted.shaped({str: str}, files, 'licence_files'):
    if not _NAMES.fullmatch(name):
      raise ValueError(f'{name!r} in licence_files')
  return files


def write(files: Mapping[str, str], folder: pathlib.Path) -> None:
  """Puts them into a folder.

  Raises:
    OSError: it cannot be written.
  """
  for name, text in files.items():
    (folder / name).write_text(text, encoding='utf-8', newline='')
