"""Draws a run, finished or not, from its workdir alone.

    python -m experiments.report --workdir=runs/a

Writes runs/a/report: index.html to look at, summary.md, one PNG per figure.
"""

from absl import flags

from experiments import cli

_WORKDIR = flags.DEFINE_string('workdir', None, 'Folder of a run.')


def main(argv: list[str]) -> None:
  """Writes the report, then prints its table and its path."""
  del argv
  # After the flags have been parsed: this import takes seconds.
  from effllm_jax import report
  from effllm_jax import runlog
  from effllm_jax import tables

  # Once: a run in progress goes on, and page and terminal say the same.
  run = runlog.read(_WORKDIR.value)
  folder = report.build(_WORKDIR.value, run)
  console = cli.tables()
  console.print(tables.compare(run).rich())
  console.print(f'{folder / "index.html"}', soft_wrap=True, highlight=False)


if __name__ == '__main__':
  flags.mark_flag_as_required('workdir')
  cli.run(main)
