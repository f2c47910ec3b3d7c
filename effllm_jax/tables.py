"""The tables of a report, each made once and rendered three ways."""

from collections.abc import Mapping
from collections.abc import Sequence
import dataclasses
import html
import json
import math
import re
from typing import Any

import numpy as np
import rich.box
import rich.table
import rich.text

from effllm_jax import accounting
from effllm_jax import amounts
from effllm_jax import benchmark_items
from effllm_jax import runlog
from effllm_jax import structure

LABELS = {
  'heads': 'heads per layer',
  'ffn': 'ffn channels per layer',
  'stem': 'stem width',
}
# What operations went into, by purpose (`accounting.PURPOSES`).
SPENT = {
  'train': 'training',
  'score': 'scoring',
  'repair': 'repair',
  'teacher': 'teacher',
}


@dataclasses.dataclass(frozen=True)
class Table:
  """Cells that are ready to be read: one row per tuple, as wide as `columns`.

  The first column names the row; all others are aligned to the right.
  """

  title: str
  columns: tuple[str, ...]
  rows: tuple[tuple[str, ...], ...]

  def rich(self) -> rich.table.Table:
    """For a terminal."""
    # Text, not str: square brackets in a name are no markup.
    text = rich.text.Text
    # Without vertical rules it fits into 80 columns.
    table = rich.table.Table(
      title=text(self.title),
      title_justify='left',
      box=rich.box.SIMPLE,
      padding=(0, 1, 0, 0),
    )
    for i, column in enumerate(self.columns):
      table.add_column(text(column), justify='right' if i else 'left')
    for row in self.rows:
      table.add_row(*map(text, row))
    return table

  def markdown(self) -> str:
    """For summary.md: a heading and a table with aligned columns."""
    cells = [[markdown_text(x) for x in r] for r in (self.columns, *self.rows)]
    width = [max(3, *map(len, column)) for column in zip(*cells, strict=True)]
    pad = lambda row: [
      x.rjust(w) if i else x.ljust(w)
      for i, (x, w) in enumerate(zip(row, width, strict=True))
    ]
    rule = [(w - 1) * '-' + (':' if i else '-') for i, w in enumerate(width)]
    lines = [pad(cells[0]), rule, *map(pad, cells[1:])]
    body = '\n'.join(f'| {" | ".join(line)} |' for line in lines)
    return f'## {markdown_text(self.title)}\n\n{body}\n'

  def html(self) -> str:
    """For the page: a `table` element inside a box that scrolls sideways."""
    head = ''.join(
      f'<th scope="col">{html.escape(x)}</th>' for x in self.columns
    )
    body = ''.join(
      f'<tr><th scope="row">{html.escape(row[0])}</th>'
      + ''.join(f'<td>{html.escape(x)}</td>' for x in row[1:])
      + '</tr>\n'
      for row in self.rows
    )
    return (
      f'<div class="scroll"><table>\n<thead><tr>{head}</tr></thead>\n'
      f'<tbody>\n{body}</tbody></table></div>'
    )

  def _repr_html_(self) -> str:
    """What a notebook shows."""
    return f'<b>{html.escape(self.title)}</b>{self.html()}'


def compare(run: runlog.Run) -> Table:
  """Source model against pruned model; "so far" while the run goes on.

  Of a run that only trains, against trained model.
  """
  became = 'trained model' if run.only_trains else 'pruned model'
  pruned = run.last_eval('pruned')
  trained = [x for x in run.evals if x['phase'] != 'source']
  evals = (run.last_eval('source'), pruned, trained[-1] if trained else None)
  params, tokens = run.source_params(), run.tokens[-1]
  before, after = run.source_widths(), run.widths()
  first, last = run.at_ends('seconds')
  live = run.train['live_params'][-1]
  kind, _ = run.budget
  rows = [
    (
      'training tokens',
      amounts.count,
      0,
      pruned and pruned['tokens'],
      tokens,
    ),
    (
      'live parameters',
      amounts.count,
      params,
      pruned and pruned['live_params'],
      live,
    ),
    (
      'parameters in arrays',
      amounts.count,
      run.source_array_params(),
      None,
      run.array_params(),
    ),
  ]
  # Nothing is removed after the last prune: cost and widths of then are those
  # now.
  if kind != 'params':
    cost, show = run.train['live_cost'][-1], lambda x: amounts.costs(kind, x)
    name = amounts.BUDGETS.get(kind, kind)
    rows.append((name, show, run.source_cost(), pruned and cost, cost))
  mean = ', mean' if run.uneven() else ''
  for t in structure.TYPES:
    name = LABELS[t] + (mean if t != 'stem' else '')
    rows.append((name, amounts.count, before[t], pruned and after[t], after[t]))
  values = [x and x['bits_per_byte'] for x in evals]
  rows.append(('held-out bits per byte', amounts.bits, *values))
  for domain in dict.fromkeys(d for x in evals if x for d in x['domains']):
    values = [x and x['domains'].get(domain) for x in evals]
    rows.append((f'{domain}, bits per byte', amounts.bits, *values))
  rows.append(('seconds per step', amounts.seconds, first, None, last))
  return Table(
    title=f'Source model against {became}',
    columns=(
      '',
      'source model',
      'last prune',
      became if run.finished else 'so far',
      'change',
    ),
    rows=tuple(
      (name, show(a), show(b), show(c), amounts.change(a, c))
      for name, show, a, b, c in rows
    ),
  )


