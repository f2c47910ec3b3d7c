"""The report of a run: figures, one self-contained page, a summary.

Everything is made from the workdir alone, and the same workdir gives the same
bytes: no dates, and no versions but those that the run was computed with.
"""

import base64
from collections.abc import Mapping
from collections.abc import Sequence
import html
import os
import pathlib
import shlex
import string

from effllm_jax import amounts
from effllm_jax import atomic
from effllm_jax import environment
from effllm_jax import errors
from effllm_jax import figures
from effllm_jax import runlog
from effllm_jax import tables

_SHIPPED = 'experiments/configs/smollm2_135m.py'


def build(
  workdir: str | os.PathLike, run: runlog.Run | None = None
) -> pathlib.Path:
  """Writes `<workdir>/report`: index.html, summary.md and a PNG per figure.

  A report that is already there is replaced when the new one is complete, and
  stays where that fails; a process that is killed between the two renames that
  it takes leaves none. Works while the run goes on, and beside another build.

  Args:
    workdir: of the run.
    run: as it has been read; None: reads it.

  Returns:
    The folder.

  Raises:
    errors.InputError: as `runlog.read`, or the report cannot be written.
  """
  workdir = pathlib.Path(workdir)
  run = run or runlog.read(workdir)
  drawn = figures.draw(run)
  files = {f'{x.name}.png': x.png for x in drawn}
  files['index.html'] = _page(run, drawn).encode()
  files['summary.md'] = _summary(run, drawn).encode()
  folder = workdir / 'report'
  remedy = f'make room or make {workdir} writable'
  with (
    atomic.locked(workdir / 'report.lock'),
    errors.writing(folder, remedy),
  ):
    _replace(folder, files)
  return folder


def _replace(folder: pathlib.Path, files: Mapping[str, bytes]) -> None:
  with atomic.scratch(folder.parent) as scratch:
    new, old = scratch / 'new', scratch / 'old'
    new.mkdir()
    for name, content in files.items():
      (new / name).write_bytes(content)
    try:
      if os.path.lexists(folder):
        folder.rename(old)
      new.rename(folder)
    finally:
      if os.path.lexists(old) and not os.path.lexists(folder):
        old.rename(folder)


def _heading(run: runlog.Run) -> tuple[str, list[tuple[str, str]]]:
  """The title of the report, and what must be known to read the rest."""
  about = run.source
  settings = dict(tables.config(run).rows)
  setting = lambda key: settings.get(key, 'not recorded')
  scored_on, shared = settings.get('eval.text'), run.eval_text.get('shared')
  if scored_on and shared:
    scored_on += (
      f'; at most {max(shared.values()):.1%} of a domain of it is trained on'
    )
  name = str(about.get('name') or setting('source'))
  start, live = run.source_params(), run.train['live_params'][-1]
  source = [name, about.get('description'), about.get('licence')]
  kind, target = run.budget
  if run.only_trains:
    target = 'none: training only'
  elif target is None:
    target = 'not recorded'
  else:
    share = amounts.change(run.source_cost(), target)
    size = (
      f'{target:,.0f} parameters'
      if kind == 'params'
      else amounts.costs(kind, target, unit=True)
    )
    target = f'at most {size} ({share}), {setting("prune.policy")} policy'
  progress = (
    f'{"finished" if run.finished else "not finished"}: '
    f'{int(run.train["step"][-1]):,} steps, {int(run.tokens[-1]):,} tokens; '
    f'prunes: {len(run.prune_tokens):,}, shrinks: {len(run.shrinks):,}'
  )
  computed = environment.text(run.starts)
  code = dict.fromkeys(x['code'] for x in run.starts if x['code'])
  if code:
    computed += f'; code {", ".join(code)}'
  return (
    f'{name}: {amounts.si(start)} to {amounts.si(live)} parameters',
    [
      ('source model', ', '.join(str(x) for x in source if x)),
      ('text', setting('data.text')),
      *([('scored on', scored_on)] if scored_on else []),
      ('target', target),
      ('workdir', run.name),
      *([('computed on', computed)] if computed else []),
      ('progress', progress),
    ],
  )


