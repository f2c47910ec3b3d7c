"""Numbers as people read them; a dash for none."""

import math

_MINUS = '\N{MINUS SIGN}'
NONE = '\N{EN DASH}'
# A number and its unit stay on one line.
_SPACE = '\N{NO-BREAK SPACE}'
PERCENT = f'{_SPACE}%'
# What a budget can limit, by `budget.kind`.
BUDGETS = {
  'params': 'parameters',
  'bytes': 'size',
  'flops': 'FLOPs per token',
  'ms': 'time',
}
# What a price is per, likewise.
UNITS = {'params': 'parameter', 'bytes': 'byte', 'flops': 'FLOP', 'ms': 'ms'}


def si(x: float, digits: int = 4) -> str:
  """A count as people say it: 20k, 134.5M, 1.5B."""
  return ''.join(_scaled(x, digits, 'kMBT'))


def flops(x: float | None, digits: int = 4) -> str:
  """FLOPs with their unit: 12.5 TFLOP."""
  if not known(x):
    return NONE
  number, prefix = _scaled(x, digits, 'kMGTPEZY')
  return f'{number}{_SPACE}{prefix}FLOP'


def size(num_bytes: int) -> str:
  """Bytes of a file: 113.4 MB, 0.6 MB, 1.2 kB."""
  unit, scale = ('MB', 1e6) if num_bytes >= 1e5 else ('kB', 1e3)
  return f'{num_bytes / scale:,.1f}{_SPACE}{unit}'


def costs(kind: str, x: float | None, unit: bool = False) -> str:
  """A cost as people say it: 134.5M, 269 MB, 2.1 GFLOP, 12.5 ms.

  Args:
    kind: `budget.kind`.
    x: in the unit of the log.
    unit: no label says what it is: 134.5M parameters, 2.1 GFLOP per token.
  """
  if not known(x):
    return NONE
  # Four digits at least, and no exponent: 0.1234, 215.2, 12,345.
  plain = lambda v: f'{v:,.0f}' if abs(v) >= 1000 else f'{v:.4g}'
  if kind == 'bytes':
    return f'{plain(x / 1e6)}{_SPACE}MB'
  if kind == 'ms':
    return f'{plain(x)}{_SPACE}ms'
  if kind == 'flops':
    return flops(x) + (' per token' if unit else '')
  return si(x) + (f' {BUDGETS.get(kind, kind)}' if unit else '')


def change(before: float | None, after: float | None) -> str:
  """The relative change in percent; a dash where there is none to state."""
  if not known(before) or not known(after) or not before:
    return NONE
  text = f'{100 * (after / before - 1):+.1f}{PERCENT}'
  return 'unchanged' if after == before else text.replace('-', _MINUS)


def span(ends: list[float]) -> str:
  """`448 to 1,536`; one number where both ends are the same."""
  return ' to '.join(dict.fromkeys(map(count, ends)))


def count(x: float | None) -> str:
  """All digits: 1,536; of a mean one more, 70.2."""
  if not known(x):
    return NONE
  # A mean over layers of different widths has a fraction.
  return f'{x:,.0f}' if x == round(x) else f'{x:,.1f}'


def bits(x: float | None) -> str:
  """Bits per byte, or nats per token: 1.2838."""
  return f'{x:.4f}' if known(x) else NONE


def tenths(x: float | None) -> str:
  """One digit after the point: 1,012.4."""
  return f'{x:,.1f}' if known(x) else NONE


def seconds(x: float | None) -> str:
  """Three digits: 0.0123."""
  return f'{x:.3g}' if known(x) else NONE


def known(x: float | None) -> bool:
  """Whether there is a number to tell."""
  return x is not None and math.isfinite(x)


def _scaled(x, digits, suffixes):
  for power, suffix in reversed([*enumerate(suffixes, 1)]):
    scale = 1000.0**power
    # Not `>= scale`: 999,999 rounds to 1M, not to 1000k.
    if abs(x) >= scale * (1 - 0.5 * 10.0**-digits):
      return f'{x / scale:.{digits}g}', suffix
  return f'{x:.{digits}g}', ''
