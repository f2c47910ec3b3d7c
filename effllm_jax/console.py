"""What a person sees of a run in progress."""

from collections.abc import Callable
from collections.abc import Generator
from collections.abc import Iterable
from collections.abc import Mapping
import logging
import math
import time
from typing import Any
from typing import TypeVar

import rich.console
import rich.progress

from effllm_jax import amounts

_T = TypeVar('_T')

# Without a terminal a bar cannot be drawn: a line at most this often, seconds.
_LINE_INTERVAL = 15.0
# Seconds between two looks of a bar at what went by.
_BAR_INTERVAL = 0.1


def plain(stderr: bool = False, quiet: bool = False) -> rich.console.Console:
  """A console that prints a path or a value as it is: [b] is no markup."""
  return rich.console.Console(
    stderr=stderr, quiet=quiet, markup=False, emoji=False
  )


def passing(
  what: str, items: Iterable[_T], size: Callable[[_T], int], total: int = 0
) -> Generator[_T, None, int]:
  """Gives items on, and shows how many bytes of them have gone by.

  By a bar that goes at the end; without a terminal, by a line now and then.

  Args:
    what: is done with them: 'reading tales'.
    items: to give on.
    size: bytes of one.
    total: bytes of all; 0: not known.

  Returns:
    Bytes of all, when they have gone by.
  """
  shown = plain(stderr=True)
  columns = (
    rich.progress.TextColumn('{task.description}'),
    rich.progress.BarColumn(),
    rich.progress.DownloadColumn(),
    rich.progress.TransferSpeedColumn(),
    rich.progress.TimeRemainingColumn(),
  )
  with rich.progress.Progress(
    *columns, console=shown, transient=True, disable=not shown.is_terminal
  ) as bar:
    task = bar.add_task(what, total=total or None)
    interval = _BAR_INTERVAL if shown.is_terminal else _LINE_INTERVAL
    done, due = 0, time.monotonic() + interval
    for item in items:
      yield item
      done += size(item)
      if time.monotonic() < due:
        continue
      due = time.monotonic() + interval
      bar.update(task, completed=done)
      if not shown.is_terminal:
        of = f' of {amounts.size(total)}' if total else ''
        shown.print(
          f'{what}: {amounts.size(done)}{of}', highlight=False, soft_wrap=True
        )
  return done


class Progress:
  """A progress bar on a terminal, plain lines elsewhere; a context manager."""

  def __init__(self, steps: int, done: int, quiet: bool = False):
    """Starts at step `done` of `steps`; `quiet` shows nothing."""
    self._console = plain(stderr=True, quiet=quiet)
    self._steps = steps
    self._seconds = 0.0
    self._next_line = 0.0
    self._bar = rich.progress.Progress(
      rich.progress.TextColumn('{task.description}'),
      rich.progress.BarColumn(bar_width=None),
      rich.progress.MofNCompleteColumn(),
      rich.progress.TextColumn('{task.fields[numbers]}'),
      console=self._console,
      disable=not self._console.is_terminal,
    )
    self._task = self._bar.add_task(
      'starting', total=steps, completed=done, numbers=''
    )

  def __enter__(self) -> 'Progress':
    """Draws the bar; warnings of the log appear above it."""
    self._bar.start()
    root = logging.getLogger()
    self._handlers, root.handlers = root.handlers, [_Handler(self)]
    return self

  def __exit__(self, *_) -> None:
    """Leaves the last state of the bar on the screen."""
    logging.getLogger().handlers = self._handlers
    self._bar.stop()

  def say(self, text: str) -> None:
    """Prints one line above the bar."""
    self._console.print(text, highlight=False, soft_wrap=True)

  def phase(self, text: str) -> None:
    """Names what is going on, for instance 'compiling'."""
    self._bar.update(self._task, description=text)

  def step(self, row: Mapping[str, Any]) -> None:
    """Shows the numbers of a finished step (a `train` row of the metrics)."""
    widths = row['widths']
    # Recent steps count most: a shrink makes all later ones faster.
    self._seconds += (row['seconds'] - self._seconds) * (
      0.1 if self._seconds else 1.0
    )
    left = int(self._seconds * (self._steps - row['step']))
    loss = math.nan if row['loss'] is None else row['loss']
    numbers = (
      f'loss {loss:.3f}  {row["tokens_per_second"]:,.0f} tok/s  '
      f'{row["live_params"]:,} live  heads {widths["heads"]:g} '
      f'ffn {widths["ffn"]:g} stem {widths["stem"]:g}  '
      f'{left // 60}:{left % 60:02d} left'
    )
    self._bar.update(self._task, completed=row['step'], numbers=numbers)
    now = time.monotonic()
    if self._console.is_terminal or (
      now < self._next_line and row['step'] < self._steps
    ):
      return
    self._next_line = now + _LINE_INTERVAL
    self.say(f'step {row["step"]}/{self._steps}  {numbers}')


class _Handler(logging.Handler):
  """Sends log records through the bar, so that they do not tear it."""

  def __init__(self, progress: Progress):
    super().__init__(level=logging.WARNING)
    self._progress = progress

  def emit(self, record):
    self._progress.say(f'{record.levelname.lower()}: {record.getMessage()}')
