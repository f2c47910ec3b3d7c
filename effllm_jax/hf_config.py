"""config.json of Hugging Face: our architecture out of it, and into it.

The classes whose arithmetic is ours are `LlamaForCausalLM` and, without a
sliding window, `MistralForCausalLM`.
"""

import json
from typing import Any

from effllm_jax import errors
from effllm_jax import structure

_CLASSES = {'LlamaForCausalLM': 'llama', 'MistralForCausalLM': 'mistral'}
# Keys that change the arithmetic -> the only values that leave it ours.
_NEUTRAL = {
  'hidden_act': ('silu', 'swish'),
  'attention_bias': (False, None),
  'mlp_bias': (False, None),
  'sliding_window': (None,),
  'partial_rotary_factor': (1, None),
  'rope_interleaved': (False, None),
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
    errors.InputError: naming the key and the value that the Llama block here
      cannot represent, or the key that is missing.
  """
  classes = raw.get('architectures') or [raw.get('model_type')]
  if classes not in [[c] for c in (*_CLASSES, *_CLASSES.values())]:
    raise _refused(file, 'architectures', classes)
  for key, allowed in _NEUTRAL.items():
    if key in raw and raw[key] not in allowed:
      raise _refused(file, key, raw[key])
  # transformers leaves a key out of the file when it has its default value.
  if 'mistral' in classes[0].lower() and 'sliding_window' not in raw:
    raise _refused(file, 'sliding_window', 4096)
  if set(raw.get('layer_types') or ()) - {'full_attention'}:
    raise _refused(file, 'layer_types', raw['layer_types'])
  D = _number(file, raw, 'hidden_size')
  heads = _number(file, raw, 'num_attention_heads')
  K = _number(file, raw, 'num_key_value_heads', heads)
  H = _number(file, raw, 'head_dim', max(D // heads, 1))
  if heads % K:
    raise _refused(file, 'num_key_value_heads', K)
  if H % 2:
    raise _refused(file, 'head_dim', H)
  return structure.ModelConfig(
    V=_number(file, raw, 'vocab_size'),
    D=D,
    N=_number(file, raw, 'num_hidden_layers'),
    K=K,
    G=heads // K,
    H=H,
    F=_number(file, raw, 'intermediate_size'),
    context=_number(file, raw, 'max_position_embeddings'),
    rope_theta=_rope_theta(file, raw),
    norm_eps=float(_number(file, raw, 'rms_norm_eps', 1e-6, (int, float))),
    tied=raw.get('tie_word_embeddings') is True,
  )


def write(cfg: structure.ModelConfig) -> dict[str, Any]:
  """A config.json that opens `cfg` in a stock class, without custom code.

  The class is Llama where its check of the shape passes. It demands a stem that
  is a multiple of the number of query heads, which nothing in the arithmetic
  does; Mistral without its sliding window is the same function without the
  check. The rotary base is written twice: transformers 5 reads
  `rope_parameters`; 4 reads only `rope_theta` and without it goes on silently
  with 10000.
  """
  heads = cfg.K * cfg.G
  name = 'MistralForCausalLM' if cfg.D % heads else 'LlamaForCausalLM'
  window = {'sliding_window': None} if cfg.D % heads else {}
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
    'rope_parameters': {'rope_type': 'default', 'rope_theta': cfg.rope_theta},
    'tie_word_embeddings': cfg.tied,
    'attention_bias': False,
    'mlp_bias': False,
    **window,
  }


def _rope_theta(file, raw):
  """The rotary base: `rope_parameters` in transformers 5, `rope_theta` in 4."""
  thetas = set()
  for key in ('rope_scaling', 'rope_parameters'):
    rope = raw.get(key) or {}
    known = {'rope_type', 'type', 'rope_theta'}
    if not isinstance(rope, dict) or set(rope) - known:
      raise _refused(file, key, rope)
    if rope.get('rope_type', rope.get('type', 'default')) != 'default':
      raise _refused(file, key, rope)
    if 'rope_theta' in rope:
      thetas.add(_number(file, rope, 'rope_theta', kind=(int, float)))
  if 'rope_theta' in raw or not thetas:
    thetas.add(_number(file, raw, 'rope_theta', 10_000.0, (int, float)))
  if len(thetas) > 1:
    raise _refused(file, 'rope_theta', sorted(thetas))
  return float(thetas.pop())


def _number(file, raw, key, default=None, kind=int):
  value = default if raw.get(key) is None else raw[key]
  if value is None:
    raise errors.InputError(
      f'{file}: {key} is missing; fetch the complete config.json again'
    )
  if isinstance(value, bool) or not isinstance(value, kind) or not value > 0:
    raise _refused(file, key, value)
  return value


def _refused(file, key, value):
  return errors.InputError(
    f'{file}: {key} = {json.dumps(value)} is not something that the Llama '
    'block here can represent; choose another source model'
  )
