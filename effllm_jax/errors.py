"""The one exception for what a user can put right."""

from collections.abc import Iterator
import contextlib
import os


class InputError(ValueError):
  """A mistake in a config, a file or a folder, not in this code.

  The message is one line that names the offending value and the remedy. The
  commands in `experiments` print it without a traceback and exit with 2.
  """


@contextlib.contextmanager
def writing(path: str | os.PathLike, *kinds: type[Exception]) -> Iterator[None]:
  """Tells a full or read-only disk in one line.

  Args:
    path: what is being written.
    *kinds: exceptions by which a package says so, besides OSError.

  Raises:
    InputError: instead of any of them.
  """
  try:
    yield
  except (OSError, *kinds) as e:
    reason = getattr(e, 'strerror', None) or e
    raise InputError(
      f'cannot write {path}: {reason}; free some space or set another --out'
    ) from e
