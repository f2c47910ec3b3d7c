"""What is compared at the same budget, and how an arm becomes a config."""

from collections.abc import Mapping
import dataclasses
import fractions
import os
import re
from typing import Any

import ml_collections

from effllm_jax import errors
from effllm_jax import plan as plan_lib
from effllm_jax import structure
from experiments import pretraining

STARTS = ('source', 'found', 'uniform')


@dataclasses.dataclass(frozen=True)
class Arm:
  """One way to a small model.

  Attributes:
    name: of its folder and of its row.
    changes: of the study's config, by key.
    start: which model it starts from, one of `STARTS`: the study's 'source';
      'found', what `ours_a` of the same seed ended as; 'uniform', a shape made
      by hand (`uniform_shape`).
  """

  name: str
  changes: Mapping[str, Any]
  start: str = 'source'

  def __post_init__(self):
    if not re.fullmatch(r'\w+', self.name) or self.start not in STARTS:
      raise errors.InputError(
        f'arm {self.name!r} from {self.start!r}: a name has letters, digits '
        f'and _, and a start is one of {", ".join(STARTS)}; correct the study'
      )


@dataclasses.dataclass(frozen=True)
class Study:
  """A comparison: its arms share everything but their changes.

  Attributes:
    config: of `ours_a`, as in `experiments/configs`; without `pretrained`, its
      `source` is where all arms come from.
    arms: that are compared.
    sensitivity: `ours_a` with one setting changed, for `--arms=sensitivity`.
    pretrained: how the source is made here; None: it exists.
  """

  config: ml_collections.ConfigDict
  arms: tuple[Arm, ...]
  sensitivity: tuple[Arm, ...] = ()
  pretrained: pretraining.Recipe | None = None

  def __post_init__(self):
    # Of a user's file they may be lists.
    for name in ('arms', 'sensitivity'):
      object.__setattr__(self, name, tuple(getattr(self, name)))


# What others start from, or are measured by.
OURS = 'ours_a'
_SCRATCH = {'init': 'random', 'prune.policy': 'none'}
_REPAIR = {'repair.enabled': True}
_TEACHER = {'distill.weight': 0.5}
_LATE_TEACHER = _TEACHER | {'distill.when': 'recovery'}
_ONESHOT = {'prune.schedule': 'oneshot'}
_CALIBRATE = {'prune.calibrate': True}
_ACTIVATION = {'prune.saliency': 'activation'}
_RAGGED_FLOORS = {'prune.policy': 'ragged', 'prune.saliency': 'fisher'}
# A layer may lose a whole block.
_RAGGED = _RAGGED_FLOORS | {'prune.floors.heads': 0, 'prune.floors.ffn': 0}
ARMS = (
  Arm('dense', {'prune.policy': 'none'}),
  Arm(OURS, {}),
  Arm('ours_b', _REPAIR),
  Arm('ours_ragged', _RAGGED),
  Arm('ours_ragged_b', _RAGGED | _REPAIR),
  # No layer below the floors of the study, as in one width.
  Arm('ours_ragged_b_floors', _RAGGED_FLOORS | _REPAIR),
  Arm('ours_ragged_b_calibrate', _RAGGED | _REPAIR | _CALIBRATE),
  Arm('ours_b_activation', _REPAIR | _ACTIVATION),
  Arm('ours_a_distill', _TEACHER),
  Arm('ours_a_distill_recovery', _LATE_TEACHER),
  Arm('ours_ragged_b_distill', _RAGGED | _REPAIR | _TEACHER),
  Arm('ours_ragged_b_floors_distill', _RAGGED_FLOORS | _REPAIR | _TEACHER),
  Arm('ours_ragged_b_distill_recovery', _RAGGED | _REPAIR | _LATE_TEACHER),
  # After the vector-wise criterion of Ma et al. 2023, under our rules; what
  # LLM-Pruner's code has as its default is `ours_a_oneshot`.
  Arm('oneshot_taylor', _ONESHOT | {'prune.saliency': 'taylor1_group'}),
  Arm('oneshot_magnitude', _ONESHOT | {'prune.saliency': 'magnitude'}),
  Arm('oneshot_activation', _ONESHOT | _ACTIVATION),
  # `ours_b_activation` and `ours_ragged_b` in one cut: what going gradually is
  # worth.
  Arm('oneshot_b_activation', _ONESHOT | _REPAIR | _ACTIVATION),
  Arm('oneshot_ragged_b', _ONESHOT | _RAGGED | _REPAIR),
  Arm('scratch_found', _SCRATCH, 'found'),
  Arm('scratch_uniform', _SCRATCH, 'uniform'),
  Arm('distill_scratch', _SCRATCH | _TEACHER, 'uniform'),
)  # fmt: skip


