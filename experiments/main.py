r"""Prunes a model while it trains; run again with the same flags to resume.

    python -m experiments.main \
      --config=experiments/configs/smollm2_135m.py --workdir=runs/a \
      [--config.budget.target=100e6] [--distributed]
"""

import os

from absl import flags
import ml_collections
from ml_collections import config_flags

from experiments import cli

_CONFIG = config_flags.DEFINE_config_file(
  'config', None, 'A file in experiments/configs.', lock_config=True
)
_DISTRIBUTED = flags.DEFINE_bool(
  'distributed',
  False,
  'Several processes, one a host: jax.distributed.initialize() finds the '
  'others on TPU pods, GKE, Slurm and under Open MPI.',
)
_WORKDIR = flags.DEFINE_string(
  'workdir', None, 'Folder of the run: metrics, checkpoints, events.'
)


def main(argv: list[str]) -> None:
  """Runs, then prints the closing table."""
  del argv
  # After the flags have been parsed: these imports take seconds.
  from effllm_jax import train

  if _DISTRIBUTED.value:
    cli.join()
  config = ml_collections.FrozenConfigDict(cli.config(_CONFIG))
  train.run(config, _WORKDIR.value, os.path.expanduser(cli.CACHE.value))


if __name__ == '__main__':
  flags.mark_flags_as_required(['config', 'workdir'])
  cli.run(main)
