"""A run's moments that Orbax has saved: which there are, and how to read one.

Layout of a workdir, one folder per moment, each complete in itself:

    checkpoints/<step>/   rolling, asynchronous; the newest `keep` stay
    events/<index>/       permanent, one per shrink

Each folder holds `arch` (JSON: architecture, step and other counts, FLOPs,
trials), `params`, `prune`, `optimizer` and `data` (the position of the input
pipeline), an event also `event` (JSON). Reading goes in two steps, architecture
first: nobody has to know a shape. Each file is checked against `digests.json`
before it is read.

Nothing here changes a workdir, so any command may read one while its run goes
on. `checkpoint_writer` writes all of this; `resume` restores it in a run.
"""

from collections.abc import Callable
import dataclasses
import logging
import os
import pathlib
from typing import Any

import jax
import orbax.checkpoint as ocp

from effllm_jax import digests
from effllm_jax import errors
from effllm_jax import events as events_lib
from effllm_jax import state as state_lib
from effllm_jax import structure
from effllm_jax import untrusted

ROLLING, EVENTS = 'checkpoints', 'events'
# What reading a moment raises where a file of it is missing or damaged.
UNREADABLE = (KeyError, OSError, TypeError, ValueError)
_REMEDY = 'choose another one'
_TRIALS = {'sums': {str: [float]}, 'broken': {str: float}}


@dataclasses.dataclass(frozen=True)
class Moment:
  """A folder that a run can go on from."""

  path: pathlib.Path
  step: int
  skipped: int
  in_a_row: int
  num_events: int
  cfg: structure.ModelConfig
  flops: dict[str, int]
  # `calibration.Calibration.record`.
  trials: dict[str, Any]


def moments(
  workdir: str | os.PathLike,
  refuse: Callable[[pathlib.Path, Exception], None] | None = None,
) -> list[Moment]:
  """Everything that a run in `workdir` can go on from, newest first.

  Args:
    workdir: of the run.
    refuse: told of each folder that cannot be read. None: it is left out, with
      a warning, and stays where it is: the run may be deleting it just now.
  """
  refuse = refuse or _leave_out
  found = []
  for kind in (ROLLING, EVENTS):
    for path in committed(workdir, kind):
      try:
        found.append(moment_at(path))
      except UNREADABLE as e:
        # A run deletes its old checkpoints while others read.
        if path.exists():
          refuse(path, e)
  return sorted(found, key=lambda m: (m.step, m.num_events), reverse=True)


def every_moment(workdir: str | os.PathLike) -> list[Moment]:
  """As `moments`, but leaves none out: for callers that delete some of them.

  Raises:
    errors.InputError: one of them cannot be read, and may be the newest.
  """
  found = moments(workdir)
  there = [x for kind in (ROLLING, EVENTS) for x in committed(workdir, kind)]
  if len(found) < len(there):
    names = ', '.join(map(str, {*there} - {x.path for x in found}))
    raise errors.InputError(
      f'{names} cannot be read; nothing of the run is deleted. Try again, or '
      'move it away'
    )
  return found


def any_left(workdir: str | os.PathLike) -> bool:
  """Whether a run in `workdir` has saved anything, readable or not."""
  return any(committed(workdir, kind) for kind in (ROLLING, EVENTS))


def choose(workdir: str | os.PathLike, event: int | None = None) -> Moment:
  """The newest moment of a run, or that right after one shrink.

  Raises:
    errors.InputError: there is no such run or event.
  """
  known = moments(workdir)
  if not known:
    begun = pathlib.Path(workdir, 'config.json').is_file()
    raise errors.InputError(
      f'no checkpoint in {workdir}; '
      + ('go on with the run first' if begun else 'give the --workdir of a run')
    )
  if event is None:
    return known[0]
  by_index = {
    int(m.path.name): m for m in known if m.path.parent.name == EVENTS
  }
  if event not in by_index:
    names = ', '.join(map(str, sorted(by_index))) or 'none yet'
    raise errors.InputError(
      f'no event {event} in {workdir}; there are: {names}'
    )
  return by_index[event]


def read_moment(path: str | os.PathLike) -> Moment:
  """What a folder `checkpoints/<step>` or `events/<index>` of a run holds.

  Raises:
    errors.InputError: it is not such a folder, or it is damaged.
  """
  path = pathlib.Path(path).absolute()
  try:
    return moment_at(path)
  except UNREADABLE as e:
    raise errors.InputError(
      f'{path} is not a complete checkpoint or event of a run ({e}); choose '
      'another one'
    ) from e


def moment_at(path: pathlib.Path) -> Moment:
  """What a folder holds; raises one of `UNREADABLE` if it is damaged."""
  arch = read_json(path, 'arch')
  names = ('step', 'skipped', 'in_a_row', 'num_events')
  counts = {name: arch[name] for name in names}
  flops = dict(**arch['flops'])
  for name, count in (counts | flops).items():
    if type(count) is not int or count < 0:
      raise ValueError(f'{name} = {count!r}')
  return Moment(
    path=path,
    cfg=structure.ModelConfig.from_dict(arch['model']),
    flops=flops,
    trials=untrusted.shaped(_TRIALS, arch['trials'], 'trials'),
    **counts,
  )


