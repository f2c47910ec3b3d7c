"""One prune and one shrink of a run's state, and what to say of them.

The host side of `steps`: what a plan asks for at a step, carried out, checked
and put into plain numbers. Nothing here knows of files or of the order of
events in a run.
"""

from collections.abc import Container
import dataclasses
import math
from typing import Any

import jax
import numpy as np
import optax

from effllm_jax import budgets
from effllm_jax import events
from effllm_jax import plan as plan_lib
from effllm_jax import selection
from effllm_jax import shrink as shrink_lib
from effllm_jax import state as state_lib
from effllm_jax import steps
from effllm_jax import structure

# A shrink changes no number that matters: float32 sums in another order.
TOLERANCE = 1e-4


def select(
  prune: state_lib.PruneState, plan: plan_lib.Plan, target: int
) -> structure.Groups:
  """Masks within `target`, in units of the plan's budget."""
  return selection.select(
    prune.scores,
    prune.masks,
    target,
    plan.schedule.target,
    plan.rules,
    plan.cost,
  )


def prices(
  prune: state_lib.PruneState,
  plan: plan_lib.Plan,
  broken: Container[str] = (),
) -> dict[str, float | None]:
  """Mean price of the live groups by type, per parameter, byte, FLOP or ms.

  None where nothing is left, a removal saves nothing, or a trial of it has
  `broken` the model.
  """
  means = selection.mean_prices(
    prune.scores, prune.masks, plan.rules, plan.cost
  )
  live = selection.live_widths(prune.masks)
  return {
    t: (
      None
      if t in broken or not live[t].any()
      else finite(plan.cost.per_unit * float(getattr(means, t)))
    )
    for t in structure.TYPES
  }


def finite(x: float) -> float | None:
  """JSON has no infinity."""
  return x if math.isfinite(x) else None


def removed(
  prune: state_lib.PruneState, masks: structure.Groups
) -> dict[str, list]:
  """What new masks remove, by its index in the source model.

  heads and ffn as [layer, index], stem as index.
  """
  found = {}
  for name in structure.TYPES:
    before, after, origin = (
      np.asarray(getattr(tree, name))
      for tree in (prune.masks, masks, prune.origin)
    )
    gone = before & ~after
    index = origin[gone].tolist()
    if gone.ndim == 2:
      index = [
        list(pair)
        for pair in zip(*(np.nonzero(gone)[0].tolist(), index), strict=True)
      ]
    found[name] = index
  return found


def sizes(
  prune: state_lib.PruneState,
  cfg: structure.ModelConfig,
  plan: plan_lib.Plan,
  step: int,
  source_widths: dict[str, float],
) -> dict[str, Any]:
  """Live size, widths and pruned shares, for the metrics.

  Args:
    prune: whose masks count.
    cfg: the shape of the arrays.
    plan: of the run.
    step: the last one that was finished.
    source_widths: mean live width of a layer of the source, by type.
  """
  widths = {
    t: float(w.mean()) for t, w in selection.live_widths(prune.masks).items()
  }
  tokens = plan.tokens(step)
  return {
    'live_params': selection.live_params(prune.masks, cfg),
    'array_params': cfg.num_params(),
    'live_cost': plan.cost.reported(plan.cost.live(prune.masks)),
    'target_cost': (
      plan.cost.reported(plan.schedule.at(tokens))
      if tokens > plan.schedule.begin
      else None
    ),
    'widths': widths,
    'pruned': {
      t: 1 - w / before if (before := source_widths[t]) else 0.0
      for t, w in widths.items()
    },
  }


def shrunk(
  masks: structure.Groups,
  cfg: structure.ModelConfig,
  plan: plan_lib.Plan,
  step: int,
) -> structure.ModelConfig | None:
  """What to shrink the arrays to after this step; None: leave them.

  The arrays become as wide as the widest layer. That may be as wide as they are
  now: then a shrink only moves the survivors of narrower layers to the front,
  so that kernels can stop sooner. Only a prune is followed by a shrink, and
  only if that saves enough, or if the target is reached.
  """
  if not plan.prunes(step):
    return None
  # In the end every width is real; until then tiles may want multiples.
  exact = structure.Groups(heads=1, ffn=1, stem=1)
  last = plan.last_prune(step)
  small = shrink_lib.shrunk_config(masks, cfg, exact if last else plan.quantum)
  reached = budgets.params(cfg).size(
    *(int(x.sum()) for x in selection.extents(masks).values())
  )
  saved = max(
    1 - small.num_params() / cfg.num_params(),
    1 - selection.live_params(masks, cfg) / reached,
  )
  wanted = saved > 0 and (saved >= plan.shrink_threshold or last)
  return small if wanted else None


def shrink(
  state: state_lib.TrainState,
  windows_BT: jax.Array,
  cfg: structure.ModelConfig,
  new: structure.ModelConfig,
  plan: plan_lib.Plan,
  tx: optax.GradientTransformation,
  index: int,
) -> tuple[state_lib.TrainState, events.ShrinkEvent]:
  """Gathers the survivors into arrays of `new`; `state` is used up.

  Args:
    state: with dead groups, in arrays of `cfg`.
    windows_BT: int32, a micro-batch on which both models must agree.
    cfg: the architecture of the arrays.
    new: of `shrunk`; no narrower than any layer's survivors.
    plan: of the run.
    tx: the optimizer, whose state is gathered too.
    index: of the event.

  Returns:
    The smaller state, and the record of shrink number `index`.

  Raises:
    RuntimeError: the loss on `windows_BT` is not what it was before.
  """
  # The reference: what is checked is the shrink alone.
  compute = dataclasses.replace(
    plan.recipe.compute, dtype='float32', kernels='xla'
  )

  def loss(state, cfg):
    # What a TPU or a GPU rounds float32 to by default is coarser than that.
    with jax.default_matmul_precision('highest'):
      return float(
        steps.batch_loss(
          state.params, state.prune.masks, windows_BT, cfg=cfg, compute=compute
        )
      )

  before, step = loss(state, cfg), int(state.step)
  if new != cfg:
    # Programs of the old shapes will not be called again. Linux gives a process
    # 65,530 pieces of memory, and on a CPU XLA aborts without; some 880 of them
    # stayed behind at every shrink (`small_run`).
    jax.clear_caches()
  live = selection.live_widths(state.prune.masks)
  state, kept = steps.shrink_step(
    state, cfg=new, tx=tx, mesh=plan.recipe.compute.mesh
  )
  after = loss(state, new)
  if not abs(after - before) <= TOLERANCE * before:
    raise RuntimeError(
      f'shrink {index} changed the loss on one batch from {before} to {after} '
      'nats per token; nothing of it was saved, the last checkpoint is intact; '
      'please report this'
    )
  return state, events.ShrinkEvent(
    index=index,
    step=step,
    tokens=plan.tokens(step),
    before=cfg,
    after=new,
    live=structure.Groups(**{t: w.tolist() for t, w in live.items()}),
    kept=jax.tree.map(lambda x: np.asarray(x).tolist(), kept),
    loss_before=before,
    loss_after=after,
  )
