"""How the figures of a report look: style, panels, lines and titles."""

from collections.abc import Sequence
import itertools
import textwrap
from typing import Any

import matplotlib
from matplotlib import axes
from matplotlib import colors
from matplotlib import figure
from matplotlib import image
from matplotlib import ticker
from matplotlib import transforms
import numpy as np

from effllm_jax import amounts
from effllm_jax import runlog

INK, FAINT = '#222222', '#b9b9b9'
SI = ticker.FuncFormatter(lambda x, _: amounts.si(x, 6))
STYLE = {
  'font.size': 10,
  'axes.titlesize': 11.5,
  'axes.titleweight': 'bold',
  'axes.titlelocation': 'left',
  'axes.spines.top': False,
  'axes.spines.right': False,
  'axes.edgecolor': '#777777',
  'axes.grid': True,
  'axes.axisbelow': True,
  'grid.color': '#e6e6e6',
  'grid.linewidth': 0.7,
  'lines.linewidth': 1.8,
  'xtick.color': '#444444',
  'ytick.color': '#444444',
}


def extremes(y: np.ndarray, spans: int = 800) -> np.ndarray:
  """Indices that draw `y` as all of it would: first, last, highs and lows.

  A million points cost seconds to draw and look like the lowest and the
  highest of each of 800 spans; a spike of one step is never lost.
  """
  if len(y) <= 2 * spans:
    return np.arange(len(y))
  kept = {0, len(y) - 1}
  edges = np.linspace(0, len(y), spans + 1).astype(int)
  for a, b in itertools.pairwise(edges):
    part = y[a:b]
    if np.isfinite(part).any():
      kept |= {a + int(np.nanargmin(part)), a + int(np.nanargmax(part))}
    else:
      kept.add(int(a))
  return np.asarray(sorted(kept))


