"""A source model from nothing but text."""

import json
import math

import numpy as np
import pytest

from effllm_jax import data
from effllm_jax import errors
from effllm_jax import small_run
from effllm_jax import sources
from effllm_jax import train
from experiments import pretraining
from tests import conftest


def test_frequencies_of_tokens_against_closed_form():
  """Seen (with one each more) 4, 2, 1, 1 of 8 times: 1, 2, 3, 3 bits."""
  held = data.HeldOut(
    windows=np.array([[3, 0, 1, 2, 3]], np.int32),
    weight=np.array([[1, 1, 1, 0]], np.float32),
    num_bytes=3,
    documents=1,
  )
  seen = np.array([0, 0, 0, 1])
  assert pretraining.unigram(seen, {'a': held}, 4) == pytest.approx(2.0)


def test_a_source_is_made_once(tmp_path, monkeypatch):
  small_run.write_inputs(tmp_path)
  config = small_run.config('', tmp_path / 'text')
  config.update_from_flattened_dict(
    {
      'init': 'random',
      'prune.policy': 'none',
      'train.tokens': 4 * 64,
      'optimizer.warmup_tokens': 64,
      'optimizer.decay_tokens': 64,
    }
  )
  cfg = conftest.make_config(V=300, N=1)
  recipe = pretraining.Recipe('mini', cfg, config)
  path = pretraining.make(recipe, tmp_path / 'work', tmp_path / 'cache')
  source = sources.load(path, tmp_path / 'cache')
  assert source.cfg == cfg
  # A model like any other: nothing of it was pruned.
  assert source.masks is source.origin is None
  assert source.description.endswith(', trained further in 4 steps')
  assert source.tokenizer.get_vocab_size() == 300
  text = 'The naïve reader\n  reads.'
  assert source.tokenizer.decode(source.tokenizer.encode(text).ids) == text
  facts = json.loads((tmp_path / 'work/mini/facts.json').read_text())
  assert 0 < facts['unigram_bits_per_byte'] < 8
  assert math.isfinite(facts['bits_per_byte'])
  with monkeypatch.context() as patch:
    patch.setattr(train, 'run', None)
    again = pretraining.make(recipe, tmp_path / 'work', tmp_path / 'cache')
  assert again == path
  config.optimizer.peak = 0.1
  with pytest.raises(errors.InputError, match=r'peak=0\.003 there, 0\.1 now'):
    pretraining.make(recipe, tmp_path / 'work', tmp_path / 'cache')
  config.optimizer.peak = 3e-3
  # The only checkpoint is damaged, then aside.
  (path / 'arch/metadata').write_text('{')
  for _ in range(2):
    with pytest.raises(errors.InputError, match=r'no checkpoint in .* can be'):
      pretraining.make(recipe, tmp_path / 'work', tmp_path / 'cache')
