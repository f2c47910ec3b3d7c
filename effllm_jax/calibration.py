"""Trials: what groups of one type alone would cost, and scores scaled by it.

A score orders the groups of a type; whether a head or a channel should go is
for a forward pass to say (`prune.calibrate` of a config).
"""

from collections.abc import Mapping
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from effllm_jax import moves
from effllm_jax import plan as plan_lib
from effllm_jax import selection
from effllm_jax import sharding
from effllm_jax import state as state_lib
from effllm_jax import steps
from effllm_jax import structure

# Nats that the lowest groups of a type together count with, where their trial
# did not raise the loss, and where it broke the model: not 0 and infinity,
# which would lose the order within the type.
_LEAST, _MOST = 1e-12, 1e20


def trials(
  params: structure.Params,
  prune: state_lib.PruneState,
  windows_ABT: jax.Array,
  cfg: structure.ModelConfig,
  plan: plan_lib.Plan,
  target: int,
) -> dict[str, dict[str, float | None]]:
  """What the loss would be if a prune took groups of one type alone.

  A trial takes the lowest groups of a type, as many as a prune to `target`
  would take of it.

  Args:
    params: of the model as it is.
    prune: scores and masks.
    windows_ABT: int32, a batch that the loss is measured on.
    cfg: architecture of the arrays.
    plan: rules, budget, and how to compute.
    target: of the prune, in units of the budget.

  Returns:
    By type: `groups` taken, the `change` of the loss, nats per token (None: it
    is not finite), and `score`, the sum of theirs.
  """
  scores, masks = prune.scores, prune.masks
  saved = max(plan.cost.live(masks) - target, 1)
  tried = selection.trials(scores, masks, saved, plan.rules, plan.cost)
  compute = plan.recipe.compute
  losses = np.asarray(
    steps.trial_losses(
      params,
      jax.device_put(tried, sharding.replicated(compute.mesh)),
      windows_ABT,
      cfg=cfg,
      compute=compute,
    ),
    np.float64,
  )
  found = {}
  for i, name in enumerate(structure.TYPES, 1):
    mask_CNX = np.asarray(getattr(tried, name))
    gone = mask_CNX[0] & ~mask_CNX[i]
    score = np.asarray(getattr(scores, name), np.float64)
    change = float(losses[i] - losses[0])
    found[name] = {
      'groups': int(gone.sum()),
      'change': change if math.isfinite(change) else None,
      'score': float(score[gone].sum()),
    }
  return found


class Calibration:
  """How many nats a unit of each type's score is worth, by its trials.

  That is the change of the loss in its trials, divided by the sum of the scores
  of what they took, both averaged over the prunes so far. A single trial of 512
  tokens can be off by half, and the type that then looks cheapest is the one
  whose trial was most wrong: `fisher` on SmolLM2, whose unit is right within a
  third without any trial, ended 0.010 bits per byte worse when scaled by the
  newest trial alone, and 0.005 worse by this average
  (experiments/HYPOTHESES.md).

  Attributes:
    broken: type -> sum of the scores of what its newest trial took, of types
      whose newest trial broke the model: the loss was not finite.
  """

  def __init__(self, decay: float, record: Mapping[str, Any] | None = None):
    """Begins, or goes on from a `record`.

    Each prune counts `decay` times as much as the one after it.
    """
    self._decay = decay
    self._sums = dict(record['sums']) if record else {}
    self.broken = dict(record['broken']) if record else {}

  @property
  def measured(self) -> bool:
    """Whether there has been a trial."""
    return bool(self._sums or self.broken)

  @property
  def record(self) -> dict[str, dict[str, Any]]:
    """As JSON, for a checkpoint."""
    return {'sums': dict(self._sums), 'broken': dict(self.broken)}

  def add(self, found: dict[str, dict[str, float | None]]) -> None:
    """Takes in the `trials` of one prune."""
    self.broken = {
      t: x['score'] for t, x in found.items() if x['change'] is None
    }
    for name in found.keys() - self.broken.keys():
      sums, trial = self._sums.get(name, (0.0, 0.0)), found[name]
      self._sums[name] = [
        self._decay * x + trial[key]
        for x, key in zip(sums, ('change', 'score'), strict=True)
      ]

  def scaled(self, prune: state_lib.PruneState) -> state_lib.PruneState:
    """Scales scores to nats per token; their order within a type stays.

    A type whose trials did not raise the loss costs next to nothing. One whose
    newest trial broke the model costs more than all others, even a group of it
    whose score is 0.
    """
    rates, extra = {}, {}
    for name in structure.TYPES:
      change, score = self._sums.get(name, (0.0, 0.0))
      extra[name] = np.float32(0)
      if name in self.broken:
        change, score = _MOST, self.broken[name]
        extra[name] = np.float32(_MOST)
      # What was taken may have a score of 0, as the zeros that fill a layer up
      # have. The scores stay as they are then: others are worth more.
      rate = max(change, _LEAST) / score if score > 0 else 1.0
      rates[name] = np.float32(min(rate, moves.HIGHEST))
    scores = _scaled(
      prune.scores, structure.Groups(**rates), structure.Groups(**extra)
    )
    return prune.replace(scores=scores)


@jax.jit
def _scaled(scores, rates, extra):
  return jax.tree.map(
    lambda s, r, e: jnp.minimum(r * s + e, moves.HIGHEST), scores, rates, extra
  )
