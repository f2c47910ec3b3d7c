"""A config, checked, as the plan of a run: what is due at which step."""

import dataclasses
import math

import ml_collections
import numpy as np
import optax

from effllm_jax import budgets
from effllm_jax import config_checks
from effllm_jax import errors
from effllm_jax import model
from effllm_jax import optimizers
from effllm_jax import rules as rules_lib
from effllm_jax import schedules
from effllm_jax import selection
from effllm_jax import sharding
from effllm_jax import steps
from effllm_jax import structure


@dataclasses.dataclass(frozen=True)
class Plan:
  """When things happen. Steps count from 1; `step` has just been finished.

  Attributes:
    tokens_per_step: training tokens of one optimizer update.
    steps: length of the run.
    every: a prune after every so many steps ("N" in the paper's Figure 2).
    cost: the budget, which says what a size is.
    schedule: target size by tokens, in units of `cost`.
    rules: policy, floors, multiples, and what a price counts.
    quantum: widths are rounded up to multiples of these at a shrink.
    shrink_threshold: shrink once this share of the arrays' parameters is dead.
    eval_every, checkpoint_every: in steps.
    recipe: what a training step does.
    teacher: when it speaks, one of `config_checks.DISTILL_WHEN`, if `recipe`
      has one.
    damping: of the repair that follows a prune, 0 where it is chosen for each
      matrix; None: no repair.
    calibrate: whether trials scale the scores before a prune.
  """

  tokens_per_step: int
  steps: int
  every: int
  cost: budgets.Cost
  schedule: schedules.Schedule
  rules: rules_lib.Rules
  quantum: structure.Groups
  shrink_threshold: float
  eval_every: int
  checkpoint_every: int
  recipe: steps.Recipe
  teacher: str
  damping: float | None
  calibrate: bool

  def unpriced(self, stem: int) -> float:
    """Share of the target that is embedding, at so many stem channels.

    0 where the embedding counts in their price, or nothing is pruned. Near 1
    the embedding of so wide a stem is nearly the whole target. And so wide it
    stays: as the layers get narrower, a stem channel saves less of what is
    priced, so its price rises.
    """
    if self.rules.policy == 'none' or self.rules.price_embedding:
      return 0.0
    return stem * self.cost.form.unpriced_stem / self.schedule.target

  def trial_decay(self) -> float:
    """What a trial still counts at the next prune: it fades as scores do."""
    return self.recipe.decay**self.every

  def tokens(self, step: int) -> int:
    """Training tokens seen after `step`."""
    return step * self.tokens_per_step

  def scores(self, step: int) -> bool:
    """Whether this step's gradient still scores groups."""
    return self.schedule.at(self.tokens(step - 1)) > self.schedule.target

  def teaches(self, step: int) -> bool:
    """Whether the teacher speaks in this step."""
    if not self.recipe.distill:
      return False
    return self.teacher == 'always' or not self.scores(step)

  def prunes(self, step: int) -> bool:
    """Whether a prune follows this step: not where the size rests."""
    if not self.scores(step):
      return False
    since = self.tokens(step - self.every)
    falls = self.schedule.falls(since, self.tokens(step))
    return (step % self.every == 0 and falls) or self.last_prune(step)

  def phase(self, step: int) -> str:
    """What goes on in this step."""
    if self.rules.policy == 'none':
      return 'training'
    return 'pruning' if self.scores(step) else 'recovery'

  def last_prune(self, step: int) -> bool:
    """Whether this is the step after which the target is reached."""
    reached = self.schedule.at(self.tokens(step)) == self.schedule.target
    return self.scores(step) and reached

  def evaluates(self, step: int) -> bool:
    """Whether a held-out evaluation follows this step."""
    return (
      step % self.eval_every == 0 or self.last_prune(step) or step == self.steps
    )

  def checkpoints(self, step: int) -> bool:
    """Whether a rolling checkpoint follows this step."""
    return step % self.checkpoint_every == 0 or step == self.steps


def tokens_per_step(config: ml_collections.ConfigDict) -> int:
  """Training tokens of one optimizer update."""
  return config.train.accumulate * config.data.batch_size * config.data.seq_len


def num_steps(config: ml_collections.ConfigDict) -> int:
  """Optimizer updates of a run, the last one whole."""
  return math.ceil(config.train.tokens / tokens_per_step(config))


def learning_rate(config: ml_collections.ConfigDict) -> optax.Schedule:
  """Learning rate by number of finished updates."""
  per_step = tokens_per_step(config)
  return optimizers.learning_rate(
    config.optimizer.schedule,
    config.optimizer.peak,
    config.optimizer.end,
    config.optimizer.warmup_tokens // per_step,
    config.optimizer.decay_tokens // per_step,
    num_steps(config),
  )


