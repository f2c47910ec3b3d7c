"""Orbax: rolling checkpoints, and the permanent record of every shrink.

In the layout of `checkpoints`. Orbax commits a folder by a rename, so a killed
process leaves no half of one; `digests.json` is written last, just before that.
"""

from collections.abc import Iterator
from collections.abc import Mapping
import contextlib
import copy
import dataclasses
import os
import pathlib
import shutil
from typing import Any

import jax
import orbax.checkpoint as ocp

from effllm_jax import atomic
from effllm_jax import checkpoints
from effllm_jax import digests
from effllm_jax import errors
from effllm_jax import events as events_lib
from effllm_jax import state as state_lib
from effllm_jax import structure

# What Orbax writes after everything else: dates, which nothing here reads.
_UNREAD = ('_CHECKPOINT_METADATA', 'commit_success.txt')
# Bytes that take about as long to write as a program to compile.
_LARGE = 2**25


class Writer:
  """Writes the checkpoints of one run; `close` waits for the last one."""

  def __init__(self, workdir: str | os.PathLike, keep: int):
    """Opens both folders of `workdir`; `keep` rolling checkpoints stay."""
    self._workdir = workdir = pathlib.Path(workdir).absolute()
    self._rolling = _manager(workdir / checkpoints.ROLLING, keep)
    self._events = _manager(workdir / checkpoints.EVENTS, None)

  def save(
    self,
    state: state_lib.TrainState,
    cfg: structure.ModelConfig,
    data: Iterator,
    num_events: int,
    flops: dict[str, int],
    trials: Mapping[str, Any],
  ) -> None:
    """Starts a rolling checkpoint; returns once the arrays may be reused.

    Args:
      state: after the update that it is named by.
      cfg: the shape of its arrays.
      data: the batches, at the one that comes next.
      num_events: shrinks so far.
      flops: spent so far, by purpose (`accounting.Meter.spent`).
      trials: so far (`calibration.Calibration.record`).

    Raises:
      errors.InputError: there is no room for it, or an earlier one failed.
    """
    step = int(state.step)
    self._check_space(state)
    items = _items(state, cfg, data, num_events, flops, trials)
    self._save(self._rolling, step, items)

  def save_event(
    self,
    event: events_lib.ShrinkEvent,
    state: state_lib.TrainState,
    data: Iterator,
    flops: dict[str, int],
    trials: Mapping[str, Any],
  ) -> None:
    """Starts the permanent record of a shrink and of the state after it.

    Args:
      event: the shrink.
      state: of the shape after it; the others as in `save`.

    Raises:
      errors.InputError: as `save`.
    """
    self._check_space(state)
    items = _items(state, event.after, data, event.index + 1, flops, trials)
    items['event'] = ocp.args.JsonSave(event.to_json())
    self._save(self._events, event.index, items)

  def wait(self) -> None:
    """Returns when everything that was started is on disk.

    Raises:
      errors.InputError: the disk is full or the folder cannot be written.
    """
    try:
      self._rolling.wait_until_finished()
      self._events.wait_until_finished()
    except (OSError, ValueError) as e:
      raise write_error(e) from e

  def close(self) -> None:
    """Waits, then releases the background threads, also after an error."""
    with contextlib.ExitStack() as stack:
      stack.callback(self._rolling.close)
      stack.callback(self._events.close)
      self.wait()

  def _check_space(self, state) -> None:
    # Before the first byte: when a disk fills up in the middle of a save, the
    # threads of Orbax that still write do not end quietly.
    self.wait()
    size = sum(x.nbytes for x in jax.tree.leaves(state))
    needed = 1.1 * size + 2**20
    free = shutil.disk_usage(self._workdir).free
    if free < needed:
      raise errors.InputError(
        f'the disk is full: a checkpoint needs {needed / 1e6:,.1f} MB, '
        f'{self._workdir} has {free / 1e6:,.1f} MB; free space or move the '
        'workdir, then run the same command again: it resumes'
      )

  def _save(self, manager, index, items):
    try:
      saved = manager.save(index, args=ocp.args.Composite(**items))
    except (OSError, ValueError) as e:
      raise write_error(e) from e
    if not saved:
      raise RuntimeError(
        f'{manager.directory}/{index} was not written: there is a newer one, '
        'which this run did not go on from; please report this'
      )


