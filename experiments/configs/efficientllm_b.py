r"""Variant B of EfficientLLM: variant A with second-order weight repair.

    python -m experiments.main \
      --config=experiments/configs/efficientllm_b.py --workdir=runs/b

After each prune the surviving inputs of every matrix that lost some are refit,
by least squares, to what the matrix computed before (effllm_jax/repair.py).
"""

import ml_collections

from experiments.configs import efficientllm_a


def get_config() -> ml_collections.ConfigDict:
  """Variant A and the repair."""
  config = efficientllm_a.get_config()
  config.repair.enabled = True
  return config
