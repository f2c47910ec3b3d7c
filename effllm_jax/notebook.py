"""What a notebook needs: open a run, look at masks, scores and survivors.

    from effllm_jax import notebook

    run = notebook.open_run('runs/a')
    model = notebook.model(run, event=0)
    notebook.masks(model)

Figures and tables show themselves where they are the value of a cell. Indices
are those of the model that the run started from, its *source*.
"""

from collections.abc import Sequence
import dataclasses
import functools
import os
import pathlib
import tempfile
from typing import Any

import jax
import numpy as np
import treescope

from effllm_jax import checkpoints
from effllm_jax import errors
from effllm_jax import events as events_lib
from effllm_jax import figures
from effllm_jax import inspection
from effllm_jax import overlap as overlap_lib
from effllm_jax import pictures
from effllm_jax import runlog
from effllm_jax import small_run as small_run_lib
from effllm_jax import sources
from effllm_jax import structure
from effllm_jax import tables

# Workdirs to look at, separated as in PATH.
VARIABLE = 'EFFLLM_RUN'

# Of models, whether a run has saved them or not.
Model = inspection.Model
small_model = inspection.small_model
prune = inspection.prune
shrink = inspection.shrink
logit_difference = inspection.logit_difference
lineage = inspection.lineage
alive_in_source = inspection.alive_in_source
survivors = inspection.survivors
sizes = inspection.sizes
prices = inspection.prices
bits = inspection.bits


@dataclasses.dataclass(frozen=True)
class Run:
  """A workdir that has been opened.

  Attributes:
    workdir: its folder.
    log: its metrics and its trace of prunes.
    source: the model it started from, without weights; has the tokenizer.
    events: its shrinks, in order.
  """

  workdir: pathlib.Path
  log: runlog.Run = dataclasses.field(repr=False)
  source: sources.Source = dataclasses.field(repr=False)
  events: list[events_lib.ShrinkEvent] = dataclasses.field(repr=False)


def open_run(workdir: str | os.PathLike = '') -> Run:
  """Opens a run.

  Args:
    workdir: of the run; '': the first one of $EFFLLM_RUN, and where that is not
      set a small run, which is made now and gone with this process.

  Raises:
    errors.InputError: there is no such run, or it cannot be read.
  """
  named = [workdir] if workdir else _named()
  if named:
    return _open(named[0])
  print('no run is named: making a small one, of random weights')
  return _open(small_run())


def open_runs(workdirs: Sequence[str | os.PathLike] = ()) -> list[Run]:
  """Opens several runs; without names all of $EFFLLM_RUN, or three small ones.

  Raises:
    errors.InputError: as `open_run`, or one workdir stands for several.
  """
  if isinstance(workdirs, (str, os.PathLike)):
    raise errors.InputError(
      f'{workdirs} is one workdir; open it by open_run, or give a list'
    )
  named = list(workdirs) or _named()
  if named:
    return [_open(x) for x in named]
  print('no run is named: making three small ones, of random weights')
  kinds = {
    'slow': {},
    'fast': {'prune.end_tokens': 640},
    'ragged': {'prune.policy': 'ragged'},
  }
  return [_open(small_run(name=x, changes=y)) for x, y in kinds.items()]


def small_run(
  folder: str | os.PathLike = '',
  name: str = 'run',
  changes: dict[str, Any] | None = None,
) -> pathlib.Path:
  """Makes a small real run and returns its workdir; see `small_run.make`.

  Args:
    folder: to keep it in; '': one that is gone with this process.
    name: of the run.
    changes: values of its config by key, as in {'prune.policy': 'ragged'}.

  Raises:
    errors.InputError: an unknown key or a value that a run refuses.
  """
  return small_run_lib.make(folder or _scratch().name, name, changes)


def model(run: Run, event: int | None = None, step: int | None = None) -> Model:
  """The model of a run: as last saved, after a shrink, or at a checkpoint.

  Args:
    run: opened.
    event: index of a shrink, for the model right after it.
    step: of a rolling checkpoint, the newest few of which a run keeps.

  Raises:
    errors.InputError: there is no such event or checkpoint, it is damaged, or
      both are named.
  """
  if event is not None and step is not None:
    raise errors.InputError(
      f'event {event} and step {step} are two moments; name one of them'
    )
  if event is not None:
    path = run.workdir / 'events' / str(event)
  elif step is not None:
    path = run.workdir / 'checkpoints' / str(step)
  else:
    # The one that a resume would take.
    saved = checkpoints.moments(run.workdir)
    if not saved:
      raise errors.InputError(
        f'{run.workdir} is finished and has no checkpoint any more, only its '
        'log; open another run'
        if run.log.finished
        else f'{run.workdir} has no checkpoint yet; wait until it has saved one'
      )
    path = saved[0].path
  if not path.is_dir():
    names = (x.name for x in path.parent.glob('*') if x.name.isdigit())
    known = ', '.join(sorted(names, key=int)) or 'none'
    raise errors.InputError(
      f'there is no {path}; {path.parent.name} there are: {known}'
    )
  moment = checkpoints.read_moment(path)
  return Model(
    name=f'{run.log.name}/{path.parent.name}/{path.name}, step {moment.step}',
    cfg=moment.cfg,
    source_cfg=run.source.cfg,
    prune=checkpoints.read_prune(moment),
    load=functools.partial(checkpoints.read_params, moment),
  )


