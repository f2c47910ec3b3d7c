"""The figures of a report, as PNG files in memory.

One colour per pruning type in all figures, from the palette of Okabe and Ito,
which the common forms of colour blindness tell apart.
"""

from collections.abc import Sequence
import dataclasses
import io

import matplotlib
from matplotlib import figure
from matplotlib import ticker
from matplotlib.backends import backend_agg
import numpy as np

from effllm_jax import amounts
from effllm_jax import plots
from effllm_jax import runlog
from effllm_jax import structure
from effllm_jax import tables

NAMES = ('size', 'price', 'loss', 'widths', 'layers', 'speed')
COLORS = {'heads': '#0072B2', 'ffn': '#D55E00', 'stem': '#009E73'}


@dataclasses.dataclass(frozen=True)
class Figure:
  """One picture: file name without suffix, PNG bytes, and the words with it."""

  name: str
  title: str
  caption: str
  png: bytes = dataclasses.field(repr=False)

  def _repr_png_(self) -> tuple[bytes, dict[str, str]]:
    """What a notebook shows, and the words for who does not see it."""
    return self.png, {'alt': f'{self.title}. {self.caption}'}


def draw(run: runlog.Run, names: Sequence[str] = NAMES) -> list[Figure]:
  """Figures of a run, also of one that has only just begun."""
  drawn = (_size, _price, _loss, _widths, _layers, _speed)
  makers = dict(zip(NAMES, drawn, strict=True))
  with matplotlib.rc_context(plots.STYLE):
    return [makers[name](run) for name in names]


def layer_maps(run: runlog.Run) -> dict[str, np.ndarray]:
  """What the figure `layers` shows: `Run.removed` of heads and ffn.

  Returns:
    float64 arrays: `heads` [N, K] by index in the source model; `ffn` [N, F]
    with the channels of each layer in the order of their removal, the last one
    first, so that the live ones come first of all and entry i is when the layer
    became as narrow as i channels.
  """
  return {
    'heads': run.removed['heads'],
    'ffn': np.sort(run.removed['ffn'], axis=-1)[:, ::-1],
  }


def _size(run):
  kind, _ = run.budget
  by_params = kind == 'params'
  fig, (ax, *others) = plots.panels(
    run, 1 if by_params else 2, height=4.0 if by_params else 6.4
  )
  start, live = run.source_params(), run.train['live_params']
  x = [0, *(e['tokens'] for e in run.shrinks), run.tokens[-1]]
  y = [
    run.source_array_params(),
    *(e['params_after'] for e in run.shrinks),
    run.array_params(),
  ]
  ax.plot(x, y, drawstyle='steps-post', lw=3.5, color='#A6CBE8', label='arrays')
  if run.shrinks:
    style = {'color': '#2a6ea3', 'mec': 'white', 'ms': 9, 'zorder': 5}
    ax.plot(x[1:-1], y[1:-1], 'v', label='shrink', **style)
  if by_params:
    _target(ax, run)
  plots.line(ax, run, live, start, color=plots.INK, label='live')
  ax.yaxis.set_major_formatter(plots.SI)
  ax.set_ylabel('parameters')
  plots.title(
    ax,
    f'{amounts.si(start)} to {amounts.si(live[-1])} live parameters '
    f'({amounts.change(start, live[-1])}) in {amounts.si(run.tokens[-1])} '
    'tokens'
    if live[-1] < start
    else f'{_unpruned(run)}: {amounts.si(start)} live parameters',
  )
  for cost in others:
    _cost(cost, run, kind)
  what = 'the live parameters' if by_params else 'the live cost'
  arrays = 'the widest layer' if run.uneven() else 'what is live'
  return render(
    fig,
    'size',
    f'Model size against training tokens: each prune takes {what} '
    'to the target of the schedule or below, each shrink takes the arrays to '
    f'{arrays}.',
  )


def _unpruned(run):
  return 'Training only' if run.only_trains else 'Nothing pruned yet'


def _target(ax, run):
  style = {'color': '#E69F00', 'ls': '--', 'lw': 1.4, 'zorder': 4}
  plots.line(ax, run, run.train['target_cost'], label='target', **style)


def _cost(ax, run, kind):
  """Live cost against its target, where that is not a number of parameters."""
  start, live = run.source_cost(), run.train['live_cost']
  _target(ax, run)
  plots.line(ax, run, live, start, color=plots.INK, label='live')
  ax.yaxis.set_major_formatter(
    ticker.FuncFormatter(lambda x, _: amounts.costs(kind, x))
  )
  name = amounts.BUDGETS.get(kind, kind)
  ax.set_ylabel(name)
  before, after = (amounts.costs(kind, x) for x in (start, live[-1]))
  name = name[0].upper() + name[1:]
  plots.title(
    ax,
    f'{name}: {before} to {after} ({amounts.change(start, live[-1])})'
    if live[-1] != start
    else f'{name}: {after}, {_unpruned(run).lower()}',
  )


