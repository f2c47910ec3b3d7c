"""A finished model -> a Hugging Face folder, opened again in PyTorch."""

import json
import os
import pathlib
import shutil
import types

from effllm_jax import agreement
from effllm_jax import errors
from effllm_jax import hf_config
from effllm_jax import hf_folder
from effllm_jax import hf_trimmed
from effllm_jax import weights
from effllm_jax import widths


def write(model: weights.Source, folder: pathlib.Path, trimmed: bool) -> None:
  """Writes all that `AutoModelForCausalLM` and `AutoTokenizer` open.

  config.json, model.safetensors (float32), the tokenizer with its chat
  template, and generation_config.json.

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
    errors.InputError: transformers cannot open it.
  """
  transformers = import_transformers()
  import torch

  # The modelling file of a trimmed folder is the one that we have just written.
  # Untrusted, it makes the tokenizer's loader ask the terminal, too.
  trusted = {'local_files_only': True, 'trust_remote_code': True}
  ours = model.tokenizer.encode(agreement.TEXT).ids
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
  theirs = tokenizer(agreement.TEXT)['input_ids']
  if not ours or ours != theirs:
    raise RuntimeError(
      f'the exported tokenizer gives {theirs[:8]}... where the source gives '
      f'{ours[:8]}...; the export is not kept'
    )
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