def events(run: runlog.Run) -> Table:
  """One row per shrink: what the arrays were and what they became."""
  arrow = lambda show, a, b: f'{show(a)} \N{RIGHTWARDS ARROW} {show(b)}'
  return Table(
    title='Shrinks',
    columns=(
      'event', 'step', 'tokens', *(LABELS[t] for t in structure.TYPES),
      'parameters of the arrays', 'alive', 'loss, nats per token', 'seconds',
    ),
    rows=tuple(
      (
        str(e['event']),
        amounts.count(e['step']),
        amounts.count(e['tokens']),
        *(
          arrow(
            str,
            amounts.count(e['widths_before'][t]),
            amounts.span(e['widths_live'][t]),
          )
          for t in structure.TYPES
        ),
        arrow(amounts.count, e['params_before'], e['params_after']),
        amounts.count(e['live_params']),
        arrow(amounts.bits, e['loss_before'], e['loss_after']),
        amounts.seconds(e['seconds']),
      )
      for e in run.shrinks
    ),
  )  # fmt: skip


def layers(run: runlog.Run) -> Table | None:
  """Live widths of each layer; None while all layers have the same."""
  if not run.uneven():
    return None
  columns, cells = ['layer'], []
  for t, name in (('heads', 'heads'), ('ffn', 'ffn channels')):
    before, now = run.layer_widths(t, [0.0, np.inf])
    if np.ptp(before):
      # The source was ragged too.
      columns.append(name)
      cells.append(
        [f'{k:,} of {n:,}' for n, k in zip(before, now, strict=True)]
      )
    else:
      columns.append(f'{name} of {before[0]:,}')
      cells.append([amounts.count(k) for k in now])
  return Table(
    title='Live widths by layer',
    columns=tuple(columns),
    rows=tuple(
      (str(n), *row) for n, row in enumerate(zip(*cells, strict=True))
    ),
  )


def spent(run: runlog.Run) -> Table:
  """Tokens and FLOPs since the start of the run, by what they went into."""
  last = {x: run.train[f'flops.{x}'][-1] for x in accounting.PURPOSES}
  total = sum(x for x in last.values() if amounts.known(x))
  tokens = {'train': run.tokens[-1]}
  share = lambda x: (
    f'{100 * x / total:.1f}{amounts.PERCENT}'
    if amounts.known(x) and total
    else amounts.NONE
  )
  count = lambda x: amounts.si(x) if amounts.known(x) else amounts.NONE
  return Table(
    title='Tokens and FLOPs spent',
    columns=('', 'tokens', 'FLOPs', 'share of FLOPs'),
    rows=(
      *(
        (SPENT[x], count(tokens.get(x)), amounts.flops(y), share(y))
        for x, y in last.items()
      ),
      ('total', count(run.tokens[-1]), amounts.flops(total), share(total)),
    ),
  )


def time(run: runlog.Run) -> Table:
  """Seconds since the start of the run, by what they went into.

  Steps without a row are taken to have waited for text, which rows have of one
  step, as long as those that have one.
  """
  steps = run.train['step']
  # A resume writes no rows anew, so that every step is counted once.
  each = steps[-1] / len(steps)
  parts = {
    'training steps and prunes': run.step_seconds,
    'waiting for text': run.train['data_seconds'].sum() * each,
    'compiling': run.train['compile_seconds'].sum(),
    'shrinking': math.fsum(x['seconds'] for x in run.shrinks),
    'waiting for checkpoints': run.save_seconds,
    'evaluating': math.fsum(x['seconds'] for x in run.evals),
  }
  total = math.fsum(parts.values())
  return Table(
    title='Time',
    columns=('', 'seconds', 'share'),
    rows=tuple(
      (
        name,
        amounts.tenths(x),
        f'{100 * x / total:.1f}{amounts.PERCENT}' if total else amounts.NONE,
      )
      for name, x in (*parts.items(), ('total', total))
    ),
  )


def edge(run: runlog.Run) -> Table:
  """Size, speed and quality of source and pruned model in other runtimes.

  The title says which model of the run the pruned one is.
  """
  record, which = run.edge, []
  if record['step'] is not None:
    which.append(f'step {record["step"]:,}')
  which += [
    f'event {x["event"]}' for x in run.shrinks if x['step'] == record['step']
  ]
  if record['pad'] > 1:
    which.append(f'padded to multiples of {record["pad"]:,}')
  return Table(
    title=f'On the edge: {record["machine"]}'
    + (f'; pruned: {", ".join(which)}' if which else ''),
    columns=(
      'format', 'model', 'MB', 'prefill tok/s', 'decode tok/s', 'memory, MB',
      'bits/byte',
    ),
    rows=tuple(
      (
        row['format'],
        row['model'],
        amounts.tenths(row['bytes'] / 1e6),
        amounts.tenths(row['prefill']),
        amounts.tenths(row['decode']),
        amounts.tenths(row['memory'] and row['memory'] / 1e6),
        amounts.bits(row['bits_per_byte']),
      )
      for row in record['rows']
    ),
  )  # fmt: skip


