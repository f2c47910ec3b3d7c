"""Tensors and config.json of `modeling_effllm`: params with each layer trimmed.

No stock class of transformers takes Llama layers of different widths, so the
folder carries its own class. A model that was trained further in PyTorch comes
back as a source: its config.json is read here, and its class never run.
"""

from collections.abc import Iterator
import dataclasses
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
# As its class has it.
MODEL_TYPE = 'effllm'
_WIDTHS = {
  'heads': 'num_key_value_heads_per_layer',
  'ffn': 'intermediate_size_per_layer',
}


def config(model: weights.Source) -> dict[str, Any]:
  """config.json of a model: its class, where that is, and all sizes."""
  cfg = model.cfg
  live = widths.of_layers(widths.whole(model.masks, cfg))
  return {
    'architectures': ['EffllmForCausalLM'],
    'model_type': MODEL_TYPE,
    'auto_map': {
      'AutoConfig': f'{MODELING.stem}.EffllmConfig',
      'AutoModelForCausalLM': f'{MODELING.stem}.EffllmForCausalLM',
    },
    'vocab_size': cfg.V,
    'hidden_size': cfg.D,
    'num_hidden_layers': cfg.N,
    'head_dim': cfg.H,
    'num_key_value_groups': cfg.G,
    **{key: live[t] for t, key in _WIDTHS.items()},
    'attention_bias': cfg.qkv_bias,
    'qk_norm': cfg.qk_norm,
    'rms_norm_eps': cfg.norm_eps,
    'rope_parameters': hf_config.rope(cfg),
    'max_position_embeddings': cfg.context,
    'tie_word_embeddings': cfg.tied,
  }


def read_config(
  raw: dict[str, Any], file: str
) -> tuple[structure.ModelConfig, dict[str, list[int]]]:
  """The model that `config`, or transformers after it, has described.

  Args:
    raw: content of config.json.
    file: named in errors.

  Returns:
    The architecture with all layers as wide as the widest one, and live heads
    and feed-forward channels of every layer.

  Raises:
    errors.InputError: naming the key and the value that is no such model's.
  """
  live = {}
  for t, key in _WIDTHS.items():
    live[t] = raw.get(key)
    if not isinstance(live[t], list) or not live[t]:
      raise hf_config.refused(file, key, live[t])
    for width in live[t]:
      if width != 0 or isinstance(width, bool):
        hf_config.number(file, {key: width}, key)
  if len(live['heads']) != len(live['ffn']):
    raise hf_config.refused(file, _WIDTHS['ffn'], live['ffn'])
  flags = {}
  for key in ('attention_bias', 'qk_norm'):
    flags[key] = raw.get(key, False)
    if not isinstance(flags[key], bool):
      raise hf_config.refused(file, key, flags[key])
  K, F = (max(1, *live[t]) for t in ('heads', 'ffn'))
  groups = hf_config.number(file, raw, 'num_key_value_groups', 1)
  # All else is said as a stock class does, but for what it means by silence.
  silence = {'tie_word_embeddings': True, 'rms_norm_eps': 1e-5, 'head_dim': 64}
  stock = silence | raw
  for key in ('auto_map', 'attention_bias'):
    stock.pop(key, None)
  stock |= {
    'architectures': ['LlamaForCausalLM'],
    'num_hidden_layers': len(live['heads']),
    'num_attention_heads': K * groups,
    'num_key_value_heads': K,
    'intermediate_size': F,
  }
  cfg = dataclasses.replace(
    hf_config.read(stock, file),
    qkv_bias=flags['attention_bias'],
    qk_norm=flags['qk_norm'],
  )
  return cfg, live


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
