"""GGUF files: llama.cpp computes the same, or the check says so."""

import ctypes
import dataclasses
import json
import resource

import gguf
import jax
import numpy as np
import pytest
import tokenizers

from effllm_jax import agreement
from effllm_jax import bpe
from effllm_jax import budgets
from effllm_jax import finished
from effllm_jax import formats
from effllm_jax import gguf_export
from effllm_jax import gguf_layout
from effllm_jax import gguf_source
from effllm_jax import llama_cpp
from effllm_jax import structure
from effllm_jax import weights
from effllm_jax import widths
from tests import conftest
from tests import model_files

refuses = model_files.refuses

needs_llama_cpp = pytest.mark.skipif(
  llama_cpp.available() is None, reason='xllamacpp is not installed'
)
CFG = model_files.CFG
CFGS = {
  'gqa-tied': CFG,
  'mha-untied': dataclasses.replace(CFG, K=4, G=1, tied=False),
}
NASTY = (
  "  I'LL  don't\r\n\r\n\tx=1,000.50;y=3e-10 ½Ⅳ٣ naïve e\u0301 日本語 🤷🏽"
  '<|im_end|><|endoftext|>\n   \n  '
)


def source(cfg=CFG, masks=None, **changes) -> weights.Source:
  fields = dict(
    name='toy', description='A toy', licence='mit', sha256='0', dtype='F32',
    cfg=cfg, separator_id=0, bos_id=None, eos_ids=(1,), pad_id=0,
    chat_template='{{ messages }}', tokenizer=model_files.bpe(),
    params=model_files.random_params(cfg), masks=masks,
  )  # fmt: skip
  return weights.Source(**fields | changes)


def masks_of(cfg, heads, ffn, seed=0):
  """So many live groups in each layer, at random places."""
  rng = np.random.default_rng(seed)

  def rows(counts, width):
    return np.stack([rng.permutation(width) < count for count in counts])

  return structure.Groups(
    heads=rows(heads, cfg.K), ffn=rows(ffn, cfg.F), stem=np.ones(cfg.D, bool)
  )


def both(model, path, format='f32'):
  """Writes and reads back; what was written, and what llama.cpp makes of it."""
  written = gguf_export.write(model, path, format)
  gguf_export.read_back(model, path, format)
  if not llama_cpp.available():
    return written, None
  want = agreement.answers(model)
  return written, gguf_export.check(model, path, format, want)


def architecture_of(path):
  """What a file calls its model, in llama.cpp's words."""
  return gguf_source.contents(path)[0]['general.architecture']


def bits_per_weight(path):
  tensors = gguf.GGUFReader(path).tensors
  return (
    8 * sum(t.n_bytes for t in tensors) / sum(t.n_elements for t in tensors)
  )


# What the reader of sources makes of a file.


@pytest.mark.parametrize('name', CFGS)
def test_is_a_source_again(tmp_path, name, monkeypatch):
  monkeypatch.setattr(llama_cpp, 'available', lambda: None)
  model = source(CFGS[name])
  path = tmp_path / 'new' / 'a.gguf'
  written, _ = both(model, path)
  assert written.fell_back == () and written.padding == 0
  assert architecture_of(path) == 'llama' and bits_per_weight(path) == 32
  again = gguf_source.read(path, params=True)
  assert again.cfg == model.cfg
  assert model_files.same(again.params, model.params)
  assert again.description == 'toy, F32 GGUF'
  for key in (
    'licence', 'separator_id', 'bos_id', 'eos_ids', 'pad_id', 'chat_template',
  ):  # fmt: skip
    assert getattr(again, key) == getattr(model, key), key
  assert again.tokenizer.encode(NASTY).ids == model.tokenizer.encode(NASTY).ids
  assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize('licence', ['other', 'mit'])
