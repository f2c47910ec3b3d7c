r"""What a run will be and cost, from its config, before it begins.

    python -m experiments.forecast --config=experiments/configs/ragged.py \
      [--config.budget.target=100e6]

Checks the config against its source as the run would, and prints sizes, steps,
prunes, memory and operations. Nothing is trained or written, no text is read,
and of the source only its shape. Operations are upper bounds: as if nothing
ever got narrower, and every repair had to solve every matrix.
"""

from absl import flags
import ml_collections
from ml_collections import config_flags

from experiments import cli

_CONFIG = config_flags.DEFINE_config_file(
  'config', None, 'A file in experiments/configs.', lock_config=True
)


def main(argv: list[str]) -> None:
  """Prints the table."""
  del argv
  # After the flags have been parsed: these imports take seconds.
  from effllm_jax import forecast
  from effllm_jax import plan as plan_lib
  from effllm_jax import selection
  from effllm_jax import sources
  from effllm_jax import structure

  config = ml_collections.FrozenConfigDict(cli.config(_CONFIG))
  source = sources.load(config.source, cli.CACHE.value, params=False)
  plan = plan_lib.make(config, source.cfg, source.masks)
  teacher = None
  if plan.recipe.distill:
    teacher = source.cfg
    if config.distill.teacher:
      teacher = sources.load(
        config.distill.teacher,
        cli.CACHE.value,
        params=False,
        flag='--config.distill.teacher',
      ).cfg
  masks = source.masks or structure.all_alive(source.cfg)
  found = forecast.of(
    plan,
    source.cfg,
    seq_len=config.data.seq_len,
    accumulate=config.train.accumulate,
    batches=config.repair.batches,
    teacher=teacher,
  )
  live = selection.live_params(masks, source.cfg)
  table = forecast.table(found, plan, source.name, live)
  cli.tables().print(table.rich())


if __name__ == '__main__':
  flags.mark_flag_as_required('config')
  cli.run(main)