def _price(run):
  fig, (top, bottom) = plots.panels(run, 2, height=6.4)
  scored = _prices_panel(top, run)
  _shares_panel(bottom, run, legend=not scored)
  saved = (
    'the live parameters' if run.budget[0] == 'params' else 'what of the budget'
  )
  return render(
    fig,
    'price',
    'Price and pruned share of each pruning type; the price is the score of a '
    f'group {"(the loss its removal is expected to cost) " * run.in_nats}'
    f'divided by {saved} its removal saves, here the mean over the live groups '
    'of a type.',
  )


def _prices_panel(ax, run) -> bool:
  """Draws the mean price of each type; whether there is any."""
  plots.pruning(ax, run)
  logged = {t: run.train[f'price.{t}'] for t in structure.TYPES}
  # Of a type that cannot be pruned there is none; a type that has had nothing
  # to try yet is said to cost 0.
  price = {
    t: np.where((y > 0) & (y < np.inf), y, np.nan) for t, y in logged.items()
  }
  rows = np.stack([*price.values()])
  scored = rows[:, np.isfinite(rows).any(0)]
  if not scored.size:
    plots.empty(
      ax,
      'training only: nothing is scored'
      if run.only_trains
      else 'nothing has been scored yet',
    )
    plots.title(ax, 'Price of each type', legend=False)
    return False
  cheapest = np.bincount(np.nanargmin(scored, 0), minlength=len(price))
  winner = structure.TYPES[cheapest.argmax()]
  share = cheapest.max() / scored.shape[1]
  low, high = np.nanmin(scored), np.nanmax(scored)
  exponent = 3 * int(np.floor(np.log10(high) / 3))
  for t, y in price.items():
    y = y / 10.0**exponent
    # Many noisy points of three types hide one another: show their mean.
    if len(y) > 400:
      plots.line(ax, run, y, color=COLORS[t], lw=0.6, alpha=0.25)
      y = np.where(np.isfinite(y), plots.smooth(y, plots.window(y)), np.nan)
    plots.line(ax, run, y, color=COLORS[t], label=t)
  if high > 8 * low:
    ax.set_yscale('log')
    ax.yaxis.set_minor_formatter(ticker.NullFormatter())
  ax.yaxis.set_major_formatter(ticker.FuncFormatter(lambda v, _: f'{v:g}'))
  plots.title(
    ax,
    f'Lowest mean price: {winner}, at {100 * share:.0f}{amounts.PERCENT} of '
    'the scored steps',
  )
  ax.set_ylabel(f'price, $10^{{{exponent}}}$ {price_unit(run)}')
  return True


def _shares_panel(ax, run, legend):
  """Draws which share of each type's groups is gone."""
  plots.pruning(ax, run)
  shares = {t: 100 * run.train[f'pruned.{t}'] for t in structure.TYPES}
  for t, y in shares.items():
    plots.line(ax, run, y, 0.0, color=COLORS[t], label=t)
  most = max(5.0, *(float(y.max()) for y in shares.values()))
  # Below 0, or a type of which nothing went would hide behind the axis.
  ax.set_ylim(-0.03 * most, 1.08 * most)
  ax.yaxis.set_major_formatter(
    ticker.FuncFormatter(lambda v, _: f'{v:g}{amounts.PERCENT}')
  )
  ax.set_ylabel('groups pruned')
  ends = ', '.join(
    f'{y[-1]:.3g}{amounts.PERCENT} of {t}' for t, y in shares.items()
  )
  plots.title(ax, f'Pruned: {ends}', legend=legend)


def price_unit(run: runlog.Run) -> str:
  """What prices of a run are in, on two lines."""
  score = 'nats per token' if run.in_nats else 'score'
  kind, _ = run.budget
  return f'{score}\nper {amounts.UNITS.get(kind, "unit of the budget")}'


def _loss(run):
  fig, (top, bottom) = plots.panels(run, 2, height=6.4)
  _training_panel(top, run)
  _heldout_panel(bottom, run)
  return render(
    fig,
    'loss',
    'Loss on the training text and bits per byte on held-out text; shaded from '
    'the first prune to the last.',
  )