def test_what_another_licence_is_called(tmp_path, monkeypatch, licence):
  monkeypatch.setattr(llama_cpp, 'available', lambda: None)
  names = {'licence_name': 'llama3.2', 'licence_link': 'https://a.b/c'}
  both(source(licence=licence, **names), tmp_path / 'a.gguf')
  again = gguf_source.read(tmp_path / 'a.gguf', params=False)
  assert again.licence == licence
  for key, value in names.items():
    assert getattr(again, key) == (value if licence == 'other' else None)


def test_a_uniform_pruned_model_is_a_narrower_llama(tmp_path, monkeypatch):
  monkeypatch.setattr(llama_cpp, 'available', lambda: None)
  cfg = dataclasses.replace(CFG, N=3, K=3)
  model = finished.tight(source(cfg, masks_of(cfg, [2, 2, 0], [64, 64, 0])))
  both(model, tmp_path / 'a.gguf')
  assert architecture_of(tmp_path / 'a.gguf') == 'llama'
  again = gguf_source.read(tmp_path / 'a.gguf', params=True)
  # The layer that lost both blocks is not there.
  assert (again.cfg.N, again.cfg.K, again.cfg.F) == (2, 2, 64)
  tokens = np.arange(40)[None]
  want, _ = conftest.forward(model.params, model.masks, tokens, model.cfg)
  have, _ = conftest.forward(
    again.params, structure.all_alive(again.cfg), tokens, again.cfg
  )
  conftest.check_close(have, want, 1e-4, 1e-3)


# llama.cpp.

RAGGED = {
  'middle without heads': ([3, 0, 1, 2], [96, 32, 64, 64]),
  'middle without ffn': ([3, 1, 3, 2], [96, 0, 64, 31]),
  'last without ffn': ([1, 2, 3, 3], [96, 64, 64, 0]),
  'last without both': ([1, 2, 3, 0], [96, 64, 64, 0]),
  'first without heads': ([0, 2, 0, 1], [32, 64, 96, 64]),
  'first without both': ([0, 0, 2, 1], [0, 64, 96, 64]),
  'no heads, ffn in one': ([0, 0, 0, 0], [0, 0, 96, 0]),
  'nothing': ([0, 0, 0, 0], [0, 0, 0, 0]),
}


OTHERS = {
  # Rows of q that are not as many as the stem is wide, which qwen2 refuses.
  'qwen2': ('llama', dataclasses.replace(model_files.QWEN2, H=24, tied=False)),
  'qwen3': ('qwen3', model_files.QWEN3),
  'llama3': ('llama', model_files.LLAMA3),
}


@needs_llama_cpp
@pytest.mark.parametrize('name', OTHERS)
def test_blocks_with_biases_norms_and_scaling(tmp_path, name):
  architecture, cfg = OTHERS[name]
  _, agreed = both(source(cfg), tmp_path / 'a.gguf')
  assert architecture_of(tmp_path / 'a.gguf') == architecture
  assert agreed.greedy and agreed.relative < 1e-4
  again = gguf_source.read(tmp_path / 'a.gguf', params=True)
  assert again.cfg == cfg
  assert model_files.same(again.params, source(cfg).params)


@needs_llama_cpp
@pytest.mark.parametrize(
  'change', [{'qkv_bias': True}, {'qk_norm': True, 'tied': False}]
)
def test_ragged_layers_with_biases_or_norms(tmp_path, change):
  cfg = dataclasses.replace(CFG, N=4, K=3, **change)
  masks = masks_of(cfg, [0, 3, 0, 1], [96, 64, 0, 64])
  model = finished.tight(source(cfg, masks))
  written, agreed = both(model, tmp_path / 'a.gguf')
  assert agreed.greedy and agreed.relative < 1e-4
  architecture = architecture_of(tmp_path / 'a.gguf')
  if cfg.qkv_bias:
    assert (architecture, written.padding) == ('deci', 0)
  else:
    assert architecture == 'qwen3'
    # Three heads and 96 channels in the three layers that are left; the first
    # has a zero head either way.
    heads, ffn = (3 - 1) + 0 + 2, 0 + 32 + 32
    assert written.padding == cfg.D * (heads * cfg.head_rows() + 3 * ffn)


