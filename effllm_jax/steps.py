"""The jitted transforms of a run: teach, train, repair, evaluate, shrink.

They are compiled once per architecture: masks and scores are data.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import optax

from effllm_jax import distillation
from effllm_jax import model
from effllm_jax import model_repair
from effllm_jax import saliency
from effllm_jax import sharding
from effllm_jax import shrink
from effllm_jax import state as state_lib
from effllm_jax import structure
from effllm_jax import unembedding

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class Recipe:
  """What a training step does besides the update.

  Attributes:
    compute: dtype and rematerialisation.
    saliency: one of `saliency.KINDS`.
    decay: of the running average of scores, see `saliency.average`.
    b1, b2: of Adam, to take the bias out of its moments.
    clip: largest gradient norm, to take the clip out of the second moment.
    distill: weight of the divergence from the teacher in the loss; the
      cross-entropy has 1 minus that. 0: no teacher.
    temperature: of both softmaxes in that divergence.
    top_k: how many of a teacher's probabilities are stored per token.
    seed: of the saliency `random`; 0 for every other one.
  """

  compute: model.Compute
  saliency: str
  decay: float
  b1: float
  b2: float
  clip: float
  distill: float
  temperature: float
  top_k: int
  seed: int


@functools.partial(jax.jit, static_argnames=('cfg', 'recipe'))
def teach_step(
  params: structure.Params,
  masks: structure.Groups,
  windows_ABT: Array,
  *,
  cfg: structure.ModelConfig,
  recipe: Recipe,
) -> distillation.Targets:
  """What the teacher says of a batch; leaves [A, B, T - 1, top_k].

  One micro-batch after another, so that its logits are bounded like those of
  the student.
  """
  answers = jax.lax.map(
    lambda windows_BT: distillation.targets(
      params,
      masks,
      windows_BT[:, :-1],
      cfg,
      recipe.compute,
      recipe.temperature,
      recipe.top_k,
    ),
    windows_ABT,
  )
  mesh = recipe.compute.mesh
  return jax.tree.map(lambda x: sharding.constrain(x, 'ABTC', mesh), answers)


@functools.partial(
  jax.jit,
  static_argnames=('cfg', 'tx', 'recipe', 'score'),
  donate_argnames='state',
)
def train_step(
  state: state_lib.TrainState,
  windows_ABT: Array,
  teacher: distillation.Targets | None = None,
  *,
  cfg: structure.ModelConfig,
  tx: optax.GradientTransformation,
  recipe: Recipe,
  score: bool,
) -> tuple[state_lib.TrainState, dict[str, Array]]:
  """One optimizer update; scores every group from the same gradient.

  Where the loss or the norm of the gradient is not finite, the step is skipped:
  parameters, optimizer and scores keep every bit, only the counters go on.
  `optax.apply_if_finite` would do half of that: it knows nothing of the scores,
  passes over the gradient once more, and applies a bad update in the end.

  Args:
    state: donated.
    windows_ABT: int32, A micro-batches whose gradients are averaged.
    teacher: from `teach_step`; None where `recipe.distill` is 0.
    cfg: architecture of the arrays.
    tx: the optimizer; its `update` may take the `norm` of the gradient.
    recipe: see there.
    score: False once pruning is over; saves the sums over the groups.

  Returns:
    The new state, and `loss` (cross-entropy, nats per token), `divergence`
    (from the teacher, if there is one) and `grad_norm` (before the clip),
    float32 scalars.
  """
  kind, mesh = recipe.saliency if score else None, recipe.compute.mesh
  grad = jax.value_and_grad(_objective, has_aux=True)

  # Traced once, though its shapes are asked for before it is called.
  @jax.jit
  def gradients(params, batch):
    (_, aux), grads = grad(params, state.prune.masks, *batch, cfg, recipe, kind)
    squares = None
    if kind == 'taylor2_micro':
      squares = jax.tree.map(jnp.square, grads)
    elif kind == 'fisher':
      squares = saliency.fisher(params, grads, windows_ABT[0, :, 1:].size)
    return sharding.constrain_params(grads, mesh), squares, aux

  batches = (windows_ABT, teacher)
  first = jax.tree.map(lambda x: x[0], batches)
  accumulate = windows_ABT.shape[0]
  if accumulate == 1:
    # No second copy of the gradient is ever held.
    total = gradients(state.params, first)
  else:
    # The first is added to zeros: to begin with it, in front of the loop, is
    # one more model to trace and to compile, and no step is faster for it.
    zeros = jax.tree.map(
      lambda x: jnp.zeros(x.shape, x.dtype),
      jax.eval_shape(gradients, state.params, first),
    )
    total, _ = jax.lax.scan(
      lambda total, batch: (
        jax.tree.map(jnp.add, total, gradients(state.params, batch)),
        None,
      ),
      zeros,
      batches,
    )
    total = jax.tree.map(lambda x: x / accumulate, total)
  grads, squares, (numbers, activations) = total
  norm = optax.tree.norm(grads)

  @jax.named_scope('update')
  def update(state):
    updates, opt_state = optax.with_extra_args_support(tx).update(
      grads, state.opt_state, state.params, norm=norm
    )
    prune = state.prune
    if score:
      # Of the parameters at which the gradient was taken.
      scores = activations
      if scores is None:
        scores = _scores(
          state, grads, squares, opt_state, norm, windows_ABT, recipe
        )
      prune = prune.replace(
        scores=saliency.average(
          prune.scores, scores, prune.count, recipe.decay
        ),
        count=prune.count + 1,
      )
    return state.replace(
      in_a_row=jnp.zeros((), jnp.int32),
      params=optax.apply_updates(state.params, updates),
      opt_state=opt_state,
      prune=prune,
    )

  def skip(state):
    return state.replace(skipped=state.skipped + 1, in_a_row=state.in_a_row + 1)

  # Costs nothing that can be measured on a CPU; to choose between the old and
  # the new state by `jnp.where` copies it: 40 % more for 32 tokens a step.
  finite = jnp.isfinite(numbers['loss']) & jnp.isfinite(norm)
  state = jax.lax.cond(finite, update, skip, state)
  state = state.replace(step=state.step + 1)
  return _placed(state, tx, mesh), numbers | {'grad_norm': norm}


def _placed(state, tx, mesh):
  """A state where `state.shardings` wants it."""
  if mesh is None:
    return state
  return jax.lax.with_sharding_constraint(
    state, state_lib.shardings(state, tx, mesh)
  )


def _objective(params, masks, windows_BT, teacher, cfg, recipe, kind):
  """What is minimised; and, not differentiated, numbers and activations."""
  final_BTD, taps = model.hidden(
    params,
    masks,
    windows_BT[:, :-1],
    cfg,
    recipe.compute,
    taps=kind == 'activation',
  )

  # A teacher may be silent, as before the recovery.
  taught = 0.0 if teacher is None else recipe.distill

  def read(logits_BtV, labels_Bt, teacher):
    entropy = optax.softmax_cross_entropy_with_integer_labels
    numbers = {'loss': entropy(logits_BtV, labels_Bt)}
    if teacher is not None:
      numbers['divergence'] = distillation.divergence(
        logits_BtV, teacher, recipe.temperature
      )
    return numbers

  objective, numbers = unembedding.mean(
    read,
    {'loss': 1 - taught, 'divergence': taught},
    final_BTD,
    params,
    recipe.compute.mesh,
    windows_BT[:, 1:],
    teacher,
  )
  activations = (
    None if taps is None else saliency.activation(taps, params, masks)
  )
  return objective, (numbers, activations)


@jax.named_scope('scores')
def _scores(state, grads, squares, opt_state, norm, windows_ABT, recipe):
  """The scores of one update; `squares` are means over the micro-batches."""
  params, count = state.params, state.step - state.skipped + 1
  # Without which weights and moments of what is dead would count.
  masks = state.prune.masks
  # Adam's moments start at 0, and are this factor too small.
  unbiased = lambda decay: 1 / (1 - decay ** count.astype(jnp.float32))
  match recipe.saliency:
    case 'taylor1':
      return saliency.taylor1(params, grads)
    case 'taylor1_momentum':
      scores = saliency.taylor1(params, optax.tree.get(opt_state, 'mu'), masks)
      return jax.tree.map(lambda x: unbiased(recipe.b1) * x, scores)
    case 'taylor1_group':
      return saliency.taylor1_group(params, grads)
    case 'taylor2' | 'obd':
      tokens = windows_ABT[..., 1:].size
      scale = tokens * jnp.maximum(norm / recipe.clip, 1.0) ** 2
      scale *= unbiased(recipe.b2)
      squares = optax.tree.get(opt_state, 'nu')
      if recipe.saliency == 'obd':
        return saliency.obd(params, squares, scale, masks)
      return saliency.taylor2(params, grads, squares, scale, masks)
    case 'taylor2_micro':
      tokens = windows_ABT[0, :, 1:].size
      return saliency.taylor2(params, grads, squares, tokens)
    case 'fisher':
      return squares
    case 'magnitude':
      return saliency.magnitude(params, masks)
    case 'random':
      key = jax.random.fold_in(jax.random.key(recipe.seed), state.step)
      return saliency.random(key, params, masks)
  raise ValueError(f'saliency {recipe.saliency!r} is not known')


@functools.partial(
  jax.jit, static_argnames=('cfg', 'damping', 'mesh'), donate_argnames='params'
)
def repair_step(
  params: structure.Params,
  masks: structure.Groups,
  new_masks: structure.Groups,
  windows_ABT: Array,
  *,
  cfg: structure.ModelConfig,
  damping: float,
  mesh: sharding.Mesh | None = None,
) -> tuple[structure.Params, dict[str, dict[str, Array]]]:
  """Repairs the survivors of a prune on the activations of batches.

  Args:
    params: donated.
    masks: before the prune.
    new_masks: after it.
    windows_ABT: int32, micro-batches.
    cfg: architecture of the arrays.
    damping: see `repair.repair`.
    mesh: devices of the arrays; None: one.

  Returns:
    The repaired parameters, and by input ('attn_in', 'heads', 'ffn_in', 'ffn',
    'final'): `damping` (of every layer, [N], of 'final' [1]), `error_without`
    and `error_with` (sums over the layers, []); 0 where nothing was removed.
  """
  params, fits = model_repair.repair_model(
    params, masks, new_masks, windows_ABT[..., :-1], cfg, damping, mesh
  )
  return sharding.constrain_params(params, mesh), {
    name: {
      'damping': jnp.atleast_1d(fit.damping),
      'error_without': fit.error_without.sum(),
      'error_with': fit.error_with.sum(),
    }
    for name, fit in fits.items()
  }


@functools.partial(jax.jit, static_argnames=('cfg', 'compute'))
def batch_loss(
  params: structure.Params,
  masks: structure.Groups,
  windows_BT: Array,
  *,
  cfg: structure.ModelConfig,
  compute: model.Compute,
) -> Array:
  """Mean loss of one batch without training on it, nats per token.

  Args:
    params, masks, cfg: the model.
    windows_BT: int32, of seq_len + 1 tokens.
    compute: how the arithmetic is done.
  """
  return model.loss(params, masks, windows_BT, cfg, compute)


@functools.partial(jax.jit, static_argnames=('cfg', 'compute'))
def trial_losses(
  params: structure.Params,
  masks_C: structure.Groups,
  windows_ABT: Array,
  *,
  cfg: structure.ModelConfig,
  compute: model.Compute,
) -> Array:
  """Mean loss of one batch under each of C masks, [C] nats per token.

  One micro-batch after another, so that the logits are bounded as in training.
  """

  def trial(masks):
    losses_A = jax.lax.map(
      lambda windows_BT: model.loss(params, masks, windows_BT, cfg, compute),
      windows_ABT,
    )
    return losses_A.mean()

  return jax.lax.map(trial, masks_C)


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


@functools.partial(jax.jit, static_argnames=('cfg', 'tx', 'mesh'))
def shrink_step(
  state: state_lib.TrainState,
  *,
  cfg: structure.ModelConfig,
  tx: optax.GradientTransformation,
  mesh: sharding.Mesh | None = None,
) -> tuple[state_lib.TrainState, structure.Groups]:
  """Gathers the survivors of a state into smaller arrays.

  Counters stay as they are: the learning rate and the bias correction of the
  moments go on as if nothing had happened. On a mesh the devices exchange the
  survivors; no array goes through a host.

  Args:
    state: before.
    cfg: the architecture after the shrink (`shrink.shrunk_config`).
    tx: of the state.
    mesh: None: one device.

  Returns:
    The smaller state, and the kept indices into the axes of the larger one.
  """
  prune = state.prune
  kept = shrink.kept_indices(prune.masks, prune.scores, cfg)
  small = shrink.take(state_lib.axes(state, tx), state, kept)
  if mesh is not None:
    replicated = sharding.replicated(mesh)
    kept = jax.lax.with_sharding_constraint(kept, replicated)
  return _placed(small, tx, mesh), kept