def _training_panel(ax, run):
  loss = run.train['loss']
  plots.pruning(ax, run)
  mean = plots.noisy(ax, run, loss)
  # A step that was skipped has none.
  mean = mean[np.isfinite(mean)]
  if mean.size:
    if len(loss) > 200:
      # One spike must not flatten everything else.
      low, high = np.nanpercentile(loss, [0.2, 99.8])
      ax.set_ylim(low - 0.1 * (high - low), high + 0.1 * (high - low))
    worst = float(mean.max())
    rose = f'{worst:.2f} at most, ' if worst > max(mean[0], mean[-1]) else ''
    end = 'at the end' if run.finished else 'now'
    plots.title(
      ax,
      f'Training loss {mean[0]:.2f} at the start, {rose}{mean[-1]:.2f} {end}',
    )
  else:
    plots.empty(ax, 'no step had a finite loss')
    plots.title(ax, 'Training loss', legend=False)
  ax.set_ylabel('nats per token')


def _heldout_panel(ax, run):
  plots.pruning(ax, run)
  x = [e['tokens'] for e in run.evals]
  domains = dict.fromkeys(d for e in run.evals for d in e['domains'])
  # Points at the very edge, before the first step, are drawn whole.
  style = {'clip_on': False, 'zorder': 3}
  for i, domain in enumerate(domains):
    y = [e['domains'].get(domain, np.nan) for e in run.evals]
    label = None if i else 'each domain'
    ax.plot(x, y, '.-', color='#cbb3c3', lw=0.8, label=label, **style)
  if x:
    y = [e['bits_per_byte'] for e in run.evals]
    color = '#8a3d6e'
    ax.plot(x, y, 'o-', color=color, ms=5, label='all domains', **style)
    plots.title(ax, f'Held-out bits per byte: {_said(run)}')
  else:
    plots.empty(ax, 'no evaluation yet')
    plots.title(ax, 'Held-out text', legend=False)
  ax.set_ylabel('bits per byte')


def _said(run):
  said = {x['phase']: x['bits_per_byte'] for x in run.evals}
  names = {
    'source': 'at the start',
    'pruned': 'after the last prune',
    'final': 'at the end',
  }
  words = [f'{said[x]:.3f} {text}' for x, text in names.items() if x in said]
  if run.evals[-1]['phase'] not in names:
    words.append(f'{run.evals[-1]["bits_per_byte"]:.3f} now')
  return ', '.join(words)


def _widths(run):
  fig, panels = plots.panels(run, 3, height=6.6)
  before, after = run.source_widths(), run.widths()
  arrays = run.source_array_widths()
  for t, ax in zip(structure.TYPES, panels, strict=True):
    x = [0, *(e['tokens'] for e in run.shrinks), run.tokens[-1]]
    y = [arrays[t], *(e['widths_after'][t] for e in run.shrinks)]
    style = {'color': COLORS[t], 'alpha': 0.3, 'lw': 4.5}
    ax.plot(x, [*y, y[-1]], drawstyle='steps-post', label='arrays', **style)
    live = run.train[f'widths.{t}']
    mean = ', mean' if t != 'stem' and run.uneven() else ''
    if mean:
      at = np.append(0.0, run.prune_tokens)
      each = run.layer_widths(t, at)
      x, low, high = (
        np.append(v, end)
        for v, end in (
          (at, max(at[-1], run.tokens[-1])),
          (each.min(-1), each[-1].min()),
          (each.max(-1), each[-1].max()),
        )
      )
      style = {'color': COLORS[t], 'alpha': 0.13, 'lw': 0, 'step': 'post'}
      ax.fill_between(x, low, high, label='narrowest to widest layer', **style)
    plots.line(ax, run, live, before[t], color=COLORS[t], label='live')
    # Below 0, or a layer that lost everything would hide behind the axis.
    ax.set_ylim(-0.03 * arrays[t], 1.12 * arrays[t])
    ax.yaxis.set_major_locator(ticker.MaxNLocator(4, integer=True))
    ax.yaxis.set_major_formatter(ticker.StrMethodFormatter('{x:,.0f}'))
    became = f'to {after[t]:,.6g} ({amounts.change(before[t], after[t])})'
    plots.title(
      ax,
      f'{tables.LABELS[t]}{mean}: {before[t]:,.6g} '
      + (became if after[t] != before[t] else '(nothing pruned)'),
      legend=ax is panels[0],
    )
  return render(
    fig,
    'widths',
    'Live width of each pruning type, mean over the layers, and the width of '
    'the arrays that hold it.',
  )


