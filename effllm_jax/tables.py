"""The tables of a report, each made once and rendered three ways."""

import dataclasses
import html
import json
import math
import re

import rich.box
import rich.table
import rich.text

from effllm_jax import runlog
from effllm_jax import structure

LABELS = {
  'heads': 'heads per layer',
  'ffn': 'ffn channels per layer',
  'stem': 'stem width',
}
_MINUS = '\N{MINUS SIGN}'
_NONE = '\N{EN DASH}'
# A number and its unit stay on one line.
PERCENT = '\N{NO-BREAK SPACE}%'


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


def compare(run: runlog.Run) -> Table:
  """Source model against pruned model; "so far" while the run goes on."""
  pruned = run.last_eval('pruned')
  trained = [x for x in run.evals if x['phase'] != 'source']
  evals = (run.last_eval('source'), pruned, trained[-1] if trained else None)
  params, tokens = run.source_params(), run.tokens[-1]
  before, after = run.source_widths(), run.widths()
  first, last = run.at_ends('seconds')
  live = run.train['live_params'][-1]
  rows = [
    ('training tokens', _count, 0, pruned and pruned['tokens'], tokens),
    ('live parameters', _count, params, pruned and pruned['live_params'], live),
    ('parameters in arrays', _count, params, None, run.array_params()),
  ]
  for t in structure.TYPES:
    # Nothing is removed after the last prune: the widths of then are those now.
    rows.append((LABELS[t], _count, before[t], pruned and after[t], after[t]))
  values = [x and x['bits_per_byte'] for x in evals]
  rows.append(('held-out bits per byte', _bits, *values))
  for domain in dict.fromkeys(d for x in evals if x for d in x['domains']):
    values = [x and x['domains'].get(domain) for x in evals]
    rows.append((f'{domain}, bits per byte', _bits, *values))
  rows.append(('seconds per step', _seconds, first, None, last))
  return Table(
    title='Source model against pruned model',
    columns=(
      '',
      'source model',
      'last prune',
      'pruned model' if run.finished else 'so far',
      'change',
    ),
    rows=tuple(
      (name, show(a), show(b), show(c), change(a, c))
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
      'parameters', 'loss, nats per token', 'seconds',
    ),
    rows=tuple(
      (
        str(e['event']),
        _count(e['step']),
        _count(e['tokens']),
        *(
          arrow(_count, e['widths_before'][t], e['widths_after'][t])
          for t in structure.TYPES
        ),
        arrow(_count, e['params_before'], e['params_after']),
        arrow(_bits, e['loss_before'], e['loss_after']),
        _seconds(e['seconds']),
      )
      for e in run.shrinks
    ),
  )  # fmt: skip


def config(run: runlog.Run) -> Table:
  """Every key of the configuration, as it is set on the command line."""

  def flat(prefix, value):
    if isinstance(value, dict):
      for key, child in value.items():
        yield from flat(f'{prefix}.{key}', child)
    else:
      yield (
        prefix.removeprefix('.'),
        value if isinstance(value, str) else json.dumps(value),
      )

  return Table('Configuration', ('key', 'value'), tuple(flat('', run.config)))


def si(x: float, digits: int = 4) -> str:
  """A count as people say it: 20k, 134.5M, 1.5B."""
  for scale, suffix in ((1e12, 'T'), (1e9, 'B'), (1e6, 'M'), (1e3, 'k')):
    # Not `>= scale`: 999,999 rounds to 1M, not to 1000k.
    if abs(x) >= scale * (1 - 0.5 * 10.0**-digits):
      return f'{x / scale:.{digits}g}{suffix}'
  return f'{x:.{digits}g}'


def change(before: float | None, after: float | None) -> str:
  """The relative change in percent; a dash where there is none to state."""
  if not _known(before) or not _known(after) or not before:
    return _NONE
  text = f'{100 * (after / before - 1):+.1f}{PERCENT}'
  return 'unchanged' if after == before else text.replace('-', _MINUS)


def markdown_text(text: str) -> str:
  """Text that Markdown shows as it is, on one line, also inside a table."""
  return re.sub(r'([\\`*|<>\[\]&])', r'\\\1', ' '.join(text.splitlines()))


def _known(x) -> bool:
  return x is not None and math.isfinite(x)


def _count(x: float | None) -> str:
  if not _known(x):
    return _NONE
  # A mean over layers of different widths has a fraction.
  return f'{x:,.0f}' if x == round(x) else f'{x:,.1f}'


def _bits(x: float | None) -> str:
  return f'{x:.4f}' if _known(x) else _NONE


def _seconds(x: float | None) -> str:
  return f'{x:.3g}' if _known(x) else _NONE
