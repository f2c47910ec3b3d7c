"""SIGTERM and SIGINT as a request to stop, which a loop grants when it can."""

from collections.abc import Iterator
import contextlib
import signal
import threading


class Stopped(Exception):
  """A run ended before its last step, because it was asked to.

  Attributes:
    signum: the signal that asked.
  """

  def __init__(self, signum: int, step: int):
    super().__init__(
      f'stopped after step {step}; run the same command again to resume'
    )
    self.signum = signum


class Requests:
  """Remembers the first signal that came; `signum` is None before."""

  def __init__(self):
    self.signum: int | None = None


@contextlib.contextmanager
def requests() -> Iterator[Requests]:
  """Within it SIGTERM and SIGINT are remembered instead of obeyed.

  Only the first one: the next does what it did outside, so that a second Ctrl-C
  ends at once what does not stop soon enough. Outside the main thread, where
  Python allows no handlers, nothing is changed.
  """
  found = Requests()
  if threading.current_thread() is not threading.main_thread():
    yield found
    return
  before = {}

  def restore():
    for signum, handler in before.items():
      signal.signal(signum, handler)

  def remember(signum, frame):
    del frame
    found.signum = signum
    restore()

  for signum in (signal.SIGTERM, signal.SIGINT):
    before[signum] = signal.signal(signum, remember)
  try:
    yield found
  finally:
    restore()
