"""The size that a run must have reached, by tokens."""

import dataclasses
import fractions
import math

from effllm_jax import errors

SCHEDULES = ('linear', 'cubic', 'oneshot')


@dataclasses.dataclass(frozen=True)
class Schedule:
  """The size that a run must have reached, by tokens, in whole budget units.

  The way from `begin` to `end` has `stages` equal stretches in which the size
  falls, with a rest after each but the last, in which it stays and the model
  recovers. A rest takes the share `rest` of a stage, so all stretches have one
  pace, and the target is reached exactly at `end`. The curve is drawn over the
  falling stretches alone, p being the share of them that has passed:

      linear   size = start - (start - target) p
      cubic    size = target + (start - target) (1 - p)^3
      oneshot  the share of a stage goes at once, at its first prune

  Cubic is from Zhu & Gupta, arXiv 1710.01878, there for a share of zeros.

  Attributes:
    begin: tokens seen when pruning starts.
    end: tokens seen when the target is reached; recovery follows.
    start: size of the source model, units.
    target: size at the end, units.
    kind: one of `SCHEDULES`.
    stages: number of falling stretches, at least 1.
    rest: share of a stage, in [0, 1); of no effect with one stage.

  Raises:
    errors.InputError: a kind, a number of stages or a rest out of range.
  """

  begin: int
  end: int
  start: int
  target: int
  kind: str
  stages: int
  rest: float

  def __post_init__(self):
    for key, value, holds, what in (
      ('schedule', self.kind, self.kind in SCHEDULES,
       f'one of {", ".join(SCHEDULES)}'),
      ('stages', self.stages, self.stages >= 1, 'at least 1'),
      ('rest', self.rest, 0 <= self.rest < 1, 'in [0, 1)'),
    ):  # fmt: skip
      if not holds:
        raise errors.InputError(
          f'prune.{key} {value!r} is not {what}; set --config.prune.{key}'
        )

  def at(self, tokens: int) -> int:
    """Largest size allowed after `tokens`: never rises, exact integers."""
    done = self._passed(tokens)
    match self.kind:
      case 'cubic':
        done = 1 - (1 - done) ** 3
      case 'oneshot':
        done = fractions.Fraction(math.ceil(done * self.stages), self.stages)
    return self.start - math.floor((self.start - self.target) * done)

  def falls(self, since: int, tokens: int) -> bool:
    """Whether the size falls between two token counts: not during a rest."""
    return self.at(tokens) < self.at(since)

  def _passed(self, tokens: int) -> fractions.Fraction:
    """Share of the falling stretches that has passed, in [0, 1]."""
    span = self.end - self.begin
    time = fractions.Fraction(min(max(tokens - self.begin, 0), span), span)
    if self.stages == 1:
      return time
    falling = 1 - fractions.Fraction(self.rest)
    # In stages; the last one ends before its rest.
    time *= self.stages - 1 + falling
    stage = math.floor(time)
    fallen = stage + min((time - stage) / falling, 1)
    return fractions.Fraction(fallen, self.stages)


def constant(size: int, after: int) -> Schedule:
  """Of a run that prunes nothing: it would begin `after` the last token."""
  return Schedule(after, after + 1, size, size, 'linear', stages=1, rest=0.0)
