r"""What pruning adds to a training step, and what a shrink takes off it.

    python -m experiments.bench_step \
      --config=experiments/configs/smollm2_135m.py [--repeats=7]

One process, random weights in the shape of SmolLM2-135M, batch and compute as
in the config. The variants take turns, so that a machine that drifts drifts for
all of them; printed are medians and ratios.
"""

import statistics
import time

from absl import flags
from ml_collections import config_flags
import rich.console
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
  import jax.numpy as jnp

  from effllm_jax import model
  from effllm_jax import optimizers
  from effllm_jax import plan as plan_lib
  from effllm_jax import selection
  from effllm_jax import shrink
  from effllm_jax import state as state_lib
  from effllm_jax import steps
  from effllm_jax import structure

  config = cli.config(_CONFIG)
  cfg = structure.ModelConfig(
    V=49152, D=576, N=30, K=3, G=3, H=64, F=1536, context=8192,
    rope_theta=1e5, norm_eps=1e-5, tied=True,
  )  # fmt: skip
  plan = plan_lib.make(config, cfg)
  tx = optimizers.optimizer(lambda _: 1e-4, 0.9, 0.95, 0.1, 1.0)
  tokens = jax.random.randint(
    jax.random.key(0),
    (config.train.accumulate, config.data.batch_size, config.data.seq_len + 1),
    0,
    cfg.V,
  )

  def fresh(cfg):
    return state_lib.fresh_state(model.init(jax.random.key(1), cfg), cfg, tx)

  def compiled(state, cfg, score):
    return steps.train_step.lower(
      state,
      tokens,
      None,
      cfg=cfg,
      tx=tx,
      recipe=plan.recipe,
      score=score,
    ).compile()

  def select(state, target):
    return selection.select(
      state.prune.scores,
      state.prune.masks,
      target,
      plan.schedule.target,
      plan.rules,
      plan.cost,
    )

  # One state at a time per shape: a step donates what it gets.
  states = {cfg: fresh(cfg)}
  states[cfg], _ = compiled(states[cfg], cfg, True)(states[cfg], tokens)
  masks = select(states[cfg], plan.schedule.target)
  small = shrink.shrunk_config(masks, cfg, structure.Groups(1, 1, 1))
  pruned = states[cfg].replace(prune=states[cfg].prune.replace(masks=masks))
  shrunk, _ = steps.shrink_step(pruned, cfg=cfg, new_cfg=small, tx=tx)
  states['shrunk'], states['built'] = shrunk, fresh(small)
  del pruned, shrunk
  variants = {
    name: (key, compiled(states[key], shape, score))
    for name, key, shape, score in (
      ('step', cfg, cfg, False),
      ('step that scores', cfg, cfg, True),
      ('step after the shrink', 'shrunk', small, False),
      ('step of a model built so', 'built', small, False),
    )
  }
  seconds = {name: [] for name in [*variants, 'select, one prune']}
  per_prune = (plan.schedule.start - plan.schedule.target) // 25
  for _ in range(_REPEATS.value + 1):
    for name, (key, step) in variants.items():
      start = time.perf_counter()
      states[key], numbers = step(states[key], tokens)
      jax.block_until_ready((states[key], numbers))
      seconds[name].append(time.perf_counter() - start)
    start = time.perf_counter()
    jax.block_until_ready(select(states[cfg], cfg.num_params() - per_prune))
    seconds['select, one prune'].append(time.perf_counter() - start)

  device = jax.devices()[0]
  table = rich.table.Table('', 'seconds, median', 'ratio to step')
  median = {k: statistics.median(v[1:]) for k, v in seconds.items()}
  for name, value in median.items():
    table.add_row(name, f'{value:.4f}', f'{value / median["step"]:.3f}')
  console = rich.console.Console()
  console.print(
    f'{device.device_kind}, jax {jax.__version__}, {plan.tokens_per_step} '
    f'tokens a step, {jnp.dtype(plan.recipe.compute.dtype)}; '
    f'{cfg.num_params():,} -> {small.num_params():,} parameters '
    f'(heads {small.K}, ffn {small.F}, stem {small.D})'
  )
  console.print(table)


if __name__ == '__main__':
  flags.mark_flag_as_required('config')
  cli.run(main)
