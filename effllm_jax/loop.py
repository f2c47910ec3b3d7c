"""The host loop: train, prune, shrink, evaluate, record, and resume."""

from collections.abc import Callable
import contextlib
import pathlib
import time
from typing import Any

import jax
import ml_collections
import numpy as np

from effllm_jax import accounting
from effllm_jax import advice
from effllm_jax import calibration
from effllm_jax import checkpoint_writer
from effllm_jax import console
from effllm_jax import data
from effllm_jax import environment
from effllm_jax import errors
from effllm_jax import evaluate
from effllm_jax import events
from effllm_jax import heldout as heldout_lib
from effllm_jax import interrupts
from effllm_jax import plan as plan_lib
from effllm_jax import profiling
from effllm_jax import pruning
from effllm_jax import repair
from effllm_jax import resume
from effllm_jax import selection
from effllm_jax import sharding
from effllm_jax import sources
from effllm_jax import state as state_lib
from effllm_jax import steps
from effllm_jax import structure
from effllm_jax import teacher as teacher_lib
from effllm_jax import workdir as workdir_lib


class Loop:
  """One run: the state on the devices and, in the first process, its files."""

  def __init__(
    self,
    config: ml_collections.ConfigDict,
    workdir: pathlib.Path,
    plan: plan_lib.Plan,
    source: sources.Source,
    initial: Callable[[], structure.Params],
    teacher: teacher_lib.Teacher | None,
    batches: data.TrainIterator,
    heldout: dict[str, heldout_lib.HeldOut],
  ):
    """Restores the newest checkpoint of `workdir`, or takes `initial()`.

    Args:
      config: as in `experiments/configs`, checked by `plan.make`.
      workdir: of the run, which this process holds (`workdir.claimed`).
      plan: of `config`.
      source: what is pruned, without its parameters.
      initial: loads these, float32 on the host; not called after a restore.
      teacher: None: there is none.
      batches: int32 [accumulate * rows, seq_len + 1] each; moved to where the
        checkpoint was saved.
      heldout: by domain.

    Raises:
      errors.InputError: as `resume.restore_latest`, or a log is damaged.
    """
    self.config, self.workdir, self.plan = config, workdir, plan
    self.mesh = plan.recipe.compute.mesh
    self.teacher = teacher
    widths = (
      selection.live_widths(source.masks)
      if source.masks
      else source.cfg.widths()
    )
    self.source_widths = {t: float(np.mean(w)) for t, w in widths.items()}
    self.batches, self.heldout = batches, heldout
    self.tx = plan_lib.optimizer(config)
    # For the rows of the log: one program, which a shrink's `clear_caches` does
    # not reach. Without, it is seven, compiled again after every shrink.
    rate = plan_lib.learning_rate(config)
    self.rate = jax.jit(rate).lower(np.int32(0)).compile()
    restored = resume.restore_latest(workdir, self.tx, batches, self.mesh)
    if restored:
      self.state, moment = restored
      self.cfg, self.num_events = moment.cfg, moment.num_events
    else:
      self.cfg, self.num_events = source.cfg, 0
      self.state = state_lib.placed_state(
        initial(), self.cfg, self.tx, self.mesh, source.masks
      )
    self.first_step = int(self.state.step)
    # -1: the logs begin anew.
    resumed_at = self.first_step if restored else -1
    # The other processes have the same numbers, and write none of them.
    log = workdir_lib.Log if jax.process_index() == 0 else workdir_lib.NoLog
    self.metrics = log(workdir / 'metrics.jsonl', resumed_at)
    self.trace = log(workdir / 'trace.jsonl', resumed_at)
    self.writer = checkpoint_writer.Writer(workdir, config.checkpoint.keep)
    self.meter = accounting.Meter(
      config.data.seq_len,
      plan.tokens_per_step,
      plan.recipe.compute.remat,
      moment.flops if restored else None,
    )
    trials = moment.trials if restored else None
    self.calibration = calibration.Calibration(plan.trial_decay(), trials)
    # The bar and the signals: both are there only while `train` runs.
    self.progress = self.requests = None
    # Programs for the present architecture, see `_compile`: `train_step`, by
    # whether it scores; `repair_step`.
    self.compiled_steps, self.compiled_repair = {}, None
    # Since the last row of the log, which not every step has.
    self.compile_seconds = self.busy_seconds = 0.0
    self.unlogged = 0
    self.damage = advice.Damage()
    self.extents = self._extents()

  def train(self, profiled: range = range(0)) -> None:
    """Runs every step that is left, then waits for the last checkpoint.

    Raises:
      errors.InputError: too many steps in a row were skipped.
      interrupts.Stopped: a signal asked for it; also after the last step, as
        more may come after this run.
    """
    plan, first = self.plan, self.first_step
    quiet = jax.process_index() > 0
    with console.Progress(plan.steps, first, quiet) as progress:
      self.progress = progress
      if first:
        progress.say(f'resuming {self.workdir} after step {first}')
      if first < plan.steps:
        self._record_start()
      if not first:
        progress.say(
          f'kernels: {plan.recipe.compute.kernels} on {jax.default_backend()}'
        )
        self._advise()
        self._evaluate(0, 'source')
      with contextlib.ExitStack() as stack:
        # After an error too: what is half written gets finished.
        for resource in (self.batches, self.writer, self.trace, self.metrics):
          stack.callback(resource.close)
        profile = stack.enter_context(
          profiling.Profile(self.workdir / 'profile', profiled, progress.say)
        )
        self.requests = stack.enter_context(interrupts.requests())
        for step in range(first + 1, plan.steps + 1):
          with profile.step(step, lambda: self.state):
            self._one_step(step)
      if self.requests.signum is not None:
        raise interrupts.Stopped(self.requests.signum, plan.steps)

  def _record_start(self) -> None:
    """Keeps where the steps from here on are computed; says what is new."""
    if jax.process_index() > 0:
      return
    row = environment.here(self.mesh, self.first_step)
    if changed := environment.record(self.workdir, row):
      self.progress.say(
        f'it goes on otherwise than before: {changed}; from step '
        f'{self.first_step + 1} on, digits may differ from those of a run in '
        'one go'
      )

  def _advise(self) -> None:
    """Tells the user what in the settings of this run deserves a look."""
    config, plan = self.config, self.plan
    self._say(advice.devices(self.cfg, self.mesh))
    self._say(advice.price(plan, self.cfg))
    tokens = plan.steps * plan.tokens_per_step
    self._say(advice.epochs(tokens, self.batches.new_tokens))
    self._say(advice.unread(self.batches.unread, config.data.seq_len))
    before = sources.trained_by(config.source)
    self._say(advice.same_order(config, before))

  def _one_step(self, step: int) -> None:
    """Everything that is due at a step, in this order."""
    plan = self.plan
    log = step % self.config.train.log_every == 0 or step == plan.steps
    start = time.perf_counter()
    windows = next(self.batches)
    waited = time.perf_counter() - start
    windows_ABT = sharding.put_batch(
      windows, self.config.train.accumulate, self.mesh
    )
    self.compile_seconds += self._compile(windows_ABT, step)
    start = time.perf_counter()
    numbers = self._update(step, windows_ABT)
    if plan.prunes(step):
      self._check_scored(step, numbers)
      self._prune(step, windows_ABT)
    if (
      log or plan.prunes(step) or plan.evaluates(step) or plan.checkpoints(step)
    ):
      # Steps run in the background; so far only asking for them was timed. What
      # follows must not be charged with them.
      jax.block_until_ready(self.state.params)
    self.busy_seconds += time.perf_counter() - start
    self.unlogged += 1
    # With the sizes from before the shrink.
    row = self._row(step, numbers, waited) if log else None
    event = self._shrink(step, windows_ABT)
    if row:
      self._log(row, numbers)
    if plan.evaluates(step):
      self._evaluate(step, self._phase(step))
    stop = self._why_stop(step, log, numbers)
    # Last of all, so that a resume from here has lost nothing of this step.
    if event or plan.checkpoints(step) or stop:
      self._save(step, event)
    if stop:
      raise stop

  def _update(self, step: int, windows_ABT) -> dict[str, jax.Array]:
    """One optimizer update; the numbers of `steps.train_step`."""
    teacher = self.teacher if self.plan.teaches(step) else None
    answers = teacher(windows_ABT) if teacher else None
    scores = self.plan.scores(step)
    self.state, numbers = self.compiled_steps[scores](
      self.state, windows_ABT, answers
    )
    self.meter.step(self.cfg, scores, teacher and teacher.cfg, self.extents)
    return numbers

  def _log(self, row: dict[str, Any], numbers) -> None:
    """Writes and shows the row of a step, and begins to count for the next."""
    if int(self.state.in_a_row):
      self.progress.say(f'step {row["step"]} is skipped: {_told(numbers)}')
    self.compile_seconds = self.busy_seconds = 0.0
    self.unlogged = 0
    self.metrics.write(row)
    self.progress.step(row)
    self._say(self.damage.add(row))

  def _row(self, step: int, numbers, waited: float) -> dict[str, Any]:
    """The row of a step in the log; `waited`: seconds for its batch."""
    seconds = self.busy_seconds / self.unlogged
    return {
      'kind': 'train',
      'step': step,
      'tokens': self.plan.tokens(step),
      **{
        name: pruning.finite(float(number)) for name, number in numbers.items()
      },
      'skipped': int(self.state.skipped),
      # Of the last update.
      'learning_rate': float(
        self.rate(np.int32(step - 1 - int(self.state.skipped)))
      ),
      # Of a step, the mean since the last row. Includes the prune; not the
      # compilation, the input or the shrink.
      'seconds': seconds,
      'compile_seconds': self.compile_seconds,
      'data_seconds': waited,
      **pruning.sizes(
        self.state.prune, self.cfg, self.plan, step, self.source_widths
      ),
      'price': self._price(step),
      'flops': dict(self.meter.spent),
      'tokens_per_second': self.plan.tokens_per_step / seconds,
    }

  def _save(self, step: int, event: events.ShrinkEvent | None) -> None:
    """Saves the state as that of an event, or else as a rolling checkpoint."""
    start = time.perf_counter()
    # No moment may be newer than its rows.
    self.metrics.sync()
    self.trace.sync()
    spent, trials = self.meter.spent, self.calibration.record
    if event:
      self.writer.save_event(event, self.state, self.batches, spent, trials)
    else:
      self.writer.save(
        self.state, self.cfg, self.batches, self.num_events, spent, trials
      )
    self.metrics.write(
      {
        'kind': 'save',
        'step': step,
        'tokens': self.plan.tokens(step),
        # How long the run waited; the rest is written while it goes on.
        'seconds': time.perf_counter() - start,
      }
    )

  def _why_stop(self, step: int, look: bool, numbers) -> Exception | None:
    """What ends the run early, after this step; None: it goes on.

    All processes of a run have to give the same answer. Where `look` is False
    nothing is read from the device.
    """
    skipped = int(self.state.in_a_row) if look else 0
    if skipped >= self.config.train.max_skipped:
      # After a resume the next batches get as many tries again.
      again = jax.device_put(np.int32(0), sharding.replicated(self.mesh))
      self.state = self.state.replace(in_a_row=again)
      return errors.InputError(
        f'{skipped} steps in a row were skipped, step {step} because of '
        f'{_told(numbers)}; the state before them is saved: run the same '
        'command again to go on with the batches after them, or lower '
        '--config.optimizer.peak and start in a new --workdir'
      )
    signum = self.requests.asked(step)
    if signum is not None and step < self.plan.steps:
      return interrupts.Stopped(signum, step)
    return None

  def _compile(self, windows_ABT, step: int) -> float:
    """Compiles the step once per architecture; returns the seconds it took."""
    score = self.plan.scores(step)
    if score in self.compiled_steps:
      return 0.0
    self.progress.phase('compiling')
    start = time.perf_counter()
    self.compiled_steps[score] = steps.train_step.lower(
      self.state,
      windows_ABT,
      self.teacher.compile(windows_ABT) if self.plan.teaches(step) else None,
      cfg=self.cfg,
      tx=self.tx,
      recipe=self.plan.recipe,
      score=score,
    ).compile()
    if score and self.plan.damping is not None:
      self.compiled_repair = steps.repair_step.lower(
        self.state.params,
        self.state.prune.masks,
        self.state.prune.masks,
        self._repaired_on(),
        cfg=self.cfg,
        damping=self.plan.damping,
        mesh=self.mesh,
      ).compile()
    if score:
      # The first calls compile; the times of steps shall not include that.
      start_size = self.plan.schedule.start
      pruning.select(self.state.prune, self.plan, start_size)
      if self.plan.calibrate:
        self.calibration.scaled(self.state.prune)
        self._trials(windows_ABT, start_size)
      pruning.prices(self.state.prune, self.plan)
    self.progress.phase(self.plan.phase(step))
    return time.perf_counter() - start

  def _check_scored(self, step: int, numbers) -> None:
    if not int(self.state.prune.count):
      raise errors.InputError(
        f'step {step} cannot prune: every step up to it was skipped, the last '
        f'because of {_told(numbers)}; check --config.source and '
        '--config.data.text, or start in a new --workdir with another '
        '--config.model.dtype'
      )

  def _prune(self, step: int, windows_ABT) -> None:
    """Flips mask bits until the schedule's size is reached; logs what went."""
    prune, plan = self.state.prune, self.plan
    target = plan.schedule.at(plan.tokens(step))
    measured = {}
    if plan.calibrate:
      trials = self._trials(self._sound(windows_ABT), target)
      self.calibration.add(trials)
      prune = self.calibration.scaled(prune)
      self.meter.calibrate(self.cfg, self.extents)
      measured = {'trials': trials}
    masks = jax.device_put(
      pruning.select(prune, plan, target), sharding.replicated(self.mesh)
    )
    repaired, removed = {}, pruning.removed(prune, masks)
    # One block may save what several prunes ask for: later ones take nothing.
    if plan.damping is not None and any(removed.values()):
      fits = self._repair(step, masks)
      repaired = {'repair': jax.tree.map(pruning.finite, fits)}
    self.trace.write(
      {
        'step': step,
        'tokens': plan.tokens(step),
        'target_cost': plan.cost.reported(target),
        'live_cost': plan.cost.reported(plan.cost.live(masks)),
        'live_params': selection.live_params(masks, self.cfg),
        'removed': removed,
        'price': pruning.prices(prune, plan, self.calibration.broken),
        **measured,
        **repaired,
      }
    )
    self.state = self.state.replace(prune=self.state.prune.replace(masks=masks))
    self.extents = self._extents()

  def _repair(self, step: int, masks: structure.Groups) -> dict[str, dict]:
    """Refits what will survive as `masks`; the fits of `steps.repair_step`."""
    params, fits = self.compiled_repair(
      self.state.params, self.state.prune.masks, masks, self._repaired_on()
    )
    self.state = self.state.replace(params=params)
    fits = jax.tree.map(lambda x: x.tolist(), fits)
    damping = self.plan.damping
    self.meter.repair(
      self.cfg,
      {n: sum(x > 0 for x in fit['damping']) for n, fit in fits.items()},
      self.config.repair.batches,
      0 if damping else len(repair.CANDIDATES),
    )
    self._say(advice.damping(step, fits, damping or max(repair.CANDIDATES)))
    return fits

  def _price(self, step: int) -> dict[str, float | None] | None:
    """Prices as a prune would compare them; None where nothing is scored."""
    prune, plan = self.state.prune, self.plan
    if not plan.scores(step) or (
      plan.calibrate and not self.calibration.measured
    ):
      return None
    if plan.calibrate:
      prune = self.calibration.scaled(prune)
    return pruning.prices(prune, plan, self.calibration.broken)

  def _trials(self, windows_ABT, target: int) -> dict[str, dict]:
    """What groups of one type alone would cost, if they made up a prune."""
    return calibration.trials(
      self.state.params,
      self.state.prune,
      windows_ABT,
      self.cfg,
      self.plan,
      target,
    )

  def _sound(self, windows_ABT) -> jax.Array:
    """The batch, or held-out windows in place of one that was skipped.

    The loss of a skipped one need not be finite.
    """
    if not int(self.state.in_a_row):
      return windows_ABT
    held = next(iter(self.heldout.values()))
    rows = np.resize(held.windows, windows_ABT.shape)
    return sharding.put(rows, sharding.batches(self.mesh))

  def _repaired_on(self) -> jax.Array:
    """The micro-batches of the newest batches, [A, B, T + 1]."""
    count = self.config.repair.batches * self.config.train.accumulate
    # What decides on a damping must not be what is fitted.
    apart = 0 if self.plan.damping else repair.deciding(count) / count
    rows = self.batches.recent(apart)
    return sharding.put_batch(rows, count, self.mesh)

  def _say(self, lines: list[str]) -> None:
    for line in lines:
      self.progress.say(line)

  def _extents(self) -> dict[str, np.ndarray] | None:
    """Where the kernels of a training step stop; None: they do not."""
    if self.plan.recipe.compute.kernels == 'xla':
      return None
    return selection.extents(self.state.prune.masks)

  def _shrink(self, step: int, windows_ABT) -> events.ShrinkEvent | None:
    """Makes the arrays smaller, where the plan wants that after this step."""
    old, masks = self.cfg, self.state.prune.masks
    new = pruning.shrunk(masks, old, self.plan, step)
    if new is None:
      return None
    start = time.perf_counter()
    self.progress.phase('shrinking')
    self.state, event = pruning.shrink(
      self.state,
      self._sound(windows_ABT)[0],
      old,
      new,
      self.plan,
      self.tx,
      self.num_events,
    )
    if new != old:
      self.cfg, self.compiled_steps = new, {}
      self._say(advice.devices(new, self.mesh))
    self.num_events += 1
    self.extents = self._extents()
    seconds = time.perf_counter() - start
    row = _shrink_row(event, selection.live_params(masks, old), seconds)
    self.metrics.write(row)
    self.progress.say(_shrink_line(row))
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
    self.progress.phase(self.plan.phase(step))

  def _phase(self, step: int) -> str:
    if step == self.plan.steps:
      return 'final'
    if self.plan.last_prune(step):
      return 'pruned'
    return self.plan.phase(step)


