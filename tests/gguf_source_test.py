"""GGUF files: read as llama.cpp reads them, or refused."""

import dataclasses
import json

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effllm_jax import errors
from effllm_jax import gguf_export
from effllm_jax import gguf_source
from effllm_jax import llama_cpp
from effllm_jax import model
from effllm_jax import sources
from effllm_jax import structure
from effllm_jax import teacher
from effllm_jax import weights
from tests import model_files


def zeros(cfg):
  """Tensors of a model of which only the rest counts."""
  return {x: np.zeros(s) for x, s in weights.file_shapes(cfg, weights.GGUF)}


@pytest.mark.parametrize('tied', [True, False])
@pytest.mark.parametrize(
  'kind, tolerance',
  [('F32', 0), ('F16', 1e-3), ('BF16', 8e-3), ('Q8_0', 1e-2), ('Q4_1', 0.15)],
)
def test_gguf_equals_its_weights(tmp_path, kind, tolerance, tied):
  cfg = dataclasses.replace(model_files.CFG, tied=tied)
  source = sources.load(
    model_files.write_gguf(tmp_path / 'a.gguf', cfg, kind), model_files.CACHE
  )
  assert source.cfg == cfg and source.dtype == kind
  for want, got in zip(
    jax.tree.leaves(model_files.random_params(cfg)),
    jax.tree.leaves(source.params),
    strict=True,
  ):
    assert got.dtype == np.float32
    assert np.abs(got - want).max() <= tolerance * np.abs(want).max()
  assert (
    source.tokenizer.encode(model_files.TEXT).ids
    == model_files.bpe().encode(model_files.TEXT).ids
  )
  assert source.description == f'Toy, {kind} GGUF' and source.licence == 'mit'
  assert source.separator_id == 0 and source.eos_ids == (1,)
  assert source.chat_template == '{{ messages }}'


@pytest.mark.parametrize('width', [16, 64, 128])
@pytest.mark.parametrize(
  'factor, context', [(8.0, 8192), (32.0, 8192), (2, 64)]
)
def test_llama3_scaling_is_found_again_in_its_result(
  tmp_path, width, factor, context
):
  scaling = structure.RopeScaling(factor, 1.0, 4.0, context)
  cfg = dataclasses.replace(
    model_files.LLAMA3, N=1, H=width, rope_scaling=scaling
  )
  path = model_files.write_gguf(tmp_path / 'a.gguf', cfg, arrays=zeros(cfg))
  assert sources.load(path, model_files.CACHE, params=False).cfg == cfg


def test_biases_of_a_llama_are_in_the_order_of_its_rows(tmp_path):
  cfg = dataclasses.replace(model_files.QWEN2, H=24)
  path = model_files.write_gguf(
    tmp_path / 'a.gguf', cfg, metadata={'general.architecture': 'llama'}
  )
  source = sources.load(path, model_files.CACHE)
  assert source.cfg == cfg and model_files.same(
    source.params, model_files.random_params(cfg)
  )
  if llama_cpp.available():
    tokens = list(range(30))
    logits, _ = model.forward(
      source.params, structure.all_alive(cfg), jnp.asarray([tokens]), cfg
    )
    (have,) = llama_cpp.logits(path, [tokens])
    np.testing.assert_allclose(
      have, logits[0], atol=1e-4 * float(jnp.abs(logits).max())
    )


@pytest.mark.parametrize('kind', ['F16', 'Q8_0'])
def test_an_output_that_repeats_the_embedding_is_tied(tmp_path, kind):
  embed = model_files.random_params(model_files.CFG).embed
  found = [
    sources.load(
      model_files.write_gguf(tmp_path / 'a.gguf', kind=kind, tensors=tensors),
      model_files.CACHE,
    )
    for tensors in ({}, {'output.weight': embed}, {'output.weight': 2 * embed})
  ]
  assert [x.cfg.tied for x in found] == [True, True, False]
  assert model_files.same(found[0].params, found[1].params)


