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
  import functools
  import statistics

  import jax
  import jax.numpy as jnp
  import rich.console
  import rich.progress
  import rich.table

  from experiments import bench_products as products
  from kernels import autotune
  from kernels import forms

  names, live, (d, f) = _names(), _shares(), _shape()
  dtype = jnp.dtype(_DTYPE.value)
  cases = _cases(d, f, _TOKENS.value)
  if _TUNE.value:
    try:
      autotune.store(_TUNE.value, [])
      for name in [x for x in names if x != 'xla']:
        for form, _, size, masked in cases:
          row = autotune.tune(name, form, **size, dtype=dtype, masked=masked)
          autotune.store(_TUNE.value, [row])
      autotune.use(_TUNE.value)
    except (OSError, ValueError) as e:
      raise errors.InputError(
        f'--tune: {e}; set --tune to a file that can be written, or leave it '
        'out'
      ) from e
  dense = jax.jit(forms.dense, static_argnums=(2, 3))
  peak, bandwidth = products.peak(dtype)
  table = rich.table.Table(
    'product', 'what', 'm n k', 'live', 'XLA cut, ms', 'roofline', *names
  )
  with rich.progress.Progress(
    console=rich.console.Console(stderr=True), transient=True
  ) as progress:
    for form, what, size, masked in progress.track(cases):
      left, right = forms.AXES[form]
      out = forms.result_dtype(form, dtype)
      a, b = (
        jax.random.normal(jax.random.key(i), [size[x] for x in letters], dtype)
        for i, letters in enumerate((left, right))
      )
      runs = {name: _masked(name, form, size, masked, out) for name in names}
      for share in live:
        width = max(round(size[masked] * share), 1)
        cut = [
          jnp.asarray(
            x[tuple(slice(width if y == masked else None) for y in letters)]
          )
          for x, letters in ((a, left), (b, right))
        ]
        extent = jnp.int32(width)
        want = dense(*cut, form, out)
        zeroed = products.zeroed(a, left, width) if masked == 'k' else a
        for name, run in runs.items():
          products.compare(
            f'{name} of {form} {size}, {masked} up to {width},',
            run(zeroed, b, extent),
            want,
            dtype,
          )
        plain = functools.partial(forms.dense, form=form, dtype=out)
        calls = {'cut': products.timed(plain, *cut)}
        for name, run in runs.items():
          calls[name] = products.timed(run, a, b, extent)
        seconds = {name: [] for name in calls}
        for _ in range(_REPEATS.value + 1):
          for name, call in calls.items():
            seconds[name].append(call())
        median = {k: statistics.median(v[1:]) for k, v in seconds.items()}
        small = size | {masked: width}
        flops = 2 * small['m'] * small['n'] * small['k']
        moved = sum(x.size * x.dtype.itemsize for x in cut)
        moved += small['m'] * small['n'] * jnp.dtype(out).itemsize
        ideal = max(flops / peak, moved / bandwidth)
        table.add_row(
          form,
          what,
          ' '.join(f'{size[x]}' for x in 'mnk'),
          f'{masked} {share:.0%}',
          f'{1e3 * median["cut"]:.3f}',
          f'{ideal / median["cut"]:.0%}',
          *(f'{median["cut"] / median[name]:.0%}' for name in names),
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


def _cases(d: int, f: int, tokens: int) -> list[tuple]:
  """(form, what it is in the layer, sizes, which of them is masked)."""
  from kernels import forms

  up = {'nn': 'n', 'nt': 'k', 'tn': 'n'}
  down = {'nn': 'k', 'nt': 'n', 'tn': 'm'}
  found = []
  for layer, masked, widths in (
    ('gate, up', up, (d, f)),
    ('down', down, (f, d)),
  ):
    for form, gradient in (('nn', ''), ('nt', ', dx'), ('tn', ', dw')):
      mnk = forms.layer_sizes(form, tokens, *widths)
      size = dict(zip('mnk', mnk, strict=True))
      found.append((form, layer + gradient, size, masked[form]))
  return found


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


def _masked(name, form, size, masked, out):
  """The jitted product by one implementation, of a traced extent."""
  import importlib

  import jax

  from kernels import autotune
  from kernels import forms

  module = importlib.import_module(f'kernels.{name}')

  @jax.jit
  def run(a, b, extent):
    extents = forms.Extents(**size | {masked: extent})
    blocks = autotune.choice(name, form, *size.values(), a.dtype)
    return module.product(a, b, form, extents, out, blocks)

  return run


if __name__ == '__main__':
  cli.run(main)
