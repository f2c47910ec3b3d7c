"""A finished model -> a Hugging Face folder, opened again in PyTorch."""

import itertools
import json
import os
import pathlib
import shutil
import types

from effllm_jax import agreement
from effllm_jax import bpe
from effllm_jax import errors
from effllm_jax import hf_config
from effllm_jax import hf_folder
from effllm_jax import hf_trimmed
from effllm_jax import weights
from effllm_jax import widths

# The file that is copied where a stock class has a tokenizer of its own.
_TOKENIZATION = pathlib.Path(__file__).with_name('tokenization_effllm.py')
# After `agreement.hard_text`: a letter in two parts, which some compose.
_DECOMPOSED = ' nai\u0308ve'


def write(model: weights.Source, folder: pathlib.Path, trimmed: bool) -> None:
  """Writes all that `AutoModelForCausalLM` and `AutoTokenizer` open.

  config.json, model.safetensors (float32), the tokenizer with its chat
  template, and generation_config.json. Of a Qwen2 model transformers 5 splits
  text as Qwen does, whatever tokenizer.json says, unless the folder names a
  class: then it takes the one of tokenizer_config.json, and does not run the
  named one unless it is trusted.

  Args:
    model: the stem is alive; heads and ffn may be dead in some layers.
    folder: exists.
    trimmed: every layer as narrow as it is, with a modelling file beside it
      that must be trusted; otherwise a stock class, for whose one width zeros
      fill up narrower layers.
  """
  transformers = import_transformers()
  masks = widths.whole(model.masks, model.cfg)
  if trimmed:
    config, tensors = hf_trimmed.config(model), hf_trimmed.tensors(model)
    shutil.copyfile(hf_trimmed.MODELING, folder / hf_trimmed.MODELING.name)
  else:
    config = hf_config.write(model.cfg)
    tensors = weights.views(
      widths.filled(model.params, masks), weights.HUGGING_FACE
    )
  config |= {
    'dtype': 'float32',
    'transformers_version': transformers.__version__,
    **hf_folder.special_ids(model),
  }
  text = json.dumps(config, indent=2) + '\n'
  (folder / 'config.json').write_text(text, encoding='utf-8')
  hf_folder.write_tokenizer(model, folder)
  if config['model_type'] == 'qwen2' and not bpe.is_qwen2(model.tokenizer):
    shutil.copyfile(_TOKENIZATION, folder / _TOKENIZATION.name)
    hf_folder.name_class(folder, f'{_TOKENIZATION.stem}.EffllmTokenizer')
  path = folder / 'model.safetensors'
  hf_folder.write_tensors(path, tensors)
  # Others may read the rest of the folder, this the package keeps to its owner.
  shutil.copymode(folder / 'config.json', path)


def check(
  model: weights.Source, folder: pathlib.Path, want: agreement.Reference
) -> agreement.Agreement:
  """Compares what transformers makes of a folder with the model.

  Logits of a text, the greedy tokens after it through the cache, and the ids
  that the tokenizer gives.

  Raises:
    RuntimeError: PyTorch computes something else.
    errors.InputError: transformers cannot open it, or has another tokenizer.
  """
  transformers = import_transformers()
  import torch

  # As the model card opens it. The modelling file of a trimmed folder is the
  # one that we have just written; untrusted, the tokenizer's loader asks, too.
  trimmed = (folder / hf_trimmed.MODELING.name).exists()
  trusted = {'local_files_only': True}
  trusted |= {'trust_remote_code': True} if trimmed else {}
  try:
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, **trusted)
    torch_model = transformers.AutoModelForCausalLM.from_pretrained(
      folder, dtype=torch.float32, **trusted
    ).eval()
  except OSError as e:
    # Beside what it reads it keeps a copy of the modelling file.
    raise errors.InputError(
      f'transformers cannot open the export: {e}; set HF_HOME to a folder that '
      'can be written'
    ) from e
  _check_tokenizer(model, tokenizer, trimmed)
  # A plain greedy search that no end-of-text token stops early.
  torch_model.generation_config = transformers.GenerationConfig(
    do_sample=False,
    max_new_tokens=agreement.NEW_TOKENS,
    use_cache=True,
    pad_token_id=0,
  )
  prompt = torch.tensor([want.prompt])
  with torch.no_grad():
    continued = torch_model.generate(
      prompt, attention_mask=torch.ones_like(prompt)
    )[0, len(want.prompt) :].tolist()
    tokens = torch.tensor([want.prompt + continued])
    logits = torch_model(tokens).logits[0].numpy()
  found = agreement.compare(want, logits, continued)
  agreement.check(found, agreement.LEVELS['f32'], 'PyTorch')
  return found


def _check_tokenizer(model, theirs, trimmed):
  """Raises InputError where transformers has another tokenizer."""
  text = agreement.hard_text(model) + _DECOMPOSED
  ours = model.tokenizer.encode(text)
  pairs = itertools.zip_longest(
    ours.ids, theirs(text, verbose=False)['input_ids']
  )
  at = next((i for i, (a, b) in enumerate(pairs) if a != b), None)
  if ours.ids and at is None:
    return
  start = ours.offsets[at][0] if at is not None and at < len(ours) else 0
  remedy = (
    'use another version of transformers'
    if trimmed
    else 'set --formats=hf-trimmed, or use another version of transformers'
  )
  raise errors.InputError(
    f'transformers opens the exported tokenizer as {type(theirs).__name__}, '
    f'which splits {text[start : start + 16]!a} otherwise than the source; the '
    f'export is not kept; {remedy}'
  )


def import_transformers() -> types.ModuleType:
  """transformers with torch behind it; neither may go online.

  Raises:
    errors.InputError: one of them is missing.
  """
  # Read at import; every path is a folder on this machine anyway.
  os.environ.setdefault('HF_HUB_OFFLINE', '1')
  with errors.installed(
    'to open a Hugging Face folder in PyTorch', '-r requirements-torch.txt'
  ):
    import torch  # noqa: F401
    import transformers
  # Its bars would break into the caller's own.
  transformers.utils.logging.disable_progress_bar()
  return transformers
