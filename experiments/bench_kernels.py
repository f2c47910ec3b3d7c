r"""Masked products against XLA's own on arrays cut to the same width.

    python -m experiments.bench_kernels
    python -m experiments.bench_kernels --model=1.7b --tokens=2048 \
      --dtype=bfloat16
    python -m experiments.bench_kernels --tokens=256 --tune=blocks.json

For every product of a feed-forward layer and of its gradients, at several live
widths: the time of XLA's product on arrays that are physically that narrow, and
what share of that speed each implementation reaches on the whole arrays. `xla`
is the padded product. The roofline is the least time that this device's own
best product and copy, measured first, allow. Implementations take turns, so
that a machine that drifts drifts for all of them; medians. Before it is timed,
each is compared with XLA's product of the cut arrays. A call that is timed is a
loop of the same product over and over, 5 ms of it at least, and on an
accelerator calls are timed many at a time, so that no start from Python and no
wait counts. Operands are thus warm: in the cache where they fit, as in the L2
of a GPU, which those of a training step need not be.

With --tune, the candidate blocks of every product are timed as well, and the
best kept in a file for `--config.model.blocks`. They are used for products of
exactly these sizes: --tokens is data.batch_size x data.seq_len over the devices
of mesh.data x mesh.fsdp. Those of `bucket` are for its products alone, as they
are timed here: in a model it cuts whole blocks.
"""

import re

from absl import flags

from effllm_jax import errors
from experiments import cli

_MODEL = flags.DEFINE_string(
  'model', '135m',
  'Whose layer: 135m or 1.7b, of SmolLM2, or its stem and feed-forward width, '
  'as in 960x2560.',
)  # fmt: skip
_TOKENS = flags.DEFINE_integer(
  'tokens', 512, 'Tokens of a micro-batch on one device.', lower_bound=1
)
_DTYPE = flags.DEFINE_enum(
  'dtype', 'float32', ['float32', 'bfloat16'], 'Of the operands.'
)
_LIVE = flags.DEFINE_list(
  'live', ['1', '0.75', '0.5', '0.25'], 'Live shares of the channels.'
)
_IMPLEMENTATIONS = flags.DEFINE_list(
  'implementations', [], 'Which to time; empty: all that run here.'
)
_REPEATS = flags.DEFINE_integer('repeats', 7, 'Timed rounds.', lower_bound=1)
_TUNE = flags.DEFINE_string(
  'tune', '', 'JSON file for the best blocks; empty: the default blocks.'
)

# Stem and feed-forward width.
SHAPES = {'135m': (576, 1536), '1.7b': (2048, 8192)}


def main(argv: list[str]) -> None:
  """Times everything, prints one table."""
  del argv
  # After the flags have been parsed: these imports take seconds.
  import jax
  import jax.numpy as jnp
  import rich.console
  import rich.progress
  import rich.table

  from experiments import bench_products as products

  names, shares = _names(), _shares()
  dtype = jnp.dtype(_DTYPE.value)
  cases = products.cases(*_shape(), _TOKENS.value)
  if _TUNE.value:
    _tune(names, cases, dtype)
  peak, bandwidth = products.peak(dtype)
  table = rich.table.Table(
    'product', 'what', 'm n k', 'live', 'XLA cut, ms', 'roofline', *names
  )
  with rich.progress.Progress(
    console=rich.console.Console(stderr=True), transient=True
  ) as progress:
    for case in progress.track(cases):
      rows = products.medians(case, shares, names, dtype, _REPEATS.value)
      for share, seconds in zip(shares, rows, strict=True):
        ideal = case.roofline(case.width(share), dtype, peak, bandwidth)
        cut = seconds['cut']
        table.add_row(
          case.form,
          case.what,
          ' '.join(f'{case.size[x]}' for x in 'mnk'),
          f'{case.masked} {share:.0%}',
          f'{1e3 * cut:.3f}',
          f'{ideal / cut:.0%}',
          *(f'{cut / seconds[name]:.0%}' for name in names),
        )
  console = cli.tables()
  console.print(
    f'{jax.devices()[0].device_kind}, jax {jax.__version__}, {dtype}, '
    f'{_TOKENS.value} tokens, {"tuned" if _TUNE.value else "default"} blocks; '
    f'best product {peak / 1e12:.3g} TFLOP/s, best copy '
    f'{bandwidth / 1e9:.3g} GB/s'
  )
  console.print(table)
  console.print(
    'Shares are of the speed of XLA on arrays cut to the live width; the '
    'roofline column is what XLA itself reaches there.'
  )


def _tune(names, cases, dtype) -> None:
  """Fills the file of --tune, and has it used."""
  from kernels import autotune

  try:
    autotune.store(_TUNE.value, [])
    for name in [x for x in names if x != 'xla']:
      for case in cases:
        row = autotune.tune(
          name, case.form, **case.size, dtype=dtype, masked=case.masked
        )
        autotune.store(_TUNE.value, [row])
    autotune.use(_TUNE.value)
  except (OSError, ValueError) as e:
    raise errors.InputError(
      f'--tune: {e}; set --tune to a file that can be written, or leave it out'
    ) from e


def _shape() -> tuple[int, int]:
  """Stem and feed-forward width."""
  if _MODEL.value in SHAPES:
    return SHAPES[_MODEL.value]
  found = re.fullmatch(r'([1-9]\d{0,5})x([1-9]\d{0,5})', _MODEL.value)
  if not found:
    raise errors.InputError(
      f'--model={_MODEL.value} is none of {", ".join(SHAPES)} and no stem and '
      'feed-forward width; set it as in --model=960x2560'
    )
  return int(found[1]), int(found[2])


def _names() -> list[str]:
  import jax

  import kernels

  here = jax.default_backend()
  runs = kernels.runnable()
  # It takes bfloat16, and multiples of 64.
  if _DTYPE.value == 'float32' or _TOKENS.value % 64:
    runs = [x for x in runs if x != 'pallas_hopper']
  for name in _IMPLEMENTATIONS.value:
    if name not in runs:
      raise errors.InputError(
        f'{name!r} does not run on this {here} in {_DTYPE.value} on '
        f'{_TOKENS.value} tokens; set --implementations to some of '
        f'{", ".join(runs)}'
      )
  return _IMPLEMENTATIONS.value or runs


def _shares() -> list[float]:
  try:
    shares = [float(x) for x in _LIVE.value]
  except ValueError:
    shares = []
  if not shares or not all(0 < x <= 1 for x in shares):
    raise errors.InputError(
      f'--live={",".join(_LIVE.value)} are not shares above 0 and up to 1; set '
      'some, as in --live=1,0.5'
    )
  return shares


if __name__ == '__main__':
  cli.run(main)
