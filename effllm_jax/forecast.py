"""What a run will be, told from its config before it begins."""

from collections.abc import Mapping
import dataclasses

import jax.numpy as jnp

from effllm_jax import accounting
from effllm_jax import amounts
from effllm_jax import plan as plan_lib
from effllm_jax import repair
from effllm_jax import structure
from effllm_jax import tables

# Bytes of a parameter, all float32: its weight and two moments; the gradient.
_STATE, _GRADIENT = 12, 4


@dataclasses.dataclass(frozen=True)
class Forecast:
  """What follows from a plan alone.

  Attributes:
    steps: updates of the run.
    scored: the first of them, which score groups.
    taught: those in which the teacher speaks.
    prunes: after which steps.
    flops: at most, by `accounting.PURPOSES`: arrays and live widths as they
      begin, and a repair of every matrix after every prune.
    state: bytes of weights and moments, which a checkpoint has too.
    gradients: bytes beside them in a step: a micro-batch's and, where there are
      several, their sum; for `taylor2_micro` that of their squares.
    teacher: bytes of the teacher's weights, in the dtype that they compute in.
  """

  steps: int
  scored: int
  taught: int
  prunes: tuple[int, ...]
  flops: Mapping[str, int]
  state: int
  gradients: int
  teacher: int


def of(
  plan: plan_lib.Plan,
  cfg: structure.ModelConfig,
  *,
  seq_len: int,
  accumulate: int,
  batches: int,
  teacher: structure.ModelConfig | None = None,
) -> Forecast:
  """Goes through the steps of a plan.

  Args:
    plan: of `plan.make`.
    cfg: architecture of the source's arrays.
    seq_len: targets of a sequence.
    accumulate: micro-batches of an update.
    batches: updates whose text a repair reads.
    teacher: architecture of the teacher, where the plan has one.
  """
  steps = range(1, plan.steps + 1)
  scored = sum(map(plan.scores, steps))
  taught = sum(map(plan.teaches, steps))
  prunes = tuple(filter(plan.prunes, range(1, scored + 1)))

  def spent(count, what) -> dict[str, int]:
    meter = accounting.Meter(
      seq_len, plan.tokens_per_step, plan.recipe.compute.remat
    )
    what(meter)
    return {name: count * x for name, x in meter.spent.items()}

  parts = [
    spent(scored, lambda meter: meter.step(cfg, True, None)),
    spent(plan.steps - scored, lambda meter: meter.step(cfg, False, None)),
  ]
  if taught:
    whole = spent(taught, lambda meter: meter.step(cfg, False, teacher))
    parts.append({'teacher': whole['teacher']})
  if plan.calibrate:
    parts.append(spent(len(prunes), lambda meter: meter.calibrate(cfg)))
  if plan.damping is not None:
    every = dict.fromkeys(('attn_in', 'heads', 'ffn_in', 'ffn'), cfg.N)
    every['final'] = int(not cfg.tied)
    tried = 0 if plan.damping else len(repair.CANDIDATES)
    parts.append(
      spent(len(prunes), lambda meter: meter.repair(cfg, every, batches, tried))
    )
  # As compiled for an H100, where nothing else is as large as the weights.
  trees = 1 + (accumulate > 1)
  trees += plan.recipe.saliency == 'taylor2_micro' and scored > 0
  return Forecast(
    steps=plan.steps,
    scored=scored,
    taught=taught,
    prunes=prunes,
    flops={
      name: sum(part.get(name, 0) for part in parts)
      for name in accounting.PURPOSES
    },
    state=_STATE * cfg.num_params(),
    gradients=_GRADIENT * trees * cfg.num_params(),
    teacher=jnp.dtype(plan.recipe.compute.dtype).itemsize * teacher.num_params()
    if taught
    else 0,
  )


def table(
  found: Forecast, plan: plan_lib.Plan, name: str, live: int
) -> tables.Table:
  """A forecast to be read.

  Args:
    found: of `of`.
    plan: that it is of.
    name: of the source.
    live: parameters of the source that are alive.
  """
  target = plan.cost.reported(plan.schedule.target)
  tokens = lambda steps: f'{plan.tokens(steps):,} tokens in {steps:,} steps'
  rest = found.steps - found.scored
  rows = {
    'source': f'{name}, {live:,} parameters',
    'to': amounts.costs(plan.cost.kind, target, unit=True),
    'run': tokens(found.steps),
    'until the last prune': tokens(found.scored),
    'recovery': tokens(rest),
    'prunes': f'{len(found.prunes):,}, after steps {found.prunes[0]:,} to '
    f'{found.prunes[-1]:,}'
    if found.prunes
    else '',
    'teacher': f'in {found.taught:,} steps, {found.teacher / 1e9:.2f} GB'
    if found.taught
    else '',
    'weights and moments': f'{found.state / 1e9:.2f} GB, and '
    f'{found.gradients / 1e9:.2f} of gradients in a step',
    **{
      f'{tables.SPENT[purpose]}, at most': amounts.flops(x) if x else ''
      for purpose, x in found.flops.items()
    },
    'in all, at most': amounts.flops(sum(found.flops.values())),
  }
  if not found.prunes:
    del rows['to'], rows['until the last prune'], rows['recovery']
  return tables.Table(
    title='What the run will be',
    columns=('', ''),
    rows=tuple((key, value) for key, value in rows.items() if value),
  )