def draw_blocks(kind, blocks, seed):
  """Random finite blocks of a quantised type, bytes, and their values."""
  _, size = gguf.GGML_QUANT_SIZES[kind]
  rng = np.random.default_rng(seed)
  raw = rng.integers(0, 256, (2 * blocks + 8, size), np.uint8)
  with np.errstate(all='ignore'):
    values = gguf.quants.dequantize(raw, kind)
  finite = np.isfinite(values).all(-1)
  assert finite.sum() >= blocks
  return raw[finite][:blocks], values[finite][:blocks]


def test_every_type_that_can_be_dequantised_is_read(tmp_path):
  types = []
  for kind in gguf.GGMLQuantizationType:
    block, size = gguf.GGML_QUANT_SIZES[kind]
    try:
      gguf.quants.dequantize(np.zeros((1, size), np.uint8), kind)
    except NotImplementedError:
      continue
    types.append((kind, block))
  names = {kind.name for kind, _ in types}
  assert names >= {'Q4_K', 'Q6_K', 'Q2_K', 'IQ2_XS', 'IQ4_NL', 'TQ1_0', 'BF16'}
  # One matrix of each type, whose rows are whole blocks.
  cfg = dataclasses.replace(
    model_files.QWEN3, D=256, F=32, N=-(-len(types) // 5)
  )
  arrays = zeros(cfg)
  reads_stem = ('attn_q.', 'attn_k.', 'attn_v.', 'ffn_gate.', 'ffn_up.')
  targets = [x for x in arrays if any(t in x for t in reads_stem)]
  raw, want = {}, {}
  for seed, (kind, block) in enumerate(types):
    name = targets[seed]
    shape = arrays[name].shape
    data, values = draw_blocks(kind, arrays[name].size // block, seed)
    raw[name] = data.reshape(len(arrays[name]), -1), kind
    want[name] = values.reshape(shape)
  path = model_files.write_gguf(
    tmp_path / 'a.gguf', cfg, arrays=arrays, raw=raw
  )
  found = dict(
    weights.views(sources.load(path, model_files.CACHE).params, weights.GGUF)
  )
  for name, values in want.items():
    kind = raw[name][1].name
    np.testing.assert_array_equal(found[name], values, err_msg=kind)


@pytest.mark.parametrize('name', ['I8', 'F64', 'Q8_1', 'Q8_K'])
def test_a_type_that_cannot_be_dequantised(tmp_path, name):
  kind = gguf.GGMLQuantizationType[name]
  block, size = gguf.GGML_QUANT_SIZES[kind]
  cfg = dataclasses.replace(model_files.CFG, D=256)
  data = np.zeros((96, 256 // block * size), np.uint8)
  if name in ('I8', 'F64'):
    data = data.view({'I8': np.int8, 'F64': np.float64}[name])
  raw = {'blk.1.ffn_up.weight': (data, kind)}
  path = model_files.write_gguf(
    tmp_path / 'a.gguf', cfg, arrays=zeros(cfg), raw=raw
  )
  model_files.refused(path, 'blk.1.ffn_up.weight', f'type {name}')


def test_unpermute_is_the_inverse_of_llama_cpps_order():
  rows = np.arange(2 * 6).reshape(12, 1)
  # Of each head of 6 channels: 0 and 3 become neighbours, then 1 and 4, ...
  permuted = rows[[0, 3, 1, 4, 2, 5, 6, 9, 7, 10, 8, 11]]
  np.testing.assert_array_equal(gguf_source.unpermute(permuted, 2), rows)


# White space, digits in and out of ASCII, contractions, joined characters.
TEXTS = [
  model_files.TEXT,
  model_files.DARWIN,
  *model_files.LLAMA_CPP,
  "ONE'LL  12345,6 a1b22\r\n \n\t\n x\n",
]


@pytest.mark.parametrize('pre', ['gpt-2', 'smollm', 'llama-bpe', 'qwen2'])
def test_tokenizer_of_a_gguf_file_is_llama_cpps(tmp_path, pre):
  if not llama_cpp.available():
    pytest.skip('the reference is llama.cpp')
  metadata = {
    'tokenizer.ggml.pre': pre,
    'tokenizer.ggml.bos_token_id': 0,
    'tokenizer.ggml.add_bos_token': pre == 'llama-bpe',
  }
  path = model_files.write_gguf(tmp_path / 'a.gguf', metadata=metadata)
  tokenizer = sources.load(path, model_files.CACHE, params=False).tokenizer
  for text in TEXTS:
    assert tokenizer.encode(text).ids == llama_cpp.tokenize(path, text)


def test_tokenizer_of_qwen2_is_transformers(tmp_path):
  transformers = pytest.importorskip('transformers', reason='the reference')
  path = model_files.write_gguf(
    tmp_path / 'a.gguf',
    model_files.QWEN2,
    metadata={'tokenizer.ggml.pre': 'qwen2'},
  )
  tokenizer = sources.load(path, model_files.CACHE, params=False).tokenizer
  model = json.loads(model_files.bpe().to_str())['model']
  reference = transformers.Qwen2Tokenizer(
    vocab=model['vocab'], merges=[tuple(m) for m in model['merges']]
  )
  for text in TEXTS:
    if '<|' not in text:  # It knows of no special tokens.
      assert tokenizer.encode(text).ids == reference(text)['input_ids'], text


def test_rows_that_no_token_has_are_no_tokens(tmp_path):
  cfg = dataclasses.replace(model_files.CFG, V=336)
  path = model_files.write_gguf(tmp_path / 'a.gguf', cfg)
  source = sources.load(path, model_files.CACHE)
  assert source.tokenizer.get_vocab() == model_files.bpe().get_vocab()
  folder = model_files.hugging_face(tmp_path / 'hf', cfg)
  teacher.fitted(source, sources.load(folder, model_files.CACHE), seq_len=8)
  # And an export names them as the converter did.
  gguf_export.write(source, tmp_path / 'again.gguf', 'f32')
  want, have = (
    gguf_source.contents(tmp_path / f'{name}.gguf')[0]
    for name in ('a', 'again')
  )
  for key in ('tokens', 'token_type'):
    key = f'tokenizer.ggml.{key}'
    assert have[key] == want[key] and len(want[key]) == 336


# What is refused.


@pytest.mark.parametrize(
  'key, value, parts',
  [
    ('general.architecture', 'gemma2', ('general.architecture = gemma2',)),
    ('llama.rope.scaling.type', 'yarn', ('llama.rope.scaling.type = yarn',)),
    ('llama.expert_count', 8, ('llama.expert_count = 8',)),
    ('llama.attention.sliding_window', 4096, ('sliding_window = 4096',)),
    ('llama.attention.causal', False, ('llama.attention.causal = False',)),
    ('tokenizer.ggml.add_eos_token', True, ('add_eos_token = True',)),
    ('llama.attention.head_count_kv', [2, 2], ('head_count_kv = [2, 2]',)),
    ('llama.attention.head_count_kv', 3, ('3 of 4',)),
    ('llama.attention.value_length', 8, ('= 8 (head width 16)',)),
    ('llama.rope.dimension_count', 8, ('= 8 (head width 16)',)),
    ('llama.attention.key_length', 15, ('key_length = 15',)),
    ('llama.block_count', None, ('llama.block_count', 'missing')),
    ('llama.feed_forward_length', 95, ('ffn_gate', (96, 64), (95, 64))),
    ('llama.vocab_size', 321, ('token_embd.weight', (320, 64), (321, 64))),
    ('tokenizer.ggml.model', 'llama', ('tokenizer.ggml.model = llama',)),
    ('tokenizer.ggml.pre', 'tekken', ('tokenizer.ggml.pre = tekken', 'smollm')),
    ('split.count', 2, ('one of 2 files', 'llama-gguf-split --merge')),
    ('tokenizer.ggml.tokens', ['a', 'b'], ('2 tokens',)),
    ('tokenizer.ggml.merges', ['a', 'b c'], ('merges',)),
    ('tokenizer.ggml.eos_token_id', 320, ('320',)),
  ],
)
def test_gguf_metadata_that_cannot_be_represented(tmp_path, key, value, parts):
  path = model_files.write_gguf(tmp_path / 'a.gguf', metadata={key: value})
  model_files.refused(path, *parts)


def test_gguf_tensors_that_do_not_fit(tmp_path):
  k, bias = 'blk.1.attn_k.weight', 'blk.0.attn_output.bias'
  for name, array, parts in (
    (k, None, (k, 'missing', (32, 64))),
    (k, np.zeros((33, 64)), (k, (33, 64), (32, 64))),
    (k, np.full((32, 64), np.inf), (k, 'not finite')),
    (bias, np.zeros(64), (bias,)),
    ('blk.0.attn_q.bias', np.zeros(64), ('blk.1.attn_q.bias', 'missing')),
    ('rope_freqs.weight', np.ones(8), ('rope_freqs.weight = [1.0, 1.0',)),
    ('rope_freqs.weight', np.ones(7), ('rope_freqs.weight = [1.0, 1.0',)),
    ('rope_freqs.weight', np.arange(8), ('rope_freqs.weight = [0.0, 1.0',)),
    ('rope_freqs.weight', 1.0 + np.arange(8), ('rope_freqs.weight = [1.0',)),
    ('rope_freqs.weight', np.full(8, np.nan), ('rope_freqs.weight = [nan',)),
    ('rope_freqs.weight', np.full(8, np.inf), ('rope_freqs.weight = [inf',)),
  ):
    path = model_files.write_gguf(tmp_path / 'a.gguf', tensors={name: array})
    model_files.refused(path, *parts)
  freqs = {'rope_freqs.weight': model_files.rope_freqs(model_files.LLAMA3)}
  for cfg in (model_files.QWEN2, model_files.QWEN3):
    path = model_files.write_gguf(tmp_path / 'a.gguf', cfg, tensors=freqs)
    model_files.refused(path, 'rope_freqs.weight')


def test_gguf_with_more_tokens_than_rows(tmp_path):
  cfg = dataclasses.replace(model_files.CFG, V=300)
  model_files.refused(
    model_files.write_gguf(tmp_path / 'a.gguf', cfg), 319, 300
  )


def test_truncated_gguf(tmp_path):
  path = model_files.write_gguf(tmp_path / 'a.gguf')
  whole = path.read_bytes()
  cut = tmp_path / 'cut.gguf'
  sizes = [*range(0, 120, 7), *range(120, len(whole), len(whole) // 30)]
  for size in [*sizes, len(whole) - 1]:
    cut.write_bytes(whole[:size])
    model_files.refused(cut, 'cut.gguf')


def test_gguf_header_that_lies(tmp_path):
  path = model_files.write_gguf(tmp_path / 'a.gguf')
  whole = path.read_bytes()
  random = np.random.default_rng(0)
  bad = tmp_path / 'bad.gguf'
  outcomes = []
  for _ in range(60):
    damaged = bytearray(whole)
    # The last of the header: names, shapes, types and offsets of tensors.
    end = whole.rindex(b'output_norm.weight') + 42
    where = random.choice([random.integers(24), random.integers(24, end)])
    damaged[where] ^= 1 << random.integers(8)
    bad.write_bytes(damaged)
    try:
      sources.load(bad, model_files.CACHE)
      outcomes.append('read')
    except errors.InputError as e:
      assert '\n' not in str(e)
      outcomes.append('refused')
  # A flipped bit in a name of a token does no harm; one in a length does.
  assert outcomes.count('refused') > 20, outcomes
