r"""Prunes a model while it trains; run again with the same flags to resume.

    python -m experiments.main \
      --config=experiments/configs/smollm2_135m.py --workdir=runs/a \
      [--config.budget.target=100e6] [--distributed] [--profile=20:24]
"""

import re

from absl import flags
import ml_collections
from ml_collections import config_flags

from effllm_jax import errors
from experiments import cli

_CONFIG = config_flags.DEFINE_config_file(
  'config', None, 'A file in experiments/configs.', lock_config=True
)
_DISTRIBUTED = flags.DEFINE_bool(
  'distributed',
  False,
  'Several processes: jax.distributed.initialize() finds the others on TPU '
  'pods and GKE, one a host, and under Slurm and Open MPI, one a GPU.',
)
_PROFILE = flags.DEFINE_string(
  'profile',
  '',
  'Steps whose trace goes to <workdir>/profile, first:last, for XProf, '
  'TensorBoard or Perfetto. The first step of a call and those after a shrink '
  'also compile.',
)
_WORKDIR = flags.DEFINE_string(
  'workdir', None, 'Folder of the run: metrics, checkpoints, events.'
)


def main(argv: list[str]) -> None:
  """Runs the config, or goes on with its run."""
  del argv
  # After the flags have been parsed: these imports take seconds.
  from effllm_jax import train

  if _DISTRIBUTED.value:
    cli.join()
  config = ml_collections.FrozenConfigDict(cli.config(_CONFIG))
  train.run(
    config,
    _WORKDIR.value,
    cli.CACHE.value,
    _steps(_PROFILE.value),
  )


def _steps(text: str) -> range:
  if not text:
    return range(0)
  found = re.fullmatch(r'(\d+):(\d+)', text)
  first, last = map(int, found.groups()) if found else (0, 0)
  if not 1 <= first <= last:
    raise errors.InputError(
      f'--profile {text!r} is not first:last, of steps from 1; for five steps '
      'set --profile=20:24'
    )
  return range(first, last + 1)


if __name__ == '__main__':
  flags.mark_flags_as_required(['config', 'workdir'])
  cli.run(main)
