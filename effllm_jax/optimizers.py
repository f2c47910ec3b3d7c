"""AdamW and its learning rate, re-warmed for a finished checkpoint."""

import jax
import jax.numpy as jnp
import optax

from effllm_jax import structure


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
    end: rate at the last step, at most `peak`, where `wsd` without decay ends.
    warmup: steps of warm-up.
    decay: steps of decay of `wsd`; 0: none.
    total: steps of the run.

  Raises:
    ValueError: an unknown kind.
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
  rate: optax.Schedule,
  b1: float,
  b2: float,
  weight_decay: float,
  clip: float,
  embedding: float = 1.0,
) -> optax.GradientTransformationExtraArgs:
  """AdamW behind a clip of the global gradient norm.

  Its `update` takes that norm, a float32 scalar, as `norm`. Every part is
  elementwise, apart from the norm, to which dead groups add exactly zero: an
  update commutes with a shrink.

  Args:
    rate: by number of finished updates.
    b1, b2: decay of Adam's moments.
    weight_decay: of matrices; norm scales and biases do not decay.
    clip: largest gradient norm.
    embedding: share of every update, decay included, that the embedding and
      the unembedding get. Their moments go on at 0 too: `saliency.obd` reads
      them.
  """
  return optax.chain(
    _clip(clip),
    optax.adamw(
      rate,
      b1=b1,
      b2=b2,
      weight_decay=weight_decay,
      mask=lambda params: structure.map_axes(
        lambda letters, _: structure.is_matrix(letters), params
      ),
    ),
    optax.stateless(
      lambda updates, _: structure.map_axes(
        lambda letters, x: embedding * x if 'V' in letters else x, updates
      )
    ),
  )


def _clip(limit: float) -> optax.GradientTransformationExtraArgs:
  """`optax.clip_by_global_norm`, of a norm that is known.

  The step has it already. To take it again is one more pass over the whole
  gradient, in a branch in which XLA does not see that it is the same: 7 % of a
  step of 512 tokens of SmolLM2-135M on 2 cores.
  """

  def update(updates, state, params=None, *, norm):
    del params
    clipped = lambda x: jnp.where(norm < limit, x, x / norm * limit)
    return jax.tree.map(clipped, updates), state

  return optax.GradientTransformationExtraArgs(optax.init_empty_state, update)
