r"""Widths that differ from layer to layer: the cheapest group anywhere goes.

    python -m experiments.main \
      --config=experiments/configs/ragged.py --workdir=runs/ragged

With --config.prune.floors.heads=0 and --config.prune.floors.ffn=0 a layer may
lose all of its heads or all of its feed-forward channels. An export as a stock
Hugging Face model fills narrower layers up with zeros.
"""

import ml_collections

from experiments.configs import efficientllm_a


def get_config() -> ml_collections.ConfigDict:
  """Variant A under the ragged policy, with the saliency that suits it.

  Sums of |g w| order the channels of one layer well and layers badly; half the
  curvature times w^2 orders both (HYPOTHESES.md, item 5).
  """
  config = efficientllm_a.get_config()
  config.prune.policy = 'ragged'
  config.prune.saliency = 'obd'
  return config
