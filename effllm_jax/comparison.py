"""Runs at the same budget, side by side: rows -> statistics, tables, figures.

Everything here is made of rows alone, one for each finished run.
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

import matplotlib
from matplotlib import figure
from matplotlib import ticker

from effllm_jax import accounting
from effllm_jax import amounts
from effllm_jax import atomic
from effllm_jax import plots
from effllm_jax import tables
from effllm_jax import untrusted
from effllm_jax import workdir

# What all runs have alike -> the title of its tables.
BUDGETS = {'tokens': 'Equal training tokens', 'flops': 'Equal FLOPs'}
# How far the FLOPs of two runs of equal FLOPs may be apart.
TOLERANCE = 0.02
_COLOURS = {'tokens': '#0072B2', 'flops': '#D55E00'}
_MARKERS = 'osD^v<>PXph*'
_PLUS_MINUS = '\N{PLUS-MINUS SIGN}'


@dataclasses.dataclass(frozen=True)
class Row:
  """One finished run.

  Attributes:
    budget: what it has in common with others, of `BUDGETS`.
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
    return f'{mean} {_PLUS_MINUS} {self.stderr:,.{digits}f}'


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
      numbers = (
        row.seed, row.bits_per_byte, row.live_params, row.tokens, row.seconds,
        row.flops_per_token, *row.domains.values(),
        *(row.flops[x] for x in accounting.PURPOSES),
        *(x[key] for x in row.tasks for key in ('value', 'limit')),
      )  # fmt: skip
      if not all(map(math.isfinite, numbers)):
        raise ValueError('a number that is not finite')
      # Both become parts of paths.
      if row.budget not in BUDGETS or not re.fullmatch(r'\w+', row.arm):
        raise ValueError(f'{row.budget}, {row.arm}')
      for x in row.tasks:
        if not (isinstance(x['task'], str) and isinstance(x['metric'], str)):
          raise ValueError(f'task {x["task"]!r}, metric {x["metric"]!r}')
      # Means are of one run of each seed, on the same domains.
      if row.key in rows:
        raise ValueError(f'a second one of {", ".join(map(str, row.key))}')
      first = next(iter(rows.values()), row)
      if row.domains.keys() != first.domains.keys():
        raise ValueError(f'domains {[*row.domains]}, not {[*first.domains]}')
      rows[row.key] = row
  return [*rows.values()]


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


def make_tables(
  rows: Sequence[Row], budget: str, reference: str
) -> list[tables.Table]:
  """What the runs of one budget reached and cost, domains, FLOPs, tasks.

  Args:
    rows: of any budget.
    budget: one of `BUDGETS`, of which there are rows.
    reference: the arm that others are measured against, seed by seed.

  Returns:
    Tables of one row for each arm. Where it does not have all seeds of the
    budget, which means and errors do not show, its own stand behind its name.
  """
  arms = by_arm(rows, budget)
  seeds = {x.seed for members in arms.values() for x in members}
  plural = lambda some: 'seeds' if len(some) > 1 else 'seed'
  title = f'{BUDGETS[budget]}, {len(seeds)} {plural(seeds)}'
  bits = lambda row: row.bits_per_byte

  def mean(members, of):
    return statistics.fmean(of(x) for x in members)

  def against(arm, members):
    found = difference(members, arms.get(reference, ()), bits)
    return found.text(4, '+') if found and arm != reference else ''

  def label(arm, members):
    own = sorted(x.seed for x in members)
    if len(own) == len(seeds):
      return arm
    return f'{arm} ({plural(own)} {", ".join(map(str, own))})'

  def table(name, columns, cells):
    return tables.Table(
      f'{title}: {name}',
      ('', *columns),
      tuple(
        (label(arm, members), *cells(arm, members))
        for arm, members in arms.items()
      ),
    )

  domains = list(dict.fromkeys(d for row in rows for d in row.domains))
  made = [
    table(
      'held-out bits per byte',
      ('parameters', 'bits/byte', f'against {reference}', 'FLOPs'),
      lambda arm, members: (
        amounts.si(mean(members, lambda x: x.live_params)),
        estimate(map(bits, members)).text(4),
        against(arm, members),
        amounts.flops(mean(members, lambda x: x.total_flops)),
      ),
    ),
    table(
      'bits per byte by domain',
      domains,
      lambda _, members: [
        estimate(x.domains[d] for x in members).text(4) for d in domains
      ],
    ),
    table(
      'what it took, FLOPs by purpose',
      ('tokens', 'seconds', *tables.SPENT.values()),
      lambda _, members: (
        amounts.si(mean(members, lambda x: x.tokens)),
        f'{mean(members, lambda x: x.seconds):,.0f}',
        *(
          amounts.flops(mean(members, lambda x, p=p: x.flops[p]), 3)
          for p in tables.SPENT
        ),
      ),
    ),
  ]
  asked = {
    (t['task'], t['metric'], t['limit']): None
    for members in arms.values() for x in members for t in x.tasks
  }  # fmt: skip
  if asked:
    made.append(
      table(
        'public benchmarks, zero-shot',
        [f'{task}, {metric}' for task, metric, _ in asked],
        lambda _, members: [_task(members, key) for key in asked],
      )
    )
  return made


