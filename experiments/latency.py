r"""Times the forward pass at several widths: the table of the budget 'ms'.

    python -m experiments.latency \
      --config=experiments/configs/smollm2_135m.py --out=latency.json

Then `--config.budget.kind=ms --config.budget.table=latency.json` prunes to a
time on this machine. Measured is the project's own jitted model, batch 1, on
`--tokens` tokens at once, in the dtype of `config.model.dtype`; or, with
`--format=gguf-q8_0` and the like, what the exported model will run in:
llama.cpp or onnxruntime on `--threads`, and with `--decode` the time of one
generated token after those. Weights are random, in the shapes of the source
model and of models pruned from it. The shapes take turns, so that a machine
that drifts drifts for all of them.
"""

from collections.abc import Mapping
import itertools
from typing import Any

from absl import flags
from ml_collections import config_flags

from effllm_jax import errors
from experiments import cli

_CONFIG = config_flags.DEFINE_config_file(
  'config', None, 'A file in experiments/configs.', lock_config=True
)
_OUT = flags.DEFINE_string('out', None, 'JSON file to write.')
_TOKENS = flags.DEFINE_integer('tokens', 256, 'Tokens a pass.', lower_bound=1)
_FORMAT = flags.DEFINE_enum(
  'format',
  'jax',
  ['jax', 'gguf-f32', 'gguf-f16', 'gguf-q8_0', 'gguf-q4_0', 'onnx'],
  "Whose time: the project's own model, or that of an exported file.",
)
_THREADS = flags.DEFINE_integer(
  'threads', 1, 'Threads of an exported file; jax takes all.', lower_bound=1
)
_DECODE = flags.DEFINE_bool(
  'decode', False, 'Time one generated token of an exported file, not a pass.'
)
_REPEATS = flags.DEFINE_integer('repeats', 5, 'Timed rounds.', lower_bound=1)


def main(argv: list[str]) -> None:
  """Measures, writes the table, prints it beside what is fitted to it."""
  del argv
  # After the flags have been parsed: these imports take seconds.
  import statistics

  import jax

  from effllm_jax import atomic
  from effllm_jax import budgets
  from effllm_jax import model
  from effllm_jax import sources

  config = cli.config(_CONFIG)
  source = sources.load(config.source, cli.CACHE.value, params=False)
  cfg = source.cfg
  out = cli.out_file(_OUT.value)
  _check(config, cfg)
  shapes = _shapes(cfg.widths(), config.prune.multiple_of)
  params = jax.device_get(model.init(jax.random.key(0), cfg))
  cut = lambda shape: _cut(params, cfg, shape)
  times = (
    _jax_times(cut, shapes, config.model.dtype)
    if _FORMAT.value == 'jax'
    else _file_times(cut, shapes, source, out.absolute().parent)
  )
  median = {k: statistics.median(v) for k, v in times.items()}
  machine = _machine(config.model.dtype)
  with errors.writing(out):
    atomic.write_json(out, _record(machine, cfg, median))

  cost = budgets.milliseconds(cfg, out)
  console = cli.tables()
  console.print(
    f'{machine["device"]}, {machine["cpus"]} cpus, {_what(config)}, '
    + ('a token after ' if _DECODE.value else '')
    + f'{_TOKENS.value} tokens'
    + ('' if _DECODE.value else ' a pass')
  )
  console.print(_table(cfg, cost, median))
  # A line, however long the path is.
  console.print(
    f'{out}: the fit is at most {cost.fit_error:.1%} off', soft_wrap=True
  )


def _check(config, cfg) -> None:
  """Raises errors.InputError where a flag does not fit model or format."""
  if _TOKENS.value > cfg.context:
    raise errors.InputError(
      f"--tokens {_TOKENS.value} exceeds the source model's context "
      f'{cfg.context}; set --tokens'
    )
  if config.model.dtype not in ('float32', 'bfloat16'):
    raise errors.InputError(
      f'model.dtype {config.model.dtype!r} is not one of float32, bfloat16; '
      'set --config.model.dtype'
    )
  if _DECODE.value and _FORMAT.value == 'jax':
    raise errors.InputError(
      '--decode: format jax has no key/value cache; set --format to an '
      'exported one'
    )


def _machine(dtype: str) -> dict[str, Any]:
  """What was timed, and on what."""
  import os
  import platform

  import jax

  # What is exported runs on the processor, whatever jax has here.
  ours = _FORMAT.value == 'jax'
  return {
    'device': jax.devices()[0].device_kind if ours else platform.machine(),
    'cpus': os.cpu_count(),
    'jax': jax.__version__,
    'format': _FORMAT.value,
    **({'dtype': dtype} if ours else {}),
    'threads': _THREADS.value,
    'decode': _DECODE.value,
    'batch': 1,
    'tokens': _TOKENS.value,
    'repeats': _REPEATS.value,
  }


def _record(machine, cfg, median) -> dict[str, Any]:
  """What `budgets.milliseconds` reads; `median` milliseconds by shape."""
  from effllm_jax import budgets
  from effllm_jax import structure

  return {
    'machine': machine,
    'model': {x: getattr(cfg, x) for x in budgets.FIXED},
    'shapes': [
      dict(zip((*structure.TYPES, 'ms'), (*shape, ms), strict=True))
      for shape, ms in median.items()
    ],
  }


