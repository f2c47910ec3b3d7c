"""Scores -> masks: prices, and the greedy choice.

A group's *cost* is what its removal saves of the budget, in parameters, bytes,
FLOPs or milliseconds (`budgets.Form.savings`), its *price* is score / cost.
`select` makes the cheapest move, one after another, until the live groups are
within the target; costs follow every move (a feed-forward channel costs
3 D_live parameters, so it gets cheaper as the stem shrinks).

Policy `uniform`: one move takes the lowest head of every layer, or the lowest
feed-forward channel of every layer, or the lowest stem channel, and its price
is the mean price of what it takes; all layers keep one width, and the result is
a plain Llama.

Policy `ragged`: one move takes the lowest heads, or feed-forward channels, of
one layer, as many as `multiple_of` says, wherever their mean price is lowest;
or the lowest stem channel. So the widths differ from layer to layer but stay on
multiples all the time, and where the floor is 0 a layer can lose a whole block.

`multiple_of` of the other types (all under `uniform`, the stem under `ragged`:
64 of its channels are 11 % of a small model, far more than one prune takes)
holds for the final shape. Rounding at the end would have to take up to 63
channels at a stroke or leave the budget unused, so selection keeps an eye on it
from the first move: a type whose width is not on a multiple is *open* and its
block will be finished; a further block is opened, by the price of its first
move, only while finishing the open ones is not enough for the final target, and
of the blocks that would overshoot it the smallest is taken. The last prune
finishes all open blocks, of each open type up to one group less than a block.

The last move may save more than was asked for: a head of every layer as much as
some hundred channels. So every prune plans to the end: from where the run would
end with the scores of now it takes back blocks that fit into the final target,
the dearest first, until none does, and it removes nothing that stays in this
plan. Without, a small model of a quarter ended 11 % below its target, with
layers at their floors when the last block of the stem had to go.

What fits is small, and not always cheap: with channels of SmolLM2 in blocks of
256 a head of every layer is the smallest block there is, and went first
whatever it scored. So under `uniform`, where a block of channels saves more
than one of heads, every prune plans a second time, by the price of whole blocks
and with any of them: one that overshoots costs as much more as it saves in
vain. Of both plans the first is kept, which wastes less, unless the second
loses less than `_CLEARLY` of its score ("A block that fits" in HYPOTHESES.md).
"""

import functools
from typing import Any
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from effllm_jax import budgets
from effllm_jax import rules as rules_lib
from effllm_jax import structure

Array = jax.Array

# Scores are estimates: for what may be chance no plan is changed.
_CLEARLY = 0.5


def live_widths(masks: structure.Groups) -> dict[str, np.ndarray]:
  """Live groups on the host: heads [N], ffn [N], stem [] (int64)."""
  return {
    'heads': np.asarray(masks.heads).sum(-1),
    'ffn': np.asarray(masks.ffn).sum(-1),
    'stem': np.asarray(masks.stem).sum(-1),
  }


def extents(masks: structure.Groups) -> dict[str, np.ndarray]:
  """1 + the last live slot of every axis, on the host; see `live_widths`."""

  def extent(mask):
    slots = np.arange(1, mask.shape[-1] + 1)
    return np.where(np.asarray(mask), slots, 0).max(-1)

  return {t: extent(getattr(masks, t)) for t in structure.TYPES}


def live_params(masks: structure.Groups, cfg: structure.ModelConfig) -> int:
  """Exact number of parameters that belong to live groups (on the host)."""
  return budgets.params(cfg).live(masks)


def prices(
  scores: structure.Groups,
  masks: structure.Groups,
  rules: rules_lib.Rules,
  cost: budgets.Cost,
) -> structure.Groups:
  """Score per saved budget unit, float32; 0 for dead groups.

  With `rules.price_embedding` off, a stem channel's saving leaves out its
  entries of the embedding and of the output matrix. Where nothing that counts
  is saved the price is infinite.
  """
  with jax.enable_x64(True):
    return _prices(scores, masks, rules, cost.form)


def mean_prices(
  scores: structure.Groups,
  masks: structure.Groups,
  rules: rules_lib.Rules,
  cost: budgets.Cost,
) -> structure.Groups:
  """Mean price of the live groups of each type, float32 scalars."""
  with jax.enable_x64(True):
    return _mean_prices(scores, masks, rules, cost.form)


