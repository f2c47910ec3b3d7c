r"""Which groups runs have in common, beside what chance would give.

    python -m experiments.overlap --workdirs=runs/a,runs/b,runs/c \
      [--event=1] [--out=overlap.json]

The runs must have started from one source, or from events of a run from it. A
folder that has a comma in its name, as of a sweep, stands in double quotes, as
in --workdirs='"runs/sweep/a=1,b=2",runs/c'.
Compared is every pair, as far as its record goes or, with --event, right after
that shrink of each: does another seed, saliency or schedule find the same
structure? The measures are defined in effllm_jax/overlap.py.
"""

from absl import flags

from effllm_jax import errors
from experiments import cli

_WORKDIRS = flags.DEFINE_list('workdirs', None, 'Folders of two runs or more.')
_EVENT = flags.DEFINE_integer('event', None, 'Index of a shrink event.')
_OUT = flags.DEFINE_string('out', None, 'JSON file to write.')


def main(argv: list[str]) -> None:
  """Compares, prints two tables, and writes them where --out says."""
  del argv
  if len(_WORKDIRS.value) < 2:
    raise errors.InputError(
      f'an overlap takes two runs or more, not {len(_WORKDIRS.value)}; set '
      '--workdirs to several, separated by commas'
    )
  out = _OUT.value and cli.out_file(_OUT.value)
  # After the flags have been checked: these imports take seconds.
  from effllm_jax import atomic
  from effllm_jax import overlap

  record = overlap.compare(
    [overlap.read(x, _EVENT.value) for x in _WORKDIRS.value]
  )
  console = cli.tables()
  for part in ('alive', 'removed'):
    console.print(overlap.table(record, part).rich())
  if out:
    with errors.writing(out):
      atomic.write_json(out, record)
    console.print(f'{out}', soft_wrap=True, highlight=False)


if __name__ == '__main__':
  flags.mark_flag_as_required('workdirs')
  cli.run(main)
