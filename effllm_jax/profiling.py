"""A few steps of a run under jax's profiler."""

from collections.abc import Callable
from collections.abc import Iterator
import contextlib
import pathlib
from typing import Any

import jax


class Profile:
  """Records some of a run's steps; a context manager.

  Every process writes the trace of its host and devices into
  `<folder>/plugins/profile/<time>`, where XProf, TensorBoard and Perfetto find
  what they read; one of several into `<folder>/process<index>` instead.
  """

  def __init__(
    self, folder: pathlib.Path, steps: range, say: Callable[[str], None]
  ):
    """Records `steps`, or those that there are; `say` is told the outcome."""
    if jax.process_count() > 1:
      # A file has the name of its host, and processes of one would share it.
      folder = folder / f'process{jax.process_index()}'
    self._folder, self._steps, self._say = folder, steps, say
    self._recorded = []
    self._recording = False

  def __enter__(self) -> 'Profile':
    return self

  def __exit__(self, *_) -> None:
    """Writes what there is, if a run ends among the recorded steps."""
    if self._recording:
      self._stop()
    elif self._steps and not self._recorded:
      self._say(
        f'no profile: this call ran none of the steps {self._steps[0]} to '
        f'{self._steps[-1]}'
      )

  @contextlib.contextmanager
  def step(self, step: int, arrays: Callable[[], Any]) -> Iterator[None]:
    """Around one step, which is named in the trace by its number.

    Args:
      step: its number.
      arrays: gives what the last recorded step computes; it is waited for.
    """
    if step not in self._steps:
      yield
      return
    if not self._recording:
      options = jax.profiler.ProfileOptions()
      # Every call of a Python function as well: a small run took three times as
      # long, most of it in compiling, and wrote twenty times as much.
      options.python_tracer_level = 0
      jax.profiler.start_trace(self._folder, profiler_options=options)
      self._recording = True
    self._recorded.append(step)
    with jax.profiler.StepTraceAnnotation('step', step_num=step):
      yield
    if step == self._steps[-1]:
      jax.block_until_ready(arrays())
      self._stop()

  def _stop(self) -> None:
    self._recording = False
    try:
      jax.profiler.stop_trace()
    except (OSError, RuntimeError) as e:
      # A run is worth more than its profile.
      self._say(f'no profile: {self._folder} cannot be written: {e}')
      return
    self._say(
      f'profile of steps {self._recorded[0]} to {self._recorded[-1]}: '
      f'{self._folder}; open it with XProf, TensorBoard or Perfetto'
    )
