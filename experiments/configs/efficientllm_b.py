r"""Variant B of EfficientLLM: variant A with second-order weight repair.

    python -m experiments.main \
      --config=experiments/configs/efficientllm_b.py --workdir=runs/b

After each prune the surviving inputs of every matrix that lost some are refit,
by least squares, to what the matrix computed before (effllm_jax/repair.py), on
the newest 4,096 tokens. That is 1.329 bits per byte where A ends at 1.346, for
as many FLOPs again as the training takes: a repair follows every other step.
"""

import ml_collections

from experiments.configs import efficientllm_a


def get_config() -> ml_collections.ConfigDict:
  """Variant A and the repair, on as many tokens as in the shipped base."""
  config = efficientllm_a.get_config()
  config.repair.enabled = True
  config.repair.batches = 8
  # As its figures were measured; what nearly all of its layers choose, too.
  config.repair.damping = 1.0
  return config
