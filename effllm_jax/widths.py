"""Widths as files have them: dead groups filled, trimmed off, or padded.

A group is dead exactly when what it writes is zero: a head whose rows of `wo`
are, a channel whose row of `w_down` is. So zeros may stand in for it where a
file has one width for all layers, and may be added where a runtime is faster on
a multiple of 32 or 64 than on what a run has found.
"""

from collections.abc import Mapping
from collections.abc import Sequence
import dataclasses
import math

import jax
import numpy as np

from effllm_jax import errors
from effllm_jax import structure

# GGUF quantizes rows in blocks of 32, and llama.cpp decodes F16 best at 64.
MULTIPLE = 64
# The largest one that a runtime asks for: llama.cpp's k-quants.
_LARGEST = 256


def of_layers(masks: structure.Groups) -> dict[str, list[int]]:
  """Live heads and feed-forward channels of every layer."""
  return {
    t: np.asarray(getattr(masks, t)).sum(-1).tolist() for t in ('heads', 'ffn')
  }


def leading(
  live: Mapping[str, Sequence[int]], cfg: structure.ModelConfig
) -> structure.Groups | None:
  """Masks (numpy) of layers whose survivors come first; None: all are alive.

  Args:
    live: as `of_layers`.
    cfg: the architecture of the arrays.
  """
  masks = structure.Groups(
    heads=np.arange(cfg.K) < np.array(live['heads'])[:, None],
    ffn=np.arange(cfg.F) < np.array(live['ffn'])[:, None],
    stem=np.ones(cfg.D, bool),
  )
  return None if masks.heads.all() and masks.ffn.all() else masks


def occupied(masks: structure.Groups) -> list[int]:
  """Indices of the layers that have something alive; at least the first one.

  The others pass their input on as it is. No runtime takes a model of none.
  """
  live = of_layers(masks)
  return np.flatnonzero(np.add(live['heads'], live['ffn'])).tolist() or [0]


def filled(
  params: structure.Params, masks: structure.Groups
) -> structure.Params:
  """Params with exact zeros in all that a dead group reads or writes.

  Args:
    params: arrays; the result is numpy.
    masks: dead slots are filled.
  """

  def leaf(letters, x):
    x = np.asarray(x)
    for axis, letter in enumerate(letters):
      if letter not in structure.PRUNABLE:
        continue
      mask = np.asarray(getattr(masks, structure.PRUNABLE[letter]))
      if mask.all():
        continue
      shape = [1] * x.ndim
      shape[axis] = mask.shape[-1]
      if letter != 'D':
        shape[0] = len(x)
      x = np.where(mask.reshape(shape), x, np.float32(0))
    return x

  return structure.map_axes(leaf, params)


def trimmed(
  params: structure.Params, masks: structure.Groups, layer: int
) -> structure.Params:
  """One layer, as narrow as what is alive in it, and nothing else.

  Returns:
    Params whose layers have a leading axis of 1 and live heads and channels
    only, also none; `embed`, `final_norm` and `unembed` are None.
  """

  def leaf(letters, x):
    x = np.asarray(x)[layer : layer + 1]
    for axis, letter in enumerate(letters):
      if letter in structure.PRUNABLE and letter != 'D':
        mask = np.asarray(getattr(masks, structure.PRUNABLE[letter]))[layer]
        x = np.compress(mask, x, axis)
    return x

  layers = structure.Params(embed=None, layers=params.layers, final_norm=None)
  return structure.map_axes(leaf, layers)


def check_multiple(multiple: int, cfg: structure.ModelConfig) -> None:
  """Checks a multiple that widths are to be filled up to.

  Raises:
    errors.InputError: it is less than 1; or more than the widths are, and than
      any runtime asks for, so that most of the model would be zeros.
  """
  most = max(_LARGEST, cfg.D, cfg.F)
  if not 1 <= multiple <= most:
    raise errors.InputError(
      f'pad {multiple} is not in 1 to {most} (the stem is {cfg.D} wide, a '
      f'feed-forward block {cfg.F}); set --pad'
    )


def padded_shape(
  masks: structure.Groups, cfg: structure.ModelConfig, multiple: int
) -> tuple[structure.Groups, structure.ModelConfig]:
  """Masks (numpy) and architecture of what `padded` makes."""
  up = lambda width: math.ceil(width / multiple) * multiple
  ffn = np.asarray(masks.ffn)
  live = ffn.sum(-1)
  new = dataclasses.replace(
    cfg,
    D=up(cfg.D),
    F=max(cfg.F, up(int(live.max()))),
    norm_eps=cfg.norm_eps * cfg.D / up(cfg.D),
  )
  ffn = np.pad(ffn, ((0, 0), (0, new.F - cfg.F)))
  need = np.array([up(int(n)) for n in live]) - live
  dead = ~ffn
  ffn = ffn | (dead & (dead.cumsum(-1) <= need[:, None]))
  stem = np.ones(new.D, bool)
  return masks.replace(heads=np.asarray(masks.heads), ffn=ffn, stem=stem), new


def padded(
  params: structure.Params,
  masks: structure.Groups,
  cfg: structure.ModelConfig,
  multiple: int,
) -> tuple[structure.Params, structure.Groups, structure.ModelConfig]:
  """The same function with stem and feed-forward widths on multiples.

  Zeros are added; those of the feed-forward block count as alive from then on,
  in each layer as many as it needs (a layer that lost the block stays without).
  Of the stem they enter the mean square of RMSNorm, so its scales are
  multiplied by sqrt(D / D') and its epsilon by D / D', which gives the same
  values up to rounding. Norms of q and k have the same epsilon and another
  width, so what they read is multiplied by sqrt(D / D').

  Args:
    params: float32.
    masks: the stem is alive.
    cfg: the architecture of the arrays.
    multiple: of every width; at least 1.

  Returns:
    Arrays, masks (numpy) and architecture.
  """
  alive, new = padded_shape(masks, cfg, multiple)
  scale = np.float32(math.sqrt(cfg.D / new.D))

  def leaf(letters, x):
    x = x * scale if letters in ('D', 'ND') else x
    grow = [getattr(new, a) - n for a, n in zip(letters, x.shape, strict=True)]
    return np.pad(x, [(0, by) for by in grow])

  params = filled(params, masks)
  if cfg.qk_norm:
    layers = params.layers
    read = {x: getattr(layers, x) for x in ('wq', 'wk', 'bq', 'bk')}
    params = params.replace(
      layers=layers.replace(
        **{k: x * scale for k, x in read.items() if x is not None}
      )
    )
  return structure.map_axes(leaf, params), alive, new


def odd(
  masks: structure.Groups, cfg: structure.ModelConfig, multiple: int
) -> dict[str, list[int]]:
  """Widths of live stem and feed-forward that are not on a multiple."""
  ffn = sorted(set(np.asarray(masks.ffn).sum(-1).tolist()))
  found = {'stem': [cfg.D], 'ffn': ffn}
  return {
    t: bad
    for t, values in found.items()
    if (bad := [n for n in values if n % multiple])
  }


def whole(
  masks: structure.Groups | None, cfg: structure.ModelConfig
) -> structure.Groups:
  """Masks as numpy; all alive where there are none."""
  return jax.tree.map(
    np.asarray, structure.all_alive(cfg) if masks is None else masks
  )