def sensitivity(config: ml_collections.ConfigDict) -> tuple[Arm, ...]:
  """`ours_a` with one setting changed, or with another score and trials."""
  every, batch = config.prune.every, config.data.batch_size
  begin, end = config.prune.begin_tokens, config.prune.end_tokens
  embedding = config.prune.price_embedding
  return (
    Arm('ours_a_every_half', {'prune.every': max(every // 2, 1)}),
    Arm('ours_a_every_4x', {'prune.every': 4 * every}),
    Arm('ours_a_cubic', {'prune.schedule': 'cubic'}),
    Arm('ours_a_oneshot', _ONESHOT),
    Arm('ours_a_early', {'prune.end_tokens': begin + (end - begin) // 4}),
    Arm('ours_a_late', {'prune.end_tokens': begin + (end - begin) * 2}),
    Arm('ours_a_activation', _ACTIVATION),
    Arm('ours_a_fisher', {'prune.saliency': 'fisher'}),
    Arm('ours_a_calibrate', _CALIBRATE),
    Arm('ours_a_activation_calibrate', _ACTIVATION | _CALIBRATE),
    Arm('ours_a_fisher_calibrate', {'prune.saliency': 'fisher'} | _CALIBRATE),
    # The embedding in the price of the stem, or no longer in it.
    Arm('ours_a_other_price', {'prune.price_embedding': not embedding}),
    Arm('ours_a_batch_2x', {'data.batch_size': 2 * batch}),
  )


def config(
  arm: Arm,
  base: ml_collections.ConfigDict,
  seed: int,
  starts: Mapping[str, str | os.PathLike],
) -> ml_collections.ConfigDict:
  """The config of one run.

  Args:
    arm: which.
    base: of the study.
    seed: of the order of the text and of new weights.
    starts: where the models are that `Arm.start` names.
  """
  made = ml_collections.ConfigDict(base.to_dict()).lock()
  made.update_from_flattened_dict(arm.changes)
  made.seed = seed
  made.source = str(starts[arm.start])
  if made.distill.weight and arm.start != 'source':
    made.distill.teacher = str(starts['source'])
  return made


def lengthened(
  config: ml_collections.ConfigDict, tokens: float
) -> ml_collections.ConfigDict:
  """The same run over more tokens: pruned at the same ones, decay in step.

  Args:
    config: of a run.
    tokens: of the longer one, which has the nearest number of whole steps.
  """
  per_step = plan_lib.tokens_per_step(config)
  tokens = round(tokens / per_step) * per_step
  made = ml_collections.ConfigDict(config.to_dict()).lock()
  share = config.optimizer.decay_tokens / config.train.tokens
  made.train.tokens = tokens
  made.optimizer.decay_tokens = round(share * tokens)
  return made


def uniform_shape(
  cfg: structure.ModelConfig, plan: plan_lib.Plan
) -> structure.ModelConfig:
  """The source's proportions, scaled down until the plan's target holds.

  All widths are multiplied by the largest factor up to 1 whose result costs at
  most the target, and rounded to the nearest multiple (half a multiple up, one
  at least); the depth stays.

  Args:
    cfg: of the source.
    plan: target and multiples of a pruned arm.
  """
  widths = [(w, m) for w, m in zip(
    (cfg.K, cfg.F, cfg.D), plan.rules.multiple_of, strict=True
  )]  # fmt: skip
  half = fractions.Fraction(1, 2)

  def shape(factor):
    K, F, D = (max(int(factor * w / m + half), 1) * m for w, m in widths)
    return dataclasses.replace(cfg, K=K, F=F, D=D)

  # Between these factors nothing changes.
  steps = {(i + half) * m / w for w, m in widths for i in range(w // m)}
  shapes = [shape(x) for x in sorted({0, *steps})]
  return next(
    x
    for x in reversed(shapes)
    if plan.cost.of_config(x) <= plan.schedule.target
  )