def _task(members, key) -> str:
  values = [
    t['value'] for x in members for t in x.tasks
    if (t['task'], t['metric'], t['limit']) == key
  ]  # fmt: skip
  return estimate(values).text(3) if values else ''


def chart(rows: Sequence[Row]) -> figure.Figure:
  """Bits per byte of every arm: seeds, mean and standard error, by budget."""
  arms = list(dict.fromkeys(row.arm for row in rows))
  with matplotlib.rc_context(plots.STYLE):
    fig = figure.Figure(
      figsize=(6.6, 1.4 + 0.34 * len(arms)), dpi=150, layout='constrained'
    )
    ax = fig.subplots()
    for i, (budget, label) in enumerate(BUDGETS.items()):
      shift = 0.28 * i - 0.14
      found = by_arm(rows, budget)
      for arm, members in found.items():
        y = arms.index(arm) + shift
        values = [x.bits_per_byte for x in members]
        middle = estimate(values)
        colour = _COLOURS[budget]
        ax.plot(values, [y] * len(values), '|', color=colour, alpha=0.5, ms=7)
        ax.errorbar(
          middle.mean, y, xerr=middle.stderr, fmt='o', color=colour, ms=5,
          capsize=3, label=label if arm == next(iter(found)) else None,
        )  # fmt: skip
    ax.set_yticks(range(len(arms)), arms)
    ax.invert_yaxis()
    ax.set_xlabel('held-out bits per byte: mean and standard error over seeds')
    plots.title(ax, 'At the same budget')
  return fig


def costs(rows: Sequence[Row], budget: str) -> figure.Figure:
  """Bits per byte against live parameters, and against FLOPs spent."""
  arms = by_arm(rows, budget)
  with matplotlib.rc_context(plots.STYLE):
    fig = figure.Figure(figsize=(9, 4), dpi=150, layout='constrained')
    panels = fig.subplots(1, 2, sharey=True)
    colours = matplotlib.colormaps['tab20'].colors
    for ax, label, of in zip(
      panels,
      ('live parameters', 'FLOPs spent, pruning included'),
      (lambda x: x.live_params, lambda x: x.total_flops),
      strict=True,
    ):
      for i, (arm, members) in enumerate(arms.items()):
        y = estimate(x.bits_per_byte for x in members)
        ax.errorbar(
          statistics.fmean(map(of, members)), y.mean, yerr=y.stderr,
          fmt=_MARKERS[i % len(_MARKERS)], color=colours[i % len(colours)],
          ms=6, capsize=3, label=arm,
        )  # fmt: skip
      ax.set_xlabel(label)
      ax.xaxis.set_major_locator(ticker.MaxNLocator(5))
      ax.xaxis.set_major_formatter(plots.SI)
    panels[0].set_ylabel('held-out bits per byte')
    handles, labels = panels[0].get_legend_handles_labels()
    fig.legend(handles, labels, loc='outside right center', frameon=False)
    plots.title(panels[0], BUDGETS[budget], legend=False)
  return fig


def publish(folder: pathlib.Path, reference: str) -> list[tables.Table]:
  """Makes summary.md and figures of `folder`/results.jsonl; returns tables.

  Without the rows that are `unequal`.

  Raises:
    errors.InputError: as `read`.
  """
  every = read(folder / 'results.jsonl')
  stale, note = unequal(every), left_out(every)
  rows = [x for x in every if x not in stale]
  budgets = [x for x in BUDGETS if by_arm(rows, x)]
  made = [t for x in budgets for t in make_tables(rows, x, reference)]
  figures = {'arms.png': chart(rows)} if rows else {}
  figures |= {f'costs-{x}.png': costs(rows, x) for x in budgets}
  for name, fig in figures.items():
    scratch = folder / f'{name}.tmp'
    fig.savefig(scratch, format='png')
    scratch.replace(folder / name)
  for budget in BUDGETS.keys() - budgets:
    # Of rows that are left out by now.
    (folder / f'costs-{budget}.png').unlink(missing_ok=True)
  pictures = [f'![{name}]({name})\n' for name in figures]
  text = '\n'.join(
    [
      '# At the same budget\n',
      f'Means over seeds {_PLUS_MINUS} standard errors; against {reference} '
      'seed by seed.\n',
      *([f'{note[0].upper()}{note[1:]}.\n'] if note else []),
      *(t.markdown() for t in made),
      *pictures,
    ]
  )
  atomic.write_text(folder / 'summary.md', text)
  return made