def _layers(run):
  fig = figure.Figure(figsize=(6.6, 6.4), dpi=150, layout='constrained')
  maps = layer_maps(run) if run.removed else {}
  rows = maps['heads'].shape[1] if maps else 3
  share = min(1.0, max(0.3, 0.07 * rows))
  fig.get_layout_engine().set(hspace=0.06)
  top, bottom = fig.subplots(2, 1, sharex=True, height_ratios=(share, 1))
  words = {'heads': 'heads', 'ffn': 'ffn channels'}
  if maps:
    style = plots.times(run)
    for ax, (t, values) in zip((top, bottom), maps.items(), strict=True):
      drawn = plots.grid(ax, values, *style)
      before, live = run.layer_widths(t, [0.0, np.inf])
      plots.lost(ax, np.flatnonzero(live == 0))
      text = f'{words[t]}: {_spread(live, before)}'
      plots.title(ax, text, space=8 if live.all() else 15)
    if len(run.prune_tokens):
      plots.time_bar(fig, drawn, (top, bottom))
  else:
    for ax, t in ((top, 'heads'), (bottom, 'ffn')):
      plots.empty(ax, 'source/source.json does not record the shape')
      plots.title(ax, f'{words[t]} by layer', legend=False)
      ax.set_xticks([])
  top.set_ylabel('head')
  bottom.set_ylabel('ffn channels')
  bottom.set_xlabel('layer')
  return render(
    fig,
    'layers',
    'What each layer kept and when the rest went: a column is a layer, the '
    'colour of a group says after how many training tokens it was removed. The '
    'heads stand at their index in the source model. The channels of a layer '
    'are sorted by the time of their removal, the live ones at the bottom: '
    'their height is the width of the layer now. A cross marks a layer that '
    'has nothing left.'
    + (
      ' What was dead before the run began is white.'
      if any((x == 0).any() for x in maps.values())
      else ''
    ),
  )


def _spread(live, before):
  """The narrowest and the widest layer, and those that have nothing left."""
  if not before.any():
    return 'none in the source model'
  width = f'{"up to " * bool(np.ptp(before))}{before.max():,}'
  if live.min() == live.max():
    left = (
      f'all {width}' if (live == before).all() else f'{live[0]:,} of {width}'
    )
    return f'{left} alive in every layer'
  lost, rest = np.flatnonzero(live == 0), live[live > 0]
  ends = [
    f'{count:,} ({_named(np.flatnonzero(live == count))})'
    for count in dict.fromkeys((int(rest.min()), int(rest.max())))
  ]
  none = f'none left in {_named(lost)}, elsewhere ' if len(lost) else ''
  return f'{none}{" to ".join(ends)} of {width}'


def _named(layers):
  """A few layers by their index, many by their number."""
  if len(layers) > 3:
    return f'{len(layers)} layers'
  return f'layer{"s" * (len(layers) > 1)} {", ".join(map(str, layers))}'


def _speed(run):
  fig, (top, bottom) = plots.panels(run, 2, height=6.0)
  seconds, speed = run.train['seconds'], run.train['tokens_per_second']
  first, last = run.at_ends('seconds')
  end = 'at the end' if run.finished else 'now'
  limit = 1.3 * float(np.nanpercentile(seconds, 95))
  above = seconds > limit
  plots.shrinks(top, run)
  plots.noisy(top, run, np.where(above, np.nan, seconds))
  if above.any():
    x = run.tokens[above][plots.extremes(seconds[above], 100)]
    label = f'{above.sum()} above, up to {seconds[above].max():.3g} s'
    top.plot(x, np.full(len(x), limit), '^', color=plots.INK, ms=5, label=label)
  top.set_ylim(0, 1.05 * limit)
  top.set_ylabel('seconds per step')
  plots.title(
    top,
    f'A step took {first:.3g} s at the start, {last:.3g} s {end} '
    f'({amounts.change(first, last)})',
  )
  plots.shrinks(bottom, run)
  plots.noisy(bottom, run, speed)
  bottom.set_ylim(0, 1.15 * np.nanmax(speed))
  bottom.yaxis.set_major_formatter(plots.SI)
  bottom.set_ylabel('tokens per second')
  slow, fast = run.at_ends('tokens_per_second')
  plots.title(
    bottom,
    f'{amounts.si(slow, 3)} tokens per second at the start, '
    f'{amounts.si(fast, 3)} {end}',
    legend=False,
  )
  return render(
    fig,
    'speed',
    'Wall time of a training step, prune included, compilation left out, and '
    'the throughput that follows from it; vertical lines mark shrinks.',
  )


def render(fig: figure.Figure, name: str, caption: str) -> Figure:
  """A drawn figure; its title is made of those of its panels."""
  buffer = io.BytesIO()
  # `savefig` would draw all of it once more, for the layout. Level 4 packs the
  # pixels in half the time of 6, into 2 % more bytes.
  backend_agg.FigureCanvasAgg(fig).print_png(
    buffer,
    # Without the version of matplotlib: the same run gives the same bytes.
    metadata={'Software': None},
    pil_kwargs={'compress_level': 4},
  )
  title = '; '.join(
    ax.get_title(loc='left').replace('\n', ' ').replace(r'\$', '$')
    for ax in fig.axes
    if ax.get_title(loc='left')
  )
  return Figure(name, title, caption, buffer.getvalue())