def test_norms_next_to_biases(tmp_path):
  cfg = dataclasses.replace(CFG, qkv_bias=True, qk_norm=True)
  path = tmp_path / 'a.gguf'
  refuses('norms of q and k', gguf_export.write, source(cfg), path, 'f32')


@needs_llama_cpp
@pytest.mark.parametrize('name', CFGS)
def test_llama_cpp_computes_the_same(tmp_path, name):
  # `check` raises at the level of the format; greedy tokens through the cache.
  _, agreed = both(source(CFGS[name]), tmp_path / 'a.gguf')
  assert agreed.greedy and agreed.relative < 1e-4


@needs_llama_cpp
@pytest.mark.parametrize('name', RAGGED)
def test_layers_of_different_widths(tmp_path, name):
  heads, ffn = RAGGED[name]
  group = dict(K=3, G=2) if len(name) % 2 else dict(K=3, G=1, tied=False)
  cfg = dataclasses.replace(CFG, N=4, **group)
  model = finished.tight(source(cfg, masks_of(cfg, heads, ffn)))
  _, agreed = both(model, tmp_path / 'a.gguf')
  assert agreed.greedy and agreed.relative < 1e-4
  plain = len({*zip(heads, ffn, strict=True)} - {(0, 0)}) <= 1
  architecture = architecture_of(tmp_path / 'a.gguf')
  assert architecture == ('llama' if plain else 'deci')
  # As small as what is alive, up to what llama.cpp cannot do without.
  alive = sum(
    conftest.alive_entries(letters, leaf.shape, model.masks).sum()
    for letters, leaf in zip(
      jax.tree.leaves(structure.axes(cfg)),
      jax.tree.leaves(model.params),
      strict=True,
    )
  )
  least = cfg.head_rows() + 3 * 32 * model.cfg.N
  numbers = sum(
    t.n_elements for t in gguf.GGUFReader(tmp_path / 'a.gguf').tensors
  )
  assert numbers <= alive + cfg.D * least


@needs_llama_cpp
@pytest.mark.parametrize('ragged', [False, True])
@pytest.mark.parametrize(
  'format, bits', [('f16', 16), ('q8_0', 8.5), ('q4_0', 4.5)]
)
def test_formats(tmp_path, format, bits, ragged):
  cfg = dataclasses.replace(CFG, N=3, H=32, tied=False)
  masks = masks_of(cfg, [2, 0, 1], [96, 64, 0]) if ragged else None
  written, agreed = both(source(cfg, masks), tmp_path / 'a.gguf', format)
  assert agreed.kl < 0.02 and written.fell_back == ()
  kinds = {
    t.name: t.tensor_type.name
    for t in gguf.GGUFReader(tmp_path / 'a.gguf').tensors
  }
  output = kinds.pop('output.weight')
  assert output == ('Q8_0' if format == 'q4_0' else format.upper())
  for kind_name, kind in kinds.items():
    assert kind == ('F32' if 'norm' in kind_name else format.upper())
  assert bits < bits_per_weight(tmp_path / 'a.gguf') < 1.25 * bits


@pytest.mark.parametrize('format', gguf_layout.TYPES)
@pytest.mark.parametrize('tied', [True, False])
def test_budget_in_bytes_is_that_of_the_tensors(tmp_path, format, tied):
  cfg = dataclasses.replace(CFG, N=3, H=32, F=96, tied=tied, qkv_bias=True)
  masks = masks_of(cfg, [2, 1, 2], [96, 64, 32])
  path = tmp_path / 'a.gguf'
  gguf_export.write(source(cfg, masks), path, format)
  stored = sum(int(t.n_bytes) for t in gguf.GGUFReader(path).tensors)
  cost = budgets.stored_bytes(cfg, format)
  assert cost.reported(cost.live(masks)) == stored


