"""SIGTERM and SIGINT as a request to stop, which a loop grants when it can."""

from collections.abc import Iterator
import contextlib
import signal
import threading

import jax
from jax.experimental import multihost_utils


class Stopped(Exception):
  """A run ended before its last step, because it was asked to.

  Attributes:
    signum: the signal that asked.
    step: the last one that was finished.
  """

  def __init__(self, signum: int, step: int):
    # The arguments themselves: an exception is pickled with these.
    super().__init__(signum, step)
    self.signum, self.step = signum, step

  def __str__(self) -> str:
    return (
      f'stopped after step {self.step}; run the same command again to resume'
    )


class Requests:
  """Remembers the first signal that came."""

  def __init__(self):
    self.signum: int | None = None

  def asked(self, step: int) -> int | None:
    """The signal that asks to stop after `step`, which has just been finished.

    Several processes agree on the step: one of them gets a SIGTERM, all of them
    stop after the same one. Each must ask after every step.
    """
    if jax.process_count() == 1:
      return self.signum
    reached = multihost_utils.reached_preemption_sync_point(step)
    return signal.SIGTERM if reached else None


@contextlib.contextmanager
def requests() -> Iterator[Requests]:
  """Within it SIGTERM and SIGINT are remembered instead of obeyed.

  Only the first one: the next does what it did outside, so that a second Ctrl-C
  ends at once what does not stop soon enough. Outside the main thread, where
  Python allows no handlers, nothing is changed; nor are processes that train
  together, for which jax itself waits for SIGTERM.
  """
  found = Requests()
  alone = jax.process_count() == 1
  if not alone or threading.current_thread() is not threading.main_thread():
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
