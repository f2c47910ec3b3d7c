"""A run's moments that Orbax has saved: what there is, and the way back.

Layout of a workdir, one folder per moment, each complete in itself:

    checkpoints/<step>/   rolling, asynchronous; the newest `keep` stay
    events/<index>/       permanent, one per shrink

Each folder holds `arch` (JSON: architecture, step and other counts, FLOPs,
trials), `params`, `prune`, `optimizer` and `data` (the position of the input
pipeline), an event also `event` (JSON). A resume takes the newest moment of
either kind, so nothing is written twice at a shrink. Reading goes in two steps,
architecture first: nobody has to know a shape. Each file is checked against
`digests.json` before it is read. `checkpoint_writer` writes all of this.
"""

from collections.abc import Callable
from collections.abc import Iterator
import dataclasses
import logging
import os
import pathlib
import re
import shutil
from typing import Any

import jax
import jax.numpy as jnp
import optax
import orbax.checkpoint as ocp

from effllm_jax import digests
from effllm_jax import errors
from effllm_jax import events as events_lib
from effllm_jax import sharding
from effllm_jax import state as state_lib
from effllm_jax import structure
from effllm_jax import untrusted
from effllm_jax import workdir as workdir_lib

ROLLING, EVENTS = 'checkpoints', 'events'
_DAMAGED = 'damaged'
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
  # `pruning.Calibration.record`.
  trials: dict[str, Any]


def moments(workdir: str | os.PathLike) -> list[Moment]:
  """Everything that a run in `workdir` can go on from, newest first.

  What cannot be read is left out, with a warning, and stays where it is: the
  run may be deleting it just now.
  """
  return _moments(workdir, _leave_out)


def every_moment(workdir: str | os.PathLike) -> list[Moment]:
  """As `moments`, for who deletes some of them.

  Raises:
    errors.InputError: one of them cannot be read, and may be the newest.
  """
  found = moments(workdir)
  there = [x for kind in (ROLLING, EVENTS) for x in _committed(workdir, kind)]
  if len(found) < len(there):
    names = ', '.join(map(str, {*there} - {x.path for x in found}))
    raise errors.InputError(
      f'{names} cannot be read; nothing of the run is deleted. Try again, or '
      'move it away'
    )
  return found


def any_left(workdir: str | os.PathLike) -> bool:
  """Whether a run in `workdir` has saved anything, readable or not."""
  return any(_committed(workdir, kind) for kind in (ROLLING, EVENTS))


def check_there(workdir: str | os.PathLike) -> None:
  """Refuses a run of which nothing is left, though its log tells of saves.

  It would begin again, and empty the log.

  Raises:
    errors.InputError: what it has saved is gone, or is a link to a place that
      is not there now.
  """
  root = pathlib.Path(workdir).absolute()
  folders = [root / kind for kind in (ROLLING, EVENTS)]
  left = [path for folder in folders for path in folder.glob('*')]
  for path in (*folders, *left):
    if path.is_symlink() and not os.path.exists(path):
      raise errors.InputError(
        f'{path} is a link to {os.readlink(path)}, which is not there; mount '
        'its disk or mend the link, or choose another --workdir'
      )
  if any_left(root) or (root / _DAMAGED).exists():
    return
  saves, ended = 0, False
  for row in workdir_lib.read(root / 'metrics.jsonl'):
    if isinstance(row, dict):
      saves += row.get('kind') == 'save'
      ended |= row.get('phase') == 'final'
  # The last save may have been killed, those before it were waited for. A lone
  # one has left something then, or the run has not come to its end; and both
  # folders are made before the first row.
  over = ended or not all(x.is_dir() for x in folders)
  if saves > 1 or (saves and over and not left):
    raise errors.InputError(
      f'the checkpoints of this run are gone: {root / "metrics.jsonl"} tells '
      f'of {saves} saves, and nothing of them is in {ROLLING}/ or {EVENTS}/ '
      'beside it; put them back, or choose another --workdir (or delete this '
      'one, and the run begins again)'
    )


