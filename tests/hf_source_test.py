"""Hugging Face folders: read as transformers reads them, or refused."""

import dataclasses
import json
import shutil
import subprocess
import types

import gguf
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors import numpy as safetensors_numpy
import tokenizers

from effllm_jax import errors
from effllm_jax import finished
from effllm_jax import hf_config
from effllm_jax import hf_folder
from effllm_jax import llama_cpp
from effllm_jax import model
from effllm_jax import sources
from effllm_jax import structure
from tests import model_files


def edit_tensors(folder, edit):
  """Rewrites model.safetensors after `edit(dict of arrays)`."""
  path = folder / 'model.safetensors'
  tensors = safetensors_numpy.load_file(path)
  edit(tensors)
  safetensors_numpy.save_file(tensors, path)


@pytest.mark.parametrize(
  'name, kv, width, tied, vocab, rope',
  [
    ('Llama', 4, 24, True, 320, {}),
    ('Llama', 2, 24, False, 320, {}),
    ('Llama', 2, 24, True, 321, model_files.LLAMA3_ROPE),
    # Of this graph llama.cpp takes the width of a head from that of the stem.
    ('Qwen2', 2, 16, True, 323, {}),
    ('Qwen2', 4, 24, False, 320, model_files.LLAMA3_ROPE),
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
  model_files.bpe().save(str(tmp_path / 'model' / 'tokenizer.json'))

  source = sources.load(tmp_path / 'model', model_files.CACHE)

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
    {v: k for k, v in gguf.MODEL_ARCH_NAMES.items()}[
      model_files.architecture(cfg)
    ],
    cfg.N,
  )
  arrays = {
    names.get_name(key, ('.weight', '.bias')): value.numpy()
    for key, value in reference.state_dict().items()
    if not (tied and key == 'lm_head.weight')
  }
  path = model_files.write_gguf(tmp_path / 'model.gguf', cfg, arrays=arrays)
  converted = sources.load(path, model_files.CACHE)
  assert converted.cfg == cfg
  assert model_files.same(converted.params, source.params)
  if llama_cpp.available():
    (have,) = llama_cpp.logits(path, [tokens[0].tolist()])
    np.testing.assert_allclose(have, want[0], atol=1e-4 * np.abs(want).max())


@pytest.mark.parametrize(
  'cfg',
  [
    model_files.CFG,
    dataclasses.replace(model_files.CFG, tied=False),
    model_files.LLAMA3,
    model_files.QWEN2,
    model_files.QWEN3,
  ],
)
def test_hugging_face_folder_is_read_exactly(tmp_path, cfg):
  folder = model_files.hugging_face(tmp_path / 'toy', cfg)
  (folder / 'README.md').write_text('---\nlicense: mit\n---\nlicense: no\n')
  source = sources.load(folder, model_files.CACHE)
  assert source.cfg == cfg
  assert model_files.same(source.params, model_files.random_params(cfg))
  assert (source.name, source.licence, source.dtype) == ('toy', 'mit', 'F32')
  assert source.separator_id == 0 and source.eos_ids == (1,)
  assert sources.load(folder, model_files.CACHE, params=False).params is None


@pytest.mark.parametrize(
  'path, name',
  [
    ('models--owner--My-model/snapshots/0a1b', 'My-model'),
    ('models--gpt2/snapshots/0a1b', 'gpt2'),
    ('runs/snapshots/0a1b', '0a1b'),
  ],
)
def test_a_folder_of_the_hub_cache_is_called_by_its_model(tmp_path, path, name):
  (tmp_path / path).parent.mkdir(parents=True)
  folder = model_files.hugging_face(tmp_path / path)
  source = sources.load(folder, model_files.CACHE, params=False)
  assert (source.name, source.description) == (name, f'{name}, F32 safetensors')


def test_a_run_is_no_source(tmp_path):
  (tmp_path / 'checkpoints').mkdir()
  (tmp_path / 'metrics.jsonl').touch()
  for folder in (tmp_path, tmp_path / 'checkpoints'):
    with pytest.raises(
      errors.InputError, match=r'is of a run.*/events/<index>'
    ):
      sources.load(folder, model_files.CACHE)
  # What was exported into a workdir is a model.
  sources.load(model_files.hugging_face(tmp_path / 'out'), model_files.CACHE)


def test_a_source_that_is_another_one_now_is_not_measured(tmp_path):
  folder = model_files.hugging_face(tmp_path / 'toy')
  model = sources.load(folder, model_files.CACHE)
  sources.save(model, tmp_path / 'run' / 'source')
  run = types.SimpleNamespace(config={'source': str(folder)})
  made = types.SimpleNamespace(run=run, new=False)
  find = lambda: finished.source(tmp_path / 'run', made, model_files.CACHE)
  assert find().sha256 == model.sha256
  tensors = safetensors_numpy.load_file(folder / 'model.safetensors')
  tensors['model.norm.weight'] += 1
  safetensors_numpy.save_file(tensors, folder / 'model.safetensors')
  with pytest.raises(errors.InputError, match=r"with: sha256='\w+' there, '\w"):
    find()
  # Of which the run has taken the shape alone.
  made.new = True
  assert find().sha256 != model.sha256


@pytest.mark.parametrize(
  'front, licence',
  [
    ('license: mit', 'mit'),
    ('license: "mit"  # or so\ntags:\n- x', 'mit'),
    ('license:\n- apache-2.0\n- mit\ntags:\n- x', 'apache-2.0, mit'),
    ("license:\n  - 'mit'", 'mit'),
    ('license: [apache-2.0, "mit"]', 'apache-2.0, mit'),
    ('license: |\n  mit\nlanguage: en', 'mit'),
    ('license: no', 'no'),
    ('license:\nlanguage: en', None),
    ('license: # none\nlanguage: en', None),
    ('license: {mit: 1}', None),
    ('license_name: mit', None),
    ('- license: mit', None),
    ('license: "mit', None),
    ('license: ' + '[' * 1_000, None),
  ],
  ids=lambda x: x and x[:20],
)
def test_licence_in_the_front_matter(tmp_path, front, licence):
  folder = model_files.hugging_face(tmp_path / 'toy')
  (folder / 'README.md').write_text(f'---\n{front}\n---\nlicense: no\n')
  source = sources.load(folder, model_files.CACHE, params=False)
  assert source.licence == licence


def test_files_about_a_licence_are_read(tmp_path):
  folder = model_files.hugging_face(tmp_path / 'toy')
  texts = {
    'LICENSE': 'Two\r\nlines, \N{COPYRIGHT SIGN}\n', 'LICENSE-MODEL': '',
    'Llama-3.2_LICENCE.txt': 'w', 'notice.md': 'x', 'USE_POLICY': 'y',
    'COPYING-3': 'z',
  }  # fmt: skip
  others = 'LICENSE.pdf', 'licensed.txt', '.license', 'LICENSE.safetensors.md'
  for name in texts:
    (folder / name).write_text(texts[name], encoding='utf-8', newline='')
  for name in others:
    (folder / name).write_text('')
  (folder / 'NOTICE').write_bytes(b'\xa9 of old')
  (folder / 'NOTICE.txt').write_bytes(b' ' * (2**20 + 1))
  (folder / 'license').mkdir()
  found = sources.load(folder, model_files.CACHE, params=False).licence_files
  assert found == texts | {'NOTICE': '\N{REPLACEMENT CHARACTER} of old'}


@pytest.mark.parametrize(
  'front, name, link',
  [
    ('license: other', None, None),
    (
      'license: other\nlicense_name: llama3.2\nlicense_link: LICENSE',
      'llama3.2',
      'LICENSE',
    ),
    (
      'license_link: >-\n  https://a.b/c#d\nlicense: other  # sic\n'
      'license_name: "My own"  # or so\ntags:\n- x',
      'My own',
      'https://a.b/c#d',
    ),
    (
      'license: other\nlicense_name:\nlicense_link: # none',
      None,
      None,
    ),
    # As our own cards quote it.
    (
      'license: other\nlicense_name: "a \\"b\\" #1"\nlicense_link: "x#y"',
      'a "b" #1',
      'x#y',
    ),
    (
      "license: other\nlicense_name: >\n  it's\n  mine\nlicense_link: 'it''s'",
      "it's mine",
      "it's",
    ),
    ('license: mit\nlicense_name: x\nlicense_link: y', None, None),
  ],
)
def test_what_another_licence_is_called(tmp_path, front, name, link):
  folder = model_files.hugging_face(tmp_path / 'toy')
  (folder / 'README.md').write_text(f'---\n{front}\n---\nlicense_name: no\n')
  source = sources.load(folder, model_files.CACHE, params=False)
  assert (source.licence_name, source.licence_link) == (name, link)


def test_shards_and_bfloat16(tmp_path):
  folder = model_files.hugging_face(
    tmp_path / 'a', dtype=ml_dtypes.bfloat16, shards=3
  )
  source = sources.load(folder, model_files.CACHE)
  rounded = jax.tree.map(
    lambda x: x.astype(ml_dtypes.bfloat16).astype(np.float32),
    model_files.random_params(model_files.CFG),
  )
  assert source.dtype == 'BF16' and model_files.same(source.params, rounded)
  said = subprocess.run(
    'sha256sum *.safetensors | sha256sum',
    shell=True, cwd=folder, capture_output=True, text=True, check=True,
  )  # fmt: skip
  assert source.sha256 == said.stdout.split()[0]
  (folder / 'model-00002-of-00003.safetensors').unlink()
  model_files.refused(folder, 'model-00002-of-00003.safetensors', 'missing')


def test_stock_classes():
  odd = dataclasses.replace(model_files.CFG, D=60, G=4)
  for changes, name in (
    ({}, 'MistralForCausalLM'),
    ({'qkv_bias': True}, 'Qwen2ForCausalLM'),
    ({'qk_norm': True}, 'Qwen3ForCausalLM'),
  ):
    config = hf_config.write(dataclasses.replace(odd, **changes))
    assert config['architectures'] == [name]
  with pytest.raises(errors.InputError, match='no class of transformers'):
    hf_config.write(dataclasses.replace(model_files.QWEN2, qk_norm=True))


def test_defaults_of_a_class_stand_in_for_absent_keys():
  for cfg, K, H in (
    (model_files.CFG, 4, 16),
    (model_files.QWEN2, 32, 2),
    (model_files.QWEN3, 32, 128),
  ):
    heads = 4 if cfg is model_files.CFG else 32
    raw = hf_config.write(cfg) | {'num_attention_heads': heads}
    del raw['num_key_value_heads'], raw['head_dim']
    found = hf_config.read(raw, 'f')
    assert (found.K, found.G, found.H) == (K, 1, H)


def test_a_window_that_qwen_does_not_use_is_no_window():
  raw = hf_config.write(model_files.QWEN2) | {'sliding_window': 32768}
  assert hf_config.read(raw, 'f') == model_files.QWEN2
  with pytest.raises(errors.InputError, match='use_sliding_window = true'):
    hf_config.read(raw | {'use_sliding_window': True}, 'f')


def test_mistral_without_window_is_the_same_model(tmp_path):
  # 60 channels do not divide by 4 * 2 heads: our own export is a Mistral.
  cfg = dataclasses.replace(model_files.CFG, D=60, G=4)
  folder = model_files.hugging_face(tmp_path / 'a', cfg)
  config = json.loads((folder / 'config.json').read_text())
  assert config['architectures'] == ['MistralForCausalLM']
  assert model_files.same(
    sources.load(folder, model_files.CACHE).params,
    model_files.random_params(cfg),
  )
  del config['sliding_window']  # As transformers writes its default, 4096.
  (folder / 'config.json').write_text(json.dumps(config))
  model_files.refused(folder, 'sliding_window = 4096')


def test_documents_are_never_truncated(tmp_path):
  folder = model_files.hugging_face(tmp_path / 'a')
  tokenizer = model_files.bpe()
  tokenizer.enable_truncation(4)
  tokenizer.enable_padding(length=9)
  tokenizer.save(str(folder / 'tokenizer.json'))
  read = sources.load(folder, model_files.CACHE).tokenizer
  assert (
    read.encode(model_files.DARWIN).ids
    == model_files.bpe().encode(model_files.DARWIN).ids
  )
  assert read.encode('a').ids == model_files.bpe().encode('a').ids


def test_merges_are_never_left_out_at_random(tmp_path):
  folder = model_files.hugging_face(tmp_path / 'a')
  tokenizer = model_files.bpe()
  tokenizer.model.dropout = 0.5
  tokenizer.save(str(folder / 'tokenizer.json'))
  read = sources.load(folder, model_files.CACHE).tokenizer
  want = model_files.bpe().encode(model_files.DARWIN).ids
  assert read.encode(model_files.DARWIN).ids == want
  # What an export and a later start of the run read is this text.
  again = tokenizers.Tokenizer.from_str(read.to_str())
  assert again.encode(model_files.DARWIN).ids == want


V_328 = dataclasses.replace(model_files.CFG, V=328)
LLAMA_TOKENS = [
  '<|begin_of_text|>', '<|end_of_text|>', '<|eom_id|>', '<|eot_id|>', '<|pad|>',
]  # fmt: skip


def instruct(folder, generation=(), **config):
  """A folder with the special tokens of Llama 3.2 Instruct."""
  model_files.hugging_face(folder, V_328, bos_token_id=320, eos_token_id=321)
  tokenizer = tokenizers.Tokenizer.from_str(
    model_files.bpe().to_str().replace('<|endoftext|>', '<|unused|>')
  )
  tokenizer.add_special_tokens(LLAMA_TOKENS)
  tokenizer.save(str(folder / 'tokenizer.json'))
  generation = {
    'eos_token_id': [321, 322, 323], 'do_sample': True, 'temperature': 0.6,
    'top_p': 0.9, 'top_k': None, 'transformers_version': '4.45.0.dev0',
    'update': True,
  } | dict(generation)  # fmt: skip
  config = {'eos_token': '<|eot_id|>', 'pad_token': '<|pad|>'} | config
  for name, content in (
    ('generation_config.json', generation),
    ('tokenizer_config.json', config),
  ):
    (folder / name).write_text(json.dumps(content))
  return folder


@pytest.mark.parametrize('token', ['<|eot_id|>', {'content': '<|eot_id|>'}])
def test_ends_padding_and_sampling_are_carried_over(tmp_path, token):
  folder = instruct(tmp_path / 'a', eos_token=token)
  source = sources.load(folder, model_files.CACHE)
  assert (source.bos_id, source.eos_ids) == (320, (321, 322, 323))
  assert (source.eos_id, source.pad_id) == (323, 324)
  # What separates documents is not what ends a turn.
  assert source.separator_id == 321
  sampling = {'do_sample': True, 'temperature': 0.6, 'top_p': 0.9}
  assert source.generation == sampling
  saved = sources.load_saved(sources.save(source, tmp_path / 'saved'))
  out = tmp_path / 'out'
  out.mkdir()
  hf_folder.write_tokenizer(saved, out)
  tokenizer, generation = (
    json.loads((out / f'{name}_config.json').read_text())
    for name in ('tokenizer', 'generation')
  )
  assert tokenizer['eos_token'] == '<|eot_id|>'
  assert tokenizer['pad_token'] == '<|pad|>'
  ids = {
    'bos_token_id': 320, 'eos_token_id': [321, 322, 323], 'pad_token_id': 324,
  }  # fmt: skip
  assert generation == ids | sampling


def test_padding_that_a_config_states_comes_first(tmp_path):
  folder = instruct(tmp_path / 'a', {'pad_token_id': 320}, eos_token='new')
  source = sources.load(folder, model_files.CACHE, params=False)
  # And a token that the tokenizer does not have is none.
  assert (source.eos_id, source.pad_id) == (321, 320)


@pytest.mark.parametrize('side', [None, 'left', 'right'])
def test_a_batch_is_filled_up_on_the_side_of_the_source(tmp_path, side):
  stated = {'padding_side': side} if side else {}
  folder = instruct(
    tmp_path / 'a', tokenizer_class='PreTrainedTokenizerFast', **stated
  )
  source = sources.load(folder, model_files.CACHE, params=False)
  assert source.padding_side == side
  out = sources.save(source, tmp_path / 'saved')
  assert sources.load_saved(out).padding_side == side
  transformers = pytest.importorskip('transformers', reason='opens both')
  theirs, ours = (
    transformers.AutoTokenizer.from_pretrained(x).padding_side
    for x in (folder, out)
  )
  assert theirs == ours == (side or 'right')


@pytest.mark.parametrize('name', ['LlamaTokenizer', 'LlamaTokenizerFast'])
@pytest.mark.parametrize('byte_level', [False, True])
def test_the_side_that_a_class_implies_is_that_of_a_batch(
  tmp_path, name, byte_level
):
  folder = model_files.hugging_face(tmp_path / 'a')
  if not byte_level:
    model_files.sentencepiece().save(str(folder / 'tokenizer.json'))
  path = folder / 'tokenizer_config.json'
  path.write_text(json.dumps({'tokenizer_class': name}))
  source = sources.load(folder, model_files.CACHE, params=False)
  assert source.padding_side == (None if byte_level else 'left')
  transformers = pytest.importorskip('transformers', reason='opens both')
  out = sources.save(source, tmp_path / 'saved')
  theirs, ours = (
    transformers.AutoTokenizer.from_pretrained(x).padding_side
    for x in (folder, out)
  )
  assert ours == (source.padding_side or 'right')
  if int(transformers.__version__.partition('.')[0]) > 4 or not byte_level:
    assert theirs == ours


def letters_for_ends(folder, name=None, **config):
  """A vocabulary of its own, with the ids of a class's defaults in its config.

  Ids 0 to 2, padding and both ends, are letters; `name` is a token that is
  added after them, if any.
  """
  model_files.hugging_face(
    folder, V_328, bos_token_id=1, eos_token_id=2, pad_token_id=0
  )
  tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
  level = tokenizers.pre_tokenizers.ByteLevel
  tokenizer.pre_tokenizer = level(add_prefix_space=False)
  tokenizer.decoder = tokenizers.decoders.ByteLevel()
  tokenizer.train_from_iterator(
    [model_files.DARWIN],
    tokenizers.trainers.BpeTrainer(
      vocab_size=320,
      special_tokens=[],
      initial_alphabet=level.alphabet(),
      show_progress=False,
    ),
  )
  if name:
    tokenizer.add_special_tokens([name])
  tokenizer.save(str(folder / 'tokenizer.json'))
  (folder / 'tokenizer_config.json').write_text(json.dumps(config))
  assert [tokenizer.id_to_token(i) for i in range(3)] == ['!', '"', '#']
  return folder


@pytest.mark.parametrize(
  'name, stated, separator',
  [
    ('<|stop|>', {'eos_token': '<|stop|>'}, 320),
    # Nothing else is there to separate documents with.
    ('<|stop|>', {}, 2),
    (None, {}, 2),
  ],
)
def test_letters_that_a_config_takes_for_ends_stay_letters(
  tmp_path, name, stated, separator
):
  folder = letters_for_ends(tmp_path / 'a', name, **stated)
  source = sources.load(folder, model_files.CACHE, params=False)
  assert source.separator_id == separator
  out = sources.save(source, tmp_path / 'saved')
  config = json.loads((out / 'tokenizer_config.json').read_text())
  tokens = {k: v for k, v in config.items() if k.endswith('os_token')}
  assert tokens == stated and 'pad_token' not in config
  transformers = pytest.importorskip('transformers', reason='opens it')
  opened = transformers.AutoTokenizer.from_pretrained(out)
  text = 'He said: "Go on!" #1, "!#" and "".'
  ids = source.tokenizer.encode(text).ids
  assert opened(text)['input_ids'] == ids
  assert opened.decode(ids, skip_special_tokens=True) == text


def test_an_end_that_a_config_states_separates_before_the_tokenizers_own(
  tmp_path,
):
  folder = letters_for_ends(tmp_path / 'a', '<|stop|>')
  stated = {'eos_token_id': [2, 320]}
  (folder / 'generation_config.json').write_text(json.dumps(stated))
  source = sources.load(folder, model_files.CACHE, params=False)
  assert (source.separator_id, source.eos_ids) == (320, (2, 320))


# What is refused.


@pytest.mark.parametrize(
  'key, value',
  [
    ('eos_token', ['<|eot_id|>']),
    ('pad_token', {'content': 3}),
    ('pad_token', 324),
    ('do_sample', 1),
    ('temperature', '0.6'),
    ('temperature', float('nan')),
    ('temperature', 10**40),
    ('top_k', 0.5),
    ('top_p', -0.1),
    ('max_new_tokens', 0),
    ('max_length', [20]),
  ],
)
def test_settings_that_no_generation_takes(tmp_path, key, value):
  folder = tmp_path / 'a'
  if key.endswith('token'):
    model_files.refused(instruct(folder, **{key: value}), key, 'not a text')
  else:
    model_files.refused(instruct(folder, {key: value}), f'{key} = ')


@pytest.mark.parametrize('side', ['both', ['left']])
def test_a_side_that_there_is_not(tmp_path, side):
  folder = instruct(tmp_path / 'a', padding_side=side)
  model_files.refused(folder, 'padding_side = ', 'neither left nor right')


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
    ('is_causal', False),
    ('rope_scaling', {'rope_type': 'linear', 'factor': 2.0}),
    ('rope_scaling', {'type': 'dynamic', 'factor': 2.0}),
    ('rope_parameters', {'rope_type': 'yarn', 'rope_theta': 50000.0}),
    ('rope_scaling', model_files.LLAMA3_ROPE | {'high_freq_factor': 1.0}),
    ('rope_scaling', model_files.LLAMA3_ROPE | {'beta_fast': 32.0}),
    # One says so, the other does not.
    ('rope_scaling', model_files.LLAMA3_ROPE),
    ('rope_parameters', {'rope_theta': 1.0, 'partial_rotary_factor': 0.5}),
    ('head_dim', 15),
    ('num_key_value_heads', 3),
    ('num_key_value_heads', [2, 2]),
    ('intermediate_size', 0),
    ('hidden_size', '64'),
    ('rms_norm_eps', -1.0),
    ('eos_token_id', '<|im_end|>'),
    ('eos_token_id', [1, None]),
  ],
)
def test_config_that_the_block_cannot_represent(tmp_path, key, value):
  folder = model_files.hugging_face(tmp_path / 'a', **{key: value})
  if key == 'eos_token_id':
    wrong = value[-1] if isinstance(value, list) else value
    model_files.refused(folder, f'token id {wrong} is not an integer', 'eos')
  else:
    model_files.refused(folder, key, json.dumps(value))


