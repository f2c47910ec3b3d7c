r"""Widths that differ from layer to layer: the cheapest group anywhere goes.

    python -m experiments.main \
      --config=experiments/configs/ragged.py --workdir=runs/ragged

A layer may lose all of its heads or all of its feed-forward channels. The
export pads narrower layers with zeros up to the widest one.
"""

from experiments.configs import efficientllm_a


def get_config():
  """Variant A under the ragged policy."""
  config = efficientllm_a.get_config()
  config.prune.policy = 'ragged'
  config.prune.floors.heads = 0
  config.prune.floors.ffn = 0
  return config
