"""A config, checked, as the plan of a run: what is due at which step."""

import dataclasses
import math
import threading

import ml_collections
import numpy as np
import optax

from effllm_jax import budgets
from effllm_jax import errors
from effllm_jax import model
from effllm_jax import optimizers
from effllm_jax import rules as rules_lib
from effllm_jax import saliency
from effllm_jax import schedules
from effllm_jax import selection
from effllm_jax import sharding
from effllm_jax import steps
from effllm_jax import structure
import kernels

# Where the weights of a run come from: `config.init`.
INITS = ('source', 'random')
# What `config.prune.policy` may be; 'none' only trains.
POLICIES = (*rules_lib.POLICIES, 'none')
TEACHER = ('always', 'recovery')


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
    teacher: when it speaks, one of `TEACHER`, if `recipe` has one.
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
    since = max(step - self.every, 0)
    falls = self.schedule.falls(self.tokens(since), self.tokens(step))
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


def device_tokens(
  config: ml_collections.ConfigDict, mesh: sharding.Mesh | None
) -> int:
  """Tokens of a micro-batch on one device: what a product reads at a time."""
  parts = 1 if mesh is None else sharding.batch_parts(mesh)
  return config.data.batch_size * config.data.seq_len // parts


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
  _check_ranges(config)
  _check_pairs(config, source)
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
    _check_blocks(rules, widths)
  parts = 1 if mesh is None else sharding.batch_parts(mesh)
  if config.data.batch_size % parts:
    raise errors.InputError(
      f'data.batch_size {config.data.batch_size} cannot be split into the '
      f'{parts} parts of mesh.data x mesh.fsdp; set --config.data.batch_size '
      'to a multiple, or --config.mesh.data'
    )
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
    recipe=steps.Recipe(
      compute=model.Compute(
        dtype=config.model.dtype,
        remat=config.model.remat,
        kernels=_kernels(config, source, mesh),
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
    ),
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


def _check_blocks(rules, widths):
  """Ragged takes whole blocks: one with dead slots would count as taken."""
  for name, multiple in zip(structure.TYPES, rules.multiple_of, strict=True):
    if name == 'stem' or name not in widths:
      continue
    odd = widths[name][widths[name] % multiple != 0]
    if odd.size:
      raise errors.InputError(
        f"prune.policy 'ragged' takes {name} in blocks of prune.multiple_of."
        f'{name} {multiple}, and a layer of the source has {odd[0]} alive; set '
        f'--config.prune.multiple_of.{name} to a divisor'
      )


def _kernels(config, source, mesh) -> str:
  """The implementation to use; 'auto' is the choice for this platform."""
  name = config.model.kernels
  # Survivors stand at the front of an axis: cut into parts, the first ones
  # would be busy and the last ones idle.
  apart = mesh is not None and mesh.shape['tensor'] > 1
  if name == 'auto':
    return 'xla' if apart else kernels.resolve(None)
  if apart and name != 'xla':
    raise errors.InputError(
      f'model.kernels {name!r} saves nothing where heads and channels are '
      f'split over mesh.tensor {mesh.shape["tensor"]}; set '
      '--config.model.kernels=xla or --config.mesh.tensor=1'
    )
  known = ('auto', *kernels.IMPLEMENTATIONS)
  _require(config, 'model.kernels', known.__contains__,
           f'one of {", ".join(known)}')  # fmt: skip
  if why := kernels.refusal(name):
    raise errors.InputError(
      f'model.kernels {name!r} {why}; set --config.model.kernels=auto or bucket'
    )
  if name == 'pallas_hopper':
    _require(config, 'model.dtype', 'bfloat16'.__eq__,
             'bfloat16, which pallas_hopper takes')  # fmt: skip
    # Channels are counted in rows of 128 bytes.
    multiple = lambda v: v % 64 == 0
    for key in ('ffn', 'stem'):
      for step in (f'shrink.quantum.{key}', f'prune.multiple_of.{key}'):
        _require(config, step, multiple,
                 'a multiple of 64, which pallas_hopper takes')  # fmt: skip
    _check_hopper(config, source, mesh)
  return name


def _check_hopper(config, source, mesh):
  """Each axis of each product is a multiple of 64, also after a shrink.

  The last one goes by the multiples of the prune alone.
  """
  rest = 'pallas_hopper takes multiples of 64; set --config.'
  tokens = device_tokens(config, mesh)
  if tokens % 64:
    raise errors.InputError(
      f'data.batch_size x data.seq_len are {tokens} tokens of a micro-batch on '
      f'one device; {rest}data.seq_len, or --config.model.kernels=bucket'
    )
  for key, heads in (
    ('shrink.quantum.heads', config.shrink.quantum.heads),
    ('prune.multiple_of.heads', config.prune.multiple_of.heads),
  ):
    if heads * source.H % 64:
      raise errors.InputError(
        f'{key} {heads} of {source.H} channels leave {heads * source.H}; '
        f'{rest}{key}={64 // math.gcd(source.H, 64)}'
      )
  widths = {
    'stem': source.D, 'ffn': source.F, 'key/value head': source.K * source.H
  }  # fmt: skip
  for what, width in widths.items():
    if width % 64:
      raise errors.InputError(
        f'the source has {width} {what} channels; {rest}model.kernels=bucket'
      )


def _check_ranges(config):
  at_least_one = [
    'data.seq_len', 'data.batch_size', 'train.accumulate', 'train.tokens',
    'train.log_every', 'train.max_skipped', 'prune.every',
    'checkpoint.every_steps', 'checkpoint.keep', 'eval.every_tokens',
    'shrink.quantum.heads', 'shrink.quantum.ffn', 'shrink.quantum.stem',
    'distill.top_k', 'repair.batches',
  ]  # fmt: skip
  for key in at_least_one:
    _require(config, key, lambda v: v >= 1, 'at least 1')
  for key in ('data.workers', 'optimizer.warmup_tokens',
              'optimizer.decay_tokens', 'eval.tokens_per_domain'):  # fmt: skip
    _require(config, key, lambda v: v >= 0, 'at least 0')
  for key in ('optimizer.peak', 'optimizer.clip', 'distill.temperature'):
    _require(config, key, lambda v: 0 < v < math.inf, 'positive')
  # A thread waits no longer.
  longest = threading.TIMEOUT_MAX
  _require(config, 'data.timeout', lambda v: 0 < v <= longest,
           f'positive and at most {longest:g}')  # fmt: skip
  # Of more bits jax takes the lower ones, and two seeds would be one.
  _require(config, 'seed', lambda v: 0 <= v < 2**32, 'from 0 to 4294967295')
  for key in ('optimizer.b1', 'optimizer.b2', 'prune.ema', 'shrink.threshold'):
    # As they are used: in float32 1 - 1e-8 is 1.
    _require(config, key, lambda v: 0 <= v < 1 != np.float32(v), 'in [0, 1)')
  for key in ('distill.weight', 'optimizer.embedding'):
    _require(config, key, lambda v: 0 <= v <= 1, 'in [0, 1]')
  for key in ('optimizer.end', 'optimizer.weight_decay', 'repair.damping'):
    _require(config, key, lambda v: 0 <= v < math.inf, 'at least 0 and finite')
  for key, known in (
    ('init', INITS),
    ('prune.policy', POLICIES),
    ('optimizer.schedule', ('cosine', 'wsd')),
    ('model.dtype', ('float32', 'bfloat16')),
    ('model.remat', model.REMAT),
    ('prune.saliency', saliency.KINDS),
    ('distill.when', TEACHER),
  ):
    _require(config, key, known.__contains__, f'one of {", ".join(known)}')
  prune, tokens = config.prune, config.train.tokens
  if prune.policy != 'none' and not (
    0 <= prune.begin_tokens < prune.end_tokens <= tokens
  ):
    raise errors.InputError(
      f'0 <= prune.begin_tokens {prune.begin_tokens:,} < prune.end_tokens '
      f'{prune.end_tokens:,} <= train.tokens {tokens:,} does not hold; change '
      'the three'
    )
  repair = config.repair
  fitted = repair.batches * config.train.accumulate
  if repair.enabled and not repair.damping and fitted < 2:
    raise errors.InputError(
      f'repair.damping {repair.damping:g} is chosen on one micro-batch of '
      'several, and repair.batches 1 with train.accumulate 1 leaves none; set '
      '--config.repair.batches=2, or a damping'
    )
  rate = config.optimizer
  if rate.end > rate.peak:
    raise errors.InputError(
      f'optimizer.end {rate.end:g} is above optimizer.peak {rate.peak:g}, and '
      'the rate would rise to the end; lower --config.optimizer.end too'
    )
  decay = rate.decay_tokens if rate.schedule == 'wsd' else 0
  if rate.warmup_tokens + decay > tokens:
    raise errors.InputError(
      f'optimizer.warmup_tokens {rate.warmup_tokens:,} and decay_tokens '
      f'{decay:,} exceed train.tokens {tokens:,}; lower them'
    )


def _check_pairs(config, source):
  """What one value makes of another, or of the source."""
  if config.data.seq_len > source.context:
    raise errors.InputError(
      f"data.seq_len {config.data.seq_len} exceeds the source model's context "
      f'{source.context}; set --config.data.seq_len'
    )
  if config.init == 'random' and not config.optimizer.embedding:
    raise errors.InputError(
      f'optimizer.embedding {config.optimizer.embedding} would leave the '
      "embedding as init 'random' draws it; set --config.optimizer.embedding=1"
    )
  if config.distill.teacher and not config.distill.weight:
    raise errors.InputError(
      f'distill.teacher {config.distill.teacher!r} would not be asked: set '
      '--config.distill.weight above 0, or no teacher'
    )
  if config.budget.table and config.budget.kind != 'ms':
    raise errors.InputError(
      f'budget.table {config.budget.table!r} would not be read: set '
      '--config.budget.kind=ms, or no table'
    )
  if config.distill.weight and config.distill.top_k > source.V:
    raise errors.InputError(
      f'distill.top_k {config.distill.top_k} exceeds the {source.V} tokens of '
      'the vocabulary; set --config.distill.top_k'
    )


def _require(config, key, holds, what):
  value = config
  for part in key.split('.'):
    value = value[part]
  if not holds(value):
    raise errors.InputError(
      f'{key} {value!r} is not {what}; set --config.{key}'
    )