def _moments(
  workdir: str | os.PathLike, refuse: Callable[[pathlib.Path, Exception], None]
) -> list[Moment]:
  """As `moments`; `refuse` is told of each folder that cannot be read."""
  found = []
  for kind in (ROLLING, EVENTS):
    for path in _committed(workdir, kind):
      try:
        found.append(_moment(path))
      except (OSError, ValueError, KeyError, TypeError) as e:
        # A run deletes its old checkpoints while others read.
        if path.exists():
          refuse(path, e)
  return sorted(found, key=lambda m: (m.step, m.num_events), reverse=True)


def _committed(workdir, kind) -> list[pathlib.Path]:
  """Folders that were written to the end, by number.

  Until then a folder has a longer name, which Orbax cleans up.
  """
  folder = pathlib.Path(workdir).absolute() / kind
  paths = [p for p in folder.glob('*') if p.name.isdigit()]
  return sorted(paths, key=lambda p: int(p.name))


def _moment(path: pathlib.Path) -> Moment:
  arch = _read_json(path, 'arch')
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


def _read_json(moment: pathlib.Path, part: str) -> dict[str, Any]:
  digests.verify(moment, f'{part}/')
  # Orbax's JsonSave writes one file, `metadata`.
  where = moment / part / 'metadata'
  return untrusted.read_json(where, _REMEDY)


def restore_latest(
  workdir: str | os.PathLike,
  tx: optax.GradientTransformation,
  data: Iterator,
  mesh: sharding.Mesh | None = None,
) -> tuple[state_lib.TrainState, Moment] | None:
  """The newest readable state of a run; moves `data` to its position.

  A damaged moment is set aside into `damaged/`, with a warning, and the one
  before it is taken. One that cannot be read here, where there is no room for
  it or its disk does not answer, stays, and nothing older is taken. Events of a
  future that the restored state has not seen yet are deleted: the run will
  write them again.

  The arrays are read straight into their shards on `mesh`, whatever devices
  they were saved from; without one, onto one device.

  Returns:
    The state and the moment that it was saved at; None for a fresh workdir.

  Raises:
    errors.InputError: the input pipeline is not the one that was saved, the
      newest moment cannot be read here, or nothing in a used workdir can be.
  """
  while moment := _agreed(workdir):
    try:
      state = _restore(moment, tx, mesh)
      data.set_state(_read_json(moment.path, 'data'))
    except errors.InputError:
      raise
    except Exception as e:
      if _contradicts_itself(e):
        # To every process.
        if jax.process_index() == 0:
          _set_aside(moment.path, e)
        sharding.wait('set aside')
        continue
      raise _not_here(moment.path, e) from e
    if jax.process_index() == 0:
      for path in _committed(workdir, EVENTS):
        if int(path.name) >= moment.num_events:
          shutil.rmtree(path)
    sharding.wait('restored')
    return state, moment
  if (pathlib.Path(workdir) / _DAMAGED).exists():
    raise errors.InputError(
      f'no checkpoint in {workdir} can be read (see {_DAMAGED}/ there); start '
      'again with an empty --workdir'
    )
  return None


def _contradicts_itself(error: Exception) -> bool:
  """Whether arrays are not what the architecture beside them says.

  What TensorStore could not read is a ValueError too, or wrapped in a plain
  Exception; its text begins with the name of a status.
  """
  mismatch = isinstance(error, (KeyError, TypeError, ValueError))
  return mismatch and not re.match('[A-Z_]+: ', str(error))


def _not_here(path: pathlib.Path, error: Exception) -> errors.InputError:
  return errors.InputError(
    f'{path} cannot be read here ({_brief(error)}); nothing of the run is '
    'lost: run the same command again, with more free memory of the machine '
    'and its devices, or with --config.mesh of more of them; where it stays '
    'so, delete that folder, to go on from the moment before'
  )


def _refuses_to_read(error: Exception) -> bool:
  """Whether a disk or the memory failed, which says nothing about a file."""
  # What `untrusted` has told in one line.
  cause = error.__cause__ if isinstance(error, errors.InputError) else error
  gone = isinstance(cause, (FileNotFoundError, NotADirectoryError))
  return isinstance(cause, (MemoryError, OSError)) and not gone


