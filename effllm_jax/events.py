"""The record of one change of architecture, and the lineage that they form."""

from collections.abc import Sequence
import dataclasses
from typing import Any

import jax
import numpy as np

from effllm_jax import structure


@dataclasses.dataclass(frozen=True)
class ShrinkEvent:
  """One shrink: when, from what to what, and who survived.

  Attributes:
    index: 0 for the first shrink of a run.
    step: batches seen; one whose update was skipped counts.
    tokens: training tokens seen.
    before, after: the arrays on either side. Where layers differ in width they
      are as wide as the widest, and may stay what they were.
    live: how many groups are alive: heads [N], ffn [N], stem.
    kept: int lists, indices into the axes *before* this shrink:
      heads [N][K'], ffn [N][F'], stem [D']; the live ones first.
    loss_before, loss_after: mean loss in nats per token on one and the same
      batch; equal up to rounding, or the run would have stopped.
  """

  index: int
  step: int
  tokens: int
  before: structure.ModelConfig
  after: structure.ModelConfig
  live: structure.Groups
  kept: structure.Groups
  loss_before: float
  loss_after: float

  def to_json(self) -> dict[str, Any]:
    """Plain dicts, lists and numbers; `from_json` is its inverse."""
    record = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
    for name in ('before', 'after'):
      record[name] = dataclasses.asdict(record[name])
    for name in ('live', 'kept'):
      record[name] = {t: getattr(record[name], t) for t in structure.TYPES}
    return record

  @classmethod
  def from_json(cls, record: dict[str, Any]) -> 'ShrinkEvent':
    """The event that `to_json` wrote.

    Raises:
      KeyError, TypeError, ValueError: of a damaged record.
    """
    record = dict(**record)
    for name in ('before', 'after'):
      record[name] = structure.ModelConfig.from_dict(record[name])
    for name in ('live', 'kept'):
      record[name] = structure.Groups(**record[name])
    for name in ('index', 'step', 'tokens'):
      if type(record[name]) is not int or record[name] < 0:
        raise ValueError(f'{name} = {record[name]!r}')
    return cls(**record)


def compose(
  first: structure.Groups | None, then: structure.Groups
) -> structure.Groups:
  """Indices into indices: where the groups of `then` sat before `first`.

  Args:
    first: int arrays, which group sits in each slot; None: its own.
    then: int arrays, indices into those slots.
  """
  if first is None:
    return then
  return jax.tree.map(
    lambda a, b: np.take_along_axis(np.asarray(a), np.asarray(b), -1),
    first,
    then,
  )


def lineage(events: Sequence[ShrinkEvent]) -> structure.Groups:
  """Which groups of the source model sit in the slots after all `events`.

  Returns:
    int arrays, indices into the run's source model: heads [N, K'], ffn [N, F'],
    stem [D']. Composed from the events alone; equals `PruneState.origin`.

  Raises:
    ValueError: no events, or they do not follow one another.
  """
  if not events:
    raise ValueError('no shrink events: the arrays are those of the source')
  origin = None
  for i, event in enumerate(events):
    if event.index != i or (i and events[i - 1].after != event.before):
      raise ValueError(
        f'event {event.index} at position {i} does not follow its predecessor'
      )
    kept = {t: np.asarray(getattr(event.kept, t)) for t in structure.TYPES}
    origin = compose(origin, structure.Groups(**kept))
  return origin