def optimizer(
  config: ml_collections.ConfigDict,
) -> optax.GradientTransformationExtraArgs:
  """The optimizer of a run, at its `learning_rate`."""
  return optimizers.optimizer(
    learning_rate(config),
    config.optimizer.b1,
    config.optimizer.b2,
    config.optimizer.weight_decay,
    config.optimizer.clip,
    config.optimizer.embedding,
  )


def make(
  config: ml_collections.ConfigDict,
  source: structure.ModelConfig,
  masks: structure.Groups | None = None,
  mesh: sharding.Mesh | None = None,
) -> Plan:
  """Checks `config` against the source model and lays out the run.

  Args:
    config: as in `experiments/configs`.
    source: architecture of the source's arrays.
    masks: what is alive in a source that was pruned before; None: everything.
    mesh: devices of the run; None: one.

  Raises:
    errors.InputError: a value that cannot work, with the key to change.
  """
  config_checks.check(config, source)
  rules = rules_lib.Rules.of(
    config.prune.policy,
    config.prune.floors,
    config.prune.multiple_of,
    config.prune.price_embedding,
  )
  cost = budgets.make(
    source,
    config.budget.kind,
    format=config.budget.format,
    context=config.budget.context,
    table=config.budget.table,
  )
  start = cost.of_config(source) if masks is None else cost.live(masks)
  widths = {} if masks is None else selection.live_widths(masks)
  uneven = [t for t, w in widths.items() if np.ptp(w)]
  if uneven and rules.policy == 'uniform':
    raise errors.InputError(
      f"prune.policy 'uniform' cannot go on from a source whose layers differ "
      f'in width ({", ".join(uneven)}); set --config.prune.policy=ragged'
    )
  per_step = tokens_per_step(config)
  length = num_steps(config)
  if rules.policy == 'none':
    schedule = schedules.constant(start, after=length * per_step)
  else:
    schedule = _schedule(config.prune, start, cost.units(config.budget.target))
    target = schedule.target
    rules_lib.check_target(source, rules, cost, target, widths, start)
  if rules.policy == 'ragged':
    config_checks.check_blocks(rules, widths)
  _check_parts(config, mesh)
  made = Plan(
    tokens_per_step=per_step,
    steps=length,
    every=config.prune.every,
    cost=cost,
    schedule=schedule,
    rules=rules,
    quantum=structure.Groups(**config.shrink.quantum.to_dict()),
    shrink_threshold=config.shrink.threshold,
    eval_every=math.ceil(config.eval.every_tokens / per_step),
    checkpoint_every=config.checkpoint.every_steps,
    recipe=_recipe(config, source, mesh),
    teacher=config.distill.when,
    damping=config.repair.damping if config.repair.enabled else None,
    calibrate=config.prune.calibrate,
  )
  if config.distill.weight and not made.teaches(made.steps):
    raise errors.InputError(
      "distill.when 'recovery' leaves the teacher no step behind "
      f'prune.end_tokens {config.prune.end_tokens:,}; lower that, or set '
      '--config.distill.when=always'
    )
  return made


def _check_parts(config, mesh) -> None:
  parts = 1 if mesh is None else sharding.batch_parts(mesh)
  if config.data.batch_size % parts:
    raise errors.InputError(
      f'data.batch_size {config.data.batch_size} cannot be split into the '
      f'{parts} parts of mesh.data x mesh.fsdp; set --config.data.batch_size '
      'to a multiple, or --config.mesh.data'
    )


def _recipe(config, source, mesh) -> steps.Recipe:
  return steps.Recipe(
    compute=model.Compute(
      dtype=config.model.dtype,
      remat=config.model.remat,
      kernels=config_checks.implementation(config, source, mesh),
      mesh=mesh,
    ),
    saliency=config.prune.saliency,
    decay=config.prune.ema,
    b1=config.optimizer.b1,
    b2=config.optimizer.b2,
    clip=config.optimizer.clip,
    distill=config.distill.weight,
    temperature=config.distill.temperature,
    top_k=config.distill.top_k,
    # No other program shall depend on it.
    seed=config.seed if config.prune.saliency == 'random' else 0,
  )


def _schedule(prune, start, target) -> schedules.Schedule:
  return schedules.Schedule(
    begin=prune.begin_tokens,
    end=prune.end_tokens,
    start=start,
    target=target,
    kind=prune.schedule,
    stages=prune.stages,
    rest=prune.rest,
  )
