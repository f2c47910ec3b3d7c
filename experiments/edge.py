r"""What a run's model is worth on the edge: beside its source, per format.

    python -m experiments.edge --workdir=runs/a [--event=1] \
      [--formats=gguf-f16,gguf-q8_0,gguf-q4_0,onnx] [--threads=1] [--pad=64]

File size, tokens/s of prefill and decode (medians), memory at the peak, and
held-out bits per byte through llama.cpp or onnxruntime. The table is printed
and kept in the workdir (edge.json): the report shows it, and so does the model
card of an export of the same model, with the same --pad, that is made
afterwards.
"""

from absl import flags

from effllm_jax import errors
from experiments import cli

_WORKDIR = flags.DEFINE_string('workdir', None, 'Folder of the run.')
_EVENT = flags.DEFINE_integer('event', None, 'Index of a shrink event.')
_FORMATS = flags.DEFINE_list(
  'formats',
  ['gguf-f16', 'gguf-q8_0', 'gguf-q4_0'],
  'Some of gguf-f32, gguf-f16, gguf-q8_0, gguf-q4_0, onnx.',
)
_PAD = flags.DEFINE_integer(
  'pad', 1, 'Fill stem and ffn of the pruned model up to multiples of this.'
)
_THREADS = flags.DEFINE_integer('threads', 1, 'Threads.', lower_bound=1)
_PREFILL = flags.DEFINE_integer(
  'prefill', 512, 'Tokens that are read at once.', lower_bound=1
)
_DECODE = flags.DEFINE_integer(
  'decode', 64, 'Tokens that are generated.', lower_bound=1
)
_ROUNDS = flags.DEFINE_integer('rounds', 5, 'Timed rounds.', lower_bound=1)
_TOKENS = flags.DEFINE_integer(
  'tokens', 512, 'Held-out tokens of each domain; 0: none.', lower_bound=0
)


def main(argv: list[str]) -> None:
  """Measures, prints the table, keeps it in the workdir."""
  del argv
  # After the flags have been parsed: these imports take seconds.
  import dataclasses
  import os
  import pathlib

  from effllm_jax import atomic
  from effllm_jax import console as console_lib
  from effllm_jax import edge
  from effllm_jax import environment
  from effllm_jax import finished
  from effllm_jax import formats
  from effllm_jax import runlog
  from effllm_jax import tables
  from effllm_jax import widths

  formats.check_runtimes(_FORMATS.value)
  model, made = finished.read(_WORKDIR.value, _EVENT.value)
  source = finished.source(_WORKDIR.value, made, cli.CACHE.value)
  if _PREFILL.value + _DECODE.value > model.cfg.context:
    raise errors.InputError(
      f'--prefill {_PREFILL.value} and --decode {_DECODE.value} exceed the '
      f"model's context {model.cfg.context}; set --prefill"
    )
  widths.check_multiple(_PAD.value, model.cfg)
  heldout = {}
  if _TOKENS.value:
    heldout = finished.heldout(
      _WORKDIR.value, made, model, cli.CACHE.value, _TOKENS.value
    )
  params, masks, cfg = widths.padded(
    model.params, model.masks, model.cfg, _PAD.value
  )
  pruned = dataclasses.replace(model, params=params, masks=masks, cfg=cfg)
  progress = console_lib.plain(stderr=True)
  rows = edge.measure(
    {'source': source, 'pruned': pruned},
    _FORMATS.value,
    heldout,
    _WORKDIR.value,
    threads=_THREADS.value,
    prefill=_PREFILL.value,
    decode=_DECODE.value,
    rounds=_ROUNDS.value,
    say=lambda line: progress.print(line, highlight=False, soft_wrap=True),
  )
  path = pathlib.Path(_WORKDIR.value) / runlog.EDGE
  machine = (
    f'{environment.processor()}, {os.cpu_count()} cpus, {_THREADS.value} '
    f'thread{"s" * (_THREADS.value > 1)}; prefill {_PREFILL.value}, decode '
    f'{_DECODE.value} tokens, medians of {_ROUNDS.value}'
  )
  with errors.writing(path):
    atomic.write_json(
      path,
      {
        'step': made.step,
        'pad': _PAD.value,
        'machine': machine,
        'rows': rows,
      },
    )
  table = tables.edge(runlog.read(_WORKDIR.value))
  console = cli.tables()
  console.print(table.rich())
  console.print(f'{path}', soft_wrap=True)


if __name__ == '__main__':
  flags.mark_flags_as_required(['workdir'])
  cli.run(main)