@pytest.mark.parametrize('cfg', [model_files.CFG, model_files.LLAMA3])
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
  for key in model_files.LLAMA3_ROPE:
    if key == 'rope_type':
      continue
    rope = {k: v for k, v in model_files.LLAMA3_ROPE.items() if k != key}
    raw = hf_config.write(model_files.CFG) | {'rope_parameters': rope}
    with pytest.raises(errors.InputError, match=f'{key} is missing'):
      hf_config.read(raw, 'f')


@pytest.mark.parametrize(
  'key', ['hidden_size', 'num_hidden_layers', 'vocab_size']
)
def test_config_with_a_key_missing(tmp_path, key):
  model_files.refused(
    model_files.hugging_face(tmp_path / 'a', **{key: None}), key, 'missing'
  )


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
  folder = model_files.hugging_face(tmp_path / 'a')
  edit_tensors(folder, edit)
  model_files.refused(folder, K_PROJ.removesuffix('weight'), *parts)


@pytest.mark.parametrize(
  'prefix, remedy',
  [
    ('_orig_mod.', 'save model._orig_mod'),
    ('module.', 'save model.module'),
    ('base_model.model.', 'merge_and_unload'),
  ],
)
def test_a_model_saved_inside_a_wrapper(tmp_path, prefix, remedy):
  folder = model_files.hugging_face(tmp_path / 'a')

  def wrap(tensors):
    for name in list(tensors):
      tensors[prefix + name] = tensors.pop(name)

  edit_tensors(folder, wrap)
  model_files.refused(folder, prefix.split('.')[0], remedy)


