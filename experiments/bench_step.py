r"""What pruning adds to a training step, and what a shrink takes off it.

    python -m experiments.bench_step \
      --config=experiments/configs/smollm2_135m.py [--repeats=7]

One process, random weights in the shape of SmolLM2-135M, batch and compute as
in the config. The variants take turns, in another order each round, so that a
machine that drifts drifts for all of them; printed are medians and ratios.
"""

import functools

from absl import flags
from ml_collections import config_flags
import rich.table

from experiments import cli

_CONFIG = config_flags.DEFINE_config_file(
  'config', None, 'A file in experiments/configs.', lock_config=True
)
_REPEATS = flags.DEFINE_integer('repeats', 7, 'Timed rounds.', lower_bound=1)


def main(argv: list[str]) -> None:
  """Times the variants and prints one table."""
  del argv
  # After the flags have been parsed: these imports take seconds.
  import jax

  from effllm_jax import pruning
  from effllm_jax import shrink
  from effllm_jax import steps
  from effllm_jax import structure
  from experiments import bench_setup

  bench = bench_setup.make(cli.config(_CONFIG))
  cfg, plan = bench.cfg, bench.plan

  # One state at a time per shape: a step donates what it gets.
  states = {cfg: bench.fresh(cfg)}
  states[cfg], _ = bench.step(states[cfg], cfg, score=True)(states[cfg])
  masks = pruning.select(states[cfg].prune, plan, plan.schedule.target)
  small = shrink.shrunk_config(masks, cfg, structure.Groups(1, 1, 1))
  pruned = states[cfg].replace(prune=states[cfg].prune.replace(masks=masks))
  shrunk, _ = steps.shrink_step(pruned, cfg=small, tx=bench.tx)
  states['shrunk'], states['built'] = shrunk, bench.fresh(small)
  del pruned, shrunk
  per_prune = (plan.schedule.start - plan.schedule.target) // 25

  def take(key, step):
    states[key], numbers = step(states[key])
    return states[key], numbers

  def select():
    target = cfg.num_params() - per_prune
    return pruning.select(states[cfg].prune, plan, target)

  calls = {
    name: functools.partial(take, key, bench.step(states[key], shape, score))
    for name, key, shape, score in (
      ('step', cfg, cfg, False),
      ('step that scores', cfg, cfg, True),
      ('step after the shrink', 'shrunk', small, False),
      ('step of a model built so', 'built', small, False),
    )
  }
  calls['select, one prune'] = select
  median = bench_setup.medians(calls, _REPEATS.value)

  device = jax.devices()[0]
  table = rich.table.Table('', 'seconds, median', 'ratio to step')
  for name, value in median.items():
    table.add_row(name, f'{value:.4f}', f'{value / median["step"]:.3f}')
  console = cli.tables()
  console.print(
    f'{device.device_kind}, jax {jax.__version__}, {plan.tokens_per_step} '
    f'tokens a step, {plan.recipe.compute.dtype}; '
    f'{cfg.num_params():,} -> {small.num_params():,} parameters '
    f'(heads {small.K}, ffn {small.F}, stem {small.D})'
  )
  console.print(table)


if __name__ == '__main__':
  flags.mark_flag_as_required('config')
  cli.run(main)