def _command(run: runlog.Run) -> str:
  """The command that runs this configuration again, whatever it came from."""
  flags = [
    f'--config={_SHIPPED}',
    f'--workdir={shlex.quote(f"runs/{run.name}-again")}',
    *(
      shlex.quote(f'--config.{key}={value}')
      for key, value in tables.config(run).rows
      if value != '{}'
    ),
  ]
  return ' \\\n  '.join(['python -m experiments.main', *flags])


_TYPES = (
  'heads are key/value heads with their query heads, ffn are feed-forward '
  'channels, stem is the width of the residual stream.'
)
_COST = (
  'Tokens are those that the model was trained on. Scoring, repair and the '
  'teacher are what pruning costs on top of plain training.'
)
_TIME = (
  'Compiling, shrinking and waiting for checkpoints are what a change of '
  'architecture costs. A run that was resumed has compiled more than once.'
)
_COMMAND = (
  'Runs the same configuration again, in a new workdir. Every value is written '
  'out, so it does not matter which file they came from.'
)


def _summary(run: runlog.Run, drawn: Sequence[figures.Figure]) -> str:
  title, facts = _heading(run)
  text = tables.markdown_text
  parts = [
    f'# {text(title)}\n',
    '\n'.join(f'- {text(k)}: {text(v)}' for k, v in facts) + '\n',
    tables.compare(run).markdown(),
    f'Here {_TYPES}\n',
  ]
  if run.shrinks:
    parts.append(tables.events(run).markdown())
  parts += [tables.spent(run).markdown(), f'{_COST}\n']
  parts += [tables.time(run).markdown(), f'{_TIME}\n']
  layers = tables.layers(run)
  if layers:
    parts.append(layers.markdown())
  if run.benchmarks:
    parts.append(tables.benchmarks(run.benchmarks).markdown())
  if run.edge:
    parts.append(tables.edge(run).markdown())
  parts.append('## Figures\n')
  parts += [
    f'![{text(x.title)}]({x.name}.png)\n\n{text(x.caption)}\n' for x in drawn
  ]
  parts.append(tables.config(run).markdown())
  parts.append(f'## Command\n\n{_COMMAND}\n')
  # Indented, not fenced: no value can end the block.
  parts.append(''.join(f'    {line}\n' for line in _command(run).splitlines()))
  return '\n'.join(parts)


def _page(run: runlog.Run, drawn: Sequence[figures.Figure]) -> str:
  title, facts = _heading(run)
  text = html.escape
  compare = tables.compare(run)
  rows = {row[0]: row for row in compare.rows}
  cards = ''.join(
    f'<li><span>{text(name)}</span><b>{text(rows[name][1])} &rarr; '
    f'{text(rows[name][3])}</b><span>{text(rows[name][4])}</span></li>\n'
    for name in _CARDS
  )
  pictures = ''.join(
    f'<figure><img alt="{text(x.title)}" src="data:image/png;base64,'
    f'{base64.b64encode(x.png).decode()}">'
    f'<figcaption>{text(x.caption)}</figcaption></figure>\n'
    for x in drawn
  )
  shrinks, layers = tables.events(run), tables.layers(run)
  return string.Template(_HTML).substitute(
    title=text(title),
    facts=''.join(f'<dt>{text(k)}</dt><dd>{text(v)}</dd>\n' for k, v in facts),
    cards=cards,
    against=text(compare.title),
    compare=compare.html(),
    types=text(_TYPES),
    events=(
      shrinks.html()
      if run.shrinks
      else '<p>None: training only.</p>'
      if run.only_trains
      else '<p>None yet.</p>'
    ),
    spent=tables.spent(run).html(),
    time=tables.time(run).html(),
    lost=text(_TIME),
    cost=text(_COST),
    layers=(
      f'<details><summary>{text(layers.title)}</summary>\n{layers.html()}\n'
      '</details>\n'
      if layers
      else ''
    ),
    measured=''.join(
      f'<h2>{text(x.title)}</h2>\n{x.html()}\n'
      for x in (
        run.benchmarks and tables.benchmarks(run.benchmarks),
        run.edge and tables.edge(run),
      )
      if x
    ),
    figures=pictures,
    config=tables.config(run).html(),
    about=text(_COMMAND),
    command=text(_command(run)),
  )