def test_rows_without_blocks_are_reported(tmp_path):
  cfg = dataclasses.replace(CFG, F=90)
  written = gguf_export.write(source(cfg), tmp_path / 'a.gguf', 'q4_0')
  assert written.fell_back == tuple(
    f'blk.{n}.ffn_down.weight' for n in range(2)
  )


def test_what_pad_does_not_fill_up_is_not_promised(tmp_path):
  """Rows of the output of attention are heads long, not stem or ffn."""
  for cfg, told in (
    (dataclasses.replace(CFG, F=90), True),
    (dataclasses.replace(CFG, H=20, K=1), False),
  ):
    (note,) = formats.write(source(cfg), 'gguf-q8_0', tmp_path)
    assert 'stay in F16' in note and ('--pad=64' in note) == told


@needs_llama_cpp
def test_vocabulary_with_rows_to_spare_and_bos(tmp_path):
  cfg = dataclasses.replace(CFG, V=352)
  tokenizer = model_files.bpe()
  tokenizer.add_tokens([tokenizers.AddedToken('<tool>', normalized=False)])
  tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
    single='<|endoftext|> $A', special_tokens=[('<|endoftext|>', 0)]
  )
  model = source(cfg, bos_id=0, eos_ids=(1, 0), tokenizer=tokenizer)
  both(model, tmp_path / 'a.gguf')
  text = NASTY + '<tool> tool'
  want = tokenizer.encode(text).ids
  assert want[0] == 0 and 320 in want
  assert llama_cpp.tokenize(tmp_path / 'a.gguf', text) == want
  again = gguf_source.read(tmp_path / 'a.gguf', params=False)
  assert (again.bos_id, again.eos_ids, again.cfg.V) == (0, (1, 0), 352)
  fields = gguf.GGUFReader(tmp_path / 'a.gguf').fields
  kinds = fields['tokenizer.ggml.token_type'].contents()
  assert kinds == [3, 3] + 318 * [1] + [4] + 31 * [5]
  assert fields['tokenizer.ggml.tokens'].contents()[350] == '[PAD350]'


LLAMA_ENDS = ('<|end_of_text|>', '<|eom_id|>', '<|eot_id|>', '<stop>', '<halt>')


@pytest.mark.parametrize(
  'ends, own, places, homeless',
  [
    # Ids in the order of LLAMA_ENDS, the tokenizer's own, (eos, eot, eom).
    ([0, 1, 2], None, (0, 2, 1), ()),
    ([0, 1, 2], 2, (2, 2, 1), ()),
    ([0, 2], None, (0, 2, None), ()),
    ([0, 2, 3], None, (0, 2, 3), ()),
    # <|eom_id|> needs no place.
    ([0, 1, 2, 3], None, (0, 2, 3), ()),
    ([0, 3, 4], None, (0, 3, 4), ()),
    ([3, 2, 4, 5, 1], None, (3, 2, 4), ('token 325',)),
    ([3], None, (3, None, None), ()),
  ],
)
def test_ends_of_a_generation(tmp_path, ends, own, places, homeless):
  tokenizer = model_files.bpe()
  tokenizer.add_special_tokens(list(LLAMA_ENDS))
  # The last is a row that no token has.
  cfg = dataclasses.replace(CFG, V=326)
  at = lambda i: None if i is None else 320 + i
  model = source(
    cfg, tokenizer=tokenizer, eos_ids=tuple(map(at, ends)),
    tokenizer_eos_id=at(own),
  )  # fmt: skip
  path = tmp_path / 'a.gguf'
  written = gguf_export.write(model, path, 'f32')
  gguf_export.read_back(model, path, 'f32')
  fields, _ = gguf_source.contents(path)
  keys = [f'tokenizer.ggml.{x}_token_id' for x in ('eos', 'eot', 'eom')]
  assert [fields.get(x) for x in keys] == [at(i) for i in places]
  again = gguf_source.read(path, params=False)
  assert set(again.eos_ids) == {at(i) for i in places if i is not None}
  assert written.homeless_ends == homeless
  notes = formats._notes('a.gguf', written)
  assert len(notes) == len(homeless)
  assert all(x in notes[0] for x in homeless)
  if llama_cpp.available():
    assert ends_in_llama_cpp(path) >= {
      at(i) for i in ends if f'token {at(i)}' not in homeless
    }


