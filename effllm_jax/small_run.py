"""A small real run, for those who want to look at one and have none.

The training loop is the real one, and so are the files that it leaves. Only
what goes in is small: a model of two layers with random weights, whose tokens
are bytes, and the documentation of Python's own library as text, which every
machine has. It shows the mechanism; what it reaches says nothing about models
that can read.
"""

import os
import pathlib
import pydoc
from typing import Any

import ml_collections
import numpy as np

from effllm_jax import atomic
from effllm_jax import bpe
from effllm_jax import errors
from effllm_jax import hf_folder
from effllm_jax import structure
from effllm_jax import train
from effllm_jax import weights

# Bytes and a separator.
CFG = structure.ModelConfig(
  V=257, D=32, N=2, K=4, G=2, H=8, F=64, context=128,
  rope_theta=1e4, norm_eps=1e-5, tied=True,
)  # fmt: skip
_DOCUMENTS = (
  'argparse', 'bisect', 'calendar', 'collections', 'csv', 'datetime',
  'difflib', 'enum', 'fractions', 'heapq', 'json', 'pathlib', 'random',
  'shutil', 'statistics', 'string', 'textwrap', 'zipfile',
)  # fmt: skip


def make(
  folder: str | os.PathLike,
  name: str = 'run',
  changes: dict[str, Any] | None = None,
) -> pathlib.Path:
  """Makes a run, or goes on with it; one that is finished stays as it is.

  Args:
    folder: for the model, the text and all runs from them.
    name: of the run.
    changes: values of its config by key, as in {'prune.policy': 'ragged'}.

  Returns:
    Its workdir, `folder/name`.

  Raises:
    errors.InputError: an unknown key, or what `train.run` refuses.
  """
  folder = pathlib.Path(folder).absolute()
  settings = config(folder / 'model', folder / 'text').lock()
  try:
    settings.update_from_flattened_dict(changes or {})
  except (AttributeError, KeyError, TypeError, ValueError) as e:
    raise errors.InputError(
      f'{changes} does not fit the config: {" ".join(str(e).split())}; use '
      'keys of experiments/configs/smollm2_135m.py'
    ) from e
  write_inputs(folder)
  train.run(settings, folder / name, folder / 'cache')
  return folder / name


def write_inputs(folder: pathlib.Path) -> None:
  """Writes the model and the text of all runs: `model`, `text`."""
  with errors.writing(folder, 'free some space or choose another folder'):
    folder.mkdir(parents=True, exist_ok=True)
    atomic.once(folder / 'model', _write_model)
    atomic.once(folder / 'text', _write_text)


def config(
  source: pathlib.Path, text: pathlib.Path
) -> ml_collections.ConfigDict:
  """All keys of a config, as in `experiments/configs`: 24 steps, uniform."""
  step = 64  # tokens
  return ml_collections.ConfigDict(
    {
      'seed': 0,
      'source': str(source),
      'init': 'source',
      'data': {
        'text': str(text), 'seq_len': 32, 'batch_size': 2, 'workers': 0,
        'timeout': 300.0, 'weights': {},
      },
      'model': {
        'dtype': 'float32', 'remat': 'none', 'kernels': 'xla', 'blocks': '',
      },
      'mesh': {'data': 1, 'fsdp': 1, 'tensor': 1},
      'train': {
        'tokens': 24 * step, 'accumulate': 1, 'log_every': 1, 'max_skipped': 10,
      },
      'optimizer': {
        'schedule': 'wsd', 'peak': 3e-3, 'end': 3e-4,
        'warmup_tokens': 2 * step, 'decay_tokens': 4 * step,
        'b1': 0.9, 'b2': 0.95, 'weight_decay': 0.1, 'clip': 1.0,
        'embedding': 1.0,
      },
      'budget': {
        'kind': 'params', 'target': 18_000.0, 'format': 'q8_0',
        'context': 2048, 'table': '',
      },
      'prune': {
        'policy': 'uniform', 'schedule': 'linear', 'stages': 1, 'rest': 0.0,
        'begin_tokens': 2 * step, 'end_tokens': 18 * step, 'every': 2,
        'saliency': 'taylor1', 'ema': 0.9, 'calibrate': False,
        'price_embedding': False,
        'floors': {'heads': 3, 'ffn': 24, 'stem': 16},
        'multiple_of': {'heads': 1, 'ffn': 8, 'stem': 8},
      },
      'repair': {'enabled': False, 'batches': 1, 'damping': 10.0},
      'distill': {
        'weight': 0.0, 'when': 'always', 'teacher': '', 'temperature': 1.0,
        'top_k': 64,
      },
      'shrink': {
        'threshold': 0.2, 'quantum': {'heads': 1, 'ffn': 1, 'stem': 1},
      },
      'eval': {'text': '', 'every_tokens': 9 * step, 'tokens_per_domain': 512},
      'checkpoint': {'every_steps': 4, 'keep': 8},
    }
  )  # fmt: skip


def random_params(
  cfg: structure.ModelConfig, deviation: float
) -> structure.Params:
  """Random float32 numpy parameters; norm scales are 1.

  As `model.init`, of which jax would have to compile a dozen functions; for
  models without biases.
  """
  rng = np.random.default_rng(0)

  def leaf(letters, like):
    if structure.is_matrix(letters):
      return rng.normal(0, deviation, like.shape).astype(np.float32)
    return np.ones(like.shape, np.float32)

  return structure.map_axes(leaf, structure.shapes(cfg))


def _write_model(folder: pathlib.Path) -> None:
  tokenizer, separator_id = bpe.of_bytes('<|endoftext|>')
  source = weights.Source(
    name='small', description='two layers of random weights', licence=None,
    sha256='', dtype='float32', cfg=CFG, separator_id=separator_id,
    bos_id=None, eos_ids=(separator_id,), pad_id=None, chat_template=None,
    tokenizer=tokenizer, params=random_params(CFG, 0.02),
  )  # fmt: skip
  hf_folder.write_model(source, folder)


def _write_text(folder: pathlib.Path) -> None:
  for name in _DOCUMENTS:
    text = pydoc.render_doc(name, renderer=pydoc.plaintext)
    (folder / f'{name}.txt').write_text(text, encoding='utf-8')
