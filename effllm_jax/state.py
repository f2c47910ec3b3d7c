"""Everything that a training step reads and writes, as arrays only."""

from typing import Any

from flax import struct
import jax
import jax.numpy as jnp
import optax

from effllm_jax import sharding
from effllm_jax import structure

Array = jax.Array


@struct.dataclass
class PruneState:
  """What pruning knows; a few kilobytes.

  Attributes:
    masks: bool, True = alive; heads [N, K], ffn [N, F], stem [D].
    scores: float32 running average of the saliency, nats per token for most
      kinds (see `saliency`).
    count: int32 [], number of batches in `scores`.
    origin: int32, which group of the run's source model sits in each slot, so
      that survivors can be named after any number of shrinks.
  """

  masks: structure.Groups
  scores: structure.Groups
  count: Array
  origin: structure.Groups


# The axis letters of each array.
PRUNE_AXES = PruneState(
  masks=structure.GROUP_AXES,
  scores=structure.GROUP_AXES,
  count='',
  origin=structure.GROUP_AXES,
)


@struct.dataclass
class TrainState:
  """A run at one moment.

  Attributes:
    step: int32 [], batches that have been seen.
    skipped: int32 [], how many of them changed nothing, because the loss or the
      gradient was not finite; `step - skipped` counts optimizer updates.
    in_a_row: int32 [], how many of the last ones were skipped.
    params: float32.
    opt_state: of the optimizer.
    prune: masks and scores.
  """

  step: Array
  skipped: Array
  in_a_row: Array
  params: structure.Params
  opt_state: Any
  prune: PruneState


def fresh_prune_state(cfg: structure.ModelConfig) -> PruneState:
  """Nothing scored, nothing pruned, every slot holds its own group."""
  alive = structure.all_alive(cfg)
  return PruneState(
    masks=alive,
    scores=jax.tree.map(lambda m: jnp.zeros(m.shape, jnp.float32), alive),
    count=jnp.zeros((), jnp.int32),
    origin=slots(cfg),
  )


def slots(cfg: structure.ModelConfig) -> structure.Groups:
  """The `origin` of a model that is its own source, int32."""
  return jax.tree.map(
    lambda shape: jnp.broadcast_to(
      jnp.arange(shape[-1], dtype=jnp.int32), shape
    ),
    structure.group_shapes(cfg),
    is_leaf=lambda x: isinstance(x, tuple),
  )


def fresh_state(
  params: structure.Params,
  cfg: structure.ModelConfig,
  tx: optax.GradientTransformation,
  masks: structure.Groups | None = None,
) -> TrainState:
  """The state before the first step; takes `params` as they are.

  `masks` say what is dead in a source that was pruned before; None: nothing.
  """
  prune = fresh_prune_state(cfg)
  if masks is not None:
    prune = prune.replace(masks=jax.tree.map(jnp.asarray, masks))
  return TrainState(
    step=jnp.zeros((), jnp.int32),
    skipped=jnp.zeros((), jnp.int32),
    in_a_row=jnp.zeros((), jnp.int32),
    params=params,
    opt_state=tx.init(params),
    prune=prune,
  )


def abstract_state(
  cfg: structure.ModelConfig,
  tx: optax.GradientTransformation,
  mesh: sharding.Mesh | None = None,
) -> TrainState:
  """Shapes and dtypes of a state of this architecture, without arrays.

  With a mesh also where each array lives on it.
  """
  state = jax.eval_shape(
    lambda params: fresh_state(params, cfg, tx), structure.shapes(cfg)
  )
  if mesh is None:
    return state
  return jax.tree.map(
    lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
    state,
    shardings(state, tx, mesh),
  )


def axes(state: TrainState, tx: optax.GradientTransformation) -> TrainState:
  """The axis letters of every array: of moments those of their parameters.

  '' for counters and other scalars.
  """
  params = structure.axes_of(state.params)
  moments = _of_moments(params, state, tx, other='')
  scalars = jax.tree.map(lambda _: '', state)
  return scalars.replace(params=params, opt_state=moments, prune=PRUNE_AXES)


def shardings(
  state: TrainState, tx: optax.GradientTransformation, mesh: sharding.Mesh
) -> TrainState:
  """Where each array of a state lives: moments where their parameters do."""
  params, whole = sharding.params(state.params, mesh), sharding.replicated(mesh)
  moments = _of_moments(params, state, tx, other=whole)
  replicated = jax.tree.map(lambda _: whole, state)
  return replicated.replace(params=params, opt_state=moments)


def _of_moments(table, state, tx, other):
  """A table of parameters as one of an optimizer state; `other`: of scalars."""
  return optax.tree.map_params(
    tx,
    lambda _, entry: entry,
    state.opt_state,
    table,
    transform_non_params=lambda _: other,
  )


def placed_state(
  params: structure.Params,
  cfg: structure.ModelConfig,
  tx: optax.GradientTransformation,
  mesh: sharding.Mesh,
  masks: structure.Groups | None = None,
) -> TrainState:
  """`fresh_state` of host arrays, made in shards: never whole on one device."""
  spread = shardings(abstract_state(cfg, tx), tx, mesh)
  make = jax.jit(
    lambda params: fresh_state(params, cfg, tx, masks),
    donate_argnums=0,
    out_shardings=spread,
  )
  return make(sharding.put(params, spread.params))
