"""Params -> a stock Hugging Face folder, opened again before it is kept."""

import contextlib
import json
import os
import pathlib
import shutil
import tempfile
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
from safetensors import numpy as safetensors_numpy

from effllm_jax import errors
from effllm_jax import hf_config
from effllm_jax import model
from effllm_jax import sources
from effllm_jax import structure
from effllm_jax import weights

# Largest difference of a logit, float32, between PyTorch and our model.
TOLERANCE = 1e-3
NEW_TOKENS = 32
# Digits, capitals, punctuation and runs of white space on purpose: it also
# compares the tokenizers.
_TEXT = """The lighthouse at Skerryvore was first lit in 1844. It stands on a
reef some 12 miles (19 km) south-west of Tiree, and took 150 men six summers:
"two of blasting, four of building." Its 4,308 tons of granite    were cut on
the island of Mull \u2013 each block fitted by hand before it was shipped."""

_forward = jax.jit(model.forward, static_argnames=('cfg', 'compute', 'taps'))


def hugging_face(
  params: structure.Params,
  masks: structure.Groups,
  cfg: structure.ModelConfig,
  out: str | os.PathLike,
  tokenizer_folder: str | os.PathLike,
  pruning: dict[str, Any],
) -> dict[str, Any]:
  """Writes a folder that `AutoModelForCausalLM` opens, and checks that it does.

  The folder holds config.json, model.safetensors (float32), the tokenizer,
  generation_config.json, and pruning.json: what the model is made from. Where
  layers differ in width, a narrower one is filled up with exact zeros: a stock
  class has one width for all layers, and a head whose rows of `wo` are zero, or
  a channel whose row of `w_down` is, adds exactly nothing. The folder is
  written beside `out` and opened in transformers there. Only when the logits of
  a real text agree to `TOLERANCE`, the next `NEW_TOKENS` greedy tokens are the
  same and the tokenizer gives the same ids, it is renamed to `out`.

  Args:
    params: float32, as small as the widest layer allows.
    masks: the stem is alive; heads and ffn may be dead where the arrays of a
      narrower layer are wider than it, also all of a layer.
    cfg: the architecture of the arrays.
    out: folder that does not exist yet, or is empty.
    tokenizer_folder: as `sources.save_tokenizer` wrote it.
    pruning: JSON content of pruning.json; `source` and `layer_widths` (live
      heads and ffn channels of each layer) are added to it.

  Returns:
    `path`, `architecture` (the class), `params` (their number), `padding` (how
    many of them are zeros that fill up narrower layers), `max_logit_diff`,
    `greedy_tokens` (how many were compared), `files` (name -> bytes).

  Raises:
    errors.InputError: torch is missing, or `out` cannot be written.
    ValueError: the stem or a slot of every layer is dead; shrink first.
    RuntimeError: PyTorch computes something else. Nothing is left behind.
  """
  masks = jax.tree.map(np.asarray, masks)
  live = {t: getattr(masks, t).sum(-1) for t in structure.TYPES}
  # A stock class has no width of 0: one slot stays where all layers lost all.
  if any(max(1, live[t].max()) < width for t, width in cfg.widths().items()):
    raise ValueError('dead groups in the masks: shrink before the export')
  structure.check_shapes(params, cfg)
  transformers = _transformers()
  source = sources.load_saved(tokenizer_folder)
  # Without links and dots, so that the rename cannot end up elsewhere.
  out = pathlib.Path(out).expanduser().resolve()
  if out.exists() and not (out.is_dir() and not any(out.iterdir())):
    raise errors.InputError(f'{out} exists and is not empty; set another --out')
  about = {
    key: getattr(source, key)
    for key in ('name', 'description', 'licence', 'sha256')
  }
  pruning = {
    'source': about,
    'layer_widths': {t: live[t].tolist() for t in ('heads', 'ffn')},
  } | pruning
  config = hf_config.write(cfg) | {
    'dtype': 'float32',
    'transformers_version': transformers.__version__,
  }
  with _one_line(out):
    out.parent.mkdir(parents=True, exist_ok=True)
    scratch = tempfile.TemporaryDirectory(
      dir=out.parent, prefix=f'.{out.name}-'
    )
  with scratch as tmp:
    folder = pathlib.Path(tmp) / out.name
    with _one_line(out):
      folder.mkdir()
      padded = _padded(params, masks)
      _write(folder, padded, config, tokenizer_folder, source, pruning)
    # Against the masked model, not against the zeros that stand for it.
    diff = _verify(folder, params, masks, cfg, source, transformers)
    files = {p.name: p.stat().st_size for p in sorted(folder.iterdir())}
    with _one_line(out):
      os.replace(folder, out)
  return {
    'path': str(out),
    'architecture': config['architectures'][0],
    'params': cfg.num_params(),
    'padding': cfg.D
    * int(
      (cfg.K - live['heads']).sum() * cfg.head_rows()
      + (cfg.F - live['ffn']).sum() * 3
    ),
    'max_logit_diff': diff,
    'greedy_tokens': NEW_TOKENS,
    'files': files,
  }


