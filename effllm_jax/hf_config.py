"""config.json of Hugging Face: our architecture out of it, and into it.

The classes whose arithmetic is ours, all of them without sliding windows:

    LlamaForCausalLM, MistralForCausalLM
    Qwen2ForCausalLM   with biases of q, k and v (also Qwen2.5)
    Qwen3ForCausalLM   with norms of q and k
"""

import dataclasses
import json
from typing import Any

from effllm_jax import errors
from effllm_jax import structure

# Class -> model type, and the defaults of that class that are not Llama's:
# transformers may leave a key out of the file when it has its default value.
_CLASSES = {
  'LlamaForCausalLM': 'llama',
  'MistralForCausalLM': 'mistral',
  'Qwen2ForCausalLM': 'qwen2',
  'Qwen3ForCausalLM': 'qwen3',
}
_DEFAULTS = {
  'llama': {},
  'mistral': {'num_key_value_heads': 8, 'sliding_window': 4096},
  'qwen2': {'num_key_value_heads': 32},
  'qwen3': {'num_key_value_heads': 32, 'head_dim': 128},
}
# RopeScaling's fields -> their keys.
_SCALING = {
  'factor': 'factor',
  'low_freq_factor': 'low_freq_factor',
  'high_freq_factor': 'high_freq_factor',
  'original_context': 'original_max_position_embeddings',
}
# Keys that change the arithmetic -> the only values that leave it ours.
_NEUTRAL = {
  'hidden_act': ('silu', 'swish'),
  'attention_bias': (False, None),
  'mlp_bias': (False, None),
  'use_sliding_window': (False, None),
  'sliding_window': (None,),
  'partial_rotary_factor': (1, None),
  'rope_interleaved': (False, None),
  'is_causal': (True, None),
  'quantization_config': (None,),
  'per_layer_config': (None,),
  'block_configs': (None,),
  'auto_map': (None,),
}


