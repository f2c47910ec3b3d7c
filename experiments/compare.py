r"""Ours, from scratch, distilled, one-shot: all at the same budget.

    python -m experiments.compare \
      --study=experiments/studies/small_quick.py --workdir=runs/compare \
      [--arms=ours_a,scratch_found] [--seeds=1,2,3] [--budgets=tokens]

One trainer runs every arm of the study, on the same text with the same
optimizer: first at equal training tokens, then once more as long as it takes to
spend the FLOPs of the costliest arm, the pruning phase included. Run it again:
what is finished is kept, what was interrupted goes on. An arm that fails, as
where it diverges, does not keep the others from running. Run it several times
at once, on a core or a GPU each: they share the work. The tables are printed
and, with two kinds of figures, kept in the workdir's folder of the study
(summary.md), all of them made of its results.jsonl.

`--arms=sensitivity` runs the study's variants of `ours_a` instead.
"""

import pathlib

from absl import flags

from experiments import cli

_STUDY = flags.DEFINE_string('study', None, 'A file in experiments/studies.')
_WORKDIR = flags.DEFINE_string('workdir', None, 'Folder of all studies.')
_ARMS = flags.DEFINE_list(
  'arms', ['all'], 'all, sensitivity, or some arms by name.'
)
_SEEDS = flags.DEFINE_list(
  'seeds',
  ['1', '2', '3'],
  'A run of each arm each. A source that is made here has the seed 0: runs of '
  'that one would read its text again, in the same order.',
)
_BUDGETS = flags.DEFINE_list(
  'budgets', ['tokens', 'flops'], 'What arms have in common; each is a table.'
)
_TASKS = flags.DEFINE_list(
  'tasks', [], 'Public benchmarks to ask, as in experiments.evaluate.'
)
_KEEP = flags.DEFINE_bool(
  'keep',
  False,
  'Keep what the runs of this call end as, 12 bytes a parameter each: a later '
  'call can ask other --tasks, and experiments.evaluate and experiments.export '
  'take their folders. Without, only ours_a at equal tokens keeps its weights.',
)
_LIMIT = flags.DEFINE_integer(
  'limit', 100, 'The first items of each task; 0: all.', lower_bound=0
)


def main(argv: list[str]) -> None:
  """Runs what is missing, then prints the tables."""
  del argv
  # After the flags have been parsed: these imports take seconds.
  from effllm_jax import benchmark_items
  from experiments import choices
  from experiments import same_budget

  path = pathlib.Path(_STUDY.value)
  study = choices.load(path)
  choice = choices.Choice(
    arms=choices.arms(study, _ARMS.value),
    seeds=choices.seeds(_SEEDS.value),
    budgets=choices.budgets(_BUDGETS.value),
    tasks=tuple(benchmark_items.names(_TASKS.value)) if _TASKS.value else (),
    limit=_LIMIT.value,
    keep=_KEEP.value,
  )
  cache = cli.CACHE.value
  made = same_budget.run(study, path.stem, _WORKDIR.value, cache, choice)
  console = cli.tables()
  for table in made:
    console.print(table.rich())
  console.print(
    pathlib.Path(_WORKDIR.value, path.stem, 'summary.md'),
    soft_wrap=True, highlight=False,
  )  # fmt: skip


if __name__ == '__main__':
  flags.mark_flags_as_required(['study', 'workdir'])
  cli.run(main)
