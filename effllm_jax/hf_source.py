"""Hugging Face folders: config.json, safetensors, tokenizer.json.

Of the stock classes of `hf_config`, and those that `hf_trimmed` describes.
Python pickles (`pytorch_model.bin`) are never opened: reading one runs whatever
code it contains.
"""

import collections
import contextlib
import os
import pathlib
from typing import Any

import jax
import ml_dtypes  # noqa: F401  Registers bfloat16, which safetensors asks for.
import numpy as np
import safetensors
import tokenizers
import yaml

from effllm_jax import errors
from effllm_jax import fetch
from effllm_jax import hf_config
from effllm_jax import hf_trimmed
from effllm_jax import licences
from effllm_jax import state
from effllm_jax import structure
from effllm_jax import untrusted
from effllm_jax import weights
from effllm_jax import widths

_DTYPES = ('F64', 'F32', 'F16', 'BF16')
_AGAIN = 'fetch it again'
_PADS_LEFT = 'LlamaTokenizer', 'LlamaTokenizerFast'
# What of generation_config.json is carried over -> its type. A name that is not
# one of these may be that of a method of transformers' class.
_GENERATION = {
  'do_sample': bool, 'temperature': float, 'top_k': int, 'top_p': float,
  'min_p': float, 'typical_p': float, 'repetition_penalty': float,
  'no_repeat_ngram_size': int, 'max_length': int, 'max_new_tokens': int,
}  # fmt: skip
# What a wrapper of PyTorch puts before the name of every tensor -> how to save
# without.
_WRAPPERS = {
  '_orig_mod.': 'torch.compile; save model._orig_mod',
  'module.': 'DistributedDataParallel; save model.module',
  'base_model.': 'PEFT; save model.merge_and_unload()',
}


def read(folder: pathlib.Path, params: bool) -> weights.Source:
  """Reads a model from a folder as `save_pretrained` writes it.

  Args:
    folder: with config.json, tokenizer.json, and either model.safetensors or
      model.safetensors.index.json and its shards.
    params: also read the weights.

  Raises:
    errors.InputError: an incomplete folder, or something that the block
      here cannot represent.
  """
  if (folder / 'adapter_config.json').is_file():
    raise errors.InputError(
      f'{folder} holds the adapter of a model, as PEFT saves it; give the '
      'whole model: save what merge_and_unload() returns, with its tokenizer'
    )
  raw = untrusted.read_json(
    folder / 'config.json', 'give a complete Hugging Face folder'
  )
  file, live = str(folder / 'config.json'), None
  if raw.get('model_type') == hf_trimmed.MODEL_TYPE:
    cfg, live = hf_trimmed.read_config(raw, file)
  else:
    cfg = hf_config.read(raw, file)
  files = _weight_files(folder)
  with contextlib.ExitStack() as stack:
    tensors = {
      name: opened
      for opened in [stack.enter_context(_opened(path)) for path in files]
      for name in opened.keys()  # noqa: SIM118
    }
    found, dtype = _shapes(tensors, folder)
    if _has_tied_copy(cfg, tensors, found):
      del found[weights.HUGGING_FACE.unembed]
    expected = weights.file_shapes(cfg, weights.HUGGING_FACE, live)
    shapes = weights.check_tensors(expected, found, str(folder))
    arrays = (
      weights.read_params(
        cfg,
        weights.HUGGING_FACE,
        shapes,
        lambda name: tensors[name].get_tensor(name),
        str(folder),
      )
      if params
      else None
    )
  masks = live and widths.leading(live, cfg)
  tokenizer, chat_template = _tokenizer(folder)
  generation = folder / 'generation_config.json'
  stated = _object(generation)
  bos_id, eos_ids, pad_id = _special_ids(
    raw | {k: v for k, v in stated.items() if v is not None}, folder
  )
  eos_id = _named_id(folder, 'eos_token', tokenizer)
  if pad_id is None:
    pad_id = _named_id(folder, 'pad_token', tokenizer)
  special_ids = [i for i in (bos_id, *eos_ids, pad_id) if i is not None]
  weights.check_tokenizer(tokenizer, special_ids, cfg.V, str(folder))
  front = _front_matter(folder)
  licence = _words(front.get('license'))
  licence_name, licence_link = (
    _words(front.get(key)) if licence == 'other' else None
    for key in ('license_name', 'license_link')
  )
  name = _name(folder.resolve())
  return weights.Source(
    name=name,
    description=f'{name}, {dtype} safetensors',
    licence=licence,
    sha256=_sha256(files),
    dtype=dtype,
    cfg=cfg,
    separator_id=weights.separator(tokenizer, eos_ids, eos_id, str(folder)),
    bos_id=bos_id,
    eos_ids=eos_ids,
    pad_id=pad_id,
    chat_template=chat_template,
    tokenizer=tokenizer,
    params=arrays,
    masks=masks,
    origin=masks and jax.tree.map(np.asarray, state.slots(cfg)),
    tokenizer_eos_id=None if eos_id in eos_ids[:1] else eos_id,
    generation=generation_settings(stated, str(generation)),
    licence_name=licence_name,
    licence_link=licence_link,
    licence_files=licences.read(folder),
    padding_side=_padding_side(folder, tokenizer),
  )


