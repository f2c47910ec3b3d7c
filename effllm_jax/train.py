"""The host loop: train, prune, shrink, evaluate, record, and resume."""

from collections.abc import Callable
from collections.abc import Iterator
import contextlib
import dataclasses
import math
import os
import pathlib
import time
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from effllm_jax import accounting
from effllm_jax import checkpoints
from effllm_jax import console
from effllm_jax import corpus
from effllm_jax import data
from effllm_jax import errors
from effllm_jax import evaluate
from effllm_jax import events
from effllm_jax import plan as plan_lib
from effllm_jax import selection
from effllm_jax import shrink
from effllm_jax import sources
from effllm_jax import state as state_lib
from effllm_jax import steps
from effllm_jax import structure
from effllm_jax import teacher as teacher_lib
from effllm_jax import workdir as workdir_lib

# A shrink changes no number that matters: float32 sums in another order.
SHRINK_TOLERANCE = 1e-4


def run(
  config: ml_collections.ConfigDict,
  workdir: str | os.PathLike,
  cache: str | os.PathLike,
) -> None:
  """Trains and prunes until the config's end; resumes what is there.

  Args:
    config: as in `experiments/configs`.
    workdir: everything that the run writes; the same config resumes it.
    cache: downloaded sources and texts, shared by all runs.

  Raises:
    errors.InputError: something that the user can put right.
  """
  workdir = pathlib.Path(workdir)
  # Everything that can be refused is checked before anything is written.
  workdir_lib.check(workdir, config.to_dict())
  source = sources.load(config.source, cache, params=False)
  plan = plan_lib.make(config, source.cfg, source.masks)
  text = corpus.prepare(config.data.text, cache)
  batches = data.train_iterator(
    text,
    source.tokenizer,
    source.separator_id,
    seq_len=config.data.seq_len,
    batch_size=config.train.accumulate * config.data.batch_size,
    seed=config.seed,
    weights=config.data.weights.to_dict(),
    workers=config.data.workers,
    process_index=jax.process_index(),
    process_count=jax.process_count(),
  )
  heldout = data.heldout(
    text,
    source.tokenizer,
    source.separator_id,
    seq_len=config.data.seq_len,
    tokens_per_domain=config.eval.tokens_per_domain,
  )
  teacher = None
  if plan.recipe.distill:
    teacher = sources.load(config.distill.teacher or config.source, cache)
    teacher_lib.check(teacher, source)
    teacher = teacher_lib.Teacher(teacher, plan.recipe)
  workdir_lib.claim(workdir, config.to_dict())
  # Read once and not held on to: the state has its own copy.
  initial = lambda: sources.load(config.source, cache).params
  try:
    if not checkpoints.moments(workdir):
      sources.save_tokenizer(source, workdir / 'source')
    Run(
      config, workdir, plan, source, initial, teacher, batches, heldout
    ).train()
  except OSError as e:
    raise checkpoints.write_error(e) from e


