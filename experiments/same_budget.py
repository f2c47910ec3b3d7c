"""Runs the arms of a study, one after another, and keeps what they reached.

Several processes share the work of a workdir: each takes the next run that no
other one is at, and waits for those that it needs or was asked for. What lies
where is in `study_folder`.
"""

from collections.abc import Callable
from collections.abc import Sequence
import contextlib
import dataclasses
import functools
import itertools
import os
import pathlib
import time
from typing import Any

import jax

from effllm_jax import accounting
from effllm_jax import atomic
from effllm_jax import comparison
from effllm_jax import comparison_report
from effllm_jax import console
from effllm_jax import environment
from effllm_jax import errors
from effllm_jax import finished
from effllm_jax import runlog
from effllm_jax import sources
from effllm_jax import tables
from effllm_jax import train
from effllm_jax import weights
from experiments import arms as arms_lib
from experiments import choice_checks
from experiments import choices
from experiments import pretraining
from experiments import study_folder

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
  rows = comparison.read(workdir / name / study_folder.RESULTS)
  choice_checks.check_order(rows, choice)
  if study.pretrained:
    choice_checks.check_plans(study, choice, study.pretrained.cfg)
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
    folder = study_folder.StudyFolder(study, workdir / name, cache, source)
    choice_checks.check_folder(folder, choice)
    runner = Runner(folder, choice, ask)
    made_with = study.pretrained and study.pretrained.config.seed
    if made_with in choice.seeds:
      runner.say(
        f'seed {made_with} is that of {study.pretrained.name} too: its runs '
        'read the text that the source was trained on, in the same order'
      )
    runner.run()
    if note := comparison.left_out([*folder.rows.values()]):
      runner.say(note, soft_wrap=True)
    with errors.writing(folder.path), folder.held():
      made = comparison_report.publish(folder.path, arms_lib.OURS)
    if runner.failed:
      failed = '; '.join(
        f'{", ".join(map(str, key))}: {e}' for key, e in runner.failed.items()
      )
      raise errors.InputError(f'{failed}; the others are in {folder.path}')
    return made


def _ask(manager, choice, model: weights.Source):
  """What a model answers to the public benchmarks."""
  from effllm_jax import harness

  asked = harness.Model(finished.tight(model), _BATCH_TOKENS, lambda *_: None)
  return harness.run(asked, manager, choice.tasks, choice.limit)


class Runner:
  """The runs of one choice, and what those of this process failed with."""

  def __init__(
    self,
    folder: study_folder.StudyFolder,
    choice: choices.Choice,
    ask: Callable[[weights.Source], list[dict[str, Any]]] | None,
  ):
    """Nothing is run yet.

    Args:
      folder: gets the runs and their rows.
      choice: what to run, checked by `choice_checks`.
      ask: gives a model's rows of public benchmarks; None: none are asked for.
    """
    self.folder, self.choice, self.ask = folder, choice, ask
    self.say = functools.partial(
      console.plain(stderr=True).print, highlight=False
    )
    # What runs of this call failed with.
    self.failed: dict[study_folder.Key, errors.InputError] = {}
    self._began, self._done = time.monotonic(), 0

  def run(self) -> None:
    """All runs that have no row, those of other processes last.

    One that fails, as where it diverges, keeps those from running that start
    from it, and equal FLOPs, whose budget follows from all at equal tokens.
    """
    self.folder.tidy()
    for budget in self.choice.budgets:
      if self.failed:
        break
      atomic.share(
        itertools.product(self.choice.seeds, self.choice.arms),
        lambda run, budget=budget: self._attempt(budget, *run),
      )

  def _attempt(
    self, budget: str, seed: int, arm: arms_lib.Arm
  ) -> pathlib.Path | None:
    """Sees to a row; the lock of another process that is at it."""
    folder, choice = self.folder, self.choice
    key, ours = (budget, arm.name, seed), ('tokens', arms_lib.OURS, seed)
    folder.read()
    if key not in self._pending():
      return None
    if arm.start == 'found' and ours not in folder.rows:
      return None if ours in self.failed else folder.lock(ours)
    with contextlib.ExitStack() as stack:
      try:
        stack.enter_context(atomic.locked(folder.lock(key), 'held'))
      except atomic.HeldError:
        return folder.lock(key)
      # It may have been finished before the lock was free.
      folder.read()
      left = self._pending()
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

  def _pending(self) -> set[study_folder.Key]:
    """Keys that are not done, or of models that were not asked enough.

    Not those which failed.
    """
    done = {
      key
      for key, row in self.folder.done.items()
      if not self.choice.unasked(row)
    }
    return self.choice.keys - done - self.failed.keys()

  def _one(self, budget: str, arm: arms_lib.Arm, seed: int) -> None:
    folder, key = self.folder, (budget, arm.name, seed)
    if key in folder.done:
      self._ask_later(key)
      return
    config = folder.config(arm, seed)
    if budget == 'flops':
      first = folder.rows['tokens', arm.name, seed]
      most = comparison.most_flops(folder.rows.values())
      missing = most - first.total_flops
      tokens = first.tokens + missing / first.flops_per_token
      if missing < comparison.TOLERANCE / 2 * most:
        folder.keep(dataclasses.replace(first, budget=budget))
        if self.choice.unasked(first) and folder.left(key):
          self._ask_later(key)
        return
      config = arms_lib.lengthened(config, tokens)
    workdir = folder.workdir(key, config.train.tokens)
    # Of the run before; see `pruning.shrink`. After 27 runs XLA aborted.
    jax.clear_caches()
    train.run(config, workdir, folder.cache)
    log = runlog.read(workdir)
    tasks = []
    if self.ask:
      tasks = self.ask(finished.read(workdir, None)[0])
    row = _row(key, log, log.evaluation('final'), tasks)
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
    with errors.writing(workdir):
      folder.mark(key, workdir if self.choice.keep else None)
    folder.keep(row)
    folder.tidy()

  def _keep_source(self, dense: comparison.Row, log: runlog.Run) -> None:
    """The row of the source, which is `dense` before its first step."""
    before = log.evaluation('source')
    self.folder.keep(
      dataclasses.replace(
        dense, arm='source', tokens=0, seconds=0.0, tasks=self._ask_source(),
        flops=dict.fromkeys(accounting.PURPOSES, 0),
        bits_per_byte=before['bits_per_byte'], domains=before['domains'],
      )
    )  # fmt: skip

  def _ask_source(self) -> list[dict[str, Any]]:
    if not self.ask:
      return []
    return self.ask(sources.load(self.folder.source, self.folder.cache))

  def _ask_later(self, key: study_folder.Key) -> None:
    """Adds what was not asked to the row of a model that was kept."""
    folder, (budget, arm, seed) = self.folder, key
    source = 'tokens', 'source', seed
    if (budget, arm) == ('tokens', 'dense') and source in folder.rows:
      folder.keep(_with(folder.rows[source], self._ask_source()))
    model, _ = finished.read(folder.left(key), None)
    folder.keep(_with(folder.rows[key], self.ask(model)))


def _with(row: comparison.Row, tasks: Sequence) -> comparison.Row:
  """A row with these answers, in place of its own to the same items."""
  same = lambda x, y: (x['task'], x['limit']) == (y['task'], y['limit'])
  others = [x for x in row.tasks if not any(same(x, y) for y in tasks)]
  return dataclasses.replace(row, tasks=[*others, *tasks])


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
    computed_on=environment.text(log.starts),
  )  # fmt: skip
