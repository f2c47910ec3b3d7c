"""What a model may cost: parameters, bytes, FLOPs or measured milliseconds.

Every budget is one bilinear form of the live groups, in whole units, so that a
size is never rounded and a target is met to one group:

    size = D (head K + ffn F + stem) + head_fixed K + ffn_fixed F + fixed

with D the live stem channels and K and F the live heads and feed-forward
channels of all layers together. The layers may differ in width.
"""

import dataclasses
import fractions
import math
import os
import pathlib
from typing import Any
from typing import NamedTuple

import numpy as np
from scipy import optimize

from effllm_jax import errors
from effllm_jax import structure
from effllm_jax import untrusted

KINDS = ('params', 'bytes', 'flops', 'ms')
# Format -> sixteenths of a byte per weight: of a matrix, and of the output
# matrix (which is the embedding where they are tied). q8_0 and q4_0 are the
# block formats of GGUF: 32 weights share a float16 scale. For why a file of
# q4_0 has its output matrix in q8_0 see `_OUTPUT` in `gguf_layout`.
FORMATS = {
  'f32': (64, 64),
  'bf16': (32, 32),
  'f16': (32, 32),
  'q8_0': (34 * 16 // 32, 34 * 16 // 32),
  'q4_0': (18 * 16 // 32, 34 * 16 // 32),
}
# Neither a width nor a time in milliseconds comes near it; the fit of numbers
# of any size would overflow.
_LONGEST = 1e9
# The letters that pruning leaves alone: a latency table holds for these.
FIXED = ('V', 'N', 'G', 'H')


class Form(NamedTuple):
  """Units as a function of how many groups are alive; a pytree of integers.

  Attributes:
    head, ffn, stem: units per live stem channel: of each head, of each
      feed-forward channel, and of all that lies outside them.
    head_fixed, ffn_fixed, fixed: units that do not depend on the stem.
    unpriced_stem: the part of `stem` that is embedding and output matrix. It is
      left out of a stem channel's price where `price_embedding` is off, never
      out of the size.
  """

  head: Any
  ffn: Any
  stem: Any
  head_fixed: Any
  ffn_fixed: Any
  fixed: Any
  unpriced_stem: Any

  def size(self, heads: Any, ffn: Any, stem: Any) -> Any:
    """Units of a model with so many live groups, over all layers.

    Exact for Python integers, and for int64 arrays of one shape.
    """
    by_stem = self.head * heads + self.ffn * ffn + self.stem
    fixed = self.head_fixed * heads + self.ffn_fixed * ffn + self.fixed
    return stem * by_stem + fixed

  def savings(self, heads: Any, ffn: Any, stem: Any) -> tuple[Any, Any, Any]:
    """Units saved by removing one (head, feed-forward channel, stem channel).

    Arguments as of `size`, whose differences these are.
    """
    return (
      self.head * stem + self.head_fixed,
      self.ffn * stem + self.ffn_fixed,
      self.head * heads + self.ffn * ffn + self.stem,
    )


@dataclasses.dataclass(frozen=True)
class Cost:
  """A budget.

  Attributes:
    kind: one of `KINDS`.
    unit: the name of what is reported, for messages.
    per_unit: integer units in one reported unit.
    form: what it costs, in units; Python integers.
    fit_error: largest relative difference between a measured time and this
      form; 0 for what is counted.
  """

  kind: str
  unit: str
  per_unit: int
  form: Form
  fit_error: float = 0.0

  def size(self, heads: int, ffn: int, stem: int) -> int:
    """As `Form.size`."""
    return self.form.size(heads, ffn, stem)

  def of_config(self, cfg: structure.ModelConfig) -> int:
    """Units of a model of which nothing is masked; exact."""
    return self.size(cfg.N * cfg.K, cfg.N * cfg.F, cfg.D)

  def live(self, masks: structure.Groups) -> int:
    """Units of the live groups, on the host; exact, widths may be ragged."""
    return self.size(
      *(int(np.asarray(getattr(masks, t)).sum()) for t in structure.TYPES)
    )

  def units(self, target: float) -> int:
    """A number of reported units in units, rounded down.

    Raises:
      errors.InputError: `target` is not a finite number.
    """
    try:
      return math.floor(fractions.Fraction(target) * self.per_unit)
    except (OverflowError, ValueError) as e:
      raise errors.InputError(
        f'budget.target {target} is not a number of {self.unit}; set '
        '--config.budget.target'
      ) from e

  def reported(self, units: int) -> float | int:
    """Units as the reported number: an int where the two are the same."""
    return units if self.per_unit == 1 else units / self.per_unit

  def text(self, units: int) -> str:
    """Units for a message, as in '107,600,000 parameters'."""
    digits = '' if self.per_unit == 1 else '.2f'
    return f'{self.reported(units):,{digits}} {self.unit}'


def params(cfg: structure.ModelConfig) -> Cost:
  """Parameters: of a whole model, `ModelConfig.num_params`."""
  return _counted(
    cfg,
    'params',
    'parameters',
    weight=1,
    scale=1,
    embedding=int(not cfg.tied),
    output=1,
  )


def stored_bytes(cfg: structure.ModelConfig, format: str) -> Cost:
  """Bytes of the weights in a number format, counted in sixteenths.

  Matrices are in `format`, norm scales and biases in float32. Exact for block
  formats when all widths are multiples of 32; other rows need a format without
  blocks (see `prune.multiple_of`). The metadata of a file is not counted.

  Raises:
    errors.InputError: an unknown format.
  """
  if format not in FORMATS:
    raise errors.InputError(
      f'budget.format {format!r} is not one of {", ".join(FORMATS)}; set '
      '--config.budget.format'
    )
  return _counted(
    cfg,
    'bytes',
    f'bytes in {format}',
    per_unit=16,
    weight=FORMATS[format][0],
    scale=4 * 16,
    embedding=0 if cfg.tied else FORMATS[format][0],
    output=FORMATS[format][1],
  )


def flops(cfg: structure.ModelConfig, context: int) -> Cost:
  """Floating-point operations of one token's forward pass.

  Two per weight of every matrix product; the output matrix is one, tied or not,
  and looking a row of the embedding up is none. Attention scores and values
  take 4 G H per key and head, for the (context + 1) / 2 keys that a token of a
  causal sequence sees on average. What is done entry by entry (norms, softmax,
  rotary embedding, SiLU, biases, residual sums) is not counted.

  Args:
    cfg: the architecture; its prunable widths are not used.
    context: length of the sequence, tokens.

  Raises:
    errors.InputError: a context below 1.
  """
  if context < 1:
    raise errors.InputError(
      f'budget.context {context} is not at least 1; set --config.budget.context'
    )
  return _counted(
    cfg,
    'flops',
    'FLOPs per token',
    weight=2,
    scale=0,
    embedding=0,
    output=2,
    head_fixed=2 * cfg.G * cfg.H * (context + 1),
  )


def milliseconds(cfg: structure.ModelConfig, table: str | os.PathLike) -> Cost:
  """Milliseconds of one pass, from a table of `experiments.latency`.

  The coefficients are the non-negative least squares fit of the measured
  times, each weighted by its inverse so that relative errors count; they are
  kept in femtoseconds. `unpriced_stem` is all of `stem`: a fit cannot tell the
  output matrix from the norms, and the matrix is nearly all of it. A type whose
  coefficients come out as 0 is never pruned.

  Args:
    cfg: the architecture; its prunable widths are not used.
    table: path of a JSON object with `machine` (free), `model` (V, N, G, H) and
      `shapes`, a list of objects with `heads`, `ffn` (per layer), `stem` and
      `ms`.

  Raises:
    errors.InputError: no such file, not such a table, measured on another
      architecture, of too few different shapes to fit, or of times too long to
      be counted in 64 bits.
  """
  path = pathlib.Path(table).expanduser()
  remedy = (
    'write one with python -m experiments.latency and set --config.budget.table'
  )
  if not os.path.isfile(path):
    raise errors.InputError(
      f'budget.table {str(table)!r} is not a file; {remedy}'
    )
  raw = untrusted.read_json(path, remedy)
  try:
    model = {letter: raw['model'][letter] for letter in FIXED}
    columns = np.array(
      [[s[t] for t in (*structure.TYPES, 'ms')] for s in raw['shapes']], float
    ).T
    heads, ffn, stem, ms = columns
    if not ((columns > 0) & (columns < _LONGEST)).all():
      raise ValueError(f'a width or a time is not in (0, {_LONGEST:,.0f})')
  except (KeyError, OverflowError, TypeError, ValueError) as e:
    raise errors.InputError(
      f'budget.table {path} is not a table of latencies '
      f'({type(e).__name__}: {e}); {remedy}'
    ) from e
  for letter, measured in model.items():
    if measured != getattr(cfg, letter):
      raise errors.InputError(
        f'budget.table {path} was measured with {letter} {measured}, the '
        f'source model has {getattr(cfg, letter)}; {remedy}'
      )
  heads, ffn = cfg.N * heads, cfg.N * ffn
  terms = np.stack(
    [stem * heads, stem * ffn, stem, heads, ffn, np.ones_like(ms)], axis=-1
  )
  # Columns of one magnitude: rank and fit would suffer from 1 beside 10^7.
  scale = terms.max(0)
  design = terms / scale / ms[:, None]
  rank = np.linalg.matrix_rank(design)
  if rank < terms.shape[1]:
    raise errors.InputError(
      f'budget.table {path} has {len(ms)} shapes, which settle {rank} of '
      f'{terms.shape[1]} coefficients; {remedy}'
    )
  solution, _ = optimize.nnls(design, np.ones_like(ms))
  per_unit = 10**12
  head, ffn, stem, head_fixed, ffn_fixed, fixed = (
    round(float(c)) for c in solution / scale * per_unit
  )
  cost = Cost(
    kind='ms',
    unit='ms',
    per_unit=per_unit,
    form=Form(head, ffn, stem, head_fixed, ffn_fixed, fixed, stem),
    fit_error=float(np.abs(terms / scale @ solution / ms - 1).max()),
  )
  if cost.of_config(cfg) >= 2**63:
    raise errors.InputError(
      f'budget.table {path} gives the source model '
      f'{cost.text(cost.of_config(cfg))}, which is more than can be counted; '
      f'{remedy}'
    )
  return cost


def make(
  cfg: structure.ModelConfig,
  kind: str,
  *,
  format: str,
  context: int,
  table: str | os.PathLike,
) -> Cost:
  """The budget of a config's `budget` section.

  Args:
    cfg: the source model; a budget holds for every model pruned from it.
    kind: one of `KINDS`.
    format: number format of 'bytes'.
    context: sequence length of 'flops', tokens.
    table: file of measured latencies of 'ms'.

  Raises:
    errors.InputError: see the constructor of each kind.
  """
  match kind:
    case 'params':
      return params(cfg)
    case 'bytes':
      return stored_bytes(cfg, format)
    case 'flops':
      return flops(cfg, context)
    case 'ms':
      return milliseconds(cfg, table)
  raise errors.InputError(
    f'budget.kind {kind!r} is not one of {", ".join(KINDS)}; set '
    '--config.budget.kind'
  )


def _counted(
  cfg, kind, unit, *, weight, scale, embedding, output, per_unit=1, head_fixed=0
) -> Cost:
  """Units by weight of a matrix, norm scale or bias, and of the two tables."""
  tables = (embedding + output) * cfg.V
  return Cost(
    kind=kind,
    unit=unit,
    per_unit=per_unit,
    form=Form(
      head=weight * cfg.head_rows(),
      ffn=weight * 3,
      stem=tables + scale * (2 * cfg.N + 1),
      # What of a head is not as long as the stem: biases; attention itself.
      head_fixed=head_fixed + scale * cfg.head_biases(),
      ffn_fixed=0,
      fixed=scale * cfg.norm_scales(),
      unpriced_stem=tables,
    ),
  )