def tokens(run: Run, text: str) -> np.ndarray:
  """Token ids of a text, int32 [1, T]."""
  ids = run.source.tokenizer.encode(text, add_special_tokens=False).ids
  return np.asarray([ids], np.int32)


def event_lineage(run: Run, event: int) -> structure.Groups:
  """Which group of the source sits in each slot right after a shrink.

  Composed of the indices that each shrink kept, from the record of the events
  alone; unlike in `lineage` dead slots have an index too.

  Args:
    run: opened.
    event: index of a shrink.

  Raises:
    errors.InputError: there is no such event, or not all of those before it.
  """
  known = [x.index for x in run.events]
  if event not in known:
    names = ', '.join(map(str, known)) or 'none'
    raise errors.InputError(
      f'{run.workdir} has no event {event}; it has {len(known)}: {names}'
    )
  lost = sorted(set(range(event)).difference(known))
  if lost:
    raise errors.InputError(
      f'{run.workdir} has lost events {", ".join(map(str, lost))}, of which '
      f'the lineage of event {event} is composed; take '
      f'notebook.lineage(notebook.model(run, event={event}))'
    )
  return events_lib.lineage([x for x in run.events if x.index <= event])


def tree(x: Any) -> None:
  """Shows a tree of arrays, which can be unfolded; arrays as pictures."""
  treescope.display(x, autovisualize=True, streaming=False)


def history(run: Run) -> tables.Table:
  """The shrinks of a run: when, from what, to what."""
  return tables.events(run.log)


def comparison(run: Run) -> tables.Table:
  """The source model against the pruned one."""
  return tables.compare(run.log)


def masks(model: Model) -> figures.Figure:
  """Bitmaps of what is alive, by layer and by index in the source."""
  return pictures.masks(alive_in_source(model))


def scores(model: Model) -> figures.Figure:
  """The score of every live group, in the order of the arrays."""
  arrays = jax.tree.map(np.asarray, (model.prune.scores, model.prune.masks))
  return pictures.scores(*arrays)


def report_figure(run: Run, name: str) -> figures.Figure:
  """A figure of the report: size, price, loss, widths, layers or speed.

  Raises:
    errors.InputError: there is no such figure.
  """
  if name not in figures.NAMES:
    raise errors.InputError(
      f'there is no figure {name!r}; choose one of {", ".join(figures.NAMES)}'
    )
  (drawn,) = figures.draw(run.log, [name])
  return drawn


def figure_2c(runs: Sequence[Run]) -> figures.Figure:
  """Live parameters against training tokens: the paper's Figure 2(c).

  Raises:
    errors.InputError: there is no run.
  """
  return pictures.sizes([x.log for x in _some(runs)])


def figure_a0(run: Run) -> figures.Figure:
  """Widths and saliencies against training tokens: the paper's Figure A0."""
  return pictures.architecture(run.log)


def quality(runs: Sequence[Run]) -> figures.Figure:
  """Held-out bits per byte against live parameters.

  Raises:
    errors.InputError: there is no run.
  """
  return pictures.quality([x.log for x in _some(runs)])


def overlap(
  runs: Sequence[Run], event: int | None = None, part: str = 'alive'
) -> tables.Table:
  """Which groups every two runs share, beside what chance would give.

  Args:
    runs: from one source; of a single one the table is empty.
    event: right after this shrink of each; None: as they are now.
    part: 'alive', or 'removed' for the groups that went.

  Raises:
    errors.InputError: the runs are of different sources, see `overlap.compare`,
      or there is none, or no such part.
  """
  if part not in ('alive', 'removed'):
    raise errors.InputError(f"there is no part {part!r}; 'alive' or 'removed'")
  found = [overlap_lib.read(x.workdir, event) for x in _some(runs)]
  return overlap_lib.table(overlap_lib.compare(found), part)


def _some(runs: Sequence[Run]) -> Sequence[Run]:
  if isinstance(runs, Run):
    raise errors.InputError(f'{runs.workdir} is one run; give a list of runs')
  if not runs:
    raise errors.InputError('no run is given; open one by open_run')
  return runs


def _named() -> list[str]:
  return [x for x in os.environ.get(VARIABLE, '').split(os.pathsep) if x]


def _open(workdir) -> Run:
  workdir = pathlib.Path(workdir).expanduser()
  return Run(
    workdir=workdir,
    log=runlog.read(workdir),
    source=sources.load_saved(workdir / 'source'),
    events=checkpoints.read_events(workdir),
  )


@functools.cache
def _scratch() -> tempfile.TemporaryDirectory:
  return tempfile.TemporaryDirectory(prefix='effllm-')
