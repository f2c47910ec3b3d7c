r"""Writes the model of a run for other runtimes, each file checked.

    python -m experiments.export --workdir=runs/a [--event=1] --out=out/a \
      [--formats=hf,gguf-f16,gguf-q8_0,onnx] [--pad=64]

Without --event it is the newest checkpoint; with it, the model right after that
shrink. Groups that are masked but still in the arrays are taken out first. All
formats go into one folder, with README.md (the model card) and pruning.json.
"""

from absl import flags

from experiments import cli

_WORKDIR = flags.DEFINE_string('workdir', None, 'Folder of the run.')
_EVENT = flags.DEFINE_integer('event', None, 'Index of a shrink event.')
_OUT = flags.DEFINE_string('out', None, 'Folder to write; new or empty.')
_FORMATS = flags.DEFINE_list(
  'formats',
  ['hf'],
  'Some of hf (stock class, narrower layers filled up with zeros), hf-trimmed '
  '(as small as the model, with a modelling file to trust), gguf-f32, '
  'gguf-f16, gguf-q8_0, gguf-q4_0 (llama.cpp), onnx, executorch (optional, '
  'and slow to write).',
)
_PAD = flags.DEFINE_integer(
  'pad', 1, 'Fill stem and ffn up with zeros to multiples of this.'
)


def main(argv: list[str]) -> None:
  """Exports, then prints where the folder is and what it holds."""
  del argv
  # After the flags have been parsed: these imports take seconds.
  from effllm_jax import amounts
  from effllm_jax import console as console_lib
  from effllm_jax import export
  from effllm_jax import finished
  from effllm_jax import formats

  formats.check_names(_FORMATS.value)
  model, made = finished.read(_WORKDIR.value, _EVENT.value)
  console = console_lib.plain(stderr=True)
  report = export.write(
    model,
    _OUT.value,
    _FORMATS.value,
    made,
    _PAD.value,
    lambda line: console.print(line, highlight=False, soft_wrap=True),
  )
  print(f'{report.path}')
  print(f'  parameters            {report.params:15,}')
  if 'hf' in _FORMATS.value:
    print(f'  zeros beside them, hf {report.padding:15,}')
  for name, size in report.files.items():
    print(f'  {name:23} {amounts.size(size):>15}')
  for name, found in report.agreements.items():
    if found:
      print(
        f'  {name}: log-probabilities within {found.relative:.1e} of the '
        f'largest logit, KL {found.kl:.1e} nats, top token equal in '
        f'{found.top1:.1%}, greedy tokens '
        f'{"all equal" if found.greedy else "not all equal"}'
      )
  for note in report.notes:
    print(f'note: {note}')


if __name__ == '__main__':
  flags.mark_flags_as_required(['workdir', 'out'])
  cli.run(main)