def select(
  scores: structure.Groups,
  masks: structure.Groups,
  target: int,
  final: int,
  rules: rules_lib.Rules,
  cost: budgets.Cost,
) -> structure.Groups:
  """Masks with the cheapest groups removed.

  A move that saves nothing (a latency fit may say so of a type) is not made.
  One that saves only what is not priced (see `rules.Rules`) costs
  more than all others, and is made last.

  Args:
    scores: float32, nats per token. Ties go to the lower layer, then to the
      lower index.
    masks: under 'uniform' all layers have the same number of live heads, and of
      live channels; under 'ragged' these are multiples of `rules.multiple_of`.
    target: the result has at most this size, in units of `cost`.
    final: the size that the run will end with. Where it equals `target` the
      result has final widths (see the module's text).
    rules: policy, floors, multiples, and what a price counts.
    cost: the budget.

  Returns:
    New masks; dead groups stay dead, and nothing goes that a run to `final`
    would keep by these scores. A target below the size at `rules.smallest()`
    gives that shape: check with `rules.check_target` before a run.
  """
  # Sizes need more than 32 bits; everything else keeps its type. The switch is
  # part of jit's key, so the compiled function is found again.
  with jax.enable_x64(True):
    return _select(
      scores, masks, np.int64(target), np.int64(final), rules, cost.form
    )


def trials(
  scores: structure.Groups,
  masks: structure.Groups,
  saved: int,
  rules: rules_lib.Rules,
  cost: budgets.Cost,
) -> structure.Groups:
  """What a prune would leave if it took groups of one type alone.

  Args:
    scores: within a type, the lowest go first, as in `select`.
    masks: as for `select`.
    saved: positive, in units of `cost`: a trial takes the fewest moves that
      save as much, by what is priced; one at least, and none from the floors.
    rules: policy, floors, and what a price counts.
    cost: the budget.

  Returns:
    [4, ...]: `masks`, then each type's trial, in the order of
    `structure.TYPES`.
  """
  with jax.enable_x64(True):
    return _trials(scores, masks, np.int64(saved), rules, cost.form)


class _Moves(NamedTuple):
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


@functools.partial(jax.jit, static_argnames='rules')
def _select(scores, masks, target, final, rules, form):
  moves, smallest, multiple = _all_moves(scores, masks, rules)
  groups = jnp.array([m.groups for m in moves])
  total = jnp.array([m.score.size - 1 for m in moves])
  live = jnp.stack([getattr(masks, t).sum() for t in structure.TYPES])

  def size(left):
    return form.size(*jnp.moveaxis(left * groups, -1, 0))

  def price(left, made=0, by_block=False):
    """Of the next move of each type; `made` 1: of the last one."""
    score = jnp.stack(
      [
        jnp.where(by_block, m.block, m.score)[total[i] - left[i] - made]
        for i, m in enumerate(moves)
      ]
    )
    worth = _price(score, jnp.stack(_priced(left * groups, rules, form)))
    # Infinity is for what is not allowed.
    return jnp.minimum(worth, jnp.finfo(worth.dtype).max)

  def taken(target, least, by_block):
    """How many moves of each type are left at `target`, none below `least`."""

    def allowed(left):
      """Which types may move, and how many times its worth each then costs."""
      open_block = left % multiple != 0
      landed = left - left % multiple
      after = size(landed - jnp.diag(multiple))
      # The next block of an open type is a candidate too: if it is the best
      # one, nothing else opens until its turn has come.
      block = (
        (landed - multiple >= least)
        & (size(landed) > final)
        & (after < size(landed))
      )
      fits = block & (after >= final)
      mildest = block & (after == jnp.max(jnp.where(block, after, -1)))
      opens = jnp.where(by_block, block, jnp.where(fits.any(), fits, mildest))
      saved, wanted = size(landed) - after, size(landed) - final
      waste = jnp.where(
        by_block & ~open_block & block, saved / jnp.minimum(saved, wanted), 1
      )
      return jnp.where(open_block, left - 1 >= least, opens), waste

    def unfinished(left):
      unaligned = ((left % multiple != 0) & (left > least)).any()
      wanted = (size(left) > target) | ((target == final) & unaligned)
      return wanted & allowed(left)[0].any()

    def move(left):
      may, waste = allowed(left)
      worth = price(left, by_block=by_block)
      worth *= waste.astype(worth.dtype)
      worth = jnp.minimum(worth, jnp.finfo(worth.dtype).max)
      cheapest = jnp.argmin(jnp.where(may, worth, jnp.inf))
      return left.at[cheapest].add(-1)

    return jax.lax.while_loop(unfinished, move, start)

  def fits_again(left):
    fuller = left + jnp.diag(multiple)
    return (left + multiple <= start) & (size(fuller) <= final)

  def take_back(left):
    dearest = jnp.argmax(jnp.where(fits_again(left), price(left, 1), -jnp.inf))
    return left.at[dearest].add(multiple[dearest])

  def lost(left):
    """Sum of the scores of all groups that are gone at `left`."""
    gone = [
      m.groups
      * jnp.where(
        (jnp.arange(m.score.size) < total[i] - left[i]) & (m.score > -jnp.inf),
        m.score,
        0,
      ).sum()
      for i, m in enumerate(moves)
    ]
    return sum(gone).astype(jnp.float32)

  def plan(carry, stage):
    best, most = carry
    goal, by_block, made = stage
    idle = by_block & ~large
    goal = jnp.where(idle, size(start), goal)
    left = taken(goal, jnp.where(made, best, smallest), by_block)
    left = jax.lax.while_loop(
      lambda left: fits_again(left).any(), take_back, left
    )
    better = (lost(left) < most) & ~idle
    return (
      jnp.where(better, left, best),
      jnp.where(better, _CLEARLY * lost(left), most),
    ), left

  # To the end first, below which the prune then does not go. One loop for all:
  # each shrink compiles this anew.
  start = live // groups
  heads, ffn, _ = size(start) - size(start - jnp.diag(multiple))
  large = ffn > heads
  stages = [(final, False, False), (target, False, True)]
  if rules.policy == 'uniform' and rules.multiple_of[1] > 1:
    stages.insert(1, (final, True, False))
  stages = [
    jnp.stack([*map(jnp.asarray, x)]) for x in zip(*stages, strict=True)
  ]
  _, (*_, left) = jax.lax.scan(
    plan, (smallest, jnp.float32(jnp.inf)), tuple(stages)
  )
  return structure.Groups(
    *(
      getattr(masks, t) & (m.at >= removed).reshape(getattr(masks, t).shape)
      for t, m, removed in zip(
        structure.TYPES, moves, total - left, strict=True
      )
    )
  )