def window(y: np.ndarray) -> int:
  """How many steps a smoothed line averages over."""
  return max(5, len(y) // 40)


def smooth(y: np.ndarray, width: int) -> np.ndarray:
  """Centred mean of `width` values, fewer at the ends; nan is skipped."""
  known = np.isfinite(y)
  sums = np.cumsum(np.concatenate([[0.0], np.where(known, y, 0.0)]))
  counts = np.cumsum(np.concatenate([[0], known]))
  i = np.arange(len(y))
  a = np.maximum(i - (width - 1) // 2, 0)
  b = np.minimum(i + width // 2 + 1, len(y))
  count = (counts[b] - counts[a]).astype(float)
  count[count == 0] = np.nan
  return (sums[b] - sums[a]) / count


def panels(
  run: runlog.Run, count: int, height: float
) -> tuple[figure.Figure, np.ndarray]:
  """`count` panels, one above the other, over training tokens.

  `height` is in inches; the width is 6.6.
  """
  fig = figure.Figure(figsize=(6.6, height), dpi=150, layout='constrained')
  fig.get_layout_engine().set(hspace=0.06)
  rows = fig.subplots(count, 1, sharex=True, squeeze=False)[:, 0]
  rows[-1].set_xlim(0, 1.01 * run.tokens[-1])
  rows[-1].xaxis.set_major_locator(ticker.MaxNLocator(7))
  rows[-1].xaxis.set_major_formatter(SI)
  rows[-1].set_xlabel('training tokens')
  return fig, rows


def line(
  ax: axes.Axes,
  run: runlog.Run,
  y: np.ndarray,
  start: float | None = None,
  **style: Any,
) -> None:
  """Draws a column of `run.train`; of a size, `start` is that of the source."""
  if not np.isfinite(y).any():
    return
  shown = extremes(y)
  x, y = run.tokens[shown], y[shown]
  if start is not None:
    # Sizes are known before the first step, and change at steps only.
    x, y = np.append(0.0, x), np.append(start, y)
    style['drawstyle'] = 'steps-post'
  # A line through one point is invisible.
  marker = 'o' if np.isfinite(y).sum() == 1 else None
  ax.plot(x, y, marker=marker, **style)


def noisy(ax: axes.Axes, run: runlog.Run, y: np.ndarray) -> np.ndarray:
  """Draws a column faintly and its running mean over it; returns the mean."""
  mean = smooth(y, window(y))
  line(ax, run, y, color=FAINT, lw=0.8, label='each step')
  line(ax, run, mean, color=INK, label='smoothed')
  return mean


def pruning(ax: axes.Axes, run: runlog.Run) -> None:
  """Shades the tokens from the first prune to the last."""
  if len(run.prune_tokens):
    first, last = run.prune_tokens[0], run.prune_tokens[-1]
    ax.axvspan(first, last, color='#f3efe4', zorder=0, label='pruning')


def shrinks(ax: axes.Axes, run: runlog.Run) -> None:
  """Marks shrinks by vertical lines."""
  x = [e['tokens'] for e in run.shrinks]
  if x:
    up = ax.get_xaxis_transform()
    style = {'color': '#3f7fb0', 'lw': 1.0, 'ls': ':', 'label': 'shrink'}
    ax.vlines(x, 0, 1, transform=up, **style)


def times(run: runlog.Run) -> tuple[colors.Colormap, colors.Normalize]:
  """Colours of tokens at removal, from the first prune to the last.

  What is alive (inf) is drawn in ink, what was dead before (0) not at all.
  """
  shades = matplotlib.colormaps['YlOrRd'](np.linspace(0.08, 0.82, 256))
  colormap = colors.ListedColormap(shades).with_extremes(
    bad=INK, over=INK, under='white'
  )
  at = run.prune_tokens
  first, last = (at[0], at[-1]) if len(at) else (1.0, run.tokens[-1])
  # One prune only: its colour is the first one.
  return colormap, colors.Normalize(first, last if last > first else first + 1)


def grid(
  ax: axes.Axes,
  values: np.ndarray,
  colormap: colors.Colormap,
  norm: colors.Normalize,
) -> image.AxesImage:
  """Draws [layers, groups], a column per layer, with lines between columns.

  Also between groups, where these are few.
  """
  layers, groups = values.shape
  drawn = ax.imshow(
    values.T,
    cmap=colormap,
    norm=norm,
    aspect='auto',
    origin='lower',
    # As drawn: averaged neighbours would be times at which nothing happened.
    interpolation='none',
    extent=(-0.5, layers - 0.5, 0, groups),
  )
  ax.grid(False)
  style = {'color': 'white', 'lw': 1.2 if layers <= 48 else 0.4}
  thin = style | {'lw': 1.2 if groups <= 8 else 0.6}
  ax.vlines(np.arange(1, layers) - 0.5, 0, groups, **style)
  if groups <= 32:
    ax.hlines(np.arange(1, groups), -0.5, layers - 0.5, **thin)
    step = -(-groups // 8)
    ax.set_yticks(np.arange(0, groups, step) + 0.5, range(0, groups, step))
    ax.tick_params(axis='y', length=0)
  else:
    ax.yaxis.set_major_locator(ticker.MaxNLocator(5, integer=True))
    ax.yaxis.set_major_formatter(ticker.StrMethodFormatter('{x:,.0f}'))
  # By default there are two ticks at least: one layer would have fractions.
  ax.xaxis.set_major_locator(
    ticker.MaxNLocator(12, integer=True, min_n_ticks=1)
  )
  return drawn


def lost(ax: axes.Axes, layers: np.ndarray) -> None:
  """Marks the layers that lost a whole block, above their columns."""
  if len(layers):
    up = ax.get_xaxis_transform()
    # In points above the axes, whatever their height.
    up += transforms.ScaledTranslation(0, 6 / 72, ax.figure.dpi_scale_trans)
    style = {'color': '#c0392b', 'ms': 5, 'mew': 1.6, 'clip_on': False}
    ax.plot(layers, np.ones(len(layers)), 'x', transform=up, **style)


def time_bar(
  fig: figure.Figure, drawn: image.AxesImage, beside: Sequence[axes.Axes]
) -> None:
  """The scale of `times`, with the ink of what is alive at its end."""
  bar = fig.colorbar(
    drawn,
    ax=beside,
    location='bottom',
    extend='max',
    extendfrac=0.05,
    extendrect=True,
    aspect=46,
    pad=0.03,
  )
  bar.ax.xaxis.set_major_formatter(SI)
  low, high = drawn.norm.vmin, drawn.norm.vmax
  ticks = ticker.MaxNLocator(7).tick_values(low, high)
  # None so late that its label would touch the word beside it.
  last = high - 0.05 * (high - low)
  # The scale of a single prune is one token wide.
  several = high - low > 1
  bar.set_ticks([x for x in ticks if low <= x <= last] if several else [low])
  bar.set_label('training tokens at removal')
  bar.outline.set_visible(False)
  under = {'ha': 'center', 'va': 'top', 'color': '#444444'}
  under['transform'] = bar.ax.transAxes + transforms.ScaledTranslation(
    0, -7 / 72, fig.dpi_scale_trans
  )
  bar.ax.text(1.025, 0, 'alive', **under)


def empty(ax: axes.Axes, text: str) -> None:
  """Says why there is nothing to see."""
  ax.text(0.5, 0.5, text, transform=ax.transAxes, ha='center', color='#777777')
  ax.set_yticks([])


def plain(text: str) -> str:
  """Text that is drawn as it is: between two dollars would be a formula."""
  return text.replace('$', r'\$')


def title(
  ax: axes.Axes, text: str, legend: bool = True, space: int = 8
) -> None:
  """Sets the title, and under it the legend of what has been drawn so far.

  A legend of several rows makes the figure higher, not the panel lower. Without
  one, `space` points are left under the title.
  """
  handles, labels = ax.get_legend_handles_labels() if legend else ([], [])
  if handles:
    columns = _columns(labels)
    below = 13.5 * (-(-len(labels) // columns) - 1)
    space = 24 + below
    ax.figure.set_figheight(ax.figure.get_figheight() + below / 72)
    ax.legend(
      loc='lower left',
      bbox_to_anchor=(-0.01, 0.985),
      ncols=columns,
      frameon=False,
      borderpad=0.2,
      handlelength=1.6,
      columnspacing=1.4,
      fontsize=9,
    )
  ax.set_title(plain(textwrap.fill(text, 62)), pad=space)


def _columns(labels: Sequence[str]) -> int:
  """As many columns as fit side by side, in letters of a mean width."""
  room, line = 74, 6
  if sum(line + len(x) for x in labels) <= room:
    return len(labels)
  return max(1, room // (line + max(map(len, labels))))
