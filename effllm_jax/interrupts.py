"""SIGTERM and SIGINT: a loop grants them when it can, all else unwinds."""

from collections.abc import Iterator
import contextlib
import os
import signal
import sys
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


class Terminated(KeyboardInterrupt):
  """SIGTERM came where no loop grants it; see `unwind_on_sigterm`."""

  signum = signal.SIGTERM


def unwind_on_sigterm() -> None:
  """Lets SIGTERM raise `Terminated` in the main thread, as Ctrl-C would raise.

  By default it ends a process where it stands, and what is unfinished stays: an
  export of which half is written, the items of a benchmark. A second SIGTERM
  does that. Processes that train together leave it to jax.

  Either signal is sent again where Python ignores what is raised: in a
  finalizer, or in a callback of the garbage collector, of which jax has one.
  """

  def unwind(signum, frame):
    del frame
    signal.signal(signum, signal.SIG_DFL)
    raise Terminated

  def again(ignored):
    if not isinstance(ignored.exc_value, KeyboardInterrupt):
      told(ignored)
      return
    signum = signal.SIGINT
    if isinstance(ignored.exc_value, Terminated):
      signum = signal.SIGTERM
      signal.signal(signum, unwind)
    # Not from in here, where it would be ignored once more.
    threading.Timer(0.05, os.kill, (os.getpid(), signum)).start()

  told, sys.unraisablehook = sys.unraisablehook, again
  signal.signal(signal.SIGTERM, unwind)


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
