"""What a prune may take: policy, floors, multiples, and what a price counts."""

from collections.abc import Mapping
import dataclasses

import numpy as np

from effllm_jax import budgets
from effllm_jax import errors
from effllm_jax import structure

POLICIES = ('uniform', 'ragged')


@dataclasses.dataclass(frozen=True)
class Rules:
  """What selection goes by; per type as (heads, ffn, stem).

  Attributes:
    policy: 'uniform' or 'ragged' (see `selection`), or 'none' where a run only
      trains.
    floors: least number of groups that stay alive in every layer (heads, ffn)
      or in the model (stem); at least 1, under 'ragged' 0 for heads and ffn.
    multiple_of: the final widths are multiples of these.
    price_embedding: whether the embeddings count in the price of a stem
      channel. They are most of what it saves (21 % of a 135M model), and their
      gradients are tiny: counted, they make the stem look cheap, and it goes
      first; in the paper's plots it goes last. The size always counts them. Of
      a target that is mostly embedding, leaving them out takes the layers
      instead (see `Plan.unpriced`).
  """

  policy: str
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
    policy: str,
    floors: Mapping[str, int],
    multiple_of: Mapping[str, int],
    price_embedding: bool,
  ) -> 'Rules':
    """From mappings whose keys are the pruning types, as in a config."""
    return cls(
      policy=policy,
      floors=tuple(floors[t] for t in structure.TYPES),
      multiple_of=tuple(multiple_of[t] for t in structure.TYPES),
      price_embedding=price_embedding,
    )


def check_target(
  cfg: structure.ModelConfig,
  rules: Rules,
  cost: budgets.Cost,
  target: int,
  live: Mapping[str, np.ndarray] | None = None,
  start: int | None = None,
) -> None:
  """Checks that a model of `cfg` can be pruned to `target`, in budget units.

  Args:
    cfg: architecture of the arrays.
    rules: of the run.
    cost: of the budget.
    target: of the budget.
    live: what is alive of every layer, by type (heads [N], ffn [N], stem []),
      of a source that was pruned before; None: everything.
    start: size of what is alive, in units of the budget, where that is less.

  Raises:
    errors.InputError: it cannot; the message has the config's key to change.
  """
  smallest = []
  for i, name in enumerate(structure.TYPES):
    width = cfg.widths()[name]
    floor, multiple = rules.floors[i], rules.multiple_of[i]
    ragged = rules.policy == 'ragged' and name != 'stem'
    for key, value, least in (
      ('floors', floor, 0 if ragged else 1),
      ('multiple_of', multiple, 1),
    ):
      if not least <= value <= width:
        raise errors.InputError(
          f'prune.{key}.{name} {value} is not between {least} and the source '
          f"model's {width}; set --config.prune.{key}.{name}"
        )
    if ragged and width % multiple:
      raise errors.InputError(
        f'prune.multiple_of.{name} {multiple} does not divide the source '
        f"model's {width}, as policy ragged needs; set "
        f'--config.prune.multiple_of.{name}'
      )
    rounded = -(-floor // multiple) * multiple
    # A source that is narrower than this, and off a multiple, would have begun
    # a block which no prune may finish, and no prune would begin another one.
    alive = np.asarray(live[name] if live else width)
    # Where layers differ in width each goes on from its own.
    if rounded > alive.min() == alive.max():
      raise errors.InputError(
        f'prune.floors.{name} {floor}, rounded up to a multiple of {multiple}, '
        f"is {rounded}, above the source model's {alive.min()}; set "
        f'--config.prune.floors.{name}'
      )
    # A layer that has fewer loses nothing.
    layers = 1 if name == 'stem' else cfg.N
    kept = np.minimum(np.broadcast_to(alive, layers), rounded)
    smallest.append(int(kept.sum()))
  start = cost.of_config(cfg) if start is None else start
  heads, ffn, stem = rules.smallest()
  least = cost.size(*smallest)
  if target >= start:
    raise errors.InputError(
      f"budget.target {cost.text(target)} is not below the source model's "
      f'{cost.text(start)}; set --config.budget.target'
    )
  if target < least:
    raise errors.InputError(
      f'budget.target {cost.text(target)} is below {cost.text(least)}, the '
      f'size at the floors (heads {heads}, ffn {ffn}, stem {stem}); raise '
      '--config.budget.target, or lower --config.prune.floors or '
      '--config.prune.multiple_of'
    )
