"""A source model made here: its own tokenizer, trained from scratch on text."""

import dataclasses
import os
import pathlib

import jax
import ml_collections
import numpy as np
import tokenizers

from effllm_jax import atomic
from effllm_jax import checkpoints
from effllm_jax import console
from effllm_jax import corpus
from effllm_jax import dataset
from effllm_jax import errors
from effllm_jax import heldout as heldout_lib
from effllm_jax import hf_folder
from effllm_jax import inputs
from effllm_jax import model
from effllm_jax import runlog
from effllm_jax import sources
from effllm_jax import structure
from effllm_jax import tokenizing
from effllm_jax import train
from effllm_jax import weights
from effllm_jax import workdir as workdir_lib

_SEPARATOR = '<|endoftext|>'


@dataclasses.dataclass(frozen=True)
class Recipe:
  """A source model that does not exist yet.

  Attributes:
    name: of its folder, which studies of the same source share.
    cfg: the architecture; `V` is also the size of the tokenizer.
    config: of the run that trains it, as in `experiments/configs`: `init` is
      'random', `prune.policy` 'none'; its `source` is set here.
  """

  name: str
  cfg: structure.ModelConfig
  config: ml_collections.ConfigDict


def make(
  recipe: Recipe, workdir: str | os.PathLike, cache: str | os.PathLike
) -> pathlib.Path:
  """Trains the model, or goes on with it; one that is finished stays.

  Args:
    recipe: which.
    workdir: gets a folder of the recipe's name.
    cache: of downloaded texts.

  Returns:
    The last checkpoint, which `config.source` takes.

  Raises:
    errors.InputError: as `train.run`; the model there is of another recipe, or
      cannot be read any more.
  """
  folder = pathlib.Path(workdir, recipe.name)
  text = corpus.prepare(recipe.config.data.text, cache)
  with errors.writing(folder):
    folder.mkdir(parents=True, exist_ok=True)
    atomic.once(
      folder / 'shape', lambda new: _write_shape(recipe.cfg, text, new)
    )
  there = sources.load(str(folder / 'shape'), cache, params=False).cfg
  changed = workdir_lib.changes(
    dataclasses.asdict(there), dataclasses.asdict(recipe.cfg)
  )
  if changed:
    raise errors.InputError(
      f'{folder} has another architecture: {changed}; use the same values, '
      'another name, or another --workdir'
    )
  config = ml_collections.ConfigDict(recipe.config)
  config.source = str(folder / 'shape')
  run, facts = folder / 'run', folder / 'facts.json'
  # Also a model that is finished must be that of this recipe.
  workdir_lib.check(run, config.to_dict())
  # Of a finished run this only makes sure that the last checkpoint is whole;
  # otherwise it goes on from the one before, to the same bits.
  train.run(config, run, cache)
  if not facts.exists():
    found = {
      'bits_per_byte': runlog.read(run).evaluation('final')['bits_per_byte'],
      'unigram_bits_per_byte': _unigram(config, text, cache),
    }
    atomic.write_json(facts, found)
    console.plain(stderr=True).print(f'{recipe.name}: {found}')
  return checkpoints.moments(run)[0].path


def _unigram(config, text, cache) -> float:
  source = sources.load(config.source, cache, params=False)
  evaluated = inputs.eval_text(config) or text
  held = train.heldout_text(config, evaluated, source)
  files = tokenizing.tokenize(text, source.tokenizer, source.separator_id)
  seen = np.concatenate([tokenizing.read(path) for path in files.values()])
  return unigram(seen, held, source.cfg.V)


def unigram(
  seen: np.ndarray, heldout: dict[str, heldout_lib.HeldOut], vocab: int
) -> float:
  """Bits per byte of a model that knows how frequent each token is.

  Args:
    seen: tokens of the training text, one-dimensional.
    heldout: of `heldout.windows`.
    vocab: number of token ids; each counts as seen once more than it was.
  """
  counts = np.bincount(seen, minlength=vocab) + 1
  bits = -np.log2(counts / counts.sum())
  total = sum(
    float((bits[held.windows[:, 1:]] * held.weight).sum())
    for held in heldout.values()
  )
  return total / sum(held.num_bytes for held in heldout.values())


def _write_shape(
  cfg: structure.ModelConfig, text: pathlib.Path, folder: pathlib.Path
) -> None:
  """A model folder of random weights, with a tokenizer made for `text`."""
  tokenizer = _train_tokenizer(cfg.V, text)
  separator = tokenizer.token_to_id(_SEPARATOR)
  source = weights.Source(
    name='shape', description='random weights', licence=None, sha256='',
    dtype='float32', cfg=cfg, separator_id=separator, bos_id=None,
    eos_ids=(separator,), pad_id=None, chat_template=None, tokenizer=tokenizer,
    params=jax.tree.map(np.asarray, model.init(jax.random.key(0), cfg)),
  )  # fmt: skip
  hf_folder.write_model(source, folder)


def _train_tokenizer(vocab, text) -> tokenizers.Tokenizer:
  """Byte-level BPE of the training split."""
  bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
  byte_level = tokenizers.pre_tokenizers.ByteLevel
  bpe.pre_tokenizer = byte_level(add_prefix_space=False)
  bpe.decoder = tokenizers.decoders.ByteLevel()
  bpe.train_from_iterator(
    (document.text for document in dataset.documents(text, 'train')),
    tokenizers.trainers.BpeTrainer(
      vocab_size=vocab,
      special_tokens=[_SEPARATOR],
      initial_alphabet=sorted(byte_level.alphabet()),
      show_progress=False,
    ),
  )
  return bpe