def ends_in_llama_cpp(path):
  """The ids at which it ends a generation."""
  with llama_cpp._opened(path) as (lib, model):
    vocab = lib.llama_model_get_vocab(model)
    is_end = lib.llama_vocab_is_eog
    is_end.restype, is_end.argtypes = (
      ctypes.c_bool, (ctypes.c_void_p, ctypes.c_int32),
    )  # fmt: skip
    return {i for i in range(326) if is_end(vocab, i)}


RULES = {
  'gpt-2': json.loads(
    tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False).__getstate__()
  ),
  'smollm': json.loads(model_files.bpe().to_str())['pre_tokenizer'],
}


@needs_llama_cpp
@pytest.mark.parametrize('rule', ['gpt-2', 'smollm', 'llama-bpe', 'qwen2'])
def test_rule_of_words_is_that_of_llama_cpp(tmp_path, rule):
  parts = json.loads(model_files.bpe().to_str())
  model = parts['model']
  merges = [' '.join(m) for m in model['merges']]
  built = bpe.tokenizer(
    list(model['vocab']), [3, 3] + [1] * 318, merges, rule, None, 'x'
  )
  if rule in RULES:  # As somebody else writes it.
    parts['pre_tokenizer'] = RULES[rule]
    built = tokenizers.Tokenizer.from_str(json.dumps(parts))
  assert bpe.rule(built, 'x', 'y') == rule
  gguf_export.write(source(tokenizer=built), tmp_path / 'a.gguf', 'f32')
  assert (
    llama_cpp.tokenize(tmp_path / 'a.gguf', NASTY) == built.encode(NASTY).ids
  )


# What is refused.


def differs(model, path, match, format='f32'):
  with pytest.raises(RuntimeError, match=match) as caught:
    gguf_export.read_back(model, path, format)
  assert '\n' not in str(caught.value)


@pytest.mark.parametrize('ragged', [False, True])
def test_rows_in_the_wrong_order(tmp_path, monkeypatch, ragged):
  cfg = dataclasses.replace(CFG, N=2, K=3)
  masks = masks_of(cfg, [3, 2], [96, 96]) if ragged else None
  model = source(cfg, masks)
  monkeypatch.setattr(gguf_export, '_permute', lambda rows, heads: rows)
  gguf_export.write(model, tmp_path / 'a.gguf', 'f32')
  differs(model, tmp_path / 'a.gguf', r'attn_q.*other values.*not kept')


@needs_llama_cpp
@pytest.mark.parametrize('ragged', [False, True])
def test_llama_cpp_notices_the_wrong_order_by_itself(
  tmp_path, monkeypatch, ragged
):
  cfg = dataclasses.replace(CFG, N=4, K=3)
  masks = masks_of(cfg, [3, 2, 1, 3], [96, 96, 96, 96]) if ragged else None
  model = source(cfg, masks)
  monkeypatch.setattr(gguf_export, '_permute', lambda rows, heads: rows)
  monkeypatch.setattr(gguf_source, 'unpermute', lambda rows, heads: rows)
  with pytest.raises(RuntimeError, match=r'in llama\.cpp differs'):
    both(model, tmp_path / 'a.gguf')