def committed(workdir: str | os.PathLike, kind: str) -> list[pathlib.Path]:
  """Folders of a kind that were written to the end, by number.

  Until then a folder has a longer name, which Orbax cleans up.
  """
  folder = pathlib.Path(workdir).absolute() / kind
  paths = [p for p in folder.glob('*') if p.name.isdigit()]
  return sorted(paths, key=lambda p: int(p.name))


def _leave_out(path: pathlib.Path, error: Exception) -> None:
  logging.warning(
    'checkpoint %s cannot be read (%s); leaving it out', path, brief(error)
  )


def brief(error: Exception) -> str:
  """An error on one line."""
  return ' '.join(str(error).split())[:200]


def restore_params(
  workdir: str | os.PathLike, event: int | None = None
) -> tuple[structure.Params, state_lib.PruneState, structure.ModelConfig, int]:
  """The model of a run as it was last saved, or right after one shrink.

  Returns:
    Parameters, pruning state, architecture and step.

  Raises:
    errors.InputError: there is no such run or event, or it cannot be read.
  """
  moment = choose(workdir, event)
  return read_params(moment), read_prune(moment), moment.cfg, moment.step


def read_params(moment: Moment) -> structure.Params:
  """The parameters of a moment; raises InputError if they are damaged."""
  return _read_part(moment, 'params', structure.shapes(moment.cfg))


def read_prune(moment: Moment) -> state_lib.PruneState:
  """The pruning state of a moment; raises InputError if it is damaged."""
  abstract = jax.eval_shape(lambda: state_lib.fresh_prune_state(moment.cfg))
  return _read_part(moment, 'prune', abstract)


def _read_part(moment, name, abstract):
  try:
    digests.verify(moment.path, f'{name}/')
    return read_arrays(moment.path / name, abstract)
  except Exception as e:
    raise errors.InputError(
      f'{moment.path} cannot be read ({brief(e)}); choose another event, or '
      'resume the run to write it again'
    ) from e


def read_events(workdir: str | os.PathLike) -> list[events_lib.ShrinkEvent]:
  """All shrink events of a run, in order.

  Raises:
    errors.InputError: one of them is damaged.
  """
  return [_read_event(path) for path in committed(workdir, EVENTS)]


def _read_event(path: pathlib.Path) -> events_lib.ShrinkEvent:
  try:
    return events_lib.ShrinkEvent.from_json(read_json(path, 'event'))
  except UNREADABLE as e:
    raise errors.InputError(
      f'{path} is damaged ({e}), and with it the lineage of the run; put a '
      'copy of it back, or start again in a new --workdir'
    ) from e


def read_json(moment: pathlib.Path, part: str) -> dict[str, Any]:
  """A JSON part of a moment, such as 'arch'; raises as `load`."""
  digests.verify(moment, f'{part}/')
  # Orbax's JsonSave writes one file, `metadata`.
  where = moment / part / 'metadata'
  return untrusted.read_json(where, _REMEDY)


def read_arrays(path: pathlib.Path, abstract: Any) -> Any:
  """The arrays of a part, in the shapes and places of `abstract`.

  Raises:
    Exception: of Orbax, TensorStore or numpy, of any type.
  """
  # Without a place of their own Orbax wants the devices of those who saved.
  here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
  abstract = jax.tree.map(
    lambda x: (
      x if x.sharding else jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here)
    ),
    abstract,
  )
  with ocp.StandardCheckpointer() as reader:
    tree = _in_memory(reader.restore(path, on_disk(abstract)), abstract)
  # Orbax can pad or cut an array to a wanted shape; never here.
  jax.tree.map(_same_shape, tree, abstract)
  return tree


def on_disk(tree: Any) -> Any:
  """Layers as a dict without what their block does not have.

  So a checkpoint does not change when this project learns another block.
  """

  def layers(node):
    if not isinstance(node, structure.Layers):
      return node
    fields = {f.name: getattr(node, f.name) for f in dataclasses.fields(node)}
    return {name: x for name, x in fields.items() if x is not None}

  return jax.tree.map(
    layers, tree, is_leaf=lambda x: isinstance(x, structure.Layers)
  )


def _in_memory(saved: Any, like: Any) -> Any:
  """The inverse of `on_disk`, for a tree that looks like another one."""
  is_layers = lambda x: isinstance(x, structure.Layers)
  return jax.tree.map(
    lambda node, found: node.replace(**found) if is_layers(node) else found,
    like,
    saved,
    is_leaf=is_layers,
  )


def _same_shape(leaf, want):
  if leaf.shape != want.shape:
    raise ValueError(
      f'an array is {leaf.shape}, the architecture says {want.shape}'
    )