def _name(folder):
  """What a model is called, also one in the cache of the Hub.

  There a folder is models--<owner>--<name>/snapshots/<hash>.
  """
  cached = folder.parent.parent.name
  if folder.parent.name == 'snapshots' and cached.startswith('models--'):
    return cached.removeprefix('models--').split('--', 1)[-1]
  return folder.name


def generation_settings(
  stated: dict[str, Any], file: str
) -> dict[str, bool | int | float]:
  """The settings of sampling and length among those of a file.

  Args:
    stated: content of generation_config.json; None is as good as absent.
    file: named in errors.

  Raises:
    errors.InputError: one is of another type, or out of range.
  """
  found = {}
  for key, kind in _GENERATION.items():
    value = stated.get(key)
    if value is None:
      continue
    right = isinstance(value, bool) == (kind is bool)
    right = right and isinstance(value, (int, kind))
    least = 1 if key.startswith('max') else 0
    if not right or not least <= value <= structure.MOST[float]:
      raise errors.InputError(
        f'{file}: {key} = {str(value)[:60]!r} is no {kind.__name__} that a '
        'generation can be set to; correct it or leave it out'
      )
    found[key] = value
  return found


def _has_tied_copy(cfg, tensors, found):
  """Whether an output matrix is there that only repeats the tied embedding."""
  names = weights.HUGGING_FACE.unembed, weights.HUGGING_FACE.embed
  return (
    cfg.tied
    and all(name in found for name in names)
    and np.array_equal(*(tensors[name].get_tensor(name) for name in names))
  )


def _weight_files(folder):
  """Paths of the safetensors files, in the order of their names."""
  single = folder / 'model.safetensors'
  if single.is_file():
    return [single]
  index = folder / 'model.safetensors.index.json'
  if index.is_file():
    names = untrusted.read_json(index, _AGAIN).get('weight_map')
    names = list(names.values()) if isinstance(names, dict) else []
    if not names:
      raise errors.InputError(f'{index}: weight_map is empty; fetch it again')
    for name in names:
      if not isinstance(name, str) or pathlib.PurePath(name).name != name:
        raise errors.InputError(
          f'{index}: {name} is not the name of a file beside it; fetch it again'
        )
    for name in names:
      # Unlike pathlib's, False also for a name that no path can have.
      if not os.path.isfile(folder / name):
        raise errors.InputError(
          f'{folder / name} is missing, the index names it; fetch it as well'
        )
    return [folder / name for name in sorted(set(names))]
  if list(folder.glob('*.bin')) or list(folder.glob('*.pt*')):
    raise errors.InputError(
      f'{folder} holds weights as a Python pickle, which is never opened; save '
      'the model again with safe_serialization=True'
    )
  raise errors.InputError(
    f'{folder} has no model.safetensors; give a folder with config.json, '
    'model.safetensors and tokenizer.json'
  )


def _opened(path):
  """A safetensors file, to be read tensor by tensor."""
  try:
    return safetensors.safe_open(path, 'numpy')
  except (OSError, safetensors.SafetensorError) as e:
    raise errors.InputError(
      f'{path} is not a complete safetensors file ({e}); fetch it again'
    ) from e


def _shapes(tensors, folder):
  """Shapes of what is to be read, by name; the type that most tensors have.

  Args:
    tensors: the open file that holds each.
    folder: named in errors.
  """
  for prefix, how in _WRAPPERS.items():
    if tensors and all(name.startswith(prefix) for name in tensors):
      raise errors.InputError(
        f'{folder}: all tensors are named {prefix}..., as of a model inside '
        f'{how}'
      )
  found, sizes = {}, collections.Counter()
  for name, opened in tensors.items():
    # Tables of angles that old conversions of Llama still carry.
    if name.endswith('.rotary_emb.inv_freq'):
      continue
    part = opened.get_slice(name)
    if part.get_dtype() not in _DTYPES:
      raise errors.InputError(
        f'{folder}: tensor {name} has type {part.get_dtype()}, only '
        f'{", ".join(_DTYPES)} are read; use unquantised weights'
      )
    found[name] = tuple(part.get_shape())
    sizes[part.get_dtype()] += 1
  return found, max(sizes, key=sizes.get, default='')


