"""Folders of trimmed layers come back as the models that they were made of."""

import dataclasses

import jax
import numpy as np
import pytest

from effllm_jax import sources
from effllm_jax import structure
from effllm_jax import widths
from tests import model_files

CFG = dataclasses.replace(model_files.CFG, N=3, K=3)
EVERYTHING = dataclasses.replace(
  CFG,
  tied=False,
  qkv_bias=True,
  qk_norm=True,
  rope_scaling=structure.RopeScaling(8.0, 1.0, 4.0, 64),
)


@pytest.mark.parametrize('cfg', [CFG, EVERYTHING])
@pytest.mark.parametrize(
  'heads, ffn',
  [((3, 1, 2), (7, 5, CFG.F)), ((0, 3, 1), (9, 0, 4)), ((2, 0, 0), (8, 0, 0))],
)
def test_what_was_written_is_read_into_the_first_slots(
  tmp_path, cfg, heads, ffn
):
  live = {'heads': list(heads), 'ffn': list(ffn)}
  model = model_files.trimmed(tmp_path / 'a', cfg, live)
  found = sources.load(tmp_path / 'a', model_files.CACHE)
  assert found.cfg == dataclasses.replace(cfg, K=max(heads), F=max(ffn))
  assert widths.of_layers(found.masks) == live
  assert found.masks.stem.all()
  # Whatever is alive, as it was; all else is 0.
  part = {'K': slice(found.cfg.K), 'F': slice(found.cfg.F)}
  want = structure.map_axes(
    lambda letters, x: x[tuple(part.get(x, slice(None)) for x in letters)],
    widths.filled(model.params, model.masks),
  )
  for kind, names in structure.BLOCKS.items():
    lost = np.array(live[kind]) == 0
    for name in names:
      if getattr(want.layers, name) is not None:
        x = np.array(getattr(want.layers, name))
        x[lost] = 0
        want = want.replace(layers=want.layers.replace(**{name: x}))
  assert model_files.same(found.params, want)
  # Its own slots are what its lineage names.
  np.testing.assert_array_equal(found.origin.ffn[-1], np.arange(found.cfg.F))
  # A plan is made before the weights are read.
  without = sources.load(tmp_path / 'a', model_files.CACHE, params=False)
  assert model_files.same(without.masks, found.masks)
  assert without.cfg == found.cfg and without.params is None


def test_layers_of_one_width_are_a_source_like_any_other(tmp_path):
  model_files.trimmed(tmp_path / 'a', CFG, {'heads': [2] * 3, 'ffn': [8] * 3})
  found = sources.load(tmp_path / 'a', model_files.CACHE)
  assert (found.masks, found.origin) == (None, None)
  assert (found.cfg.K, found.cfg.F) == (2, 8)


def test_what_transformers_does_not_write_again(tmp_path):
  """Version 4 leaves out what is default."""
  live = {'heads': [1] * 3, 'ffn': [8] * 3}
  absent = dict.fromkeys(('tie_word_embeddings', 'rms_norm_eps', 'qk_norm'))
  model_files.trimmed(tmp_path / 'a', CFG, live, **absent)
  found = sources.load(tmp_path / 'a', model_files.CACHE).cfg
  assert (found.tied, found.norm_eps, found.qk_norm) == (True, 1e-5, False)


HEADS, FFN = 'num_key_value_heads_per_layer', 'intermediate_size_per_layer'


@pytest.mark.parametrize(
  'key, value, named',
  [
    (HEADS, [2, -1, 2], '-1'),
    (HEADS, [2, True, 2], 'true'),
    (HEADS, 2, '2'),
    (HEADS, [], '[]'),
    (FFN, [8, 8.5, 8], '8.5'),
    (FFN, [8, 8], '[8, 8]'),
    (FFN, [8, 2**40, 8], f'{2**40}'),
    ('attention_bias', 1, '1'),
    ('qk_norm', 'yes', '"yes"'),
    ('num_key_value_groups', 0, '0'),
    ('hidden_act', 'gelu', '"gelu"'),
    ('sliding_window', 128, '128'),
  ],
)
def test_a_config_that_is_none_of_ours(tmp_path, key, value, named):
  live = {'heads': [2, 1, 2], 'ffn': [8, 8, 8]}
  model_files.trimmed(tmp_path / 'a', CFG, live, **{key: value})
  model_files.refused(tmp_path / 'a', f'{key} = {named} ')


@pytest.mark.parametrize('key', [HEADS, FFN, 'hidden_size', 'vocab_size'])
def test_a_config_with_a_key_missing(tmp_path, key):
  model_files.trimmed(
    tmp_path / 'a', CFG, {'heads': [1] * 3, 'ffn': [8] * 3}, **{key: None}
  )
  model_files.refused(tmp_path / 'a', key)


def test_widths_that_the_tensors_do_not_have(tmp_path):
  live = {'heads': [2, 1, 2], 'ffn': [8, 6, 8]}
  model_files.trimmed(tmp_path / 'a', CFG, live, **{FFN: [8, 7, 8]})
  model_files.refused(tmp_path / 'a', 'layers.1.mlp.gate_proj', '(6, 64)')
  model_files.trimmed(tmp_path / 'b', CFG, live, **{HEADS: [2, 0, 2]})
  model_files.refused(tmp_path / 'b', 'layers.1.input_layernorm')
  model_files.trimmed(
    tmp_path / 'c', CFG, live | {'heads': [2, 0, 2]}, **{HEADS: [2, 1, 2]}
  )
  model_files.refused(tmp_path / 'c', 'layers.1.input_layernorm', 'missing')


def test_a_size_that_no_file_backs_takes_no_memory(tmp_path):
  live = {'heads': [1] * 3, 'ffn': [8] * 3}
  most = structure.MOST[int]
  model_files.trimmed(tmp_path / 'a', CFG, live, **{FFN: [8, most, 8]})
  model_files.refused(tmp_path / 'a', 'layers.1.mlp', f'({most}, 64)')


def test_both_are_read_alike(tmp_path):
  """The same widths in all layers, by the stock class and by our own."""
  cfg = dataclasses.replace(CFG, K=2, F=8)
  model_files.trimmed(tmp_path / 'a', cfg, {'heads': [2] * 3, 'ffn': [8] * 3})
  model_files.hugging_face(tmp_path / 'b', cfg)
  ours, stock = (
    sources.load(tmp_path / x, model_files.CACHE) for x in ('a', 'b')
  )
  assert ours.cfg == stock.cfg
  jax.tree.map(np.testing.assert_array_equal, ours.params, stock.params)
