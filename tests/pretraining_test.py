"""A source model from nothing but text."""

import dataclasses
import json
import math

import jax
import numpy as np
import pytest

from effllm_jax import errors
from effllm_jax import heldout as heldout_lib
from effllm_jax import small_run
from effllm_jax import sources
from experiments import pretraining
from tests import conftest


def test_frequencies_of_tokens_against_closed_form():
  """Seen (with one each more) 4, 2, 1, 1 of 8 times: 1, 2, 3, 3 bits."""
  held = heldout_lib.HeldOut(
    windows=np.array([[3, 0, 1, 2, 3]], np.int32),
    weight=np.array([[1, 1, 1, 0]], np.float32),
    num_bytes=3,
  )
  seen = np.array([0, 0, 0, 1])
  assert pretraining.unigram(seen, {'a': held}, 4) == pytest.approx(2.0)


def test_a_source_is_made_once(tmp_path, monkeypatch):
  where = tmp_path / 'work', tmp_path / 'cache'
  small_run.write_inputs(tmp_path)
  config = small_run.config('', tmp_path / 'text')
  config.update_from_flattened_dict(
    {
      'init': 'random',
      'prune.policy': 'none',
      'train.tokens': 4 * 64,
      'optimizer.warmup_tokens': 64,
      'optimizer.decay_tokens': 64,
      'checkpoint.every_steps': 2,
    }
  )
  cfg = conftest.make_config(V=300, N=1)
  recipe = pretraining.Recipe('mini', cfg, config)
  path = pretraining.make(recipe, *where)
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
  # Again: nothing changes.
  files = {p: p.read_bytes() for p in tmp_path.rglob('*') if p.is_file()}
  assert pretraining.make(recipe, *where) == path
  for file, content in files.items():
    assert file.read_bytes() == content, file
  config.optimizer.peak = 0.1
  with pytest.raises(errors.InputError, match=r'peak=0\.003 there, 0\.1 now'):
    pretraining.make(recipe, *where)
  config.optimizer.peak = 3e-3
  other = dataclasses.replace(recipe, cfg=dataclasses.replace(cfg, F=cfg.F + 1))
  message = rf'another architecture: F={cfg.F} there, {cfg.F + 1} now; use the'
  with pytest.raises(errors.InputError, match=message):
    pretraining.make(other, *where)
  # However the folder is spelt, it is the same.
  monkeypatch.chdir(tmp_path)
  assert pretraining.make(recipe, 'work', 'cache') == path
  # The last checkpoint is damaged: it goes on from the one before.
  for file in path.glob('params/**/d/*'):
    file.write_bytes(b'')
  assert pretraining.make(recipe, *where) == path
  again = sources.load(path, tmp_path / 'cache')
  jax.tree.map(np.testing.assert_array_equal, again.params, source.params)
  # All of them are.
  for file in path.parent.glob('*/arch/metadata'):
    file.write_text('{')
  for _ in range(2):
    with pytest.raises(errors.InputError, match=r'no checkpoint in .* can be'):
      pretraining.make(recipe, *where)