def _table(cfg, cost, median):
  """Of what was measured, and what the budget makes of it."""
  import dataclasses

  import rich.table

  table = rich.table.Table(
    'heads', 'ffn', 'stem', 'parameters', 'ms, median', 'ms, fitted', 'off'
  )
  for (heads, ffn, stem), measured in median.items():
    small = dataclasses.replace(cfg, K=heads, F=ffn, D=stem)
    fitted = cost.reported(cost.of_config(small))
    table.add_row(
      f'{heads}',
      f'{ffn}',
      f'{stem}',
      f'{small.num_params():,}',
      f'{measured:.2f}',
      f'{fitted:.2f}',
      f'{fitted / measured - 1:+.1%}',
    )
  return table


def _what(config) -> str:
  import jax

  if _FORMAT.value != 'jax':
    return f'{_FORMAT.value}, threads: {_THREADS.value}'
  return f'jax {jax.__version__}, {config.model.dtype}'


def _cut(params, cfg, shape):
  """Architecture and parameters of one shape, cut out of the source model's."""
  import dataclasses

  import numpy as np

  from effllm_jax import shrink
  from effllm_jax import structure

  heads, ffn, stem = shape
  kept = structure.Groups(
    heads=np.tile(np.arange(heads), (cfg.N, 1)),
    ffn=np.tile(np.arange(ffn), (cfg.N, 1)),
    stem=np.arange(stem),
  )
  small = dataclasses.replace(cfg, K=heads, F=ffn, D=stem)
  return small, shrink.take_params(params, kept)


def _jax_times(cut, shapes, dtype) -> dict[tuple[int, int, int], list[float]]:
  """Milliseconds of each round of our own model, by shape."""
  import time

  import jax

  from effllm_jax import model
  from effllm_jax import structure

  compute = model.Compute(dtype=dtype, remat='none')

  @jax.jit(static_argnames='cfg')
  def prefill(params, tokens_BT, cfg):
    masks = structure.all_alive(cfg)
    return model.forward(params, masks, tokens_BT, cfg, compute)[0]

  times = {shape: [] for shape in shapes}
  for _ in range(_REPEATS.value):
    for shape, found in times.items():
      # Cut out anew each time: all shapes at once need not fit in memory.
      cfg, params = cut(shape)
      params = jax.device_put(params)
      tokens_BT = jax.random.randint(
        jax.random.key(1), (1, _TOKENS.value), 0, cfg.V
      )
      # The first pass compiles, and fills the caches.
      jax.block_until_ready(prefill(params, tokens_BT, cfg))
      start = time.perf_counter()
      jax.block_until_ready(prefill(params, tokens_BT, cfg))
      found.append(1e3 * (time.perf_counter() - start))
  return times


def _file_times(
  cut, shapes, source, folder
) -> dict[tuple[int, int, int], list[float]]:
  """Milliseconds of each round of exported models, by shape."""
  import contextlib
  import dataclasses
  import pathlib

  import rich.progress

  from effllm_jax import atomic
  from effllm_jax import formats
  from effllm_jax import timing

  formats.check_runtimes([_FORMAT.value])
  file = formats.FORMATS[_FORMAT.value].file
  runtime = formats.FORMATS[_FORMAT.value].runtime.__name__
  with contextlib.ExitStack() as stack:
    with errors.writing(folder):
      scratch = stack.enter_context(atomic.scratch(pathlib.Path(folder)))
    files, times = {}, {shape: [] for shape in shapes}
    for shape in rich.progress.track(shapes, 'writing', transient=True):
      cfg, params = cut(shape)
      # Masks and origin of a pruned source are for its own widths.
      model = dataclasses.replace(
        source, cfg=cfg, params=params, masks=None, origin=None
      )
      place = scratch / str(len(files))
      place.mkdir()
      formats.write(model, _FORMAT.value, place)
      files[shape] = place / file
    for _ in range(_REPEATS.value):
      for shape, path in files.items():
        speed = timing.speed(
          runtime, path, _THREADS.value, prefill=_TOKENS.value, decode=16
        )
        times[shape].append(
          1e3 / speed.decode
          if _DECODE.value
          else 1e3 * _TOKENS.value / speed.prefill
        )
  return times


def _shapes(
  widths: Mapping[str, int], multiple_of: Mapping[str, int]
) -> list[tuple[int, int, int]]:
  """Widths (heads, ffn, stem) whose times settle every coefficient.

  Whole and half of each type in all combinations, and between them three
  quarters of all; where there is room, on multiples, as a pruned model is.
  """

  def part(name, quarters):
    if widths[name] < 2 or multiple_of[name] < 1:
      raise errors.InputError(
        f'{name} {widths[name]} of the source model, on multiples of '
        f'{multiple_of[name]}, has no half to time; set '
        f'--config.prune.multiple_of.{name} to at least 1, or another '
        '--config.budget.kind'
      )
    width = widths[name] * quarters // 4
    return width - width % multiple_of[name] or width

  return [
    (part('heads', k), part('ffn', f), part('stem', d))
    for k, f, d in (*itertools.product((4, 2), repeat=3), (3, 3, 3))
  ]


if __name__ == '__main__':
  flags.mark_flags_as_required(['config', 'out'])
  cli.run(main)
