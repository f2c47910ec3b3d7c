"""The jitted transforms of a run: train, evaluate, shrink.

They are compiled once per architecture: masks, scores and targets are data.
"""

import functools

import jax
import jax.numpy as jnp
import optax

from effllm_jax import model
from effllm_jax import saliency
from effllm_jax import shrink
from effllm_jax import state as state_lib
from effllm_jax import structure

Array = jax.Array


def learning_rate(
  kind: str, peak: float, end: float, warmup: int, decay: int, total: int
) -> optax.Schedule:
  """Learning rate by step.

  The source is a finished, decayed checkpoint, so the rate always warms up
  again.

  Args:
    kind: `cosine` (warm-up, then half a cosine down to `end`) or `wsd`
      (warm-up, stable, then linear decay to `end` over the last `decay` steps).
    peak: highest rate.
    end: rate at the last step.
    warmup: steps of warm-up.
    decay: steps of decay of `wsd`.
    total: steps of the run.
  """
  rise = optax.linear_schedule(0.0, peak, warmup)
  if kind == 'cosine':
    fall = optax.cosine_decay_schedule(
      peak, max(total - warmup, 1), alpha=end / peak
    )
    rate = optax.join_schedules([rise, fall], [warmup])
  elif kind == 'wsd':
    fall = optax.linear_schedule(peak, end, decay)
    stable = optax.constant_schedule(peak)
    rate = optax.join_schedules([rise, stable, fall], [warmup, total - decay])
  else:
    raise ValueError(f'schedule {kind!r} is neither cosine nor wsd')
  # Optax counts finished updates: a rate of 0 would waste the first one.
  return lambda count: rate(count + 1)


def optimizer(
  rate: optax.Schedule, b1: float, b2: float, weight_decay: float, clip: float
) -> optax.GradientTransformation:
  """AdamW behind a clip of the global gradient norm.

  Weight decay skips norm scales. Every part is elementwise, apart from the
  norm, to which dead groups add exactly zero: an update commutes with a shrink.
  """
  return optax.chain(
    optax.clip_by_global_norm(clip),
    optax.adamw(
      rate,
      b1=b1,
      b2=b2,
      weight_decay=weight_decay,
      mask=lambda params: structure.map_axes(
        lambda letters, _: letters not in ('D', 'ND'), params
      ),
    ),
  )


@functools.partial(
  jax.jit,
  static_argnames=('cfg', 'tx', 'compute', 'decay', 'score'),
  donate_argnames='state',
)
def train_step(
  state: state_lib.TrainState,
  windows_ABT: Array,
  *,
  cfg: structure.ModelConfig,
  tx: optax.GradientTransformation,
  compute: model.Compute,
  decay: float,
  score: bool,
) -> tuple[state_lib.TrainState, dict[str, Array]]:
  """One optimizer update; scores every group from the same gradient.

  Args:
    state: donated.
    windows_ABT: int32, A micro-batches whose gradients are averaged.
    cfg: architecture of the arrays.
    tx: the optimizer.
    compute: dtype and rematerialisation.
    decay: of the running average of scores, see `saliency.average`.
    score: False once pruning is over; saves the sums over |g w|.

  Returns:
    The new state, and `loss` (nats per token) and `grad_norm` (before the
    clip), float32 scalars.
  """
  masks = state.prune.masks
  loss_and_grads = jax.value_and_grad(model.loss)

  def add(total, windows_BT):
    result = loss_and_grads(state.params, masks, windows_BT, cfg, compute)
    return jax.tree.map(jnp.add, total, result), None

  accumulate = windows_ABT.shape[0]
  # The first micro-batch starts the sum: without accumulation no second copy
  # of the gradient is ever held.
  total = loss_and_grads(state.params, masks, windows_ABT[0], cfg, compute)
  if accumulate > 1:
    total, _ = jax.lax.scan(add, total, windows_ABT[1:])
    total = jax.tree.map(lambda x: x / accumulate, total)
  loss, grads = total

  prune = state.prune
  if score:
    scores = saliency.group_scores(state.params, grads)
    prune = prune.replace(
      scores=saliency.average(prune.scores, scores, prune.count, decay),
      count=prune.count + 1,
    )
  updates, opt_state = tx.update(grads, state.opt_state, state.params)
  state = state.replace(
    step=state.step + 1,
    params=optax.apply_updates(state.params, updates),
    opt_state=opt_state,
    prune=prune,
  )
  return state, {'loss': loss, 'grad_norm': optax.tree.norm(grads)}


@functools.partial(jax.jit, static_argnames=('cfg', 'compute'))
def batch_loss(
  params: structure.Params,
  masks: structure.Groups,
  windows_BT: Array,
  *,
  cfg: structure.ModelConfig,
  compute: model.Compute,
) -> Array:
  """Mean loss of one batch without training on it, nats per token."""
  return model.loss(params, masks, windows_BT, cfg, compute)


@functools.partial(jax.jit, static_argnames=('cfg', 'compute'))
def sum_losses(
  params: structure.Params,
  masks: structure.Groups,
  windows_BT: Array,
  weight_BT: Array,
  *,
  cfg: structure.ModelConfig,
  compute: model.Compute,
) -> Array:
  """Sum of weighted token losses, nats; weights are [B, T - 1]."""
  losses = model.token_losses(params, masks, windows_BT, cfg, compute)
  return (losses * weight_BT).sum()


@functools.partial(jax.jit, static_argnames=('cfg', 'new_cfg', 'tx'))
def shrink_step(
  state: state_lib.TrainState,
  *,
  cfg: structure.ModelConfig,
  new_cfg: structure.ModelConfig,
  tx: optax.GradientTransformation,
) -> tuple[state_lib.TrainState, structure.Groups]:
  """Gathers the survivors of a state into arrays of `new_cfg`.

  Returns:
    The smaller state, and the kept indices into the axes of `cfg`.
  """
  prune = state.prune
  kept = shrink.kept_indices(prune.masks, prune.scores, new_cfg)
  small = state.replace(
    params=shrink.take_params(state.params, kept),
    opt_state=shrink.take_opt_state(tx, state.opt_state, cfg.tied, kept),
    prune=prune.replace(
      masks=shrink.take_groups(prune.masks, kept),
      scores=shrink.take_groups(prune.scores, kept),
      origin=shrink.take_groups(prune.origin, kept),
    ),
  )
  return small, kept