def perplexity(
  results: Mapping[str, Mapping[str, Any]],
  title: str,
  shared: Mapping[str, float] | None = None,
) -> Table:
  """Losses on a text, one model beside the other.

  Args:
    results: of `evaluate.bits_per_byte` on one text, by the model's name.
    title: of the table.
    shared: how much of each domain was trained on, `ngrams.shared`; None: not
      to be shown.
  """
  first, *_ = results.values()
  only, *others = first['domains']
  domains = first['domains'] if others else {}
  rows = {
    'bits per byte': lambda x: amounts.bits(x['bits_per_byte']),
    **{
      name: lambda x, name=name: amounts.bits(x['domains'][name])
      for name in domains
    },
    'nats per token': lambda x: f'{x["nats_per_token"]:.4f}',
    'perplexity': lambda x: f'{np.exp(x["nats_per_token"]):,.2f}',
  }
  columns = {
    model: [show(x) for show in rows.values()] for model, x in results.items()
  }
  if shared is not None:
    # A single domain has no row of its own.
    of = shared if domains else {'bits per byte': shared[only]}
    columns['in training text'] = [
      f'{of[name]:.1%}' if name in of else '' for name in rows
    ]
  return Table(
    title=title,
    columns=('', *columns),
    rows=tuple(zip(rows, *columns.values(), strict=True)),
  )


def benchmarks(
  record: Mapping[str, Any], step: int | None = None, first: str = 'source'
) -> Table:
  """Public benchmarks: the source model beside what it became.

  Args:
    record: `runlog.Run.benchmarks`, not empty.
    step: of the one model to show; None: all that were measured.
    first: what the model of no step is called.
  """
  rows = [
    x for x in record['rows'] if step is None or x['step'] in (None, step)
  ]
  cells = {}
  for x in [*rows, *_averages(rows)]:
    key = (x['task'], x['metric'], x['items'])
    cells.setdefault(key, {})[x['step']] = _measured(x)
  steps = sorted({x['step'] for x in rows} - {None})
  return Table(
    title=f'Benchmarks: {record["harness"]}, zero-shot, with standard errors',
    columns=('task', 'items', first, *(f'step {x:,}' for x in steps)),
    rows=tuple(
      (
        f'{task}, {metric}',
        amounts.count(items),
        *(found.get(x, amounts.NONE) for x in (None, *steps)),
      )
      for (task, metric, items), found in cells.items()
    ),
  )


def _averages(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
  """A row for each model that has answered all tasks of the paper's table.

  Of acc_norm where lm-eval has it, of acc elsewhere: our choice, the paper does
  not say.
  """
  best = {}
  # acc comes before acc_norm.
  for x in sorted(rows, key=lambda x: x['metric']):
    if x['task'] in benchmark_items.TABLE2:
      best.setdefault((x['limit'], x['step']), {})[x['task']] = x
  found = []
  for (_, step), tasks in best.items():
    if len(tasks) == len(benchmark_items.TABLE2):
      errors = [x['stderr'] for x in tasks.values()]
      found.append(
        {
          'task': 'average of table2',
          'metric': 'acc_norm or acc',
          'items': sum(x['items'] for x in tasks.values()),
          'step': step,
          'value': math.fsum(x['value'] for x in tasks.values()) / len(tasks),
          'stderr': None
          if None in errors
          else math.hypot(*errors) / len(tasks),
        }
      )
  return found


def _measured(x: Mapping[str, Any]) -> str:
  """`0.475 ± 0.080`; a perplexity with two digits."""
  digits = 3 if x['metric'].startswith('acc') else 2
  value = f'{x["value"]:,.{digits}f}'
  return (
    value
    if x['stderr'] is None
    else (f'{value} \N{PLUS-MINUS SIGN} {x["stderr"]:,.{digits}f}')
  )


def config(run: runlog.Run) -> Table:
  """Every key of the configuration, as it is set on the command line."""

  def flat(prefix, value):
    # Domains are no keys of a config: their weights are one value.
    if isinstance(value, dict) and prefix != '.data.weights':
      for key, child in value.items():
        yield from flat(f'{prefix}.{key}', child)
    else:
      # As Python reads it too, which takes half a surrogate pair for a letter.
      literal = lambda x: json.dumps(x, ensure_ascii=False)
      yield (
        prefix.removeprefix('.'),
        value if isinstance(value, str) else literal(value),
      )

  return Table('Configuration', ('key', 'value'), tuple(flat('', run.config)))


def markdown_text(text: str) -> str:
  """Text that Markdown shows as it is, on one line, also inside a table."""
  return re.sub(r'([\\`*|<>\[\]&])', r'\\\1', ' '.join(text.splitlines()))
