"""Scores -> masks: costs, the greedy choice, and the schedule of the size.

A group's *cost* is the number of live parameters that its removal saves, its
*price* is score / cost. `select` removes the cheapest groups, one move after
another, until the live parameters are within the target; costs follow every
move (a feed-forward channel costs 3 D_live, so it gets cheaper as the stem
shrinks). Policy `uniform`: one move takes the lowest head of every layer, or
the lowest feed-forward channel of every layer, or the lowest stem channel, and
its price is the mean price of what it takes; all layers keep one width, and the
result is a plain Llama.

`multiple_of` holds for the final shape. Rounding at the end would have to take
up to 63 channels at a stroke or leave the budget unused, so selection keeps an
eye on it from the first move: a type whose width is not on a multiple is *open*
and its block will be finished; a further block is opened only while finishing
the open ones is not enough for the final target, and of the blocks that would
overshoot it the smallest is taken. The last prune finishes all open blocks.
"""

from collections.abc import Mapping
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from effllm_jax import errors
from effllm_jax import structure

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class Rules:
  """What selection goes by; per type as (heads, ffn, stem).

  Attributes:
    floors: least number of groups that stay alive in every layer (heads, ffn)
      or in the model (stem); at least 1.
    multiple_of: the final widths are multiples of these.
    price_embedding: whether the embeddings count in the price of a stem
      channel. They are most of what it saves (21 % of a 135M model), and their
      gradients are tiny: counted, they make the stem look cheap, and it goes
      first; in the paper's plots it goes last. The size always counts them.
  """

  floors: tuple[int, int, int]
  multiple_of: tuple[int, int, int]
  price_embedding: bool

  def smallest(self) -> tuple[int, int, int]:
    """The floors, rounded up to the multiples: the smallest final shape."""
    return tuple(
      -(-f // m) * m for f, m in zip(self.floors, self.multiple_of, strict=True)
    )

  @classmethod
  def of(
    cls,
    floors: Mapping[str, int],
    multiple_of: Mapping[str, int],
    price_embedding: bool,
  ) -> 'Rules':
    """From mappings whose keys are the pruning types, as in a config."""
    return cls(
      floors=tuple(floors[t] for t in structure.TYPES),
      multiple_of=tuple(multiple_of[t] for t in structure.TYPES),
      price_embedding=price_embedding,
    )


@dataclasses.dataclass(frozen=True)
class Schedule:
  """The size that a run must have reached, as a line in tokens.

  Attributes:
    begin: tokens seen when pruning starts.
    end: tokens seen when the target is reached; recovery follows.
    start: parameters of the source model.
    target: parameters at the end.
  """

  begin: int
  end: int
  start: int
  target: int

  def at(self, tokens: int) -> int:
    """Most live parameters allowed after `tokens`; exact integers."""
    if tokens >= self.end:
      return self.target
    done = max(tokens - self.begin, 0)
    drop = (self.start - self.target) * done // (self.end - self.begin)
    return self.start - drop


def check_target(cfg: structure.ModelConfig, rules: Rules, target: int) -> None:
  """Raises InputError unless a model of `cfg` can be pruned to `target`."""
  widths = tuple(cfg.widths()[t] for t in structure.TYPES)
  for i, name in enumerate(structure.TYPES):
    for key, value in (
      ('floors', rules.floors[i]),
      ('multiple_of', rules.multiple_of[i]),
    ):
      if not 1 <= value <= widths[i]:
        raise errors.InputError(
          f'prune.{key}.{name} {value} is not between 1 and the source '
          f"model's {widths[i]}; set --config.prune.{key}.{name}"
        )
  dense = cfg.num_params()
  heads, ffn, stem = rules.smallest()
  least = dataclasses.replace(cfg, K=heads, F=ffn, D=stem).num_params()
  if target >= dense:
    raise errors.InputError(
      f"target_params {target:,} is not below the source model's {dense:,}; "
      'set --config.prune.target_params'
    )
  if target < least:
    raise errors.InputError(
      f'target_params {target:,} is below {least:,}, the size at the floors '
      f'(heads {heads}, ffn {ffn}, stem {stem}); raise '
      '--config.prune.target_params or lower --config.prune.floors'
    )


def live_widths(masks: structure.Groups) -> dict[str, np.ndarray]:
  """Live groups on the host: heads [N], ffn [N], stem [] (int64)."""
  return {
    'heads': np.asarray(masks.heads).sum(-1),
    'ffn': np.asarray(masks.ffn).sum(-1),
    'stem': np.asarray(masks.stem).sum(-1),
  }


def live_params(masks: structure.Groups, cfg: structure.ModelConfig) -> int:
  """Exact number of parameters that belong to live groups (on the host)."""
  live = live_widths(masks)
  rows = int(live['heads'].sum()) * cfg.head_rows() + 3 * int(live['ffn'].sum())
  return int(live['stem']) * (rows + cfg.stem_rows())


def costs(
  masks: structure.Groups, cfg: structure.ModelConfig
) -> structure.Groups:
  """Live parameters saved by removing each single group; 0 for dead ones.

  int32, shapes of `masks`. Every parameter lies in a row of length D, so a
  head costs (2G + 2) H D_live, a feed-forward channel 3 D_live, and a stem
  channel the number of live rows.
  """
  live_D = masks.stem.sum()
  rows = (
    masks.heads.sum() * cfg.head_rows() + 3 * masks.ffn.sum() + cfg.stem_rows()
  )
  return structure.Groups(
    heads=masks.heads * (live_D * cfg.head_rows()),
    ffn=masks.ffn * (live_D * 3),
    stem=masks.stem * rows,
  )


def prices(
  scores: structure.Groups,
  masks: structure.Groups,
  cfg: structure.ModelConfig,
  rules: Rules,
) -> structure.Groups:
  """Score per saved parameter, float32; 0 for dead groups.

  With `rules.price_embedding` off, a stem channel's saving leaves out its
  entries of the embedding and of the output matrix.
  """
  cost = costs(masks, cfg)
  unpriced = masks.stem * _unpriced_rows(cfg, rules)
  return jax.tree.map(
    # A group that died lately still has a score in the running average.
    lambda s, c, m: jnp.where(m, s / jnp.maximum(c, 1), 0.0),
    scores,
    cost.replace(stem=cost.stem - unpriced),
    masks,
  )


def _unpriced_rows(cfg, rules) -> int:
  return 0 if rules.price_embedding else cfg.stem_rows() - 2 * cfg.N - 1


@functools.partial(jax.jit, static_argnames=('cfg', 'rules'))
def mean_prices(
  scores: structure.Groups,
  masks: structure.Groups,
  cfg: structure.ModelConfig,
  rules: Rules,
) -> structure.Groups:
  """Mean price of the live groups of each type, float32 scalars."""
  return jax.tree.map(
    lambda p, m: p.sum() / jnp.maximum(m.sum(), 1),
    prices(scores, masks, cfg, rules),
    masks,
  )


def split(count: int) -> np.ndarray:
  """A parameter count as two int32 limbs [high, low], base 2^15.

  Device code has 32-bit integers; this carries targets up to 2^46 exactly.
  """
  return np.array([count >> 15, count & (2**15 - 1)], np.int32)


@functools.partial(jax.jit, static_argnames=('cfg', 'rules'))
def select(
  scores: structure.Groups,
  masks: structure.Groups,
  target: Array,
  final: Array,
  cfg: structure.ModelConfig,
  rules: Rules,
) -> structure.Groups:
  """Masks with the cheapest groups removed, policy `uniform`.

  Args:
    scores: float32, nats per token. Ties go to the lower index.
    masks: all layers have the same number of live heads, and of live channels.
    target: `split(parameters)`; the result has at most that many live ones.
    final: `split(parameters)` that the run will end with. Where it equals
      `target` the result has final widths (see the module's text).
    cfg: the architecture of the arrays.
    rules: floors, multiples, and what a price counts.

  Returns:
    New masks; dead groups stay dead. A target below `smallest_params` gives the
    smallest shape: check with `check_target` before a run.
  """
  # Move j of a type removes what has rank j among all slots (dead ones first),
  # so three counters are the whole state of the search.
  order = jax.tree.map(
    lambda s, m: jnp.sort(jnp.where(m, s, -1.0), axis=-1), scores, masks
  )
  victims = (order.heads.mean(0), order.ffn.mean(0), order.stem)
  size = jnp.array([cfg.K, cfg.F, cfg.D])
  start = jnp.stack(
    [masks.heads[0].sum(), masks.ffn[0].sum(), masks.stem.sum()]
  )
  floors, multiple = jnp.array(rules.smallest()), jnp.array(rules.multiple_of)
  last = (target == final).all()

  def rows(width):
    per_layer = width[0] * cfg.head_rows() + width[1] * 3
    return cfg.N * per_layer + cfg.stem_rows()

  def above(width, count):
    return rows(width) > _floor_div(count, jnp.maximum(width[2], 1))

  def price(width):
    # By the row, like the cost: a head of each layer is N head_rows rows of
    # D_live; a stem channel is one entry of every row.
    cost = jnp.stack(
      [
        width[2] * cfg.head_rows(),
        width[2] * 3,
        rows(width) - _unpriced_rows(cfg, rules),
      ]
    ).astype(jnp.float32)
    score = jnp.stack(
      [
        jnp.take(v, size[i] - width[i], mode='clip')
        for i, v in enumerate(victims)
      ]
    )
    return score / cost

  def allowed(width):
    open_block = width % multiple != 0
    landed = width - width % multiple
    after = jnp.where(jnp.eye(3, dtype=bool), landed - multiple, landed)
    enough = ~above(landed, final)
    overshoots = ~jax.vmap(above, (0, None))(after, final)
    # Rows times width as float: only orders three candidates by size.
    left = jax.vmap(lambda w: rows(w).astype(jnp.float32) * w[2])(after)
    # The next block of an open type is a candidate too: if it is the best one,
    # nothing else opens until its turn has come.
    block = (landed - multiple >= floors) & ~enough
    fits = block & ~overshoots
    smallest = block & (left == jnp.max(jnp.where(block, left, -jnp.inf)))
    opens = jnp.where(fits.any(), fits, smallest) & ~open_block
    return jnp.where(open_block, width - 1 >= floors, opens)

  def unfinished(width):
    aligned = ~((width % multiple != 0) & (width > floors)).any()
    wanted = above(width, target) | (last & ~aligned)
    return wanted & allowed(width).any()

  def move(width):
    cheapest = jnp.argmin(jnp.where(allowed(width), price(width), jnp.inf))
    return width.at[cheapest].add(-1)

  removed = size - jax.lax.while_loop(unfinished, move, start)

  def cut(score, mask, count):
    rank = jnp.argsort(jnp.argsort(jnp.where(mask, score, -1.0), axis=-1), -1)
    return mask & (rank >= count)

  return structure.Groups(
    heads=cut(scores.heads, masks.heads, removed[0]),
    ffn=cut(scores.ffn, masks.ffn, removed[1]),
    stem=cut(scores.stem, masks.stem, removed[2]),
  )


def _floor_div(count, divisor):
  """`split(count) // divisor` for divisor < 2^15, capped to int32 (exact)."""
  high, low = count[0], count[1]
  quotient = high // divisor
  rest = ((high % divisor) << 15) + low
  cap = jnp.int32(2**31 - 1)
  exact = (quotient << 15) + rest // divisor
  return jnp.where(quotient >= 2**16 - 1, cap, exact)
