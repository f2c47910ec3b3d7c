"""How a run goes on: the newest moment that can be read, restored.

A resume takes the newest moment of either kind, checkpoint or event, so that
nothing has to be written twice at a shrink. It moves damaged moments away and
deletes events that the run will write again, so nobody calls this but the run
that holds the workdir; `checkpoints` is for all who only read.
"""

from collections.abc import Iterator
import logging
import os
import pathlib
import re
import shutil

import jax
import jax.numpy as jnp
import optax

from effllm_jax import checkpoints
from effllm_jax import digests
from effllm_jax import errors
from effllm_jax import sharding
from effllm_jax import state as state_lib
from effllm_jax import workdir as workdir_lib

_DAMAGED = 'damaged'
# What the first process says in place of a moment.
_NOTHING, _REFUSED = -1, -2


def check_there(workdir: str | os.PathLike) -> None:
  """Refuses a workdir whose log tells of saves of which nothing is left.

  Without this check the run would begin again and empty the log.

  Raises:
    errors.InputError: what it has saved is gone, or is a link to a place that
      is not there now.
  """
  root = pathlib.Path(workdir).absolute()
  folders = [root / kind for kind in (checkpoints.ROLLING, checkpoints.EVENTS)]
  left = [path for folder in folders for path in folder.glob('*')]
  for path in (*folders, *left):
    if path.is_symlink() and not os.path.exists(path):
      raise errors.InputError(
        f'{path} is a link to {os.readlink(path)}, which is not there; mount '
        'its disk or mend the link, or choose another --workdir'
      )
  if checkpoints.any_left(root) or (root / _DAMAGED).exists():
    return
  saves, ended = 0, False
  for row in workdir_lib.read(root / 'metrics.jsonl'):
    if isinstance(row, dict):
      saves += row.get('kind') == 'save'
      ended |= row.get('phase') == 'final'
  # Each save waits for the one before it, so of several all but the last were
  # on disk. A single one may have been killed: then its half-written folder is
  # there, or the run has not come to its end. Both folders are made before the
  # first row is written: if one is missing, somebody has taken it away.
  over = ended or not all(x.is_dir() for x in folders)
  if saves > 1 or (saves and over and not left):
    raise errors.InputError(
      f'the checkpoints of this run are gone: {root / "metrics.jsonl"} tells '
      f'of {saves} saves, and nothing of them is in {checkpoints.ROLLING}/ or '
      f'{checkpoints.EVENTS}/ beside it; put them back, or choose another '
      '--workdir (or delete this one, and the run begins again)'
    )


def restore_latest(
  workdir: str | os.PathLike,
  tx: optax.GradientTransformation,
  data: Iterator,
  mesh: sharding.Mesh | None = None,
) -> tuple[state_lib.TrainState, checkpoints.Moment] | None:
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
      data.set_state(checkpoints.read_json(moment.path, 'data'))
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
      for path in checkpoints.committed(workdir, checkpoints.EVENTS):
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
    f'{path} cannot be read here ({checkpoints.brief(error)}); nothing of the '
    'run is lost: run the same command again, with more free memory of the '
    'machine and its devices, or with --config.mesh of more of them; where it '
    'stays so, delete that folder, to go on from the moment before'
  )


def _refuses_to_read(error: Exception) -> bool:
  """Whether a disk or the memory failed, which says nothing about a file."""
  # What `untrusted` has told in one line.
  cause = error.__cause__ if isinstance(error, errors.InputError) else error
  gone = isinstance(cause, (FileNotFoundError, NotADirectoryError))
  return isinstance(cause, (MemoryError, OSError)) and not gone


def _agreed(workdir) -> checkpoints.Moment | None:
  """The newest moment that is as it was saved, the same for all processes.

  The first process reads all files, moves damaged moments away, and tells the
  others its choice as one number: a moment is 2 * step if it is a checkpoint,
  2 * index + 1 if it is an event.
  """
  found, refusal, choice = None, None, _NOTHING
  if jax.process_index() == 0:
    try:
      found = _newest_sound(workdir)
    except errors.InputError as e:
      refusal, choice = e, _REFUSED
    else:
      if found:
        is_event = found.path.parent.name == checkpoints.EVENTS
        choice = 2 * int(found.path.name) + is_event
  # Also after a refusal: the others would wait for it for ever.
  choice = sharding.of_the_first(choice)
  if choice == _REFUSED:
    raise refusal or errors.InputError(
      f'the first process cannot go on in {workdir}; see what it says'
    )
  if choice == _NOTHING or found:
    return found
  number, is_event = divmod(choice, 2)
  kind = checkpoints.EVENTS if is_event else checkpoints.ROLLING
  path = pathlib.Path(workdir).absolute() / kind / str(number)
  try:
    return checkpoints.moment_at(path)
  except checkpoints.UNREADABLE as e:
    raise _not_here(path, e) from e


def _newest_sound(workdir) -> checkpoints.Moment | None:
  for moment in checkpoints.moments(workdir, _set_aside):
    try:
      digests.verify(moment.path)
    except checkpoints.UNREADABLE as e:
      _set_aside(moment.path, e)
    else:
      return moment
  return None


def _restore(moment: checkpoints.Moment, tx, mesh) -> state_lib.TrainState:
  abstract = state_lib.abstract_state(moment.cfg, tx, mesh)
  number = lambda n: jnp.asarray(n, jnp.int32, device=abstract.step.sharding)
  read = lambda part, like: checkpoints.read_arrays(moment.path / part, like)
  return state_lib.TrainState(
    step=number(moment.step),
    skipped=number(moment.skipped),
    in_a_row=number(moment.in_a_row),
    params=read('params', abstract.params),
    prune=read('prune', abstract.prune),
    opt_state=read('optimizer', abstract.opt_state),
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
    checkpoints.brief(error),
    target,
  )