def _tokenizer(folder):
  """The fast tokenizer and the chat template, or None."""
  path = folder / 'tokenizer.json'
  if not path.is_file():
    raise errors.InputError(
      f'{path} is missing; save the tokenizer with transformers (use_fast=True)'
    )
  text = untrusted.read_text(path, _AGAIN)
  with untrusted.parsing(f'{path} is not a tokenizer', _AGAIN):
    tokenizer = tokenizers.Tokenizer.from_str(text)
  # Files may carry the settings of their training; documents stay whole here.
  tokenizer.no_truncation()
  tokenizer.no_padding()
  if isinstance(tokenizer.model, tokenizers.models.BPE):
    # Merges left out at random would make of a text other ids each time.
    tokenizer.model.dropout = None
  template = folder / 'chat_template.jinja'
  if template.is_file():
    return tokenizer, untrusted.read_text(template, _AGAIN)
  config = folder / 'tokenizer_config.json'
  chat = _object(config).get('chat_template')
  if isinstance(chat, list):
    # Several by name: the one that is meant where none is named.
    named = [c for c in chat if isinstance(c, dict)]
    chats = [c.get('template') for c in named if c.get('name') == 'default']
    chat = chats[-1] if chats else None
  if not isinstance(chat, str | None):
    raise errors.InputError(
      f'{config}: chat_template is not a text; correct it or leave it out'
    )
  return tokenizer, chat


def _special_ids(stated, folder):
  """(bos, all eos, pad) of the keys of both configs."""
  bos, eos, pad = (
    stated.get(key) for key in ('bos_token_id', 'eos_token_id', 'pad_token_id')
  )
  eos = eos if isinstance(eos, list) else [] if eos is None else [eos]
  for i in (*eos, *(x for x in (bos, pad) if x is not None)):
    if isinstance(i, bool) or not isinstance(i, int):
      raise errors.InputError(
        f'{folder}: token id {i} is not an integer; correct the ids of bos, '
        'eos and pad in generation_config.json or config.json'
      )
  # The first Llamas state -1 where there is no padding.
  return bos, tuple(eos), None if pad == -1 else pad


def _named_id(folder, key, tokenizer):
  """The id of a token that tokenizer_config.json names, or None.

  Also where the tokenizer has no such token: transformers would then add one,
  for which the embedding has no row.
  """
  path = folder / 'tokenizer_config.json'
  token = _object(path).get(key)
  # Older files have the settings of an `AddedToken` in its place.
  token = token.get('content', token) if isinstance(token, dict) else token
  if not isinstance(token, str | None):
    raise errors.InputError(
      f'{path}: {key} is not a text; correct it or leave it out'
    )
  return None if token is None else tokenizer.token_to_id(token)


def _padding_side(folder, tokenizer):
  """'left' or 'right', as tokenizer_config.json states or implies it, or None.

  What states none and names Llama's own class is filled up on the left, unless
  its letters are bytes: then transformers (since 5) takes another class.
  """
  path = folder / 'tokenizer_config.json'
  stated = _object(path)
  side = stated.get('padding_side')
  if side is None and stated.get('tokenizer_class') in _PADS_LEFT:
    byte_level = isinstance(tokenizer.decoder, tokenizers.decoders.ByteLevel)
    return None if byte_level else 'left'
  if side not in (None, 'left', 'right'):
    raise errors.InputError(
      f'{path}: padding_side = {str(side)[:60]!r} is neither left nor right; '
      'correct it or leave it out'
    )
  return side


def _front_matter(folder):
  """Of README.md, every scalar as a text; empty where there is none."""
  readme = folder / 'README.md'
  text = readme.read_text('utf-8', 'replace') if readme.is_file() else ''
  if not text.startswith('---'):
    return {}
  # A card that is no YAML says nothing; the model beside it can be read.
  with contextlib.suppress(yaml.YAMLError, RecursionError):
    # This loader makes no objects, dates or numbers.
    front = yaml.load(text.split('\n---', 1)[0], yaml.BaseLoader)
    return front if isinstance(front, dict) else {}
  return {}


def _words(value):
  """A text or a list of them on one line, or None."""
  listed = value if isinstance(value, list) else [value]
  texts = [' '.join(x.split()) for x in listed if isinstance(x, str)]
  return ', '.join(filter(None, texts)) or None


def _sha256(files):
  """Of the only file, or of what `sha256sum` prints for several."""
  digests = {path.name: fetch.sha256(path) for path in files}
  if len(files) == 1:
    return digests[files[0].name]
  return fetch.listing(digests)


def _object(path):
  """The object in a JSON file, empty where there is no such file."""
  return untrusted.read_json(path, _AGAIN) if path.is_file() else {}
