"""Files of models as others write them, small and by hand."""

import dataclasses
import functools
import json
import os

import gguf
import jax
import numpy as np
import pytest
from safetensors import numpy as safetensors_numpy
import tokenizers

from effllm_jax import errors
from effllm_jax import hf_config
from effllm_jax import hf_folder
from effllm_jax import hf_trimmed
from effllm_jax import sources
from effllm_jax import structure
from effllm_jax import weights
from effllm_jax import widths

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
  rng = np.random.default_rng(seed)

  def leaf(letters, like):
    if structure.is_matrix(letters):
      scale = 0.4 if letters == 'VD' else 0.16
      return rng.normal(0, scale, like.shape).astype(np.float32)
    # Norm scales around 1, biases around 0.
    middle = 0.0 if 'K' in letters else 1.0
    return rng.uniform(-0.5, 0.5, like.shape).astype(np.float32) + middle

  return structure.map_axes(leaf, structure.shapes(cfg))


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


def sentencepiece():
  """Pieces of words after a mark for a space, as in Llama 2."""
  built = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token='<unk>'))
  built.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
  built.decoder = tokenizers.decoders.Metaspace()
  trainer = tokenizers.trainers.BpeTrainer(
    vocab_size=CFG.V,
    special_tokens=['<|endoftext|>', '<|im_end|>', '<unk>'],
    show_progress=False,
  )
  built.train_from_iterator([DARWIN], trainer)
  return built


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


def finished(cfg, params, masks=None):
  """A model as an export takes it."""
  return weights.Source(
    name='toy', description='toy', licence=None, sha256='0', dtype='F32',
    cfg=cfg, separator_id=0, bos_id=None, eos_ids=(1,), pad_id=None,
    chat_template=None, tokenizer=bpe(), params=params, masks=masks,
  )  # fmt: skip


def trimmed(folder, cfg, live, **changes):
  """Writes random weights with such heads and channels of every layer.

  Returns:
    The model, with the arrays and masks that it has before.
  """
  masks = widths.leading(live, cfg)
  model = finished(cfg, random_params(cfg), masks)
  write_trimmed(model, folder, **changes)
  return model


def write_trimmed(model, folder, **changes):
  """Writes a folder of trimmed layers; `changes` go over its config.json.

  A key that is changed to None is left out.
  """
  folder.mkdir()
  config = hf_trimmed.config(model) | {'eos_token_id': 1} | changes
  config = {k: v for k, v in config.items() if v is not None}
  (folder / 'config.json').write_text(json.dumps(config))
  hf_folder.write_tokenizer(model, folder)
  tensors = hf_trimmed.tensors(model)
  hf_folder.write_tensors(folder / 'model.safetensors', tensors)


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


def refuses(match, call, *arguments):
  """Asserts that a call raises one line that matches, with a remedy."""
  with pytest.raises(errors.InputError, match=match) as caught:
    call(*arguments)
  assert '\n' not in str(caught.value) and ';' in str(caught.value)


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


LLAMA3_ROPE = {
  'rope_type': 'llama3', 'factor': 8.0, 'low_freq_factor': 1.0,
  'high_freq_factor': 4.0, 'original_max_position_embeddings': 64,
}  # fmt: skip
