"""What a study has on disk.

    <workdir>/lock                held while a source is made
    <workdir>/<source>/           a source that is made here
    <workdir>/<study>/uniform-*/  the shape that was made by hand
    <workdir>/<study>/runs/<budget>/<arm>/...    a run, for experiments.report
    <workdir>/<study>/runs/<budget>/<arm>/<seed>.lock   held while it is at work
    <workdir>/<study>/results.jsonl              a row for every finished run
    <workdir>/<study>/results.lock               held while rows are added
    <workdir>/<study>/summary.md, *.png          made of these rows alone

A finished run loses its checkpoints and events, but for the last of either kind
where the run has a file `kept`, or is `ours_a` at equal tokens, whose shape
other arms start from.
"""

from collections.abc import Iterator
import contextlib
import dataclasses
import functools
import logging
import os
import pathlib
import shutil

import jax
import ml_collections
import numpy as np

from effllm_jax import atomic
from effllm_jax import checkpoints
from effllm_jax import comparison
from effllm_jax import console
from effllm_jax import corpus
from effllm_jax import errors
from effllm_jax import hf_folder
from effllm_jax import model
from effllm_jax import plan as plan_lib
from effllm_jax import selection
from effllm_jax import sources
from effllm_jax import weights
from experiments import arms as arms_lib

RESULTS = 'results.jsonl'
_KEPT = 'kept'

# Of a run and of its row: budget, arm, seed.
Key = tuple[str, str, int]


