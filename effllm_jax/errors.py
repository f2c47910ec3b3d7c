"""The one exception for what a user can put right."""

from collections.abc import Iterator
import contextlib
import os
import re

# Characters of a message that are kept of its start and of its end.
_HEAD, _TAIL = 1500, 500


class InputError(ValueError):
  """A mistake in a config, a file or a folder, not in this code.

  The message is one line that names the offending value and the remedy. The
  commands in `experiments` print it without a traceback and exit with 2.
  Whatever it quotes of a file, it stays one printable line of bounded length.
  """

  def __init__(self, message: str):
    text = re.sub(r'\s*[\r\n]\s*', ' ', message)
    if len(text) > _HEAD + _TAIL:
      text = f'{text[:_HEAD]} ... {text[-_TAIL:]}'
    # No control sequence of a terminal, no half of a surrogate pair.
    super().__init__(
      ''.join(
        c if c.isprintable() else c.encode('unicode_escape').decode()
        for c in text
      )
    )

  def _render_traceback_(self) -> list[str]:
    """What a notebook shows instead of a traceback."""
    return [f'error: {self}']


@contextlib.contextmanager
def writing(
  what: str | os.PathLike,
  remedy: str = 'free some space or set another --out or --workdir',
) -> Iterator[None]:
  """Tells a full or read-only disk in one line.

  Args:
    what: is being written; a path, or words that end in one.
    remedy: what the user can do.

  Raises:
    InputError: instead of an OSError.
  """
  try:
    yield
  except OSError as e:
    reason = e.strerror or e
    raise InputError(f'cannot write {what}: {reason}; {remedy}') from e


@contextlib.contextmanager
def installed(purpose: str, *requirements: str) -> Iterator[None]:
  """Tells an import of an optional package that fails in one line.

  Args:
    purpose: what needs it.
    requirements: what pip installs, as on its command line.

  Raises:
    InputError: instead of an ImportError.
  """
  try:
    yield
  except ImportError as e:
    raise InputError(
      f'{purpose} needs {e.name or e}, which is missing or too old; '
      f'pip install {" ".join(requirements)}'
    ) from e