class _Manager(ocp.CheckpointManager):
  """Waits for all it began; never asks jax whether processes are to stop.

  Orbax asks with the number of what it saves, an event's index or, from its
  thread, a step that is long past; jax takes the last number for the step that
  the run is at, and stops it after the next one: never. The loop asks.
  """

  def reached_preemption(self, step: int) -> bool:
    """No: see above."""
    del step
    return False

  def wait_until_finished(self) -> None:
    """Also for the thread that deletes what a killed process has left.

    Orbax waits for it before it saves. A process that saves nothing could end
    before it, and had a traceback behind its last line.
    """
    begun = getattr(self, '_cleanup_tmp_directory_future', None)
    self._cleanup_tmp_directory_future = None
    if begun is not None:
      begun.result()
    super().wait_until_finished()


def _manager(folder: pathlib.Path, keep: int | None) -> ocp.CheckpointManager:
  return _Manager(
    folder,
    handler_registry=_handlers(),
    options=ocp.CheckpointManagerOptions(
      max_to_keep=keep,
      cleanup_tmp_directories=True,
      # In the thread that saves: after the last array, before the rename.
      async_options=ocp.AsyncOptions(
        post_finalization_callback=lambda: _write_digests(folder)
      ),
    ),
  )


def _handlers() -> ocp.DefaultCheckpointHandlerRegistry:
  """Cuts up only what is large.

  Of an array that several devices hold, each writes a piece, and cuts it out by
  a program of its own: Orbax expects shapes that stay. Here every shrink would
  compile a hundred of them on eight devices before it is saved.
  """
  arrays = ocp.type_handlers.ArrayHandler(
    min_slice_bytes_for_replica_parallel=_LARGE
  )
  handler = ocp.PyTreeCheckpointHandler(
    type_handler_registry=ocp.type_handlers.create_type_handler_registry(
      (jax.Array, arrays)
    )
  )
  registry = ocp.DefaultCheckpointHandlerRegistry()
  for item in ('params', 'prune', 'optimizer'):
    registry.add(item, ocp.args.PyTreeSave, handler)
  return registry


def _write_digests(folder: pathlib.Path) -> None:
  """Writes the digests of the one moment of `folder` that is being saved.

  All of it is on the disk afterwards: the moment before it goes next. Orbax
  sees to that for arrays only.
  """
  (moment,) = folder.glob('*.orbax-checkpoint-tmp*')
  digests.write(moment, but=_UNREAD)
  for path in (*moment.rglob('*'), moment):
    atomic.sync(path)


def _items(state, cfg, data, num_events, flops, trials) -> dict[str, Any]:
  arch = {
    'model': dataclasses.asdict(cfg),
    'step': int(state.step),
    'skipped': int(state.skipped),
    'in_a_row': int(state.in_a_row),
    'num_events': num_events,
    # Copies: a thread writes them, while the run goes on counting.
    'flops': dict(flops),
    'trials': trials,
  }
  return {
    'arch': ocp.args.JsonSave(arch),
    'params': ocp.args.PyTreeSave(checkpoints.on_disk(state.params)),
    'prune': ocp.args.PyTreeSave(state.prune),
    'optimizer': ocp.args.PyTreeSave(checkpoints.on_disk(state.opt_state)),
    # What one process has read, all others have: it is one number.
    'data': ocp.args.JsonSave(copy.deepcopy(data.get_state())),
  }


def write_error(error: Exception) -> Exception:
  """What to tell a user about a failed write; other errors as they are."""
  text = ' '.join(str(error).split())
  for sign in ('No space left', 'ENOSPC', 'RESOURCE_EXHAUSTED', 'Disk quota'):
    if sign in text:
      return errors.InputError(
        'the disk is full; free space or move the workdir, then run the same '
        'command again: it resumes from the last complete checkpoint'
      )
  if 'Permission denied' in text or 'Read-only file system' in text:
    return errors.InputError(
      f'cannot write the workdir: {text[:200]}; choose another --workdir'
    )
  return error