def _agreed(workdir) -> Moment | None:
  """The newest moment that is as it was saved, the same for all processes.

  The first process reads all files, and moves away what is newer.
  """
  found, refusal, choice = None, None, -1
  if jax.process_index() == 0:
    try:
      found = _newest_sound(workdir)
    except errors.InputError as e:
      refusal, choice = e, -2
    else:
      if found:
        is_event = found.path.parent.name == EVENTS
        choice = 2 * int(found.path.name) + is_event
  # The others would wait for it for ever.
  choice = sharding.of_the_first(choice)
  if choice == -2:
    raise refusal or errors.InputError(
      f'the first process cannot go on in {workdir}; see what it says'
    )
  if choice == -1 or found:
    return found
  number, is_event = divmod(choice, 2)
  path = pathlib.Path(workdir).absolute() / (EVENTS if is_event else ROLLING)
  try:
    return _moment(path / str(number))
  except (OSError, ValueError, KeyError, TypeError) as e:
    raise _not_here(path / str(number), e) from e


def _newest_sound(workdir) -> Moment | None:
  for moment in _moments(workdir, _set_aside):
    try:
      digests.verify(moment.path)
    except (KeyError, OSError, TypeError, ValueError) as e:
      _set_aside(moment.path, e)
    else:
      return moment
  return None


def _restore(moment: Moment, tx, mesh) -> state_lib.TrainState:
  abstract = state_lib.abstract_state(moment.cfg, tx, mesh)
  number = lambda n: jnp.asarray(n, jnp.int32, device=abstract.step.sharding)
  return state_lib.TrainState(
    step=number(moment.step),
    skipped=number(moment.skipped),
    in_a_row=number(moment.in_a_row),
    params=_read(moment.path / 'params', abstract.params),
    prune=_read(moment.path / 'prune', abstract.prune),
    opt_state=_read(moment.path / 'optimizer', abstract.opt_state),
  )


def _read(path: pathlib.Path, abstract: Any) -> Any:
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
  if leaf.shape != want.shape or leaf.dtype != want.dtype:
    raise ValueError(
      f'an array is {leaf.dtype}{leaf.shape}, the architecture says '
      f'{want.dtype}{want.shape}'
    )


def _leave_out(path: pathlib.Path, error: Exception) -> None:
  logging.warning(
    'checkpoint %s cannot be read (%s); leaving it out', path, _brief(error)
  )


def _set_aside(path: pathlib.Path, error: Exception) -> None:
  """Only for the run itself: nobody else may move what it writes.

  Raises:
    errors.InputError: it may be whole, and stays where it is.
  """
  if _refuses_to_read(error):
    raise _not_here(path, error) from error
  target = path.parents[1] / _DAMAGED / f'{path.parent.name}-{path.name}'
  target.parent.mkdir(exist_ok=True)
  if target.exists():
    shutil.rmtree(target)
  path.replace(target)
  logging.warning(
    'checkpoint %s cannot be read (%s); moved to %s, taking the one before',
    path,
    _brief(error),
    target,
  )


def _brief(error: Exception) -> str:
  return ' '.join(str(error).split())[:200]


def read_events(workdir: str | os.PathLike) -> list[events_lib.ShrinkEvent]:
  """All shrink events of a run, in order.

  Raises:
    errors.InputError: one of them is damaged.
  """
  return [_read_event(path) for path in _committed(workdir, EVENTS)]


def _read_event(path: pathlib.Path) -> events_lib.ShrinkEvent:
  try:
    return events_lib.ShrinkEvent.from_json(_read_json(path, 'event'))
  except (OSError, ValueError, KeyError, TypeError) as e:
    raise errors.InputError(
      f'{path} is damaged ({e}), and with it the lineage of the run; put a '
      'copy of it back, or start again in a new --workdir'
    ) from e


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
    return _moment(path)
  except (OSError, ValueError, KeyError, TypeError) as e:
    raise errors.InputError(
      f'{path} is not a complete checkpoint or event of a run ({e}); choose '
      'another one'
    ) from e


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
    return _read(moment.path / name, abstract)
  except Exception as e:
    raise errors.InputError(
      f'{moment.path} cannot be read ({_brief(e)}); choose another event, or '
      'resume the run to write it again'
    ) from e
