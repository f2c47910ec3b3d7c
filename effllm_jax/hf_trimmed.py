"""Params -> tensors and config.json of `modeling_effllm`, each layer trimmed.

No stock class of transformers takes Llama layers of different widths, so the
folder carries its own class.
"""

from collections.abc import Iterator
import pathlib
from typing import Any

import jax
import numpy as np

from effllm_jax import hf_config
from effllm_jax import structure
from effllm_jax import weights
from effllm_jax import widths

# The file to copy into the folder.
MODELING = pathlib.Path(__file__).with_name('modeling_effllm.py')


def config(model: weights.Source) -> dict[str, Any]:
  """config.json of a model: its class, where that is, and all sizes."""
  cfg = model.cfg
  live = widths.of_layers(widths.whole(model.masks, cfg))
  return {
    'architectures': ['EffllmForCausalLM'],
    'model_type': 'effllm',
    'auto_map': {
      'AutoConfig': f'{MODELING.stem}.EffllmConfig',
      'AutoModelForCausalLM': f'{MODELING.stem}.EffllmForCausalLM',
    },
    'vocab_size': cfg.V,
    'hidden_size': cfg.D,
    'num_hidden_layers': cfg.N,
    'head_dim': cfg.H,
    'num_key_value_groups': cfg.G,
    'num_key_value_heads_per_layer': live['heads'],
    'intermediate_size_per_layer': live['ffn'],
    'attention_bias': cfg.qkv_bias,
    'qk_norm': cfg.qk_norm,
    'rms_norm_eps': cfg.norm_eps,
    'rope_parameters': hf_config.rope(cfg),
    'max_position_embeddings': cfg.context,
    'tie_word_embeddings': cfg.tied,
  }


def tensors(model: weights.Source) -> Iterator[tuple[str, np.ndarray]]:
  """Yields name and float32 array of every tensor, as the file has them.

  One layer at a time; what is dead, and the norm of a block of which nothing is
  left, is not among them.
  """
  masks = widths.whole(model.masks, model.cfg)
  params = jax.tree.map(np.asarray, model.params)
  yield from weights.views(params.replace(layers=None), weights.HUGGING_FACE)
  for n in range(model.cfg.N):
    layer = widths.trimmed(params, masks, n)
    lost = [
      name
      for kind, names in structure.BLOCKS.items()
      if not getattr(masks, kind)[n].any()
      for name in names
    ]
    yield from weights.views(
      layer.replace(layers=layer.layers.replace(**dict.fromkeys(lost))),
      weights.HUGGING_FACE,
      n,
    )