class StudyFolder:
  """The folder of one study: its rows, its runs, and what they start from.

  Attributes:
    study: which arms there are.
    path: of the folder.
    cache: of downloaded models and texts.
    source: what most arms start from.
    results: the file of the rows.
    rows: what it held when it was last read, by key.
  """

  def __init__(
    self,
    study: arms_lib.Study,
    path: pathlib.Path,
    cache: str | os.PathLike,
    source: str | os.PathLike,
  ):
    """Makes the folder where it is missing, and reads the rows in it."""
    self.study, self.path = study, path
    self.cache, self.source = cache, source
    self.results = path / RESULTS
    with errors.writing(path):
      path.mkdir(parents=True, exist_ok=True)
    self.read()

  @functools.cached_property
  def shape(self) -> weights.Source:
    """The source without its weights."""
    return sources.load(self.source, self.cache, params=False)

  @functools.cached_property
  def text(self) -> pathlib.Path:
    """The dataset that all arms read."""
    return corpus.prepare(self.study.config.data.text, self.cache)

  @functools.cached_property
  def uniform(self) -> pathlib.Path:
    """The shape made by hand, as a model folder with random weights.

    It is written here, unless it is there; of its weights nothing is used.
    """
    source = self.shape
    plan = plan_lib.make(self.study.config, source.cfg, source.masks)
    cfg = arms_lib.uniform_shape(source.cfg, plan)
    folder = self.path / f'uniform-{cfg.num_params()}'

    def write(new):
      params = jax.tree.map(np.asarray, model.init(jax.random.key(0), cfg))
      shaped = dataclasses.replace(source, cfg=cfg, masks=None, params=params)
      hf_folder.write_model(shaped, new)
      console.plain(stderr=True).print(
        f'made by hand: heads {cfg.K}, ffn {cfg.F}, stem {cfg.D}, '
        f'{cfg.num_params():,} parameters',
        highlight=False,
      )

    with errors.writing(self.path):
      atomic.once(folder, write)
    return folder

  def found(self, seed: int) -> pathlib.Path:
    """Where the last state of `ours_a` is.

    Raises:
      errors.InputError: it is gone, or what is there is not of the size that
        it ended with.
    """
    key = ('tokens', arms_lib.OURS, seed)
    run = self.workdir(key, self.study.config.train.tokens)
    saved = checkpoints.moments(run)
    if not saved and key in self.rows:
      raise errors.InputError(
        f'{run} has no checkpoint and no event that can be read: what '
        f'{arms_lib.OURS} of seed {seed} ended as is gone; put it back, or '
        f'delete {run} and the line of {", ".join(map(str, key))} in '
        f'{self.results}, to have it run again'
      )
    if not saved:
      return run
    last = saved[0]
    masks = checkpoints.read_prune(last).masks
    live = selection.live_params(masks, last.cfg)
    if key in self.rows and live != self.rows[key].live_params:
      raise errors.InputError(
        f'{last.path} has {live:,} live parameters, {arms_lib.OURS} of seed '
        f'{seed} ended with {self.rows[key].live_params:,}; its last state is '
        'gone: set another --workdir'
      )
    return last.path

  def is_left(self, seed: int) -> bool:
    """Whether anything is where the last state of `ours_a` belongs."""
    key = ('tokens', arms_lib.OURS, seed)
    return checkpoints.any_left(
      self.workdir(key, self.study.config.train.tokens)
    )

  def config(self, arm: arms_lib.Arm, seed: int) -> ml_collections.ConfigDict:
    """Of a run at equal tokens; makes the uniform shape, if it starts there."""
    starts = {'source': self.source}
    if arm.start == 'uniform':
      starts['uniform'] = self.uniform
    if arm.start == 'found':
      starts['found'] = self.found(seed)
    return arms_lib.config(arm, self.study.config, seed, starts)

  def workdir(self, key: Key, tokens: int) -> pathlib.Path:
    """Of a run over so many tokens."""
    budget, arm, seed = key
    return self.path / 'runs' / budget / arm / f'{seed}-{tokens}'

  def lock(self, key: Key) -> pathlib.Path:
    """Of a run; the folder of it is there afterwards."""
    budget, arm, seed = key
    folder = self.path / 'runs' / budget / arm
    with errors.writing(folder):
      folder.mkdir(parents=True, exist_ok=True)
    return folder / f'{seed}.lock'

  @property
  def done(self) -> dict[Key, comparison.Row]:
    """The rows but for those of equal FLOPs that are no longer the most.

    A run that replaces one of these is at work yet, or was interrupted.
    """
    again = {x.key for x in comparison.unequal([*self.rows.values()])}
    return {key: row for key, row in self.rows.items() if key not in again}

  def left(self, key: Key) -> pathlib.Path | None:
    """The run that has the model of a row yet; None: it is gone."""
    budget, arm, seed = key
    first = self.rows.get(('tokens', arm, seed))
    if first and first.tokens == self.rows[key].tokens:
      # Equal FLOPs of the costliest arm have no run of their own.
      budget = 'tokens'
    return next(
      filter(checkpoints.any_left, self._runs(budget, arm, seed)), None
    )

  def mark(self, key: Key, kept: pathlib.Path | None) -> None:
    """Of all runs of a key `kept` is the one whose last state stays, if any."""
    for run in self._runs(*key):
      (run / _KEPT).unlink(missing_ok=True)
    if kept:
      (kept / _KEPT).touch()

  def _runs(self, budget, arm, seed) -> list[pathlib.Path]:
    """Of a key: those of an older budget may be among them."""
    return sorted(self.path.absolute().glob(f'runs/{budget}/{arm}/{seed}-*'))

  def read(self) -> None:
    """Takes in the rows of now, those of other processes among them."""
    self.rows = {row.key: row for row in comparison.read(self.results)}

  @contextlib.contextmanager
  def held(self) -> Iterator[None]:
    """Nobody else writes rows or tables meanwhile."""
    with atomic.locked(self.results.with_suffix('.lock')):
      self.read()
      yield

  def keep(self, row: comparison.Row) -> None:
    """Writes a row, in place of one that has its key."""
    with errors.writing(self.results), self.held():
      self.rows[row.key] = row
      comparison.write(self.results, self.rows.values())

  def tidy(self) -> None:
    """Deletes states of finished runs that nobody starts from or asked for."""
    for key in self.done:
      for run in self._runs(*key):
        kept = None
        if key[:2] == ('tokens', arms_lib.OURS) or (run / _KEPT).exists():
          try:
            saved = checkpoints.every_moment(run)
          except errors.InputError as e:
            logging.warning('%s', e)
            continue
          if not saved:
            continue
          # An event, where the last step shrinks.
          kept = saved[0].path
        for folder in (run / 'events', run / 'checkpoints'):
          others = [folder]
          if kept and kept.parent == folder:
            others = [x for x in folder.iterdir() if x != kept]
          for path in others:
            shutil.rmtree(path, ignore_errors=True)
