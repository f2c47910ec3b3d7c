"""Writes what transformers opens: weights, tokenizer, config of a model."""

from collections.abc import Iterable
import json
import pathlib
from typing import Any

import numpy as np
import safetensors
from safetensors import numpy as safetensors_numpy

from effllm_jax import atomic
from effllm_jax import hf_config
from effllm_jax import weights


def write_model(source: weights.Source, folder: pathlib.Path) -> None:
  """Writes a folder that `sources.load` reads; `source` has parameters.

  config.json, model.safetensors (float32) and the files of `write_tokenizer`.
  """
  tensors = weights.views(source.params, weights.HUGGING_FACE)
  write_tensors(folder / 'model.safetensors', tensors)
  write_tokenizer(source, folder)
  config = hf_config.write(source.cfg) | special_ids(source)
  atomic.write_json(folder / 'config.json', config)


def write_tensors(
  path: pathlib.Path, tensors: Iterable[tuple[str, np.ndarray]]
) -> None:
  """Writes tensors by name, float32, as PyTorch's packages ask for them.

  Raises:
    OSError: where safetensors has an error of its own, too.
  """
  try:
    safetensors_numpy.save_file(
      {name: np.ascontiguousarray(x, np.float32) for name, x in tensors},
      path,
      metadata={'format': 'pt'},
    )
  except safetensors.SafetensorError as e:
    raise OSError(str(e)) from e


def write_tokenizer(source: weights.Source, folder: pathlib.Path) -> None:
  """Writes what transformers opens beside the weights of a model.

  tokenizer.json, tokenizer_config.json (a `PreTrainedTokenizerFast`, with the
  chat template) and generation_config.json.
  """

  def token(i):
    # transformers makes a special token of each. A letter that a config takes
    # for one would change how texts are split, and be left out of answers.
    if i is None or not weights.is_added(source.tokenizer, i):
      return None
    return source.tokenizer.id_to_token(i)

  generation = {**special_ids(source), **source.generation}
  config = {
    'tokenizer_class': 'PreTrainedTokenizerFast',
    'model_max_length': source.cfg.context,
    # transformers 4 adds token_type_ids otherwise, which no decoder takes.
    'model_input_names': ['input_ids', 'attention_mask'],
    'clean_up_tokenization_spaces': False,
    'bos_token': token(source.bos_id),
    'eos_token': token(source.eos_id),
    'pad_token': token(source.pad_id),
    'padding_side': source.padding_side,
    'chat_template': source.chat_template,
  }
  atomic.write_text(folder / 'tokenizer.json', source.tokenizer.to_str())
  for name, content in (
    ('tokenizer_config.json', config),
    ('generation_config.json', generation),
  ):
    atomic.write_json(folder / name, _set(content))


def name_class(folder: pathlib.Path, name: str) -> None:
  """Names the class, 'module.Class', that opens the tokenizer of a folder."""
  path = folder / 'tokenizer_config.json'
  config = json.loads(path.read_text(encoding='utf-8'))
  # The slow and the fast one.
  config['auto_map'] = {'AutoTokenizer': [name, name]}
  atomic.write_json(path, config)


def special_ids(source: weights.Source) -> dict[str, Any]:
  """Special tokens as transformers' files name them; None: it has none.

  A config.json keeps the None: absent, the ids would be the classes' 1 and 2.
  """
  return {
    'bos_token_id': source.bos_id,
    'eos_token_id': list(source.eos_ids) or None,
    'pad_token_id': source.pad_id,
  }


def _set(content):
  """Leaves out the keys without a value."""
  return {k: v for k, v in content.items() if v is not None}
