r"""What the repair of the survivors gives back after one prune.

    python -m experiments.bench_repair \
      --config=experiments/configs/smollm2_135m.py \
      [--seeds=3] [--share=0.05] [--damping=0,1,10]

For each seed: scores from a few training batches, one uniform prune of --share
of the parameters, and the held-out loss before it, after it, and after it with
a repair on one and on all of these batches; with a damping of 0 every matrix
chooses its own. Nothing is trained. The config says source, text, batch, kind
of prices and floors; widths are not rounded. Seconds are the median of a
repair, without its compilation.
"""

from absl import flags
from ml_collections import config_flags

from effllm_jax import errors
from experiments import cli

_CONFIG = config_flags.DEFINE_config_file(
  'config', None, 'A file in experiments/configs.', lock_config=True
)
_SEEDS = flags.DEFINE_integer('seeds', 3, 'Text orders.', lower_bound=1)
_SHARE = flags.DEFINE_float(
  'share', 0.05, 'Of the parameters to remove.', 0.0, 0.5
)
_DAMPING = flags.DEFINE_list(
  'damping', ['0', '1', '10'], 'Dampings to compare; 0: chosen.'
)
_BATCHES = flags.DEFINE_integer(
  'batches', 4, 'Batches to score on, and of the larger repair.', lower_bound=2
)
_TOKENS = flags.DEFINE_integer(
  'tokens', 256, 'Held-out tokens of each domain.', lower_bound=2
)


def main(argv: list[str]) -> None:
  """Measures every seed and prints one table."""
  del argv
  config, dampings = cli.config(_CONFIG), _dampings()
  # A batch is what an update takes.
  sequences = config.data.batch_size * config.train.accumulate
  if 0 in dampings and sequences < 2:
    raise errors.InputError(
      f'data.batch_size {config.data.batch_size}: a damping is chosen on one '
      'sequence of several; set --config.data.batch_size=2, or --damping'
    )
  # After the flags have been parsed: these imports take seconds.
  import numpy as np

  from effllm_jax import selection
  from effllm_jax import structure
  from experiments import repair_trials

  console = cli.tables()
  trials = repair_trials.Trials(config, cli.CACHE.value, _TOKENS.value)
  before = trials.unpruned()
  rows = {}

  def keep(name, tokens, found):
    rows.setdefault((name, tokens), []).append(found)
    console.print(f'  {name} {tokens}: {found.loss:.4f}')

  for seed in range(_SEEDS.value):
    batches = trials.batches(seed, _BATCHES.value)
    masks = trials.prune(batches, _SHARE.value)
    live = selection.live_widths(masks)
    size, pruned = (
      trials.cfg.num_params(), selection.live_params(masks, trials.cfg),
    )  # fmt: skip
    if pruned == size:
      raise errors.InputError(
        f'--share={_SHARE.value:g} removes nothing; set a larger one'
      )
    console.print(
      f'seed {seed}: {size:,} -> {pruned:,} parameters; '
      + ', '.join(f'{t} {np.mean(live[t]):g}' for t in structure.TYPES)
    )
    keep(*repair_trials.MASKED, trials.masked(masks))
    for damping in dampings:
      name = f'damping {damping:g}' if damping else 'chosen'
      for windows in (batches[0], np.concatenate(batches)):
        found = trials.repaired(masks, windows, damping)
        keep(name, windows[:, 1:].size, found)
  console.print(repair_trials.table(before, rows))


def _dampings() -> list[float]:
  """What --damping says."""
  try:
    dampings = [float(x) for x in _DAMPING.value]
  except ValueError as e:
    raise errors.InputError(f'--damping: {e}; give numbers') from e
  if not all(0 <= x < float('inf') for x in dampings):
    raise errors.InputError(
      f'--damping={",".join(_DAMPING.value)} has a number below 0, or none; '
      'give numbers of at least 0'
    )
  return dampings


if __name__ == '__main__':
  flags.mark_flag_as_required('config')
  cli.run(main)
