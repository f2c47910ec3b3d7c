"""Runs the arms of a study, one after another, and keeps what they reached.

    <workdir>/lock                held while a source is made
    <workdir>/<source>/           a source that is made here
    <workdir>/<study>/uniform-*/  the shape that was made by hand
    <workdir>/<study>/runs/<budget>/<arm>/...    a run, for experiments.report
    <workdir>/<study>/runs/<budget>/<arm>/<seed>.lock   held while it is at work
    <workdir>/<study>/results.jsonl              a row for every finished run
    <workdir>/<study>/results.lock               held while rows are added
    <workdir>/<study>/summary.md, *.png          made of these rows alone

Several processes share the work of a workdir: each takes the next run that no
other one is at, and waits for those that it needs or was asked for.

A finished run loses its checkpoints and events, but for the last of either kind
of `ours_a` at equal tokens, whose shape other arms start from.
"""

from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Sequence
import contextlib
import dataclasses
import functools
import itertools
import os
import pathlib
import shutil
import time
from typing import Any

import jax
import ml_collections
import numpy as np

from effllm_jax import accounting
from effllm_jax import atomic
from effllm_jax import checkpoints
from effllm_jax import comparison
from effllm_jax import console
from effllm_jax import corpus
from effllm_jax import dataset
from effllm_jax import errors
from effllm_jax import finished
from effllm_jax import model
from effllm_jax import plan as plan_lib
from effllm_jax import runlog
from effllm_jax import selection
from effllm_jax import sources
from effllm_jax import tables
from effllm_jax import train
from effllm_jax import weights
from effllm_jax import workdir as workdir_lib
from experiments import arms as arms_lib
from experiments import choices
from experiments import pretraining

_RESULTS = 'results.jsonl'
# Of public benchmarks, read at once.
_BATCH_TOKENS = 2048


def run(
  study: arms_lib.Study,
  name: str,
  workdir: str | os.PathLike,
  cache: str | os.PathLike,
  choice: choices.Choice,
) -> list[tables.Table]:
  """Runs what is not there yet; returns the tables of all that is.

  Args:
    study: which arms there are.
    name: of its folder below `workdir`.
    workdir: of all studies.
    cache: of downloaded models and texts.
    choice: what of it to run.

  Raises:
    errors.InputError: a choice that cannot be run, a target out of reach,
      results of another config, model or text; after all others, what runs
      failed with.
    RuntimeError: a run of equal FLOPs spent others.
  """
  workdir = pathlib.Path(workdir)
  # Before a folder is made, or a source, which takes minutes. Another one
  # that is at work can only add rows.
  if choice.tasks:
    # Needs lm-eval, which no other part of a comparison does.
    from effllm_jax import harness
  choices.check_order(comparison.read(workdir / name / _RESULTS), choice)
  if study.pretrained:
    # Of `ours_a`, and so of the shape made by hand.
    plan_lib.make(study.config, study.pretrained.cfg)
    choices.check_plans(study, choice, study.pretrained.cfg)
  with errors.writing(workdir):
    workdir.mkdir(parents=True, exist_ok=True)
  with contextlib.ExitStack() as stack:
    source = study.config.source
    if study.pretrained:
      waiting = (
        f'waiting for the source, which another process makes in {workdir}'
      )
      with atomic.locked(workdir / 'lock', waiting=waiting):
        source = pretraining.make(study.pretrained, workdir, cache)
    ask = None
    if choice.tasks:
      manager = stack.enter_context(harness.prepared(choice.tasks, cache))
      ask = functools.partial(_ask, manager, choice)
    runner = Runner(study, workdir / name, cache, source, ask)
    runner.check(choice)
    made_with = study.pretrained and study.pretrained.config.seed
    if made_with in choice.seeds:
      runner.say(
        f'seed {made_with} is that of {study.pretrained.name} too: its runs '
        'read the text that the source was trained on, in the same order'
      )
    runner.run(choice)
    if note := comparison.left_out([*runner.rows.values()]):
      runner.say(note, soft_wrap=True)
    with errors.writing(runner.folder), runner.results():
      made = comparison.publish(runner.folder, arms_lib.OURS)
    if runner.failed:
      failed = '; '.join(
        f'{", ".join(map(str, key))}: {e}' for key, e in runner.failed.items()
      )
      raise errors.InputError(f'{failed}; the others are in {runner.folder}')
    return made


