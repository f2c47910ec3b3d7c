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


def take(letters: Any, tree: Any, kept: structure.Groups) -> Any:
  """Gathers the survivors along every prunable axis of a tree's arrays.

  An axis whose group is per layer (K, F) has its own indices in each slice of
  the leading N axis. Slice after slice: of an array that is split over devices
  XLA makes what it gathers from whole on each of them. All arrays in one loop:
  with one for each, a shrink of a small model took twice as long to compile.
  Arrays of numpy stay with numpy, which compiles nothing.

  Args:
    letters: the axis letters of every array; '' leaves one as it is.
    tree: arrays, all of numpy or all of jax.
    kept: int32 indices, of `kept_indices`.
  """
  leaves, treedef = jax.tree.flatten(tree)
  pairs = list(zip(treedef.flatten_up_to(letters), leaves, strict=True))
  layered = [(axes[1:], x) for axes, x in pairs if axes.startswith('N')]

  def one_layer(layer):
    arrays, heads, ffn = layer
    own = kept.replace(heads=heads, ffn=ffn)
    return [
      _take(axes, x, own) for (axes, _), x in zip(layered, arrays, strict=True)
    ]

  layers = [x for _, x in layered], kept.heads, kept.ffn
  if all(isinstance(x, np.ndarray) for x in leaves):
    taken = [
      one_layer(jax.tree.map(lambda x, n=n: x[n], layers))
      for n in range(len(kept.heads))
    ]
    taken = map(np.stack, zip(*taken, strict=True))
  else:
    taken = iter(jax.lax.map(one_layer, layers))
  return treedef.unflatten(
    next(taken) if axes.startswith('N') else _take(axes, x, kept)
    for axes, x in pairs
  )


def _take(letters, leaf, kept):
  for axis, letter in enumerate(letters):
    if letter in structure.PRUNABLE:
      index = getattr(kept, structure.PRUNABLE[letter])
      # They are all within, which XLA need not check.
      leaf = leaf.take(index, axis=axis, mode='clip')
  return leaf


def take_params(
  params: structure.Params, kept: structure.Groups
) -> structure.Params:
  """Survivors of a parameter-shaped tree."""
  return take(structure.axes_of(params), params, kept)


def take_groups(
  groups: structure.Groups, kept: structure.Groups
) -> structure.Groups:
  """Survivors of a mask-shaped tree (masks, scores, origins)."""
  return take(structure.GROUP_AXES, groups, kept)