@functools.partial(jax.jit, static_argnames='rules')
def _trials(scores, masks, saved, rules, form):
  moves, smallest, _ = _all_moves(scores, masks, rules)
  live = [getattr(masks, t).sum() for t in structure.TYPES]
  units = _priced(live, rules, form)
  tried = [masks]
  for i, (name, m) in enumerate(zip(structure.TYPES, moves, strict=True)):
    left = live[i] // m.groups
    unit = jnp.asarray(units[i] * m.groups)
    count = jnp.where(unit > 0, -(-saved // jnp.maximum(unit, 1)), 1)
    count = jnp.minimum(count, jnp.maximum(left - smallest[i], 0))
    mask = getattr(masks, name)
    kept = (m.at >= m.score.size - 1 - left + count).reshape(mask.shape)
    tried.append(masks.replace(**{name: mask & kept}))
  return jax.tree.map(lambda *leaves: jnp.stack(leaves), *tried)


def _all_moves(scores, masks, rules):
  """The moves of each type; floors and multiples, counted in moves.

  A move is a block under 'ragged'. The stem is one layer, taken channel by
  channel under both policies.
  """
  smallest, multiple = list(rules.smallest()), list(rules.multiple_of)
  moves = []
  for i, name in enumerate(structure.TYPES):
    score_NX = jnp.atleast_2d(getattr(scores, name))
    mask_NX = jnp.atleast_2d(getattr(masks, name))
    if rules.policy == 'ragged' and name != 'stem':
      kept = smallest[i] // multiple[i]
      moves.append(_ragged(score_NX, mask_NX, multiple[i], kept))
      # A layer that has fewer, of a source pruned before, protects no more.
      live_N = mask_NX.sum(-1) // multiple[i]
      smallest[i], multiple[i] = jnp.minimum(live_N, kept).sum(), 1
    else:
      moves.append(_uniform(score_NX, mask_NX, multiple[i]))
  return moves, jnp.array(smallest), jnp.array(multiple)


def _uniform(score_NX, mask_NX, block) -> _Moves:
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
  return _Moves(
    rank_NX,
    jnp.append(mean_X, jnp.inf),
    jnp.append(of_block_X, jnp.inf),
    len(mask_NX),
  )


def _ragged(score_NX, mask_NX, block, kept) -> _Moves:
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
  return _Moves(at, score, score, block)


@functools.partial(jax.jit, static_argnames='rules')
def _prices(scores, masks, rules, form):
  live = [getattr(masks, t).sum() for t in structure.TYPES]
  return jax.tree.map(
    # A group that died lately still has a score in the running average.
    lambda s, c, m: jnp.where(m, _price(s, c), 0.0),
    scores,
    structure.Groups(*_priced(live, rules, form)),
    masks,
  )


@functools.partial(jax.jit, static_argnames='rules')
def _mean_prices(scores, masks, rules, form):
  return jax.tree.map(
    lambda p, m: p.sum() / jnp.maximum(m.sum(), 1).astype(p.dtype),
    _prices(scores, masks, rules, form),
    masks,
  )


def _priced(live, rules, form) -> tuple[Any, Any, Any]:
  """Units by which one removal of each type is priced; int64 scalars."""
  head, ffn, stem = form.savings(*live)
  unpriced = 0 if rules.price_embedding else form.unpriced_stem
  return head, ffn, stem - unpriced


def _price(score, units):
  units = jnp.asarray(units).astype(score.dtype)
  return jnp.where(units > 0, score / units, jnp.inf)