def _shrink_row(
  event: events.ShrinkEvent, live_params: int, seconds: float
) -> dict[str, Any]:
  """The row of a shrink in the log."""
  live = {t: np.atleast_1d(getattr(event.live, t)) for t in structure.TYPES}
  return {
    'kind': 'shrink',
    'event': event.index,
    'step': event.step,
    'tokens': event.tokens,
    'widths_before': event.before.widths(),
    'widths_after': event.after.widths(),
    # Of the narrowest and of the widest layer.
    'widths_live': {t: [int(w.min()), int(w.max())] for t, w in live.items()},
    'live_params': live_params,
    'params_before': event.before.num_params(),
    'params_after': event.after.num_params(),
    'loss_before': event.loss_before,
    'loss_after': event.loss_after,
    'seconds': seconds,
  }


def _shrink_line(row: dict[str, Any]) -> str:
  """What the user is told of a `_shrink_row`."""
  spans = {
    t: ' to '.join(dict.fromkeys(map(str, ends)))
    for t, ends in row['widths_live'].items()
  }
  widths = ', '.join(
    f'{t} {before} -> {spans[t]}' for t, before in row['widths_before'].items()
  )
  return (
    f'shrink {row["event"]} at step {row["step"]}: arrays '
    f'{row["params_before"]:,} -> {row["params_after"]:,} parameters, '
    f'{row["live_params"]:,} alive: {widths}'
  )


def _told(numbers) -> str:
  return f'loss {numbers["loss"]} and gradient norm {numbers["grad_norm"]}'