@pytest.mark.parametrize('whole', [True, False])
def test_an_adapter_is_no_model(tmp_path, whole):
  """Also one that was saved into the folder of its model."""
  folder = model_files.hugging_face(tmp_path / 'a')
  (folder / 'adapter_config.json').write_text('{"peft_type": "LORA"}')
  if not whole:
    (folder / 'config.json').unlink()
    shutil.move(
      folder / 'model.safetensors', folder / 'adapter_model.safetensors'
    )
  model_files.refused(folder, 'adapter', 'merge_and_unload')


def test_safetensors_without_a_tensor(tmp_path):
  folder = model_files.hugging_face(tmp_path / 'a')
  edit_tensors(folder, dict.clear)
  model_files.refused(folder, 'missing')


def test_leftovers_that_transformers_ignores_are_ignored(tmp_path):
  folder = model_files.hugging_face(tmp_path / 'a')
  angles = 'model.layers.0.self_attn.rotary_emb.inv_freq'
  head, embed = 'lm_head.weight', 'model.embed_tokens.weight'
  edit_tensors(folder, lambda t: t.update({angles: np.ones(8), head: t[embed]}))
  assert model_files.same(
    sources.load(folder, model_files.CACHE).params,
    model_files.random_params(model_files.CFG),
  )
  edit_tensors(folder, lambda t: t.update({head: 2 * t[embed]}))
  model_files.refused(folder, head)


