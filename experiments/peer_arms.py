"""The arms of `experiments.peers`: what each does, and its row of results."""

from collections.abc import Mapping
from collections.abc import Sequence
import contextlib
import functools
import os
import pathlib
import time
from typing import Any

import ml_collections
import numpy as np

from effllm_jax import errors
from effllm_jax import untrusted
from experiments import alone
from experiments import cli
from experiments import torch_peers

# Changes of the config, as `experiments/configs/ragged.py` makes them.
OURS = {
  'ours': {},
  'ours_ragged': {
    'prune.policy': 'ragged',
    'prune.saliency': 'obd',
  },
}
# LLM-Pruner's script leaves alone 4 layers at the start and 2 at the end.
OTHERS = {
  'torch_dense': None,
  'torch_pruning': torch_peers.Recipe('group_taylor'),
  'torch_pruning_iterative': torch_peers.Recipe('group_taylor', times=5),
  'llm_pruner': torch_peers.Recipe(
    'param_first', first=4, last=2, rounded=False
  ),
  'llm_pruner_mix': torch_peers.Recipe('param_mix'),
}


def check(names: list[str]) -> None:
  """Raises InputError where an arm is not known or cannot run here."""
  from effllm_jax import hf_export

  known = [*OURS, *OTHERS]
  wrong = [x for x in names if x not in known]
  if wrong or not names or len({*names}) < len(names):
    meant = cli.suggestion(wrong[0], known) if wrong else ''
    raise errors.InputError(
      f'arms {",".join(names)!r} are not some of {",".join(known)}, each once; '
      f'set --arms{meant}'
    )
  if any(x in OTHERS for x in names):
    hf_export.import_transformers()
  if any(OTHERS.get(x) for x in names):
    torch_peers.require()