def _ask(manager, choice, model: weights.Source):
  """What a model answers to the public benchmarks."""
  from effllm_jax import harness

  asked = harness.Model(finished.tight(model), _BATCH_TOKENS, lambda *_: None)
  return harness.run(asked, manager, choice.tasks, choice.limit)


class Runner:
  """The runs of one study, and their rows."""

  def __init__(
    self,
    study: arms_lib.Study,
    folder: pathlib.Path,
    cache: str | os.PathLike,
    source: str | os.PathLike,
    ask: Callable[[weights.Source], list[dict[str, Any]]] | None,
  ):
    """Reads the rows that are there, and writes the shape made by hand.

    Args:
      study: which arms there are.
      folder: of the study, in the workdir.
      cache: of downloaded models and texts.
      source: what most arms start from.
      ask: gives a model's rows of public benchmarks; None: none are asked for.
    """
    self.study, self.folder, self.cache = study, folder, cache
    self.source, self.ask = source, ask
    self.say = functools.partial(
      console.plain(stderr=True).print, highlight=False
    )
    with errors.writing(folder):
      folder.mkdir(parents=True, exist_ok=True)
      self.uniform = self._write_uniform()
    self.path = folder / _RESULTS
    # What runs of this call failed with, by key.
    self.failed: dict[tuple[str, str, int], errors.InputError] = {}
    self._began, self._done = time.monotonic(), 0
    self._read()

  @functools.cached_property
  def shape(self) -> weights.Source:
    """The source without its weights."""
    return sources.load(self.source, self.cache, params=False)

  @functools.cached_property
  def text(self) -> pathlib.Path:
    """The dataset that all arms read."""
    return corpus.prepare(self.study.config.data.text, self.cache)

  def check(self, choice: choices.Choice) -> None:
    """Refuses what belongs to other settings, or would have no row."""
    names = [arm.name for arm in choice.arms]
    choices.check_plans(self.study, choice, self.shape.cfg, self.shape.masks)
    # Whatever is asked for, the table is of all of them.
    known = {arm.name: arm for arm in self.study.arms + self.study.sensitivity}
    known |= {arm.name: arm for arm in choice.arms}
    for budget, name, seed in self.rows:
      # What others end as may be gone, for arms that are not asked for.
      if (
        budget == 'tokens'
        and name in known
        and (known[name].start != 'found' or name in names)
      ):
        self._check_row(known[name], seed)
    for row in self.rows.values():
      asked = {x['task'] for x in row.tasks if x['limit'] == choice.limit}
      missing = sorted({*choice.tasks} - asked)
      if missing and row.arm in names and row.seed in choice.seeds:
        raise errors.InputError(
          f'{row.arm}, seed {row.seed}, was not asked {", ".join(missing)} '
          f'with --limit={choice.limit}, and its model is gone; set another '
          '--workdir'
        )

  def _check_row(self, arm: arms_lib.Arm, seed: int) -> None:
    """Refuses a row at equal tokens of other settings than the study's."""
    key = ('tokens', arm.name, seed)
    config = self._config(arm, seed)
    tokens = plan_lib.num_steps(config) * plan_lib.tokens_per_step(config)
    if self.rows[key].tokens != tokens:
      raise errors.InputError(
        f'{self.path} has {arm.name} of seed {seed} after '
        f'{self.rows[key].tokens:,} tokens, the study says {tokens:,}; set '
        'another --workdir'
      )
    workdir = self._workdir(key, config.train.tokens)
    # A row is all that the table needs: its run may have been deleted.
    if not workdir.exists():
      return
    workdir_lib.check(workdir, config.to_dict())
    if arm.start == 'source':
      train.check_source(config, workdir, self.shape)
    dataset.check_same(workdir / runlog.TEXT, self.text, config.data.text)

  def run(self, choice: choices.Choice) -> None:
    """All runs that have no row, those of other processes last.

    One that fails, as where it diverges, keeps those from running that start
    from it, and equal FLOPs, whose budget follows from all at equal tokens.
    """
    self._tidy()
    for budget in choice.budgets:
      if self.failed:
        break
      atomic.share(
        itertools.product(choice.seeds, choice.arms),
        lambda run, budget=budget: self._attempt(choice, budget, *run),
      )

  def _attempt(
    self, choice: choices.Choice, budget: str, seed: int, arm: arms_lib.Arm
  ) -> pathlib.Path | None:
    """Sees to a row; the lock of another process that is at it."""
    key, ours = (budget, arm.name, seed), ('tokens', arms_lib.OURS, seed)
    self._read()
    if key not in self._pending(choice):
      return None
    if arm.start == 'found' and ours not in self.rows:
      return None if ours in self.failed else self._lock(ours)
    with contextlib.ExitStack() as stack:
      try:
        stack.enter_context(atomic.locked(self._lock(key), 'held'))
      except atomic.HeldError:
        return self._lock(key)
      # It may have been finished before the lock was free.
      self._read()
      left = self._pending(choice)
      if key not in left:
        return None
      number = len(choice.budgets) * len(choice.seeds) * len(choice.arms)
      took = time.monotonic() - self._began
      self.say(
        f'run {number - len(left) + 1} of {number}: {", ".join(key[:2])}, '
        f'seed {seed}'
        + (
          f'; {len(left) * took / self._done / 60:.0f} min left'
          if self._done
          else ''
        )
      )
      try:
        self._one(budget, arm, seed)
      except errors.InputError as e:
        self.failed[key] = e
        self.say(f'failed: {e}', soft_wrap=True)
      self._done += 1
    return None

  def _lock(self, key: tuple[str, str, int]) -> pathlib.Path:
    """Of a run; the folder of it is there afterwards."""
    budget, arm, seed = key
    folder = self.folder / 'runs' / budget / arm
    with errors.writing(folder):
      folder.mkdir(parents=True, exist_ok=True)
    return folder / f'{seed}.lock'

  def _read(self) -> None:
    """The rows of now, those of other processes among them."""
    self.rows = {row.key: row for row in comparison.read(self.path)}

  @contextlib.contextmanager
  def results(self) -> Iterator[None]:
    """Nobody else writes rows or tables meanwhile."""
    with atomic.locked(self.path.with_suffix('.lock')):
      self._read()
      yield

  def _pending(self, choice: choices.Choice) -> set[tuple[str, str, int]]:
    """Keys without a row, or with one of FLOPs that are no longer the most.

    Not those which failed.
    """
    stale = {x.key for x in comparison.unequal([*self.rows.values()])}
    return {
      (budget, arm.name, seed)
      for budget in choice.budgets
      for arm in choice.arms
      for seed in choice.seeds
      if (budget, arm.name, seed) not in self.rows
      or (budget, arm.name, seed) in stale
    } - self.failed.keys()

  def _one(self, budget: str, arm: arms_lib.Arm, seed: int) -> None:
    config = self._config(arm, seed)
    if budget == 'flops':
      first = self.rows['tokens', arm.name, seed]
      most = comparison.most_flops(self.rows.values())
      missing = most - first.total_flops
      tokens = first.tokens + missing / first.flops_per_token
      if missing < comparison.TOLERANCE / 2 * most:
        self._keep(dataclasses.replace(first, budget=budget))
        return
      config = arms_lib.lengthened(config, tokens)
    key = (budget, arm.name, seed)
    workdir = self._workdir(key, config.train.tokens)
    # Of the run before; see `pruning.shrink`. After 27 runs XLA aborted.
    jax.clear_caches()
    train.run(config, workdir, self.cache)
    log = runlog.read(workdir)
    tasks = []
    if self.ask:
      tasks = self.ask(finished.read(workdir, None)[0])
    row = _row(key, log, log.last_eval('final'), tasks)
    if (
      budget == 'flops'
      and abs(row.total_flops / most - 1) > comparison.TOLERANCE
    ):
      raise RuntimeError(
        f'{workdir} spent {row.total_flops:.4g} FLOPs where {most:.4g} were '
        'planned; please report this'
      )
    if arm.name == 'dense' and budget == 'tokens':
      self._keep_source(row, log)
    self._keep(row)
    self._tidy()

  def _keep_source(self, dense: comparison.Row, log: runlog.Run) -> None:
    """The row of the source, which is `dense` before its first step."""
    before = log.last_eval('source')
    tasks = []
    if self.ask:
      tasks = self.ask(sources.load(self.source, self.cache))
    self._keep(
      dataclasses.replace(
        dense, arm='source', tokens=0, seconds=0.0, tasks=tasks,
        flops=dict.fromkeys(accounting.PURPOSES, 0),
        bits_per_byte=before['bits_per_byte'], domains=before['domains'],
      )
    )  # fmt: skip

  def _keep(self, row: comparison.Row) -> None:
    with errors.writing(self.path), self.results():
      self.rows[row.key] = row
      comparison.write(self.path, self.rows.values())

  def _tidy(self) -> None:
    """Deletes the states of finished runs that no other arm starts from."""
    # A run that replaces a row is at work yet, or was interrupted.
    again = {x.key for x in comparison.unequal([*self.rows.values()])}
    for budget, arm, seed in self.rows.keys() - again:
      for run in self.folder.absolute().glob(f'runs/{budget}/{arm}/{seed}-*'):
        kept = None
        if (budget, arm) == ('tokens', arms_lib.OURS):
          # An event, where the last step shrinks.
          kept = next((x.path for x in checkpoints.moments(run)), None)
        for folder in (run / 'events', run / 'checkpoints'):
          others = [folder]
          if kept and kept.parent == folder:
            others = [x for x in folder.iterdir() if x != kept]
          for path in others:
            shutil.rmtree(path, ignore_errors=True)

  def _workdir(self, key, tokens: int) -> pathlib.Path:
    budget, arm, seed = key
    return self.folder / 'runs' / budget / arm / f'{seed}-{tokens}'

  def _config(self, arm: arms_lib.Arm, seed: int) -> ml_collections.ConfigDict:
    starts = {'source': self.source, 'uniform': self.uniform}
    if arm.start == 'found':
      starts['found'] = self._found(seed)
    return arms_lib.config(arm, self.study.config, seed, starts)

  def _found(self, seed: int) -> pathlib.Path:
    """Where the last state of `ours_a` is.

    Raises:
      errors.InputError: what is there is not of the size that it ended with.
    """
    key = ('tokens', arms_lib.OURS, seed)
    run = self._workdir(key, self.study.config.train.tokens)
    saved = checkpoints.moments(run)
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

  def _write_uniform(self) -> pathlib.Path:
    """A model folder; of its random weights only the shape is used."""
    source = self.shape
    plan = plan_lib.make(self.study.config, source.cfg, source.masks)
    cfg = arms_lib.uniform_shape(source.cfg, plan)
    folder = self.folder / f'uniform-{cfg.num_params()}'

    def write(new):
      params = jax.tree.map(np.asarray, model.init(jax.random.key(0), cfg))
      shaped = dataclasses.replace(source, cfg=cfg, masks=None, params=params)
      sources.write_model(shaped, new)
      self.say(
        f'made by hand: heads {cfg.K}, ffn {cfg.F}, stem {cfg.D}, '
        f'{cfg.num_params():,} parameters'
      )

    atomic.once(folder, write)
    return folder


def _row(key, log: runlog.Run, last, tasks: Sequence) -> comparison.Row:
  budget, arm, seed = key
  train = log.train
  flops = {x: train[f'flops.{x}'] for x in accounting.PURPOSES}
  total = sum(flops.values())
  return comparison.Row(
    budget=budget, arm=arm, seed=seed,
    bits_per_byte=last['bits_per_byte'],
    domains=last['domains'],
    live_params=int(last['live_params']),
    tokens=int(log.tokens[-1]),
    flops={x: int(y[-1]) for x, y in flops.items()},
    flops_per_token=float(
      (total[-1] - total[-2]) / (log.tokens[-1] - log.tokens[-2])
    ),
    seconds=log.step_seconds,
    tasks=tasks,
  )  # fmt: skip