def read(raw: dict[str, Any], file: str) -> structure.ModelConfig:
  """The architecture that a config.json describes.

  Where a key is absent, the default is that of transformers' classes.

  Args:
    raw: content of config.json.
    file: named in errors.

  Raises:
    errors.InputError: naming the key and the value that the block here
      cannot represent, or the key that is missing.
  """
  classes = raw.get('architectures') or [raw.get('model_type')]
  if classes not in [[c] for c in (*_CLASSES, *_CLASSES.values())]:
    raise refused(file, 'architectures', classes)
  kind = _CLASSES.get(classes[0], classes[0])
  raw = _DEFAULTS[kind] | raw
  for key, allowed in _NEUTRAL.items():
    # Of Qwen the width of a window is stated even where there is none.
    if key == 'sliding_window' and kind.startswith('qwen'):
      continue
    if key in raw and raw[key] not in allowed:
      raise refused(file, key, raw[key])
  layers = raw.get('layer_types') or []
  if not isinstance(layers, list) or any(x != 'full_attention' for x in layers):
    raise refused(file, 'layer_types', layers)
  D = number(file, raw, 'hidden_size')
  heads = number(file, raw, 'num_attention_heads')
  K = number(file, raw, 'num_key_value_heads', heads)
  H = number(file, raw, 'head_dim', max(D // heads, 1))
  if heads % K:
    raise refused(file, 'num_key_value_heads', K)
  if H % 2:
    raise refused(file, 'head_dim', H)
  theta, scaling = _rope(file, raw)
  return structure.ModelConfig(
    V=number(file, raw, 'vocab_size'),
    D=D,
    N=number(file, raw, 'num_hidden_layers'),
    K=K,
    G=heads // K,
    H=H,
    F=number(file, raw, 'intermediate_size'),
    context=number(file, raw, 'max_position_embeddings'),
    rope_theta=theta,
    norm_eps=float(number(file, raw, 'rms_norm_eps', 1e-6, (int, float))),
    tied=raw.get('tie_word_embeddings') is True,
    qkv_bias=kind == 'qwen2',
    qk_norm=kind == 'qwen3',
    rope_scaling=scaling,
  )


def write(cfg: structure.ModelConfig) -> dict[str, Any]:
  """A config.json that opens `cfg` in a stock class, without custom code.

  The class is Qwen2 for biases, Qwen3 for norms of q and k, else Llama where
  its check of the shape passes. It demands a stem that is a multiple of the
  number of query heads, which nothing in the arithmetic does; Mistral without
  its sliding window is the same function without the check, and the others do
  not have it. What the rotary embedding needs is written twice: transformers 5
  reads `rope_parameters`; 4 reads only `rope_theta` and `rope_scaling`, and
  without them goes on silently with 10000 and none.

  Raises:
    errors.InputError: biases and norms at once.
  """
  heads = cfg.K * cfg.G
  own = {}
  if cfg.qkv_bias and cfg.qk_norm:
    raise errors.InputError(
      'no class of transformers has both biases (qkv_bias) and norms (qk_norm) '
      'of q and k; export to another format'
    )
  if cfg.qkv_bias or cfg.qk_norm:
    name = 'Qwen2ForCausalLM' if cfg.qkv_bias else 'Qwen3ForCausalLM'
    own = {'use_sliding_window': False}
  elif cfg.D % heads:
    name, own = 'MistralForCausalLM', {'sliding_window': None}
  else:
    name = 'LlamaForCausalLM'
  if cfg.rope_scaling is not None:
    # transformers 4 has the base elsewhere and warns of it here.
    own['rope_scaling'] = rope(cfg)
    del own['rope_scaling']['rope_theta']
  return {
    'architectures': [name],
    'model_type': _CLASSES[name],
    'vocab_size': cfg.V,
    'hidden_size': cfg.D,
    'num_hidden_layers': cfg.N,
    'num_attention_heads': heads,
    'num_key_value_heads': cfg.K,
    'head_dim': cfg.H,
    'intermediate_size': cfg.F,
    'hidden_act': 'silu',
    'max_position_embeddings': cfg.context,
    'rms_norm_eps': cfg.norm_eps,
    'rope_theta': cfg.rope_theta,
    'rope_parameters': rope(cfg),
    'tie_word_embeddings': cfg.tied,
    'attention_bias': False,
    'mlp_bias': False,
    **own,
  }


def rope(cfg: structure.ModelConfig) -> dict[str, Any]:
  """The rotary embedding as transformers 5 reads it (`rope_parameters`)."""
  kind = {'rope_type': 'default', 'rope_theta': cfg.rope_theta}
  if cfg.rope_scaling is None:
    return kind
  fields = dataclasses.asdict(cfg.rope_scaling)
  return kind | {
    'rope_type': 'llama3',
    **{key: fields[field] for field, key in _SCALING.items()},
  }


def number(
  file: str,
  raw: dict[str, Any],
  key: str,
  default: float | None = None,
  kind: type | tuple[type, ...] = int,
) -> float:
  """A positive number of a config.json, or the default where it is absent.

  Raises:
    errors.InputError: it is no such number, or absent without a default.
  """
  value = default if raw.get(key) is None else raw[key]
  if value is None:
    raise errors.InputError(
      f'{file}: {key} is missing; fetch the complete config.json again'
    )
  if isinstance(value, bool) or not isinstance(value, kind):
    raise refused(file, key, value)
  if not 0 < value <= structure.MOST[int if kind is int else float]:
    raise refused(file, key, value)
  return value


def refused(file: str, key: str, value: Any) -> errors.InputError:
  """The error to raise of a value that the block here cannot represent."""
  return errors.InputError(
    f'{file}: {key} = {json.dumps(value)} is not something that the block '
    'here can represent; choose another source model'
  )


def _rope(file, raw):
  """The rotary base and what stretches it, or None.

  transformers 5 writes both into `rope_parameters`; 4 the base as `rope_theta`,
  the rest into `rope_scaling`.
  """
  thetas, scalings = set(), set()
  for key in ('rope_scaling', 'rope_parameters'):
    rope = raw.get(key)
    if not rope:
      continue
    if not isinstance(rope, dict):
      raise refused(file, key, rope)
    kind = rope.get('rope_type', rope.get('type', 'default'))
    known = {'rope_type', 'type', 'rope_theta'}
    if kind == 'llama3':
      known |= set(_SCALING.values())
    if kind not in ('default', 'llama3') or set(rope) - known:
      raise refused(file, key, rope)
    scalings.add(_scaling(file, key, rope) if kind == 'llama3' else None)
    if 'rope_theta' in rope:
      thetas.add(number(file, rope, 'rope_theta', kind=(int, float)))
  if 'rope_theta' in raw or not thetas:
    thetas.add(number(file, raw, 'rope_theta', 10_000.0, (int, float)))
  if len(thetas) > 1:
    raise refused(file, 'rope_theta', sorted(thetas))
  if len(scalings) > 1:
    raise refused(file, 'rope_scaling', raw['rope_scaling'])
  return float(thetas.pop()), scalings.pop() if scalings else None


def _scaling(file, key, rope):
  """Llama 3's scaling; refuses numbers that are no such thing."""
  context = number(file, rope, _SCALING['original_context'])
  factor, low, high = (
    float(number(file, rope, _SCALING[field], kind=(int, float)))
    for field in ('factor', 'low_freq_factor', 'high_freq_factor')
  )
  if not low < high:
    raise refused(file, key, rope)
  return structure.RopeScaling(factor, low, high, context)
