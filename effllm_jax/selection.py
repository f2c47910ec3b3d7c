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

All other types have to be on a multiple only at the end of the run: every type
under `uniform`, the stem under `ragged`, of which 64 channels are 11 % of a
small model, far more than one prune takes. Rounding at the end would either
take up to 63 channels at a stroke or leave some of the budget unused, so
selection works towards it from the first move. A *block* is `multiple_of`
groups, and a type whose width is not on a multiple has an *open* one, which
will be finished. As long as finishing the open blocks is enough for the final
target, no other block is opened. When it is not, the one whose first move has
the lowest price is opened, of those that do not overshoot the target; where
all do, it is the smallest. The last prune finishes all open blocks: for that
it may take up to one group less than a block of each type.

The last move may save more than was asked for: a head of every layer saves as
much as some hundred channels. So every prune first plans the end of the run by
the scores of now: it makes moves down to the final target, then takes back
blocks that still fit into it, the dearest first, until none fits. The prune
itself removes nothing that this plan keeps. Without such a plan, a small model
that was pruned to a quarter ended 11 % below its target: the last block of the
stem had to go when the layers had already come to their floors.

That plan prefers blocks that fit, which are small and not always cheap: with
channels of SmolLM2 in blocks of 256, a head of every layer is the smallest
block there is, and went first whatever it scored. So under `uniform`, where a
block of channels saves more than one of heads, every prune makes a second plan.
It compares whole blocks by their prices and may take any of them; one that
overshoots is priced by the part of its saving that is still wanted. The first
plan wastes less of the budget and is kept, unless the second loses less than
`_CLEARLY` times as much score ("A block that fits" in HYPOTHESES.md).
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from effllm_jax import budgets
from effllm_jax import moves as moves_lib
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
  One that saves only what is not priced (see `rules.Rules`) costs more than all
  others, and is made last. This is compiled by itself; call it outside of
  `jax.jit`.

  Args:
    scores: float32, nats per token. Ties go to the lower layer, then to the
      lower index. What is no number counts as infinite: it costs most.
    masks: under 'uniform' all layers have the same number of live heads, and of
      live channels; under 'ragged' these are multiples of `rules.multiple_of`.
    target: the result has at most this size, in units of `cost`.
    final: the size that the run will end with, at most `target`. Where it is
      `target` the result has final widths (see the module's text).
    rules: policy, floors, multiples, and what a price counts.
    cost: the budget.

  Returns:
    New masks; dead groups stay dead, and nothing goes that a run to `final`
    would keep by these scores. A target below the size at `rules.smallest()`
    gives that shape: check with `rules.check_target` before a run.

  Raises:
    ValueError: the policy is none of `rules.POLICIES`.
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


@functools.partial(jax.jit, static_argnames='rules')
def _select(scores, masks, target, final, rules, form):
  moves, smallest, multiple = moves_lib.of_all_types(scores, masks, rules)
  live = jnp.stack([getattr(masks, t).sum() for t in structure.TYPES])
  start = live // jnp.array([m.groups for m in moves])
  search = _Search(moves, start, multiple, final, rules, form)
  left = search.plan(target, smallest)
  total = jnp.array([m.score.size - 1 for m in moves])
  return structure.Groups(
    *(
      getattr(masks, t) & (m.at >= removed).reshape(getattr(masks, t).shape)
      for t, m, removed in zip(
        structure.TYPES, moves, total - left, strict=True
      )
    )
  )


@dataclasses.dataclass(frozen=True)
class _Search:
  """The greedy search of one prune, traced: see the module's text.

  `left` is its state everywhere, [3]: how many moves of each type have not been
  made. Those that have been made are the first ones of the type.

  Attributes:
    moves: of each type.
    start: `left` before the prune.
    multiple: how many moves of each type make up a block, [3].
    final: size that the run will end with, units.
    rules: policy, and what a price counts.
    form: size of the live groups, units.
  """

  moves: list[moves_lib.Moves]
  start: Array
  multiple: Array
  final: Array
  rules: rules_lib.Rules
  form: budgets.Form

  def plan(self, target: Array, smallest: Array) -> Array:
    """What is left at `target`, with nothing gone that the end would keep.

    The end of the run is planned first, once or twice; the better plan is the
    least that the prune itself may leave. One loop for all of these searches:
    each shrink compiles it anew.

    Args:
      target: size that this prune has to reach, units.
      smallest: `left` at the floors.
    """
    heads, ffn, _ = self.size(self.start) - self.size(
      self.start - jnp.diag(self.multiple)
    )

    def search(carry, stage):
      best, least_lost = carry
      goal, by_block, made = stage
      # A block of channels that saves no more than one of heads: no second
      # plan, by a goal that is reached already.
      idle = by_block & (ffn <= heads)
      goal = jnp.where(idle, self.size(self.start), goal)
      left = self._taken(goal, jnp.where(made, best, smallest), by_block)
      left = self._filled_up(left)
      lost = self._lost(left)
      better = (lost < least_lost) & ~idle
      return (
        jnp.where(better, left, best),
        jnp.where(better, _CLEARLY * lost, least_lost),
      ), left

    # Goal; whether by the price of whole blocks; whether the end is planned.
    stages = [(self.final, False, False), (target, False, True)]
    if self.rules.policy == 'uniform' and self.rules.multiple_of[1] > 1:
      stages.insert(1, (self.final, True, False))
    stages = tuple(
      jnp.stack([*map(jnp.asarray, x)]) for x in zip(*stages, strict=True)
    )
    nothing = smallest, jnp.float32(jnp.inf)
    _, (*_, left) = jax.lax.scan(search, nothing, stages)
    return left

  def size(self, left: Array) -> Array:
    """Units of what is alive at [..., 3]."""
    return self.form.size(*jnp.moveaxis(self._groups(left), -1, 0))

  def _groups(self, left):
    return left * jnp.array([m.groups for m in self.moves])

  def _made(self, left):
    """How many moves of each type have been made at `left`."""
    return jnp.array([m.score.size - 1 for m in self.moves]) - left

  def _prices_at(self, left, back=0, by_block=False):
    """Price of each type's next move; of the last one made with `back` 1."""
    at = self._made(left) - back
    score = jnp.stack(
      [
        jnp.where(by_block, m.block, m.score)[at[i]]
        for i, m in enumerate(self.moves)
      ]
    )
    units = jnp.stack(_priced(self._groups(left), self.rules, self.form))
    return _price(score, units)

  def _taken(self, target, least, by_block):
    """What the greedy choice leaves at `target`, of no type below `least`."""

    def unfinished(left):
      unaligned = ((left % self.multiple != 0) & (left > least)).any()
      at_the_end = target == self.final
      wanted = (self.size(left) > target) | (at_the_end & unaligned)
      return wanted & self._allowed(left, least, by_block)[0].any()

    def move(left):
      may, waste = self._allowed(left, least, by_block)
      price = self._prices_at(left, by_block=by_block)
      price = _finite(price * waste.astype(price.dtype))
      cheapest = jnp.argmin(jnp.where(may, price, jnp.inf))
      return left.at[cheapest].add(-1)

    return jax.lax.while_loop(unfinished, move, self.start)

  def _allowed(self, left, least, by_block):
    """Which types may move, and how many times its price each then costs."""
    multiple, final = self.multiple, self.final
    is_open = left % multiple != 0
    landed = left - left % multiple
    size, after = self.size(landed), self.size(landed - jnp.diag(multiple))
    # The next block of an open type is a candidate too: if it is the best one,
    # nothing else opens until its turn has come.
    block = (landed - multiple >= least) & (size > final) & (after < size)
    fits = block & (after >= final)
    mildest = block & (after == jnp.max(jnp.where(block, after, -1)))
    opens = jnp.where(by_block, block, jnp.where(fits.any(), fits, mildest))
    saved, wanted = size - after, size - final
    waste = jnp.where(
      by_block & ~is_open & block, saved / jnp.minimum(saved, wanted), 1
    )
    return jnp.where(is_open, left - 1 >= least, opens), waste

  def _filled_up(self, left):
    """Takes blocks back that fit into the final size, the dearest first."""

    def fits(left):
      fuller = left + jnp.diag(self.multiple)
      return (left + self.multiple <= self.start) & (
        self.size(fuller) <= self.final
      )

    def take_back(left):
      price = self._prices_at(left, back=1)
      dearest = jnp.argmax(jnp.where(fits(left), price, -jnp.inf))
      return left.at[dearest].add(self.multiple[dearest])

    return jax.lax.while_loop(lambda left: fits(left).any(), take_back, left)

  def _lost(self, left):
    """Sum of the scores of all groups that are gone at `left`."""
    made = self._made(left)
    gone = [
      m.groups
      * jnp.where(
        # Before the prune they were dead where the score is -inf.
        (jnp.arange(m.score.size) < made[i]) & (m.score > -jnp.inf),
        m.score,
        0,
      ).sum()
      for i, m in enumerate(self.moves)
    ]
    return sum(gone).astype(jnp.float32)


@functools.partial(jax.jit, static_argnames='rules')
def _trials(scores, masks, saved, rules, form):
  moves, smallest, _ = moves_lib.of_all_types(scores, masks, rules)
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
  # Not in the scores' type: in float16 a head of a large model saves infinity.
  units = jnp.asarray(units).astype(jnp.float32)
  return jnp.where(units > 0, score / units, jnp.inf)


def _finite(price):
  """Infinity is for what is not allowed."""
  return jnp.minimum(price, jnp.finfo(price.dtype).max)
