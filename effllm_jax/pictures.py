"""Figures for notebooks: one moment of a run, and several runs in one figure.

A report has those of one run over time (`figures`); style and colours are the
same.
"""

from collections.abc import Sequence
import itertools

import matplotlib
from matplotlib import colors
from matplotlib import figure
import numpy as np

from effllm_jax import amounts
from effllm_jax import figures
from effllm_jax import plots
from effllm_jax import runlog
from effllm_jax import structure

_WORDS = {'heads': 'heads', 'ffn': 'ffn channels', 'stem': 'stem channels'}
# For runs, of Okabe and Ito too, without those of the pruning types.
_RUNS = ('#222222', '#CC79A7', '#56B4E9', '#E69F00', '#7a5c00', '#8a8a8a')


def masks(alive: structure.Groups) -> figures.Figure:
  """A bitmap per type, dark where a group is alive: a column per layer.

  Args:
    alive: bool, numpy; heads [N, K], ffn [N, F], stem [D].
  """
  pale = colors.ListedColormap(['#f2d9c9', plots.INK])
  said = lambda live: f'{live.sum():,} of {live.size:,} alive'
  return _maps(
    alive,
    (pale, colors.Normalize(0, 1)),
    said,
    'masks',
    'Which groups are alive (dark) and which are not (pale), by their index in '
    'the source model. A column is a layer; the stem is shared by all.',
  )


def scores(values: structure.Groups, alive: structure.Groups) -> figures.Figure:
  """A map of the scores per type, in the order of the arrays.

  Args:
    values: float, numpy, shapes of `alive`.
    alive: bool, numpy.
  """
  shown = {
    t: np.where(getattr(alive, t), getattr(values, t), np.nan)
    for t in structure.TYPES
  }
  known = np.concatenate([x[x > 0] for x in shown.values()])
  low, high = (known.min(), known.max()) if known.size else (1.0, 1.0)
  norm = colors.LogNorm(low, high if high > low else 2 * low)
  style = matplotlib.colormaps['viridis'].with_extremes(bad='white'), norm

  def said(x):
    x = x[x > 0]
    return f'{x.min():.2g} to {x.max():.2g}' if x.size else 'nothing scored'

  return _maps(
    structure.Groups(**shown),
    style,
    said,
    'scores',
    'Score of every live group (dead ones are white), in the order in which '
    'the arrays hold them: a shrink sorts the survivors, the highest score '
    'first.',
    bar='score',
  )


def _maps(groups, style, said, name, caption, bar=None) -> figures.Figure:
  with matplotlib.rc_context(plots.STYLE):
    fig = figure.Figure(figsize=(6.6, 7.4), dpi=150, layout='constrained')
    axes = fig.subplots(3, 1, height_ratios=(0.6, 1, 0.6))
    for ax, (t, word) in zip(axes, _WORDS.items(), strict=True):
      values = np.atleast_2d(getattr(groups, t))
      drawn = plots.grid(ax, values.astype(float), *style)
      ax.set_ylabel(word)
      if t == 'stem':
        ax.set_xticks([])
      else:
        ax.set_xlabel('layer')
      plots.title(ax, f'{word}: {said(values)}', legend=False)
    if bar:
      fig.colorbar(drawn, ax=axes, location='bottom', aspect=46, label=bar)
    return figures.render(fig, name, caption)


def sizes(runs: Sequence[runlog.Run]) -> figures.Figure:
  """Live parameters against training tokens, a line per run.

  The form of the paper's Figure 2(c), of the runs given.
  """
  with matplotlib.rc_context(plots.STYLE):
    fig, ax = _panel('training tokens', 'live parameters')
    for run, name, color in _each(runs):
      start, live = run.source_params(), run.train['live_params']
      plots.line(ax, run, live, start, color=color, label=_label(name))
    first = [run.source_params() for run in runs]
    last = [run.train['live_params'][-1] for run in runs]
    ax.set_ylim(0, None)
    plots.title(
      ax,
      f'{_span(first)} live parameters became {_span(last)}',
    )
    return figures.render(
      fig,
      'sizes',
      'The size of the model falls while it trains: a step down is a prune, '
      'the flat end is recovery.',
    )


