r"""Masked products and blocks against XLA's own on arrays of the same width.

    python -m experiments.bench_kernels
    python -m experiments.bench_kernels --model=1.7b --tokens=2048 \
      --dtype=bfloat16
    python -m experiments.bench_kernels --tokens=256 --tune=blocks.json

For every product of a feed-forward layer and of its gradients, and for whole
SwiGLU and attention blocks alone and with their gradients, at several live
widths: the time of XLA on arrays that are physically that narrow, and what
share of that speed each implementation reaches on the whole arrays. `xla` is
the padded product. The roofline is the least time that this device's own best
product and copy, measured first, allow. Implementations take turns, so that a
machine that drifts drifts for all of them; medians. Before it is timed, each is
compared with XLA on the cut arrays. A call that is timed is a loop of the same
work over and over, 5 ms of it at least, and on an accelerator calls are timed
many at a time, so that no start from Python and no wait counts. Operands are
thus warm: in the cache where they fit, as in the L2 of a GPU, which those of a
training step need not be.

With --tune, the candidate blocks of every product, and of every kernel that
attention has, are timed as well, and the best kept in a file for
`--config.model.blocks`. They are used for products of exactly these sizes, and
for attention in texts of this length: --tokens is data.batch_size x
data.seq_len over the devices of mesh.data x mesh.fsdp, --seq_len is
data.seq_len. Those of `bucket` are for its products alone, as they are timed
here: in a model it cuts whole blocks.
"""

import re

from absl import flags

from effllm_jax import errors
from experiments import cli

_MODEL = flags.DEFINE_string(
  'model', '135m',
  'Whose layer: 135m or 1.7b, of SmolLM2, or its stem and feed-forward width, '
  'as in 960x2560, and for attention its key/value heads, query heads to each, '
  'and channels of a head, as in 960x2560x5x3x64.',
)  # fmt: skip
_TOKENS = flags.DEFINE_integer(
  'tokens', 512, 'Tokens of a micro-batch on one device.', lower_bound=1
)
_SEQ_LEN = flags.DEFINE_integer(
  'seq_len', 2048,
  'Tokens of a text, of which --tokens are several; with fewer, they are one.',
  lower_bound=1,
)  # fmt: skip
_DTYPE = flags.DEFINE_enum(
  'dtype', 'float32', ['float32', 'bfloat16'], 'Of the activations.'
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

# Stem and feed-forward width; key/value heads, query heads to each, channels.
SHAPES = {'135m': (576, 1536, 3, 3, 64), '1.7b': (2048, 8192, 32, 1, 64)}


def main(argv: list[str]) -> None:
  """Times everything, prints one table."""
  del argv
  # After the flags have been parsed: these imports take seconds.
  import jax
  import jax.numpy as jnp
  import rich.console
  import rich.progress
  import rich.table

  from experiments import bench_blocks
  from experiments import bench_products

  stem, ffn, *heads = _shape()
  names, shares = _names(stem, ffn, *heads), _shares()
  dtype = jnp.dtype(_DTYPE.value)
  products = bench_products.cases(stem, ffn, _TOKENS.value)
  texts, tokens = _texts()
  blocks = bench_blocks.cases(stem, ffn, heads, texts, tokens)
  if _TUNE.value:
    _tune(names, products, [(texts, tokens, *heads)] if heads else [], dtype)
  peak, bandwidth = bench_products.peak(dtype)
  table = rich.table.Table(
    'of', 'what', 'm n k', 'live', 'XLA cut, ms', 'roofline', *names
  )
  with rich.progress.Progress(
    console=rich.console.Console(stderr=True), transient=True
  ) as progress:
    for case in progress.track([*products, *blocks]):
      for width, seconds in bench_products.medians(
        case, shares, names, dtype, _REPEATS.value
      ):
        cut = seconds['cut']
        table.add_row(
          case.name,
          case.what,
          case.size_text(),
          case.live(width),
          f'{1e3 * cut:.3f}',
          f'{case.roofline(width, dtype, peak, bandwidth) / cut:.0%}',
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


def _tune(names, products, attentions, dtype) -> None:
  """Fills the file of --tune, and has it used."""
  import itertools

  from effllm_jax import kernels
  from effllm_jax.kernels import autotune
  from effllm_jax.kernels import forms

  try:
    autotune.store(_TUNE.value, [])
    for name, case in itertools.product(names, products):
      if name != 'xla':
        row = autotune.tune(name, case.name, *case.sizes, dtype, case.masked)
        autotune.store(_TUNE.value, [row])
    for name, shape, form in itertools.product(
      names, attentions, forms.ATTENTION
    ):
      if name in kernels.PLATFORMS:
        row = autotune.tune_attention(f'{name}_attention', form, shape, dtype)
        autotune.store(_TUNE.value, [row])
    autotune.use(_TUNE.value)
  except (OSError, ValueError) as e:
    raise errors.InputError(
      f'--tune: {e}; set --tune to a file that can be written, or leave it out'
    ) from e


def _shape() -> tuple[int, ...]:
  """Stem and feed-forward width, and of heads nothing or three numbers."""
  if _MODEL.value in SHAPES:
    return SHAPES[_MODEL.value]
  width = r'[1-9]\d{0,5}'
  if not re.fullmatch(
    rf'{width}x{width}(x{width}x{width}x{width})?', _MODEL.value
  ):
    raise errors.InputError(
      f'--model={_MODEL.value} is none of {", ".join(SHAPES)} and no stem and '
      'feed-forward width; set it as in --model=960x2560, or with heads as in '
      '--model=960x2560x5x3x64'
    )
  shape = tuple(map(int, _MODEL.value.split('x')))
  if shape[4:] and shape[4] % 2:
    raise errors.InputError(
      f'--model={_MODEL.value} has {shape[4]} channels in a head, which are '
      'turned in pairs; set an even number of them'
    )
  return shape


def _texts() -> tuple[int, int]:
  """Texts of a micro-batch, and tokens of each."""
  tokens = min(_TOKENS.value, _SEQ_LEN.value)
  if _TOKENS.value % tokens:
    raise errors.InputError(
      f'--tokens={_TOKENS.value} are no whole number of texts of '
      f'--seq_len={tokens}; set one to a multiple of the other'
    )
  return _TOKENS.value // tokens, tokens


def _names(stem: int, ffn: int, *heads: int) -> list[str]:
  import jax

  from effllm_jax import kernels

  here = jax.default_backend()
  runs = kernels.runnable()
  if not _fits_hopper(stem, ffn, *heads):
    runs = [x for x in runs if x != 'pallas_hopper']
  for name in _IMPLEMENTATIONS.value:
    if name not in runs:
      raise errors.InputError(
        f'{name!r} does not run on this {here} in {_DTYPE.value} on '
        f'{_TOKENS.value} tokens of --model={_MODEL.value}; set '
        f'--implementations to some of {", ".join(runs)}'
      )
  return _IMPLEMENTATIONS.value or runs


def _fits_hopper(stem, ffn, keys=64, group=1, channels=1) -> bool:
  """It takes bfloat16, multiples of 64, and heads of up to 128 channels."""
  axes = _TOKENS.value, stem, ffn, keys * channels, keys * group * channels
  even = not any(x % 64 for x in axes)
  return _DTYPE.value == 'bfloat16' and even and channels <= 128


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
