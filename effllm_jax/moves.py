"""The moves that a prune may make: which groups go together, in which order.

A policy is no more than this. Under `uniform` a move takes the lowest slot of
every layer, under `ragged` the lowest block of `multiple_of` slots of any one
layer. `selection` decides between the types.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from effllm_jax import rules as rules_lib
from effllm_jax import structure

Array = jax.Array

# Of a score. Sums of float32 end soon behind it, and infinity is for what is
# kept.
HIGHEST = 1e30


class Moves(NamedTuple):
  """The moves of one type, in the order in which they can be made.

  Which move is next never depends on how many moves of other types were made,
  so a counter per type is the whole state of the search. Moves whose groups are
  dead come first: they have been made.

  Attributes:
    at: [N, X] int64, position of the move that takes each group.
    score: [moves + 1] float32, mean score of what a move takes; one entry more,
      so that there is always a next one to look at.
    block: [moves + 1] float32, mean score of the block of `multiple_of` moves
      that a move belongs to.
    groups: how many groups a move takes.
  """

  at: Array
  score: Array
  block: Array
  groups: int


def of_all_types(
  scores: structure.Groups, masks: structure.Groups, rules: rules_lib.Rules
) -> tuple[list[Moves], Array, Array]:
  """The moves of each type, and what limits them, in the order of the types.

  Args:
    scores: of all groups.
    masks: what is alive.
    rules: policy, floors and multiples.

  Returns:
    The moves; how many of each type are never made, because of the floors, [3];
    how many of each type make up one of its multiples, [3].

  Raises:
    ValueError: a policy that is none of `rules.POLICIES`.
  """
  if rules.policy not in rules_lib.POLICIES:
    raise ValueError(
      f'policy {rules.policy!r} is not one of {", ".join(rules_lib.POLICIES)}'
    )
  smallest, multiple = list(rules.smallest()), list(rules.multiple_of)
  moves = []
  for i, name in enumerate(structure.TYPES):
    score_NX = jnp.atleast_2d(getattr(scores, name)).astype(jnp.float32)
    score_NX = jnp.nan_to_num(score_NX, nan=HIGHEST)
    score_NX = jnp.clip(score_NX, -HIGHEST, HIGHEST)
    mask_NX = jnp.atleast_2d(getattr(masks, name))
    # The stem is one layer, taken channel by channel under both policies.
    if rules.policy == 'ragged' and name != 'stem':
      kept = smallest[i] // multiple[i]
      moves.append(_ragged(score_NX, mask_NX, multiple[i], kept))
      # In blocks, which are the moves here. A layer that has fewer than the
      # floor, of a source pruned before, keeps what it has.
      live_N = mask_NX.sum(-1) // multiple[i]
      smallest[i], multiple[i] = jnp.minimum(live_N, kept).sum(), 1
    else:
      moves.append(_uniform(score_NX, mask_NX, multiple[i]))
  return moves, jnp.array(smallest), jnp.array(multiple)


def _uniform(score_NX, mask_NX, block) -> Moves:
  """Move j takes what has rank j among the slots of each layer."""
  score_NX = jnp.where(mask_NX, score_NX, -jnp.inf)
  rank_NX = jnp.argsort(jnp.argsort(score_NX, axis=-1), axis=-1)
  mean_X = jnp.sort(score_NX, axis=-1).mean(0)
  # Counted from the highest score down, as widths are; what has died of the
  # lowest block of all is not missed.
  pad = -len(mean_X) % block
  mean_BX = jnp.pad(mean_X, (pad, 0), constant_values=-jnp.inf)
  mean_BX = mean_BX.reshape(-1, block)
  live_BX = mean_BX > -jnp.inf
  mean_B = jnp.where(live_BX, mean_BX, 0).sum(-1) / live_BX.sum(-1).clip(1)
  of_block_X = jnp.repeat(mean_B.astype(mean_X.dtype), block)[pad:]
  return Moves(
    rank_NX,
    jnp.append(mean_X, jnp.inf),
    jnp.append(of_block_X, jnp.inf),
    len(mask_NX),
  )


def _ragged(score_NX, mask_NX, block, kept) -> Moves:
  """A move takes a block of one layer; the `kept` best of each come last."""
  X = mask_NX.shape[-1]
  score_NX = jnp.where(mask_NX, score_NX, -jnp.inf)
  # Blocks are counted from the highest score down: a shrink may have left a
  # width that is not on a multiple, with dead slots at the low end.
  pad = -X % block
  rank_NX = jnp.argsort(jnp.argsort(score_NX, axis=-1), axis=-1) + pad
  sorted_NX = jnp.pad(
    jnp.sort(score_NX, axis=-1), ((0, 0), (pad, 0)), constant_values=-jnp.inf
  )
  mean_NB = sorted_NX.reshape(len(mask_NX), -1, block).mean(-1)
  # The order in a layer must hold, in whatever order a device adds a block up.
  mean_NB = jax.lax.cummax(mean_NB, axis=1)
  best_B = jnp.arange(mean_NB.shape[1]) >= mean_NB.shape[1] - kept
  key_NB = jnp.where(best_B & (mean_NB > -jnp.inf), jnp.inf, mean_NB)
  # Stable: ties go to the lower layer, then to the lower block.
  at_NB = jnp.argsort(jnp.argsort(key_NB, axis=None)).reshape(key_NB.shape)
  score = jnp.append(jnp.sort(key_NB, axis=None), jnp.inf)
  at = jnp.take_along_axis(at_NB, rank_NX // block, axis=1)
  return Moves(at, score, score, block)