def architecture(run: runlog.Run) -> figures.Figure:
  """Width of each type, and its saliency, against training tokens.

  The form of the paper's Figure A0, of the run given.
  """
  with matplotlib.rc_context(plots.STYLE):
    fig, (top, bottom) = plots.panels(run, 2, height=6.4)
    before, after = run.source_widths(), run.widths()
    for t in structure.TYPES:
      # No line for a type that the source had nothing of.
      share = 100 * run.train[f'widths.{t}'] / (before[t] or np.nan)
      style = {'color': figures.COLORS[t], 'label': t}
      plots.line(top, run, share, 100.0, **style)
      plots.line(bottom, run, run.train[f'price.{t}'], **style)
    top.set_ylim(0, 108)
    top.set_ylabel('width, % of the source')
    became = ', '.join(
      f'{t} {before[t]:,.4g} to {after[t]:,.4g}' for t in structure.TYPES
    )
    plots.title(top, became)
    bottom.set_ylabel(f'mean price, {figures.price_unit(run)}')
    bottom.set_ylim(0, None)
    plots.title(bottom, 'Saliency of each type, per unit that it saves', False)
    return figures.render(
      fig,
      'architecture',
      'The architecture that pruning finds: the widths of the three types '
      '(means over the layers), and what decides which of them is pruned next. '
      'The price ends where pruning does.',
    )


def quality(runs: Sequence[runlog.Run]) -> figures.Figure:
  """Held-out bits per byte against live parameters, a line per run."""
  with matplotlib.rc_context(plots.STYLE):
    fig, ax = _panel('live parameters', 'held-out bits per byte')
    ends = []
    for run, name, color in _each(runs):
      x = [e['live_params'] for e in run.evals]
      y = [e['bits_per_byte'] for e in run.evals]
      ax.plot(x, y, '.-', color=color, lw=1.2, label=_label(name))
      ax.plot(x[-1:], y[-1:], 'o', color=color, ms=8)
      ends += [(y[-1], name)] if y else []
    if len(ends) > 3:
      said = ' to '.join(f'{y:.3f} ({x})' for y, x in (min(ends), max(ends)))
    else:
      said = ', '.join(f'{x} {y:.3f}' for y, x in ends) or 'none'
    plots.title(ax, f'Held-out bits per byte now: {said}')
    return figures.render(
      fig,
      'quality',
      'What a smaller model costs: every evaluation of every run, in order, '
      'the newest one large. Left is smaller, down is better.',
    )


def _span(values):
  ends = dict.fromkeys(amounts.si(x) for x in (min(values), max(values)))
  return ' to '.join(ends)


def _panel(x, y):
  fig = figure.Figure(figsize=(6.6, 4.0), dpi=150, layout='constrained')
  ax = fig.subplots()
  ax.set_xlabel(x)
  ax.set_ylabel(y)
  ax.xaxis.set_major_formatter(plots.SI)
  if 'parameters' in y:
    ax.yaxis.set_major_formatter(plots.SI)
  return fig, ax


def _each(runs):
  """Each run, a name that no other one has, and a colour."""
  names = runlog.names([x.workdir for x in runs])
  short = [
    x if len(x) <= 48 else f'{x[:23]}\N{HORIZONTAL ELLIPSIS}{x[-24:]}'
    for x in names
  ]
  if len(set(short)) < len(set(names)):
    short = names
  # With more runs than colours these come again.
  return zip(runs, short, itertools.cycle(_RUNS), strict=False)


def _label(name):
  # The legend leaves out what begins with an underscore.
  return ' ' * name.startswith('_') + plots.plain(name)
