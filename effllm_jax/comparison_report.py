"""What runs at the same budget reached: tables, figures, and a page of both."""

import collections
from collections.abc import Sequence
import pathlib
import statistics

import matplotlib
from matplotlib import figure
from matplotlib import ticker

from effllm_jax import amounts
from effllm_jax import atomic
from effllm_jax import comparison
from effllm_jax import plots
from effllm_jax import tables

_COLOURS = {'tokens': '#0072B2', 'flops': '#D55E00'}
_MARKERS = 'osD^v<>PXph*'


def make_tables(
  rows: Sequence[comparison.Row], budget: str, reference: str
) -> list[tables.Table]:
  """What the runs of one budget reached and cost, domains, FLOPs, tasks.

  Args:
    rows: of any budget.
    budget: one of `comparison.BUDGETS`, of which there are rows.
    reference: the arm that others are measured against, seed by seed.

  Returns:
    Tables of one row for each arm. Where it does not have all seeds of the
    budget, which means and errors do not show, its own stand behind its name.
  """
  arms = comparison.by_arm(rows, budget)
  seeds = {x.seed for members in arms.values() for x in members}
  plural = lambda some: 'seeds' if len(some) > 1 else 'seed'
  title = f'{comparison.BUDGETS[budget]}, {len(seeds)} {plural(seeds)}'
  bits = lambda row: row.bits_per_byte

  def mean(members, of):
    return statistics.fmean(of(x) for x in members)

  def against(arm, members):
    found = comparison.difference(members, arms.get(reference, ()), bits)
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
        comparison.estimate(map(bits, members)).text(4),
        against(arm, members),
        amounts.flops(mean(members, lambda x: x.total_flops)),
      ),
    ),
    table(
      'bits per byte by domain',
      domains,
      lambda _, members: [
        comparison.estimate(x.domains[d] for x in members).text(4)
        for d in domains
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
  return comparison.estimate(values).text(3) if values else ''


def chart(rows: Sequence[comparison.Row]) -> figure.Figure:
  """Bits per byte of every arm: seeds, mean and standard error, by budget."""
  arms = list(dict.fromkeys(row.arm for row in rows))
  with matplotlib.rc_context(plots.STYLE):
    fig = figure.Figure(
      figsize=(6.6, 1.4 + 0.34 * len(arms)), dpi=150, layout='constrained'
    )
    ax = fig.subplots()
    for i, (budget, label) in enumerate(comparison.BUDGETS.items()):
      shift = 0.28 * i - 0.14
      found = comparison.by_arm(rows, budget)
      for arm, members in found.items():
        y = arms.index(arm) + shift
        values = [x.bits_per_byte for x in members]
        middle = comparison.estimate(values)
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


def costs(rows: Sequence[comparison.Row], budget: str) -> figure.Figure:
  """Bits per byte against live parameters, and against FLOPs spent."""
  arms = comparison.by_arm(rows, budget)
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
        y = comparison.estimate(x.bits_per_byte for x in members)
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
    plots.title(panels[0], comparison.BUDGETS[budget], legend=False)
  return fig


def _computed_on(rows: Sequence[comparison.Row]) -> list[str]:
  """Where runs were computed, a paragraph; none if none of them says so."""
  found = collections.Counter(x.computed_on for x in rows)
  if not any(found):
    return []
  if len(found) == 1:
    return [f'All runs on {tables.markdown_text(rows[0].computed_on)}.\n']
  each = '; '.join(
    f'{count:,} {"run" if count == 1 else "runs"} on '
    f'{tables.markdown_text(name) or "what is not recorded"}'
    for name, count in sorted(found.items())
  )
  return [f'Digits may depend on where runs were computed: {each}.\n']


def publish(folder: pathlib.Path, reference: str) -> list[tables.Table]:
  """Makes summary.md and figures of `folder`/results.jsonl; returns tables.

  Without the rows that are `comparison.unequal`.

  Raises:
    errors.InputError: as `comparison.read`.
  """
  every = comparison.read(folder / 'results.jsonl')
  stale, note = comparison.unequal(every), comparison.left_out(every)
  rows = [x for x in every if x not in stale]
  budgets = [x for x in comparison.BUDGETS if comparison.by_arm(rows, x)]
  made = [t for x in budgets for t in make_tables(rows, x, reference)]
  figures = {'arms.png': chart(rows)} if rows else {}
  figures |= {f'costs-{x}.png': costs(rows, x) for x in budgets}
  for name, fig in figures.items():
    scratch = folder / f'{name}.tmp'
    fig.savefig(scratch, format='png')
    scratch.replace(folder / name)
  for budget in comparison.BUDGETS.keys() - budgets:
    # Of rows that are left out by now.
    (folder / f'costs-{budget}.png').unlink(missing_ok=True)
  pictures = [f'![{name}]({name})\n' for name in figures]
  text = '\n'.join(
    [
      '# At the same budget\n',
      f'Means over seeds {comparison.PLUS_MINUS} standard errors; against '
      f'{reference} seed by seed.\n',
      *([f'{note[0].upper()}{note[1:]}.\n'] if note else []),
      *_computed_on(rows),
      *(t.markdown() for t in made),
      *pictures,
    ]
  )
  atomic.write_text(folder / 'summary.md', text)
  return made
