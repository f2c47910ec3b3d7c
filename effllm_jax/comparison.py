"""Runs at the same budget: a row for each finished one, and statistics of rows.

`comparison_report` makes tables and figures of them.
"""

from collections.abc import Callable
from collections.abc import Iterable
from collections.abc import Mapping
from collections.abc import Sequence
import dataclasses
import json
import math
import pathlib
import re
import statistics
from typing import Any

from effllm_jax import accounting
from effllm_jax import atomic
from effllm_jax import untrusted
from effllm_jax import workdir

# What all runs have alike -> the title of its tables.
BUDGETS = {'tokens': 'Equal training tokens', 'flops': 'Equal FLOPs'}
# How far the FLOPs of two runs of equal FLOPs may be apart.
TOLERANCE = 0.02
PLUS_MINUS = '\N{PLUS-MINUS SIGN}'


@dataclasses.dataclass(frozen=True)
class Row:
  """One finished run.

  Attributes:
    budget: what it is compared at, one of `BUDGETS`.
    arm: how it was made.
    seed: of its text's order and its new weights.
    bits_per_byte: held out, at the end.
    domains: the same by domain.
    live_params: at the end.
    tokens: that it was trained on, pruning included.
    flops: spent, by purpose (`accounting.PURPOSES`).
    flops_per_token: of its last steps.
    seconds: of training steps and prunes; not of compiling and evaluating.
    tasks: rows of `harness.run`.
    computed_on: `environment.text`; '' of results of older versions.
  """

  budget: str
  arm: str
  seed: int
  bits_per_byte: float
  domains: Mapping[str, float]
  live_params: int
  tokens: int
  flops: Mapping[str, int]
  flops_per_token: float
  seconds: float
  tasks: Sequence[Mapping[str, Any]]
  computed_on: str = ''

  @property
  def key(self) -> tuple[str, str, int]:
    """What there is one row of."""
    return self.budget, self.arm, self.seed

  @property
  def total_flops(self) -> int:
    """Spent on everything."""
    return sum(self.flops.values())


@dataclasses.dataclass(frozen=True)
class Estimate:
  """A mean over seeds and its standard error, None for a single seed."""

  mean: float
  stderr: float | None

  def text(self, digits: int, sign: str = '') -> str:
    """`1.2950 ± 0.0012`."""
    mean = f'{self.mean:{sign},.{digits}f}'
    if self.stderr is None:
      return mean
    return f'{mean} {PLUS_MINUS} {self.stderr:,.{digits}f}'


def estimate(values: Iterable[float]) -> Estimate:
  """Mean, and sample deviation over the root of the number of values."""
  values = list(values)
  if len(values) < 2:
    return Estimate(statistics.fmean(values), None)
  deviation = statistics.stdev(values)
  return Estimate(statistics.fmean(values), deviation / math.sqrt(len(values)))


def difference(
  rows: Iterable[Row], others: Iterable[Row], of: Callable[[Row], float]
) -> Estimate | None:
  """Mean of `of(row) - of(other)` over the seeds that both have.

  Runs of one seed see the text in one order, so the pairs scatter less than
  the arms do. None where no seed is in both.
  """
  known = {x.seed: x for x in others}
  pairs = [of(x) - of(known[x.seed]) for x in rows if x.seed in known]
  return estimate(pairs) if pairs else None


def read(path: pathlib.Path) -> list[Row]:
  """Rows of a file; a torn last line is left out.

  Raises:
    errors.InputError: a line that is no such row.
  """
  rows = {}
  for number, raw in enumerate(workdir.read(path), 1):
    with untrusted.parsing(
      f'{path} row {number} is not a result',
      'take that line out; a run that has none is made again',
    ):
      row = Row(**raw)
      _check(row)
      # Means are of one run of each seed, on the same domains.
      if row.key in rows:
        raise ValueError(f'a second one of {", ".join(map(str, row.key))}')
      first = next(iter(rows.values()), row)
      if row.domains.keys() != first.domains.keys():
        raise ValueError(f'domains {[*row.domains]}, not {[*first.domains]}')
      rows[row.key] = row
  return [*rows.values()]


def _check(row: Row) -> None:
  """Raises what `untrusted.parsing` knows, for values that no run writes."""
  numbers = (
    row.seed, row.bits_per_byte, row.live_params, row.tokens, row.seconds,
    row.flops_per_token, *row.domains.values(),
    *(row.flops[x] for x in accounting.PURPOSES),
    *(x[key] for x in row.tasks for key in ('value', 'limit')),
  )  # fmt: skip
  if not all(map(math.isfinite, numbers)):
    raise ValueError('a number that is not finite')
  if not isinstance(row.computed_on, str):
    raise TypeError(f'computed_on {row.computed_on!r}')
  # Both become parts of paths.
  if row.budget not in BUDGETS or not re.fullmatch(r'\w+', row.arm):
    raise ValueError(f'{row.budget}, {row.arm}')
  for x in row.tasks:
    if not (isinstance(x['task'], str) and isinstance(x['metric'], str)):
      raise ValueError(f'task {x["task"]!r}, metric {x["metric"]!r}')


def write(path: pathlib.Path, rows: Iterable[Row]) -> None:
  """Replaces a file by these rows, at once."""
  lines = (json.dumps(dataclasses.asdict(row)) for row in rows)
  atomic.write_text(path, ''.join(f'{line}\n' for line in lines))


def most_flops(rows: Iterable[Row]) -> int:
  """FLOPs of the costliest run at equal tokens; 0: there is none."""
  return max((x.total_flops for x in rows if x.budget == 'tokens'), default=0)


def unequal(rows: Sequence[Row]) -> list[Row]:
  """Rows of equal FLOPs that are not those of the costliest run any more.

  So it is with those that were there before a costlier arm was run.
  """
  most = most_flops(rows)
  return [
    x
    for x in rows
    if x.budget == 'flops' and abs(x.total_flops - most) > TOLERANCE * most
  ]


def left_out(rows: Sequence[Row]) -> str:
  """One line on what `unequal` finds, and the remedy; '': nothing."""
  found = unequal(rows)
  if not found:
    return ''
  names = ', '.join(f'{x.arm} of seed {x.seed}' for x in found)
  arms = ','.join(dict.fromkeys(x.arm for x in found))
  seeds = ','.join(str(x) for x in sorted({x.seed for x in found}))
  # A run of now replaces a row, and has to be asked what that one was.
  asked = [y for x in found for y in x.tasks]
  tasks = ','.join(dict.fromkeys(x['task'] for x in asked))
  again = f' --tasks={tasks} --limit={asked[0]["limit"]}' if asked else ''
  return (
    f'left out of equal FLOPs, which a costlier arm has raised: {names}; run '
    f'them again with --arms={arms} --seeds={seeds}{again}'
  )


def by_arm(rows: Iterable[Row], budget: str) -> dict[str, list[Row]]:
  """The rows of one budget, in the order in which their arms first appear."""
  arms = {}
  for row in rows:
    if row.budget == budget:
      arms.setdefault(row.arm, []).append(row)
  return arms