def test_another_model_is_noticed(tmp_path):
  path = tmp_path / 'a.gguf'
  gguf_export.write(source(), path, 'f32')
  differs(source(), path, r'file_type', 'f16')
  other = source(params=model_files.random_params(CFG, 1))
  differs(other, path, r'token_embd.*other values')
  differs(source(dataclasses.replace(CFG, rope_theta=1e4)), path, 'freq_base')
  wider = dataclasses.replace(CFG, V=352)
  gguf_export.write(source(wider), path, 'f32')
  more = model_files.bpe()
  more.add_tokens(['lighthouse'])
  differs(source(wider, tokenizer=more), path, 'tokens')


def test_another_tokenizer_is_noticed(tmp_path):
  path = tmp_path / 'a.gguf'
  gguf_export.write(source(), path, 'f32')
  # It leaves out all merges, which GGUF cannot say.
  bare = model_files.bpe()
  bare.model.dropout = 1.0
  differs(source(tokenizer=bare), path, r'tokenizer gives.*not kept')


def test_truncated_file(tmp_path):
  path = tmp_path / 'a.gguf'
  gguf_export.write(source(), path, 'f32')
  whole = path.read_bytes()
  for end in (len(whole) // 2, 1000, 3):
    path.write_bytes(whole[:end])
    refuses('complete', gguf_export.read_back, source(), path, 'f32')
  path.unlink()
  refuses('complete', gguf_export.read_back, source(), path, 'f32')


def unknown_words(tokenizer):
  tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()


def lower_case(tokenizer):
  tokenizer.normalizer = tokenizers.normalizers.Lowercase()


def closing(tokenizer):
  tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
    single='$A <|im_end|>', special_tokens=[('<|im_end|>', 1)]
  )


def taking_in_spaces(tokenizer):
  end = tokenizers.AddedToken('<|im_end|>', rstrip=True)
  tokenizer.add_special_tokens([end])


def bytes_alone(tokenizer):
  alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
  tokenizer.model = tokenizers.models.BPE(
    vocab={token: i for i, token in enumerate(alphabet)}, merges=[]
  )


@pytest.mark.parametrize(
  'edit, match',
  [
    (bytes_alone, 'has no merges'),
    (unknown_words, 'gpt-2, smollm, llama-bpe, qwen2'),
    (lower_case, 'gpt-2, smollm, llama-bpe, qwen2'),
    (closing, 'post-processor'),
    (taking_in_spaces, "'<[|]im_end[|]>' is found by rstrip, "),
  ],
)
def test_tokenizer_that_gguf_has_no_words_for(tmp_path, edit, match):
  tokenizer = model_files.bpe()
  edit(tokenizer)
  model = source(tokenizer=tokenizer)
  refuses(match, gguf_export.write, model, tmp_path / 'a.gguf', 'f32')
  assert not list(tmp_path.iterdir())


def test_unknown_format_and_dead_stem(tmp_path):
  path = tmp_path / 'a.gguf'
  refuses('q3_k is not.*q4_0', gguf_export.write, source(), path, 'q3_k')
  masks = widths.whole(None, CFG)
  stem = np.arange(CFG.D) > 0
  with pytest.raises(ValueError, match='shrink'):
    gguf_export.write(source(masks=masks.replace(stem=stem)), path, 'f32')
  assert not list(tmp_path.iterdir())


def test_target_that_cannot_be_written(tmp_path):
  (tmp_path / 'file').touch()
  path = tmp_path / 'file' / 'a.gguf'
  refuses('cannot write', gguf_export.write, source(), path, 'f32')


@pytest.mark.parametrize('limit', [100, 200_000])
def test_disk_that_runs_full(tmp_path, limit):
  path = tmp_path / 'a.gguf'
  path.write_text('precious')
  # A limit on the size of a file fails as a full disk does, in mid-write.
  soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
  try:
    refuses('cannot write', gguf_export.write, source(), path, 'f32')
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
  assert path.read_text() == 'precious'
  assert list(tmp_path.iterdir()) == [path]