def _transformers():
  """transformers with torch behind it; neither may go online."""
  # Read at import; every path below is a folder on this machine anyway.
  os.environ.setdefault('HF_HUB_OFFLINE', '1')
  try:
    import torch  # noqa: F401
    import transformers
  except ImportError as e:
    raise errors.InputError(
      f'an export is checked in PyTorch, but {e.name} is missing; '
      'pip install -r requirements-torch.txt'
    ) from e
  # Its bars would break into the caller's own.
  transformers.utils.logging.disable_progress_bar()
  return transformers


@contextlib.contextmanager
def _one_line(out):
  """A full or read-only disk, told in one line."""
  try:
    yield
  except (OSError, safetensors.SafetensorError) as e:
    reason = getattr(e, 'strerror', None) or e
    raise errors.InputError(
      f'cannot write {out}: {reason}; free some space or set another --out'
    ) from e


def _padded(params, masks):
  """Params with exact zeros in all that a dead head or channel reads or writes.

  Zeros in `wo` and `w_down` are what makes it dead; the rest is put to zero so
  that nothing of it leaves with the file.
  """

  def leaf(letters, x):
    x = np.asarray(x)
    for axis, letter in enumerate(letters):
      mask = getattr(masks, structure.PRUNABLE.get(letter, ''), None)
      if mask is None or mask.all():
        continue
      shape = [1] * x.ndim
      shape[0], shape[axis] = len(x), mask.shape[-1]
      x = np.where(mask.reshape(shape), x, np.float32(0))
    return x

  return structure.map_axes(leaf, params)


def _write(folder, params, config, tokenizer_folder, source, pruning):
  """All files of the folder."""
  # None is written too: absent, the ids would be the classes' 1 and 2.
  ids = {
    'bos_token_id': source.bos_id,
    'eos_token_id': list(source.eos_ids) or None,
    'pad_token_id': source.pad_id,
  }
  for name, content in (
    ('config.json', config | ids),
    ('pruning.json', pruning),
  ):
    text = json.dumps(content, indent=2) + '\n'
    (folder / name).write_text(text, encoding='utf-8')
  for name in (
    'tokenizer.json',
    'tokenizer_config.json',
    'generation_config.json',
  ):
    shutil.copyfile(pathlib.Path(tokenizer_folder) / name, folder / name)
  tensors = weights.views(
    jax.tree.map(np.asarray, params), weights.HUGGING_FACE
  )
  safetensors_numpy.save_file(
    {name: np.ascontiguousarray(x, np.float32) for name, x in tensors},
    folder / 'model.safetensors',
    metadata={'format': 'pt'},
  )


def _verify(folder, params, masks, cfg, source, transformers):
  """Largest logit difference; raises RuntimeError where PyTorch disagrees.

  Our side runs once, over the text with PyTorch's continuation: that every
  continued token is our most likely one after its prefix is the same as equal
  greedy decoding, for one forward pass instead of 32.
  """
  import torch

  ours = source.tokenizer.encode(_TEXT).ids
  theirs = transformers.AutoTokenizer.from_pretrained(
    folder, local_files_only=True
  )(_TEXT)['input_ids']
  if not ours or ours != theirs:
    raise RuntimeError(
      f'the exported tokenizer gives {theirs[:8]}... where the source gives '
      f'{ours[:8]}...; the export is not kept'
    )
  torch_model = transformers.AutoModelForCausalLM.from_pretrained(
    folder, dtype=torch.float32, local_files_only=True
  ).eval()
  # A plain greedy search that no end-of-text token stops early.
  torch_model.generation_config = transformers.GenerationConfig(
    do_sample=False, max_new_tokens=NEW_TOKENS, use_cache=True, pad_token_id=0
  )
  text = torch.tensor([ours])
  with torch.no_grad():
    continued = torch_model.generate(text, attention_mask=torch.ones_like(text))
    want = torch_model(continued).logits[0].numpy()
  tokens = jnp.asarray(continued.numpy(), jnp.int32)
  logits, _ = _forward(params, masks, tokens, cfg, model.Compute(remat=False))
  have = np.asarray(logits[0])
  diff = float(np.abs(have - want).max())
  # `not <=` so that a NaN is refused as well.
  if not diff <= TOLERANCE:
    raise RuntimeError(
      f'PyTorch differs from the model by {diff:.3g} in a logit (at most '
      f'{TOLERANCE}); the export is not kept'
    )
  greedy = continued[0, len(ours) :].tolist()
  likely = have[len(ours) - 1 : -1].argmax(-1).tolist()
  if len(greedy) != NEW_TOKENS or greedy != likely:
    raise RuntimeError(
      f'greedy tokens in PyTorch {greedy} are not those of the model {likely}; '
      'the export is not kept'
    )
  return diff