# Rows of the first table that the page repeats above it.
_CARDS = ('live parameters', 'held-out bits per byte', 'seconds per step')

# The policy lets nothing be loaded and no script run, whatever a name holds.
_HTML = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>$title</title>
<style>
:root { --ink: #1d1d1f; --soft: #5c5c63; --line: #dcdce0; --page: #f6f6f7;
  --card: #fff; }
@media screen and (prefers-color-scheme: dark) {
  :root { --ink: #ececee; --soft: #a3a3ab; --line: #3a3a3f; --page: #0d0d0e;
    --card: #191919; }
  /* White becomes the colour of the card; every hue stays what it was. */
  img { filter: invert(.902) hue-rotate(180deg); }
}
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.2rem 1rem 3rem; max-width: 76rem;
  background: var(--page); color: var(--ink);
  font: 1rem/1.5 system-ui, sans-serif; }
h1 { font-size: 1.6rem; line-height: 1.2; margin: .4rem 0 1rem;
  overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 2rem 0 .6rem; }
p, figcaption { color: var(--soft); max-width: 44rem; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .2rem 1rem;
  margin: 0; }
dt { color: var(--soft); }
dd { margin: 0; overflow-wrap: anywhere; }
ul { display: grid; gap: .8rem; margin: 1.4rem 0 0; padding: 0;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 17rem), 1fr)); }
li, figure, .scroll, pre { background: var(--card); border-radius: .5rem;
  border: 1px solid var(--line); }
li { display: grid; list-style: none; padding: .7rem .9rem; }
li span { color: var(--soft); font-size: .9rem; }
b, td { font-variant-numeric: tabular-nums; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: .92rem; }
th, td { padding: .35rem .7rem; text-align: right; }
td, tbody th { white-space: nowrap; }
th:first-child { text-align: left; font-weight: 400; }
thead th { color: var(--soft); font-weight: 600; }
tbody tr { border-top: 1px solid var(--line); }
.figures { columns: 2 27rem; column-gap: 1rem; }
figure { margin: 0 0 1rem; padding: .8rem; break-inside: avoid; }
img { display: block; width: 100%; height: auto; }
figcaption { font-size: .9rem; margin-top: .6rem; }
.config .scroll td { text-align: left; white-space: normal;
  overflow-wrap: anywhere; }
.config .scroll thead th { text-align: left; }
summary { cursor: pointer; font-weight: 600; font-size: 1.15rem;
  margin: 2rem 0 .6rem; }
pre { padding: .8rem; overflow-x: auto; font-size: .85rem; }
@media screen and (max-width: 40rem) {
  body { padding: .8rem .6rem 2rem; }
  table { font-size: .72rem; }
  th, td { padding: .3rem .25rem; }
  tbody th { white-space: normal; min-width: 4.6rem; }
  figure { padding: .4rem; }
}
@media print {
  body { max-width: none; padding: 0; background: #fff; font-size: .8rem; }
  h2, summary { break-after: avoid; }
  tr, li { break-inside: avoid; }
  .scroll, pre { overflow: visible; }
  pre { white-space: pre-wrap; overflow-wrap: anywhere; }
  table { font-size: .72rem; }
  th, td { padding: .15rem .4rem; }
  .figures { columns: 2; }
  details::details-content { content-visibility: visible; height: auto; }
}
</style>
</head>
<body>
<h1>$title</h1>
<dl>
$facts</dl>
<ul>
$cards</ul>
<h2>$against</h2>
$compare
<p>Here $types</p>
<h2>Figures</h2>
<div class="figures">
$figures</div>
<h2>Shrinks</h2>
$events
<h2>Tokens and FLOPs spent</h2>
$spent
<p>$cost</p>
<h2>Time</h2>
$time
<p>$lost</p>
$measured$layers<details class="config"><summary>Configuration</summary>
$config
</details>
<details><summary>Command</summary>
<p>$about</p>
<pre>$command</pre>
</details>
</body>
</html>
"""