class Bench:
  """One config, its source, its text and its budget, for every arm."""

  def __init__(
    self,
    config: ml_collections.ConfigDict,
    workdir: pathlib.Path,
    cache: str,
    scoring: int,
  ):
    """Checks all that can be refused.

    Args:
      config: as in `experiments/configs`; that of the arm `ours`.
      workdir: of the comparison.
      cache: downloaded sources and texts.
      scoring: batches that the others score.

    Raises:
      errors.InputError: what the others cannot do, or `train.run` refuses.
    """
    from effllm_jax import plan as plan_lib
    from effllm_jax import sources

    self.config, self.workdir = config, workdir
    self.cache, self.scoring = cache, scoring
    for key, have, want in (
      ('budget.kind', config.budget.kind, 'params'),
      ('model.dtype', config.model.dtype, 'float32'),
      ('init', config.init, 'source'),
      ('distill.weight', config.distill.weight, 0.0),
    ):
      if have != want:
        raise errors.InputError(
          f'{key} {have!r} is not that of the other arms, {want!r}; set '
          f'--config.{key}={want}'
        )
    if config.prune.policy == 'none':
      raise errors.InputError(
        "prune.policy 'none' says nothing of when the other arms prune; set "
        '--config.prune.policy=uniform'
      )
    self.source = sources.load(config.source, cache, params=False)
    if self.source.masks is not None:
      raise errors.InputError(
        f'source {config.source!r} was pruned before, which transformers does '
        'not see; set --config.source to a finished model'
      )
    self.plan = plan_lib.make(config, self.source.cfg)
    if scoring > self.plan.steps - self._window()[1]:
      raise errors.InputError(
        f'--scoring_batches {scoring} is more than follow the last prune, '
        f'{self.plan.steps - self._window()[1]}; lower it'
      )

  def _made_of(self) -> dict[str, str | None]:
    """What tells its model and its text from others of the same path."""
    from effllm_jax import corpus
    from effllm_jax import dataset

    text = corpus.prepare(self.config.data.text, self.cache)
    return {
      'source': self.source.sha256,
      'saved': self.source.saved,
      'text': dataset.manifest(text)['digest'],
    }

  def results(self, names: list[str]) -> list[dict[str, Any]]:
    """Runs the arms that have no row in `results.jsonl` yet; all their rows.

    Raises:
      errors.InputError: an arm prunes more often than there are steps for it,
        others were measured on another number of threads, as `width`,
        `workdir.claimed` or `run`.
      atomic.HeldError: another comparison is at work in the workdir.
    """
    from effllm_jax import workdir as workdir_lib

    begin, end = self._window()
    for name in names:
      recipe = OTHERS.get(name)
      if recipe is None:
        continue
      self.width(recipe)
      if end - begin < recipe.times - 1:
        raise errors.InputError(
          f'{name} prunes {recipe.times} times, and from prune.begin_tokens to '
          f'prune.end_tokens are {end - begin} steps; set '
          '--config.prune.end_tokens, or leave the arm out of --arms'
        )
    claim = self.config.to_dict() | {
      'scoring_batches': self.scoring,
      'made_of': self._made_of(),
      'threads': _threads(),
    }
    path, before = self.workdir / 'results.jsonl', self.workdir / 'config.json'
    if before.exists() and 'threads' not in untrusted.read_json(
      before, 'restore it or choose another --workdir'
    ):
      # Of before it was claimed: the rows say it alone.
      del claim['threads']
    with contextlib.ExitStack() as stack:
      stack.enter_context(workdir_lib.claimed(self.workdir, claim))
      log = workdir_lib.Log(path, self.plan.steps)
      stack.callback(log.close)
      done = {row['arm']: row for row in workdir_lib.read(path)}
      self._check_threads([done.get(name) for name in names])
      for name in names:
        if name not in done:
          print(f'{name}: {self.plan.steps} steps', flush=True)
          done[name] = self.run(name)
          log.write(done[name])
    return [done[name] for name in names]

  def _check_threads(self, rows: Sequence[Mapping[str, Any] | None]) -> None:
    """Refuses rows, None: to be run, that are not of one number of threads."""
    here = _threads()
    counts = {(row or {}).get('threads', here) for row in rows}
    if len(counts) > 1:
      raise errors.InputError(
        f'arms in {self.workdir} were measured on '
        f'{" and ".join(map(str, sorted(counts)))} threads, this process has '
        f'{here}; run them on one number (taskset -c), or set --arms to those '
        'of one, or choose another --workdir'
      )

  def run(self, name: str) -> dict[str, Any]:
    """Runs one arm in a process of its own; returns its row.

    Raises:
      errors.InputError: what the user can put right.
    """
    threads = _threads()
    if name in OURS:
      work, more = _ours, (
        self.config.to_dict(), OURS[name], str(self.workdir / name), self.cache
      )  # fmt: skip
    else:
      recipe = OTHERS[name]
      width = recipe and self.width(recipe)
      work, more = torch_peers.run, (self.task, recipe, width, threads)
    resumed = name in OURS and (self.workdir / name / 'metrics.jsonl').exists()
    start = time.perf_counter()
    found = alone.call('an arm', work, *more)
    total = time.perf_counter() - start
    if resumed:
      # What the process before took is not on record.
      total = found['peak_bytes'] = None
    if name in OTHERS:
      found = self._row(found)
    tokens = self.plan.tokens(self.plan.steps)
    return {
      # `step` is what the log goes by.
      'arm': name,
      'step': self.plan.steps,
      'tokens': tokens,
      'threads': threads,
      **found,
      'tokens_per_second': tokens / found['seconds'],
      'total_seconds': total,
    }

  def width(self, recipe: torch_peers.Recipe) -> int:
    """Most channels a pruned layer may keep within `budget.target`.

    Raises:
      errors.InputError: there are none, or the model has too few layers.
    """
    cfg = self.source.cfg
    pruned = cfg.N - recipe.first - recipe.last
    step = self.config.prune.multiple_of.ffn if recipe.rounded else 1
    excess = cfg.num_params() - self.plan.schedule.target
    gone = -(-excess // (3 * cfg.D * max(pruned, 1)))
    width = (cfg.F - gone) // step * step
    if pruned < 1 or width < 1:
      raise errors.InputError(
        f'budget.target {self.plan.schedule.target:,} is out of reach of '
        f'feed-forward channels in {max(pruned, 0)} of {cfg.N} layers; set '
        '--config.budget.target, or leave the arm out of --arms'
      )
    return width

  def _window(self) -> tuple[int, int]:
    """Steps between which our own run prunes."""
    per_step = self.plan.tokens_per_step
    schedule = self.plan.schedule
    return schedule.begin // per_step, -(-schedule.end // per_step)

  @functools.cached_property
  def task(self) -> torch_peers.Task:
    """Text, rates and weights, the same as `train.run` takes."""
    from effllm_jax import corpus
    from effllm_jax import inputs
    from effllm_jax import plan as plan_lib
    from effllm_jax import train

    config, plan, source = self.config, self.plan, self.source
    text = corpus.prepare(config.data.text, self.cache)
    batches = train.train_batches(config, text, source)
    windows = np.stack([next(batches) for _ in range(plan.steps)])
    batches.close()
    rate = plan_lib.learning_rate(config)
    evaluated = inputs.eval_text(config) or text
    heldout = train.heldout_text(config, evaluated, source)
    begin, end = self._window()
    return torch_peers.Task(
      folder=str(self.folder()),
      windows=windows.reshape(
        plan.steps, config.train.accumulate, config.data.batch_size, -1
      ),
      rates=[float(rate(i)) for i in range(plan.steps)],
      optimizer=config.optimizer.to_dict(),
      heldout=heldout,
      batch_size=config.data.batch_size,
      scoring=self.scoring,
      begin=begin,
      end=end,
    )

  def folder(self) -> pathlib.Path:
    """The source for transformers, written once."""
    from effllm_jax import atomic
    from effllm_jax import hf_export
    from effllm_jax import sources

    def write(new):
      model = sources.load(self.config.source, self.cache)
      hf_export.write(model, new, trimmed=False)

    folder = self.workdir / 'source'
    atomic.once(folder, write)
    return folder

  def _row(self, found: Mapping[str, Any]) -> dict[str, Any]:
    """What PyTorch found, in the words of our own runs."""
    from effllm_jax import evaluate

    phases = {
      phase: evaluate.summary(nats, self.task.heldout)
      for phase, nats in found['nats'].items()
    }
    return {
      **{k: v for k, v in found.items() if k != 'nats'},
      'bits_per_byte': {p: x['bits_per_byte'] for p, x in phases.items()},
      'domains': phases['final']['domains'],
    }


def _threads() -> int:
  """What an arm computes on."""
  return len(os.sched_getaffinity(0))


def _ours(config, changes, workdir, cache) -> dict[str, Any]:
  """Runs `train.run`, or goes on with it; its row."""
  from effllm_jax import runlog
  from effllm_jax import timing
  from effllm_jax import train
  from experiments import compiled

  config = ml_collections.ConfigDict(config)
  config.update_from_flattened_dict(changes)
  compiled.keep(cache)
  train.run(config, workdir, cache)
  log = runlog.read(workdir)
  phases = ('source', 'pruned', 'final')
  held = {phase: log.last_eval(phase) for phase in phases}
  final = log.evaluation('final')
  shrinks = sum(row['seconds'] for row in log.shrinks)
  return {
    'widths': log.widths(),
    'params': int(final['live_params']),
    'losses': log.train['loss'].tolist(),
    'seconds': log.step_seconds + shrinks,
    'peak_bytes': timing.memory('VmHWM'),
    'bits_per_byte': {p: x['bits_per_byte'] for p, x in held.items() if x},
    'domains': final['domains'],
  }