def test_truncated_safetensors(tmp_path):
  folder = model_files.hugging_face(tmp_path / 'a')
  whole = (folder / 'model.safetensors').read_bytes()
  for size in [0, 4, 8, 100, *range(1000, len(whole), 20_000), len(whole) - 1]:
    (folder / 'model.safetensors').write_bytes(whole[:size])
    model_files.refused(folder, 'model.safetensors', 'fetch it again')


def test_safetensors_header_that_lies(tmp_path):
  folder = model_files.hugging_face(tmp_path / 'a')
  path = folder / 'model.safetensors'
  whole = path.read_bytes()
  assert whole.count(b'[64,96]') == 2 and b'[320,64]' in whole
  for old, new in ((b'[320,64]', b'[640,64]'), (b'[64,96]', b'[96,64]')):
    path.write_bytes(whole.replace(old, new))
    model_files.refused(
      folder, 'model.safetensors' if old[1:4] == b'320' else (96, 64)
    )
  path.write_bytes(b'\xff' * 8 + whole[8:])
  model_files.refused(folder, 'model.safetensors')


def test_index_that_points_out_of_the_folder(tmp_path):
  folder = model_files.hugging_face(tmp_path / 'a', shards=2)
  index = folder / 'model.safetensors.index.json'
  index.write_text(json.dumps({'weight_map': {'x': '../b.safetensors'}}))
  model_files.refused(folder, '../b.safetensors')


def test_tokenizer_that_does_not_fit(tmp_path):
  folder = model_files.hugging_face(tmp_path / 'a')
  model_files.bpe(400).save(str(folder / 'tokenizer.json'))
  model_files.refused(folder, 399, 320)
  (folder / 'tokenizer.json').write_text('{}')
  model_files.refused(folder, 'tokenizer.json')
  (folder / 'tokenizer.json').unlink()
  model_files.refused(folder, 'tokenizer.json', 'missing')