class Run:
  """One run in one process: the state on the device and its files."""

  def __init__(
    self,
    config: ml_collections.ConfigDict,
    workdir: pathlib.Path,
    plan: plan_lib.Plan,
    source: sources.Source,
    initial: Callable[[], structure.Params],
    teacher: teacher_lib.Teacher | None,
    batches: Iterator[np.ndarray],
    heldout: dict[str, data.HeldOut],
  ):
    """Restores the newest checkpoint of `workdir`, or takes `initial()`.

    `source` is without its parameters, which `initial` loads.
    """
    self.config, self.workdir, self.plan = config, workdir, plan
    self.teacher = teacher
    self.source_widths = {
      t: float(w.mean())
      for t, w in selection.live_widths(
        source.masks or structure.all_alive(source.cfg)
      ).items()
    }
    self.batches, self.heldout = batches, heldout
    self.rate = steps.learning_rate(
      config.optimizer.schedule,
      config.optimizer.peak,
      config.optimizer.end,
      config.optimizer.warmup_tokens // plan.tokens_per_step,
      config.optimizer.decay_tokens // plan.tokens_per_step,
      plan.steps,
    )
    self.tx = steps.optimizer(
      self.rate,
      config.optimizer.b1,
      config.optimizer.b2,
      config.optimizer.weight_decay,
      config.optimizer.clip,
    )
    restored = checkpoints.restore_latest(workdir, self.tx, batches)
    if restored:
      self.state, moment = restored
      self.cfg, self.num_events = moment.cfg, moment.num_events
    else:
      self.cfg, self.num_events = source.cfg, 0
      params = jax.tree.map(jnp.asarray, initial())
      self.state = state_lib.fresh_state(
        params, self.cfg, self.tx, source.masks
      )
    self.first_step = int(self.state.step)
    resume = self.first_step if restored else -1
    self.metrics = workdir_lib.Log(workdir / 'metrics.jsonl', resume)
    self.trace = workdir_lib.Log(workdir / 'trace.jsonl', resume)
    self.writer = checkpoints.Writer(workdir, config.checkpoint.keep)
    self.meter = accounting.Meter(
      config.data.seq_len,
      plan.tokens_per_step,
      plan.recipe.compute.remat,
      moment.flops if restored else None,
    )
    self.compiled = {}

  def train(self) -> None:
    """Runs every step that is left, then waits for the last checkpoint."""
    plan, first = self.plan, self.first_step
    with console.Progress(plan.steps, first) as progress:
      self.progress = progress
      if first:
        progress.say(f'resuming {self.workdir} after step {first}')
      else:
        self._evaluate(0, 'source')
      with contextlib.ExitStack() as stack:
        # Also on the way out of an error: what was started gets finished.
        for resource in (self.batches, self.writer, self.trace, self.metrics):
          stack.callback(resource.close)
        for step in range(first + 1, plan.steps + 1):
          self._one_step(step)

  def _one_step(self, step: int) -> None:
    plan = self.plan
    start = time.perf_counter()
    windows = next(self.batches)
    waited = time.perf_counter() - start
    windows_ABT = jnp.asarray(windows).reshape(
      self.config.train.accumulate, -1, windows.shape[-1]
    )
    compile_seconds = self._compile(windows_ABT, plan.scores(step))
    start = time.perf_counter()
    answers = self.teacher(windows_ABT) if self.teacher else None
    self.state, numbers = self.compiled[plan.scores(step)](
      self.state, windows_ABT, answers
    )
    self.meter.step(
      self.cfg, plan.scores(step), self.teacher and self.teacher.cfg
    )
    log = step % self.config.train.log_every == 0 or step == plan.steps
    # Before anything is kept of this step: every checkpoint is a good one.
    if log or plan.prunes(step) or plan.checkpoints(step):
      self._check_finite(step, numbers)
    if plan.prunes(step):
      self._prune(step, windows_ABT)
    seconds = time.perf_counter() - start
    row = (
      {
        'kind': 'train',
        'step': step,
        'tokens': plan.tokens(step),
        **{name: float(number) for name, number in numbers.items()},
        'learning_rate': float(self.rate(step - 1)),
        # Includes the prune; not the compilation, the input or the shrink.
        'seconds': seconds,
        'compile_seconds': compile_seconds,
        'data_seconds': waited,
        **self._sizes(step),
      }
      if log
      else None
    )
    event = self._shrink(step, windows_ABT[0]) if self._shrinks(step) else None
    if row:
      row['tokens_per_second'] = plan.tokens_per_step / seconds
      self.metrics.write(row)
      self.progress.step(row)
    if plan.evaluates(step):
      self._evaluate(step, self._phase(step))
    # Last of all, so that a resume from here has lost nothing of this step.
    if event:
      self.writer.save_event(event, self.state, self.batches, self.meter.spent)
    elif plan.checkpoints(step):
      self.writer.save(
        self.state,
        self.cfg,
        self.batches,
        self.num_events,
        self.meter.spent,
      )

  def _compile(self, windows_ABT, score: bool) -> float:
    """Compiles the step once per architecture; returns the seconds it took."""
    if score in self.compiled:
      return 0.0
    self.progress.phase('compiling')
    start = time.perf_counter()
    self.compiled[score] = steps.train_step.lower(
      self.state,
      windows_ABT,
      self.teacher.compile(windows_ABT) if self.teacher else None,
      cfg=self.cfg,
      tx=self.tx,
      recipe=self.plan.recipe,
      score=score,
    ).compile()
    if score and self.plan.damping is not None:
      self.repair = steps.repair_step.lower(
        self.state.params,
        self.state.prune.masks,
        self.state.prune.masks,
        _flat(windows_ABT),
        cfg=self.cfg,
        damping=self.plan.damping,
      ).compile()
    # The first calls compile; the times of steps shall not include that.
    self._select(self.plan.schedule.start)
    self._prices()
    self.progress.phase('pruning' if score else 'recovery')
    return time.perf_counter() - start

  def _check_finite(self, step: int, numbers) -> None:
    if not math.isfinite(float(numbers['loss'] + numbers['grad_norm'])):
      raise errors.InputError(
        f'loss {float(numbers["loss"])} or gradient norm '
        f'{float(numbers["grad_norm"])} at step {step} is not finite; the '
        'last checkpoint is intact: lower --config.optimizer.peak and start '
        'in a new --workdir'
      )

  def _prune(self, step: int, windows_ABT) -> None:
    """Flips mask bits until the schedule's size is reached; logs what went."""
    prune, plan = self.state.prune, self.plan
    target = plan.schedule.at(plan.tokens(step))
    masks = self._select(target)
    repaired = {}
    if plan.damping is not None:
      params, fits = self.repair(
        self.state.params, prune.masks, masks, _flat(windows_ABT)
      )
      self.state = self.state.replace(params=params)
      fits = jax.tree.map(float, fits)
      self.meter.repair(
        self.cfg, [name for name, fit in fits.items() if fit['damping'] > 0]
      )
      self._say_damping(step, fits)
      repaired = {'repair': jax.tree.map(_finite, fits)}
    self.trace.write(
      {
        'step': step,
        'tokens': plan.tokens(step),
        'target_cost': plan.cost.reported(target),
        'live_cost': plan.cost.reported(plan.cost.live(masks)),
        'live_params': selection.live_params(masks, self.cfg),
        'removed': _named(prune.masks, masks, prune.origin),
        'price': self._prices(),
        **repaired,
      }
    )
    self.state = self.state.replace(prune=prune.replace(masks=masks))

  def _say_damping(self, step: int, fits: dict[str, dict[str, float]]) -> None:
    """Tells of every matrix that did not take the damping it was given."""
    for name, fit in fits.items():
      # Tenfold at a time; float32 on the way back is not equal to the bit.
      if fit['damping'] > 2 * self.plan.damping:
        how = (
          f'needed damping {fit["damping"]:g}'
          if math.isfinite(fit['damping'])
          else 'found no damping that works and left some layers as they were'
        )
        self.progress.say(f'repair after step {step}: {name} {how}')

  def _select(self, target: int) -> structure.Groups:
    prune = self.state.prune
    return selection.select(
      prune.scores,
      prune.masks,
      target,
      self.plan.schedule.target,
      self.plan.rules,
      self.plan.cost,
    )

  def _prices(self) -> dict[str, float | None]:
    prune = self.state.prune
    prices = selection.mean_prices(
      prune.scores, prune.masks, self.plan.rules, self.plan.cost
    )
    # Infinite where a removal saves nothing.
    return {t: _finite(float(getattr(prices, t))) for t in structure.TYPES}

  def _shrinks(self, step: int) -> bool:
    """Whether that saves enough, or the target has been reached."""
    if not self.plan.prunes(step):
      return False
    small = self._shrunk(step)
    saved = 1 - small.num_params() / self.cfg.num_params()
    return saved > 0 and (
      saved >= self.plan.shrink_threshold or self.plan.last_prune(step)
    )

  def _shrunk(self, step: int) -> structure.ModelConfig:
    """What the arrays would be after a shrink: as wide as the widest layer."""
    # In the end every width is real; until then tiles may want multiples.
    exact = structure.Groups(heads=1, ffn=1, stem=1)
    quantum = exact if self.plan.last_prune(step) else self.plan.quantum
    return shrink.shrunk_config(self.state.prune.masks, self.cfg, quantum)

  def _shrink(self, step: int, windows_BT) -> events.ShrinkEvent:
    """Makes the arrays smaller; stops the run if that changed the loss."""
    start = time.perf_counter()
    self.progress.phase('shrinking')
    old, masks = self.cfg, self.state.prune.masks
    new = self._shrunk(step)
    compute = dataclasses.replace(self.plan.recipe.compute, dtype='float32')
    loss_before = float(
      steps.batch_loss(
        self.state.params, masks, windows_BT, cfg=old, compute=compute
      )
    )
    self.state, kept = steps.shrink_step(
      self.state, cfg=old, new_cfg=new, tx=self.tx
    )
    loss_after = float(
      steps.batch_loss(
        self.state.params,
        self.state.prune.masks,
        windows_BT,
        cfg=new,
        compute=compute,
      )
    )
    if not abs(loss_after - loss_before) <= SHRINK_TOLERANCE * loss_before:
      raise RuntimeError(
        f'shrink {self.num_events} changed the loss on one batch from '
        f'{loss_before} to {loss_after} nats per token; nothing of it was '
        'saved, the last checkpoint is intact; please report this'
      )
    event = events.ShrinkEvent(
      index=self.num_events,
      step=step,
      tokens=self.plan.tokens(step),
      before=old,
      after=new,
      kept=jax.tree.map(lambda x: np.asarray(x).tolist(), kept),
      loss_before=loss_before,
      loss_after=loss_after,
    )
    self.cfg, self.num_events, self.compiled = new, self.num_events + 1, {}
    seconds = time.perf_counter() - start
    self.metrics.write(
      {
        'kind': 'shrink',
        'event': event.index,
        'step': step,
        'tokens': event.tokens,
        'widths_before': old.widths(),
        'widths_after': new.widths(),
        'params_before': old.num_params(),
        'params_after': new.num_params(),
        'loss_before': loss_before,
        'loss_after': loss_after,
        'seconds': seconds,
      }
    )
    self.progress.say(
      f'shrink {event.index} at step {step}: {old.num_params():,} -> '
      f'{new.num_params():,} parameters, heads {old.K} -> {new.K}, '
      f'ffn {old.F} -> {new.F}, stem {old.D} -> {new.D}'
    )
    return event

  def _evaluate(self, step: int, phase: str) -> None:
    self.progress.phase('evaluating')
    result = evaluate.bits_per_byte(
      self.state.params,
      self.state.prune.masks,
      self.heldout,
      self.cfg,
      self.plan.recipe.compute,
      self.config.data.batch_size,
    )
    self.metrics.write(
      {
        'kind': 'eval',
        'step': step,
        'tokens': self.plan.tokens(step),
        'phase': phase,
        'live_params': selection.live_params(self.state.prune.masks, self.cfg),
        **result,
      }
    )
    self.progress.say(
      f'held out, {phase}: {result["bits_per_byte"]:.4f} bits per byte'
    )
    self.progress.phase('pruning' if self.plan.scores(step) else 'recovery')

  def _phase(self, step: int) -> str:
    if step == self.plan.steps:
      return 'final'
    if self.plan.last_prune(step):
      return 'pruned'
    return 'pruning' if self.plan.scores(step) else 'recovery'

  def _sizes(self, step: int) -> dict[str, Any]:
    """Live size, widths, prices and pruned shares, for the metrics."""
    prune, plan = self.state.prune, self.plan
    live = selection.live_widths(prune.masks)
    tokens = plan.tokens(step)
    source = self.source_widths
    return {
      'live_params': selection.live_params(prune.masks, self.cfg),
      'array_params': self.cfg.num_params(),
      'live_cost': plan.cost.reported(plan.cost.live(prune.masks)),
      'target_cost': (
        plan.cost.reported(plan.schedule.at(tokens))
        if tokens > plan.schedule.begin
        else None
      ),
      'widths': {t: float(w.mean()) for t, w in live.items()},
      'pruned': {t: 1 - float(w.mean()) / source[t] for t, w in live.items()},
      'price': self._prices() if plan.scores(step) else None,
      'flops': dict(self.meter.spent),
    }


def _finite(x: float) -> float | None:
  """JSON has no infinity."""
  return x if math.isfinite(x) else None


def _flat(windows_ABT):
  """All micro-batches as one batch."""
  return windows_ABT.reshape(-1, windows_ABT.shape[-1])


def _named(before, after, origin) -> dict[str, list]:
  """What a prune removed, by index in the source model.

  heads and ffn as [layer, index], stem as index.
  """
  removed = {}
  for name in structure.TYPES:
    gone = np.asarray(getattr(before, name)) & ~np.asarray(getattr(after, name))
    index = np.asarray(getattr(origin, name))[gone].tolist()
    if gone.ndim == 2:
      index = [
        list(pair)
        for pair in zip(*(np.nonzero(gone)[0].tolist(), index), strict=True)
      ]
    removed[name] = index
  return removed
