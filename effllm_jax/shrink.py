"""Masks -> smaller arrays: parameters, optimizer state, masks, scores, config.

One function, `take`, gathers the survivors out of any tree whose leaves have
axis letters; the letters come from `structure`. Survivors are ordered by
descending score, so that the next victims sit at the end of an axis.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from effllm_jax import state as state_lib
from effllm_jax import structure

Array = jax.Array


def shrunk_config(
  masks: structure.Groups,
  cfg: structure.ModelConfig,
  quantum: structure.Groups,
) -> structure.ModelConfig:
  """The architecture after a shrink.

  Each width is that of the layer with the most live groups, rounded up to a
  multiple of the type's `quantum`, but never above what the arrays have now. It
  is at least 1: where all layers lost a block, a dead slot stays.
  """

  def width(mask, step, letter):
    most = max(int(np.asarray(mask).sum(-1).max()), 1)
    return min(math.ceil(most / step) * step, getattr(cfg, letter))

  return dataclasses.replace(
    cfg,
    K=width(masks.heads, quantum.heads, 'K'),
    F=width(masks.ffn, quantum.ffn, 'F'),
    D=width(masks.stem, quantum.stem, 'D'),
  )


def kept_indices(
  masks: structure.Groups,
  scores: structure.Groups,
  cfg: structure.ModelConfig,
) -> structure.Groups:
  """Which slots survive, and in which order.

  Args:
    masks: live groups.
    scores: orders the survivors, highest first (ties: lower index first). One
      that is no number comes first: what is alive is kept.
    cfg: the architecture after the shrink (`shrunk_config`). Where a layer has
      fewer live groups than its width, dead slots fill the end; of more than
      that the lowest would be lost.

  Returns:
    int32 indices into the present axes: heads [N, K'], ffn [N, F'], stem [D'].
  """

  def best(mask, score, letters):
    score = jnp.nan_to_num(score, nan=jnp.inf)
    ranked = jnp.argsort(jnp.where(mask, -score, jnp.inf), axis=-1)
    return ranked[..., : getattr(cfg, letters[-1])]

  return jax.tree.map(best, masks, scores, structure.GROUP_AXES)


def take(letters: str, leaf: Array, kept: structure.Groups) -> Array:
  """Gathers the survivors along every prunable axis of one array.

  An axis whose group is per layer (K, F) has its own indices in each slice of
  the leading N axis. Slice after slice: of an array that is split over devices
  XLA makes what it gathers from whole on each of them. Arrays of numpy stay
  with numpy, which compiles nothing.
  """
  if letters[0] != 'N':
    return _take(letters, leaf, kept)
  layers = leaf, kept.heads, kept.ffn
  one = lambda x: _take(letters[1:], x[0], kept.replace(heads=x[1], ffn=x[2]))
  if isinstance(leaf, np.ndarray):
    return np.stack([one(x) for x in zip(*layers, strict=True)])
  return jax.lax.map(one, layers)


def _take(letters, leaf, kept):
  for axis, letter in enumerate(letters):
    if letter in structure.PRUNABLE:
      index = getattr(kept, structure.PRUNABLE[letter])
      leaf = leaf.take(index, axis=axis)
  return leaf


def take_params(
  params: structure.Params, kept: structure.Groups
) -> structure.Params:
  """Survivors of a parameter-shaped tree."""
  return structure.map_axes(lambda s, x: take(s, x, kept), params)


def take_groups(
  groups: structure.Groups, kept: structure.Groups
) -> structure.Groups:
  """Survivors of a mask-shaped tree (masks, scores, origins)."""
  return jax.tree.map(
    lambda s, x: take(s, x, kept), structure.GROUP_AXES, groups
  )


def take_prune(
  prune: state_lib.PruneState, kept: structure.Groups
) -> state_lib.PruneState:
  """Survivors of what pruning knows: masks, scores, origins."""
  return prune.replace(
    masks=take_groups(prune.masks, kept),
    scores=take_groups(prune.scores, kept),
    origin=take_groups(prune.origin, kept),
  )


def take_opt_state(
  tx: optax.GradientTransformation,
  opt_state: Any,
  cfg: structure.ModelConfig,
  kept: structure.Groups,
) -> Any:
  """Survivors of every parameter-shaped subtree of an optimizer state.

  Counters and other scalars stay as they are: the learning-rate schedule and
  the bias correction of the moments go on as if nothing had happened.
  """
  return optax.tree.map_params(
    tx, lambda x, s: take(s, x, kept), opt_state, structure.axes(cfg)
  )
