"""Exports: PyTorch computes the same, or nothing is left behind."""

import dataclasses
import json
import os
import pathlib
import re
import resource
import subprocess
import sys

import grain
import jax
import numpy as np
import pytest
import tokenizers

from effllm_jax import accounting
from effllm_jax import agreement
from effllm_jax import bpe
from effllm_jax import calibration
from effllm_jax import checkpoint_writer
from effllm_jax import errors
from effllm_jax import export
from effllm_jax import formats
from effllm_jax import gguf_source
from effllm_jax import hf_config
from effllm_jax import hf_folder
from effllm_jax import llama_cpp
from effllm_jax import model
from effllm_jax import model_card
from effllm_jax import optimizers
from effllm_jax import runlog
from effllm_jax import sources
from effllm_jax import state as state_lib
from effllm_jax import structure
from effllm_jax import weights
from effllm_jax import widths
from tests import conftest
from tests import model_files

CFG = model_files.CFG
# 60 channels are no multiple of 4 * 2 heads of queries.
SHAPES = {
  'LlamaForCausalLM': CFG,
  'MistralForCausalLM': dataclasses.replace(CFG, D=60, G=4, tied=False),
}


@pytest.fixture(scope='module', name='tokenizer_folder')
def _tokenizer_folder(tmp_path_factory):
  tmp = tmp_path_factory.mktemp('source')
  path = model_files.write_gguf(tmp / 'toy.gguf')
  source = sources.load(path, model_files.CACHE, params=False)
  return sources.save(source, tmp / 'saved')


@pytest.fixture(name='reference')
def _reference():
  pytest.importorskip('torch', reason='an export is checked in PyTorch')
  return pytest.importorskip('transformers', reason='opens the export')


def made(step=7, **config):
  """A record of a run of one row."""
  columns = ('step', 'tokens', 'live_params', 'array_params')
  train = dict(zip(columns, (step, 10 * step, 900, 1000), strict=True))
  return model_card.Made(
    step=step,
    params=900,
    pruning={'step': step, 'events': []},
    run=runlog.Run(
      workdir=pathlib.Path('runs', 'run'),
      config=config,
      source={},
      train={k: np.array([v], float) for k, v in train.items()},
      evals=[],
      shrinks=[],
      prune_tokens=np.zeros(0),
      removed={},
    ),
  )


def finished_model(folder, cfg=CFG, params=None, masks=None):
  """A source with weights, as `finished.read` gives it."""
  return dataclasses.replace(
    sources.load_saved(folder),
    params=model_files.random_params(cfg) if params is None else params,
    masks=widths.whole(masks, cfg),
    cfg=cfg,
  )


def run(
  out, folder, cfg=CFG, params=None, masks=None, formats=('hf',), **settings
):
  settings = {'made': made()} | settings
  return export.write(
    finished_model(folder, cfg, params, masks), out, formats, **settings
  )


def refuse(kind, match, tmp_path, folder, out=None):
  """An export that fails and leaves nothing in its place or beside it."""
  before = sorted(tmp_path.rglob('*'))
  with pytest.raises(kind, match=match) as caught:
    run(tmp_path / 'out' if out is None else out, folder)
  assert '\n' not in str(caught.value)
  assert sorted(tmp_path.rglob('*')) == before


def test_a_file_has_the_name_of_what_is_in_it(tmp_path, tokenizer_folder):
  run(tmp_path / 'out', tokenizer_folder, formats=('gguf-f32',))
  fields = gguf_source.contents(tmp_path / 'out' / 'model-f32.gguf')[0]
  source = sources.load_saved(tokenizer_folder)
  assert fields['general.name'] == f'{source.name}, pruned to 900 parameters'
  about = f'Pruned from {source.description} by pruning-aware pretraining'
  assert fields['general.description'].startswith(about)


@pytest.mark.parametrize('context', [agreement.NEW_TOKENS, 8])
def test_a_context_may_be_short(tmp_path, tokenizer_folder, context):
  """No longer than the tokens that a check goes on with."""
  pytest.importorskip('torch', reason='requirements-torch.txt')
  cfg = dataclasses.replace(CFG, context=context)
  report = run(tmp_path / 'out', tokenizer_folder, cfg)
  assert report.agreements['hf'].greedy


@pytest.mark.parametrize('architecture', SHAPES)
def test_opens_as_a_stock_class(
  tmp_path, tokenizer_folder, reference, architecture
):
  cfg = SHAPES[architecture]
  params = model_files.random_params(cfg)
  out = tmp_path / 'new' / 'out'
  report = run(out, tokenizer_folder, cfg)

  assert report.path == out
  assert report.params == cfg.num_params() and report.padding == 0
  agreed = report.agreements['hf']
  assert 0 <= agreed.relative < 1e-4 and agreed.greedy
  assert {p.name for p in out.iterdir()} == {
    'config.json', 'generation_config.json', 'model.safetensors',
    'pruning.json', 'tokenizer.json', 'tokenizer_config.json', 'README.md',
  }  # fmt: skip
  for name, size in report.files.items():
    assert (out / name).stat().st_size == size
  assert report.files['model.safetensors'] > 4 * cfg.num_params()
  assert len({p.stat().st_mode for p in out.iterdir()}) == 1
  assert [p.name for p in out.parent.iterdir()] == ['out']
  pruning = json.loads((out / 'pruning.json').read_text())
  assert pruning['step'] == 7 and pruning['source']['name'] == 'toy.gguf'

  # What transformers opens, not what the export says about itself.
  opened = reference.AutoModelForCausalLM.from_pretrained(out)
  assert type(opened).__name__ == architecture
  assert opened.num_parameters() == cfg.num_params()
  assert opened.generation_config.eos_token_id in (1, [1])
  tokens = np.random.default_rng(0).integers(0, cfg.V, (2, 40))
  import torch

  with torch.no_grad():
    have = opened(torch.tensor(tokens)).logits.numpy()
  want, _ = model.forward(params, structure.all_alive(cfg), tokens, cfg)
  assert have.std() > 0.5
  np.testing.assert_allclose(have, want, atol=1e-3)

  # And it is a source again.
  again = sources.load(out, model_files.CACHE)
  assert again.cfg == cfg and model_files.same(again.params, params)
  saved = sources.load_saved(tokenizer_folder)
  for key in ('separator_id', 'bos_id', 'eos_ids', 'pad_id', 'chat_template'):
    assert getattr(again, key) == getattr(saved, key)


def test_end_of_text_does_not_cut_the_comparison(
  tmp_path, tokenizer_folder, reference
):
  saved = sources.load_saved(tokenizer_folder)
  everything = dataclasses.replace(saved, eos_ids=tuple(range(CFG.V)))
  folder = sources.save(everything, tmp_path / 'saved')
  assert run(tmp_path / 'out', folder).agreements['hf'].greedy


def swap_heads(views):
  """Exchanges the key heads of the first layer."""

  def swapped(params, names):
    for name, view in views(params, names):
      yield name, (
        np.roll(view, CFG.H, 0) if name.endswith('0.self_attn.k_proj.weight')
        else view
      )  # fmt: skip

  return swapped


def test_wrong_weights_are_not_kept(
  tmp_path, tokenizer_folder, reference, monkeypatch
):
  monkeypatch.setattr(weights, 'views', swap_heads(weights.views))
  refuse(RuntimeError, r'differs.*not kept', tmp_path, tokenizer_folder)
  # The greedy tokens notice by themselves.
  only = agreement.Level(greedy=True)
  monkeypatch.setitem(agreement.LEVELS, 'f32', only)
  refuse(RuntimeError, r'greedy.*not kept', tmp_path, tokenizer_folder)


@pytest.mark.parametrize(
  'change',
  [{'rms_norm_eps': 0.1}, {'rope_theta': 1e4, 'rope_parameters': None}],
)
def test_wrong_config_is_not_kept(
  tmp_path, tokenizer_folder, reference, monkeypatch, change
):
  wrong = hf_config.write(CFG) | change
  monkeypatch.setattr(hf_config, 'write', lambda cfg: wrong)
  refuse(RuntimeError, r'differs.*not kept', tmp_path, tokenizer_folder)


def test_wrong_tokenizer_is_not_kept(
  tmp_path, tokenizer_folder, reference, monkeypatch
):
  saved = sources.load_saved(tokenizer_folder)
  saved.tokenizer.normalizer = tokenizers.normalizers.Lowercase()
  write = hf_folder.write_tokenizer
  monkeypatch.setattr(
    hf_folder,
    'write_tokenizer',
    lambda _, folder: write(saved, folder),
  )
  match = r"tokenizer.* splits 'The lighthouse a.*not kept"
  refuse(errors.InputError, match, tmp_path, tokenizer_folder)


def qwens(composed=True):
  """As the tokenizer of Qwen2, or as a GGUF file has it: not composed."""
  parts = json.loads(model_files.bpe().to_str())['model']
  merges = [' '.join(x) for x in parts['merges']]
  kinds = [3, 3] + [1] * (CFG.V - 2)
  built = bpe.tokenizer([*parts['vocab']], kinds, merges, 'qwen2', None, 'x')
  if composed:
    built.normalizer = tokenizers.normalizers.NFC()
  return built


@pytest.mark.parametrize(
  'kind, make',
  [
    ('TokenizersBackend', model_files.bpe),
    ('TokenizersBackend', model_files.sentencepiece),
    ('TokenizersBackend', lambda: qwens(composed=False)),
    ('Qwen2Tokenizer', qwens),
  ],
  ids=['smollm', 'sentencepiece', 'gguf', 'own'],
)
def test_a_qwen2_model_may_have_any_tokenizer(
  tmp_path, tokenizer_folder, reference, kind, make
):
  """transformers 5 gives such a model Qwen's, unless the folder says more."""
  saved = dataclasses.replace(
    sources.load_saved(tokenizer_folder), tokenizer=make()
  )
  folder, out = sources.save(saved, tmp_path / 'saved'), tmp_path / 'out'
  run(out, folder, model_files.QWEN2)
  own = out / 'tokenization_effllm.py'
  assert own.exists() == (kind != 'Qwen2Tokenizer')
  text = 'def f(x):\n    return x  # nai\u0308ve \u00ef\n\n\n  1000<|im_end|>'
  ids = make().encode(text).ids
  auto = reference.AutoTokenizer
  if int(reference.__version__.partition('.')[0]) > 4:
    assert type(auto.from_pretrained(out)).__name__ == kind
  for trust in (None, False, True):
    opened = auto.from_pretrained(out, trust_remote_code=trust)
    assert opened(text)['input_ids'] == ids
  again = sources.load(out, model_files.CACHE, params=False)
  assert again.tokenizer.encode(text).ids == ids


def test_a_tokenizer_that_transformers_takes_for_another_is_told(
  tmp_path, tokenizer_folder, reference, monkeypatch
):
  if int(reference.__version__.partition('.')[0]) < 5:
    pytest.skip('transformers 4 reads tokenizer.json as it is')
  monkeypatch.setattr(bpe, 'is_qwen2', lambda _: True)
  with pytest.raises(errors.InputError) as caught:
    run(tmp_path / 'out', tokenizer_folder, model_files.QWEN2)
  (line,) = str(caught.value).splitlines()
  assert "as Qwen2Tokenizer, which splits 'i\\u0308ve'" in line, line
  assert '; set --formats=hf-trimmed' in line
  assert not (tmp_path / 'out').exists()


def test_target_that_cannot_be_written(tmp_path, tokenizer_folder, reference):
  (tmp_path / 'full').mkdir()
  (tmp_path / 'full' / 'precious').touch()
  for out, match in (
    (tmp_path / 'full', 'not empty'),
    (tmp_path / 'full' / 'precious', 'not empty'),
    (tmp_path / 'full' / 'precious' / 'out', 'cannot write'),
  ):
    refuse(errors.InputError, match, tmp_path, tokenizer_folder, out)
  (tmp_path / 'empty').mkdir()
  run(tmp_path / 'empty', tokenizer_folder)
  assert (tmp_path / 'empty' / 'config.json').is_file()


def test_disk_that_runs_full(tmp_path, tokenizer_folder, reference):
  # A limit on the size of a file fails as a full disk does, in mid-write.
  soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
  try:
    refuse(errors.InputError, 'cannot write', tmp_path, tokenizer_folder)
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


DEAD = {
  'stem': lambda m: m.replace(stem=m.stem.at[3].set(False)),
  # A slot that no layer uses is not padding.
  'heads': lambda m: m.replace(heads=m.heads.at[:, 0].set(False)),
  'ffn': lambda m: m.replace(ffn=m.ffn.at[0, 3].set(False).at[1, 5].set(False)),
}


@pytest.mark.parametrize('name', DEAD)
def test_what_a_shrink_takes_out_is_not_exported(
  tmp_path, tokenizer_folder, name
):
  masks = DEAD[name](structure.all_alive(CFG))
  with pytest.raises(ValueError, match='shrink'):
    run(tmp_path / 'out', tokenizer_folder, masks=masks)
  assert not (tmp_path / 'out').exists()


# Three key/value heads; the stem is and is not a multiple of the query heads.
RAGGED = {
  'LlamaForCausalLM': dataclasses.replace(CFG, D=60, N=4, K=3),
  'MistralForCausalLM': dataclasses.replace(CFG, N=4, K=3, tied=False),
}


def ragged(cfg, seed=0):
  """Masks of which layer 0 is whole, 1 has no heads, 2 no feed-forward."""
  masks = conftest.make_masks(cfg, seed)
  return masks.replace(
    heads=masks.heads.at[0].set(True).at[1].set(False),
    ffn=masks.ffn.at[0].set(True).at[2].set(False),
    stem=jax.numpy.ones_like(masks.stem),
  )


@pytest.mark.parametrize('architecture', RAGGED)
def test_layers_of_different_widths(
  tmp_path, tokenizer_folder, reference, architecture
):
  cfg = RAGGED[architecture]
  params, masks = model_files.random_params(cfg), ragged(cfg)
  out = tmp_path / 'out'
  report = run(out, tokenizer_folder, cfg, params, masks=masks)
  assert 0 <= report.agreements['hf'].relative < 1e-4

  # What a stock class computes from the file, against the masked model.
  opened = reference.AutoModelForCausalLM.from_pretrained(out)
  assert type(opened).__name__ == architecture
  tokens = np.random.default_rng(0).integers(0, cfg.V, (2, 40))
  import torch

  with torch.no_grad():
    have = opened(torch.tensor(tokens)).logits.numpy()
  want, _ = model.forward(params, masks, tokens, cfg)
  dense, _ = model.forward(params, structure.all_alive(cfg), tokens, cfg)
  np.testing.assert_allclose(have, want, atol=1e-3)
  assert np.abs(want - dense).max() > 1

  # Nothing dead is in the file, and everything alive is as it was.
  saved = sources.load(out, model_files.CACHE).params
  dead = 0

  def check(letters, leaf, kept):
    nonlocal dead
    alive = conftest.alive_entries(letters, leaf.shape, masks)
    np.testing.assert_array_equal(kept, np.where(alive, leaf, 0))
    assert (leaf != 0).all()
    dead += (~alive).sum()

  structure.map_axes(check, params, saved)
  assert report.padding == dead
  widths = json.loads((out / 'pruning.json').read_text())['layer_widths']
  assert widths['heads'] == np.asarray(masks.heads).sum(-1).tolist()
  assert widths['ffn'] == np.asarray(masks.ffn).sum(-1).tolist()
  assert widths['heads'][:2] == [3, 0] and widths['ffn'][2] == 0


# Opens every folder and keeps what it answers beside it.
OPEN = """
import sys
import numpy as np
import torch
import transformers

print(transformers.__version__)
for folder in sys.argv[2:]:
  model = transformers.AutoModelForCausalLM.from_pretrained(
    folder, trust_remote_code=True
  )
  tokens = torch.tensor(np.load(sys.argv[1]))
  with torch.no_grad():
    np.save(folder + '.npy', model(tokens).logits.numpy())
  found = [
    model.generate(
      tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=8,
      do_sample=False, pad_token_id=0, cache_implementation=cache,
    ).tolist()
    for cache in (None, 'static', 'static')
  ]
  assert found[0] == found[1] == found[2], folder
  tokenizer = transformers.AutoTokenizer.from_pretrained(
    folder, trust_remote_code=True
  )
  print(tokenizer('A line.')['input_ids'])
  inputs = tokenizer('A line.', return_tensors='pt')
  model.generate(**inputs, max_new_tokens=2, pad_token_id=0)
"""


@pytest.mark.skipif(
  'EFFLLM_OLDER_TRANSFORMERS' not in os.environ,
  reason='EFFLLM_OLDER_TRANSFORMERS names no folder with transformers 4.57',
)
def test_opens_in_an_older_transformers(tmp_path, tokenizer_folder, reference):
  """Which reads other keys for the rotary embedding than the newest."""
  untied = RAGGED['MistralForCausalLM']
  cases = {
    'llama': (CFG, 'hf'),
    'mistral': (SHAPES['MistralForCausalLM'], 'hf'),
    'qwen2': (model_files.QWEN2, 'hf'),
    'qwen3': (model_files.QWEN3, 'hf'),
    'llama3': (model_files.LLAMA3, 'hf'),
    'zeros': (untied, 'hf'),
    'trimmed': (untied, 'hf-trimmed'),
  }
  tokens = np.random.default_rng(0).integers(0, CFG.V, (2, 40))
  np.save(tmp_path / 'tokens.npy', tokens)
  wants, folders = {}, [str(tmp_path / name) for name in cases]
  for name, (cfg, kind) in cases.items():
    params = model_files.random_params(cfg)
    masks = ragged(cfg) if cfg is untied else structure.all_alive(cfg)
    run(tmp_path / name, tokenizer_folder, cfg, params, masks, (kind,))
    wants[name], _ = model.forward(params, masks, tokens, cfg)
  done = subprocess.run(
    [sys.executable, '-c', OPEN, tmp_path / 'tokens.npy', *folders],
    env=os.environ
    | {
      'PYTHONPATH': os.environ['EFFLLM_OLDER_TRANSFORMERS'],
      'HF_HOME': str(tmp_path / 'home'),
    },
    capture_output=True,
    text=True,
    check=True,
  )
  version, *ids = done.stdout.splitlines()
  assert version.startswith('4.') and version != reference.__version__
  saved = sources.load_saved(tokenizer_folder)
  want = saved.tokenizer.encode('A line.', add_special_tokens=False).ids
  assert ids == [str(want)] * len(cases)
  for name, want in wants.items():
    have = np.load(tmp_path / f'{name}.npy')
    np.testing.assert_allclose(have, want, atol=1e-3, err_msg=name)


def test_odd_widths_are_told_and_padded(tmp_path, tokenizer_folder, reference):
  cfg = dataclasses.replace(CFG, D=60, F=90)
  odd = run(tmp_path / 'odd', tokenizer_folder, cfg)
  (note,) = odd.notes
  assert 'stem 60; ffn 90' in note and '196 against 299' in note
  assert '\n' not in note

  out, how = tmp_path / 'even', made()
  how.run.edge.update(step=7, pad=64, machine='a padded phone', rows=[])
  even = run(out, tokenizer_folder, cfg, pad=64, made=how)
  assert even.notes == [] and even.agreements['hf'].greedy
  again = sources.load(out, model_files.CACHE)
  assert (again.cfg.D, again.cfg.F) == (64, 128)
  added = again.cfg.num_params() - cfg.num_params()
  assert f'--pad=64 adds {added:,} zeros' in note
  assert (even.params, even.padding) == (cfg.num_params(), added)
  pruning = json.loads((out / 'pruning.json').read_text())
  assert pruning['pad'] == 64
  # As many as `origin` has slots for.
  assert pruning['layer_widths']['ffn'] == [90] * cfg.N
  card = (out / 'README.md').read_text()
  assert 'a padded phone' in card
  assert re.search(r'ffn channels .* 128, filled up to multiples of 64 ', card)
  assert re.search(r'stem width .* 64, filled up to multiples of 64 ', card)


@pytest.mark.parametrize(
  ('link', 'told'),
  [(None, []), ('https://a.b/LICENSE', []), ('LICENSE.txt', ['LICENSE.txt'])],
)
def test_a_licence_that_lies_beside_the_source_is_told(
  tmp_path, tokenizer_folder, monkeypatch, link, told
):
  monkeypatch.setattr(llama_cpp, 'available', lambda: False)
  names = {'licence': 'other', 'licence_link': link}
  model = dataclasses.replace(finished_model(tokenizer_folder), **names)
  report = export.write(model, tmp_path / 'out', ('gguf-f32',), made())
  notes = [note for note in report.notes if 'licence' in note]
  assert [note.split()[3] for note in notes] == told
  card = (report.path / 'README.md').read_text()
  assert (f'license_link: "{link}"' in card) == bool(link)


def test_files_about_a_licence_go_where_the_weights_go(
  tmp_path, tokenizer_folder, monkeypatch
):
  monkeypatch.setattr(llama_cpp, 'available', lambda: False)
  files = {'LICENSE.txt': 'All\r\nof it, \N{COPYRIGHT SIGN}', 'NOTICE': ''}
  model = dataclasses.replace(
    finished_model(tokenizer_folder),
    licence='other', licence_link='LICENSE.txt', licence_files=files,
  )  # fmt: skip
  report = export.write(model, tmp_path / 'out', ('gguf-f32',), made())
  assert not [note for note in report.notes if 'licence' in note]
  for name, text in files.items():
    assert (report.path / name).read_bytes() == text.encode()
  assert {*files} < {*report.files}


@pytest.mark.parametrize(
  ('formats', 'match'),
  [
    ((), 'is not known'),
    (('hf', 'gguf-q3_k'), "'gguf-q3_k' is not known.*gguf-q8_0"),
    (('hf', 'hf-trimmed'), 'two --out'),
  ],
)
def test_formats_that_make_no_sense(tmp_path, tokenizer_folder, formats, match):
  with pytest.raises(errors.InputError, match=match):
    run(tmp_path / 'out', tokenizer_folder, formats=formats)
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize('block', [False, True])
def test_what_gguf_cannot_hold_is_told_before_anything_is_written(
  tmp_path, tokenizer_folder, monkeypatch, block
):
  """By a tokenizer as TinyLlama's, or by its block."""
  cfg = dataclasses.replace(CFG, qk_norm=block, qkv_bias=block)
  made_of = finished_model(tokenizer_folder, cfg)
  if not block:
    pieces = model_files.bpe()
    pieces.normalizer = tokenizers.normalizers.Prepend('\u2581')
    pieces.pre_tokenizer = None
    made_of = dataclasses.replace(made_of, tokenizer=pieces)
  monkeypatch.setattr(formats, 'write', lambda *_: pytest.fail('written'))
  with pytest.raises(errors.InputError, match='; choose formats without'):
    export.write(made_of, tmp_path / 'out', ('hf', 'gguf-q8_0'), made())
  assert not list(tmp_path.iterdir())


def test_a_runtime_that_cannot_keep_its_copy(
  tmp_path, tokenizer_folder, reference, monkeypatch
):
  monkeypatch.setattr(
    reference.dynamic_module_utils, 'HF_MODULES_CACHE', '/dev/null/modules'
  )
  with pytest.raises(errors.InputError, match=r'cannot open .* HF_HOME'):
    run(tmp_path / 'out', tokenizer_folder, formats=('hf-trimmed',))
  assert not list(tmp_path.iterdir())


def test_several_formats_in_one_folder(
  tmp_path, tokenizer_folder, reference, monkeypatch
):
  pytest.importorskip('xllamacpp', reason='the runtime')
  # transformers asks whether to run the modelling file, if nobody has said so.
  monkeypatch.setattr('builtins.input', lambda text: pytest.fail(text))
  cfg = RAGGED['LlamaForCausalLM']
  params, masks = model_files.random_params(cfg), ragged(cfg)
  said = []
  report = run(
    tmp_path / 'out', tokenizer_folder, cfg, params, masks,
    ('hf-trimmed', 'gguf-f32', 'gguf-f16'), say=said.append,
  )  # fmt: skip
  assert all(report.agreements.values()) and len(said) == 3
  # As small as the model: 4 bytes a weight, and the header.
  trimmed = report.files['model.safetensors'] - 4 * report.params
  assert 0 < trimmed < 20_000
  assert report.files['model-f16.gguf'] < report.files['model-f32.gguf']
  opened = reference.AutoModelForCausalLM.from_pretrained(
    report.path, trust_remote_code=True
  )
  assert type(opened).__name__ == 'EffllmForCausalLM'
  assert report.params == opened.num_parameters() + 2 * cfg.D


def test_without_llama_cpp_a_file_is_read_back(
  tmp_path, tokenizer_folder, monkeypatch
):
  monkeypatch.setattr(llama_cpp, 'xllamacpp', None)
  report = run(tmp_path / 'out', tokenizer_folder, formats=('gguf-q8_0',))
  assert report.agreements == {'gguf-q8_0': None}
  assert 'llama.cpp was not asked' in report.notes[-1]
  assert set(report.files) == {'model-q8_0.gguf', 'pruning.json'}


def test_no_layer_has_heads(tmp_path, tokenizer_folder, reference):
  cfg = dataclasses.replace(CFG, K=1)
  masks = structure.all_alive(cfg)
  masks = masks.replace(heads=jax.numpy.zeros_like(masks.heads))
  report = run(tmp_path / 'out', tokenizer_folder, cfg, masks=masks)
  assert report.padding == cfg.N * cfg.D * cfg.head_rows()


def test_live_weights_under_a_wrong_mask_are_not_kept(
  tmp_path, tokenizer_folder, reference, monkeypatch
):
  cfg = RAGGED['LlamaForCausalLM']
  monkeypatch.setattr(widths, 'filled', lambda params, masks: params)
  with pytest.raises(RuntimeError, match=r'differs.*not kept'):
    run(tmp_path / 'out', tokenizer_folder, cfg, masks=ragged(cfg))
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
  ('name', 'package'), [('onnx', 'onnxscript'), ('executorch', 'executorch')]
)
def test_a_missing_package_is_told_before_anything_is_written(
  tmp_path, tokenizer_folder, monkeypatch, name, package
):
  if name == 'onnx':
    pytest.importorskip('onnxruntime')  # Or that one is told.
  monkeypatch.setitem(sys.modules, package, None)
  monkeypatch.setattr(formats, 'write', lambda *_: pytest.fail('written'))
  with pytest.raises(errors.InputError, match=rf'{package}.*; pip install'):
    run(tmp_path / 'out', tokenizer_folder, formats=('gguf-f32', name))
  assert not list(tmp_path.iterdir())


def test_without_torch(tmp_path, tokenizer_folder, monkeypatch):
  monkeypatch.setitem(sys.modules, 'torch', None)
  refuse(
    errors.InputError, r'torch.*requirements-torch\.txt', tmp_path,
    tokenizer_folder,
  )  # fmt: skip


def test_smollm2(tmp_path, reference):
  source = sources.load('smollm2-135m', model_files.CACHE)
  folder = sources.save(source, tmp_path / 'source')
  out = tmp_path / 'out'
  report = run(out, folder, source.cfg, source.params)
  assert report.agreements['hf'].greedy and report.params == 134_515_008
  tokenizer = reference.AutoTokenizer.from_pretrained(out)
  for text, ids in model_files.LLAMA_CPP.items():
    assert tokenizer(text)['input_ids'] == [int(i) for i in ids.split()]
  assert tokenizer.eos_token == '<|im_end|>'
  chat = tokenizer.apply_chat_template(
    [{'role': 'user', 'content': 'Hi'}], tokenize=False
  )
  assert chat.endswith('<|im_start|>user\nHi<|im_end|>\n')


def write_checkpoint(workdir, tokenizer_folder, edit):
  """A run's folder after step 5; `edit` makes the masks. Params and masks."""
  source = sources.load_saved(tokenizer_folder)
  sources.save(source, workdir / 'source')
  tx = optimizers.optimizer(lambda _: 1e-2, 0.9, 0.95, 0.1, 1.0)
  params = jax.tree.map(jax.numpy.asarray, model_files.random_params(CFG))
  state = state_lib.fresh_state(params, CFG, tx)
  masks = edit(state.prune.masks)
  prune = state.prune.replace(masks=masks)
  state = state.replace(step=jax.numpy.int32(5), prune=prune)
  writer = checkpoint_writer.Writer(workdir, keep=1)
  data = iter(grain.MapDataset.range(9).to_iter_dataset())
  writer.save(state, CFG, data, 0, {}, calibration.Calibration(0.5).record)
  writer.close()
  per_type = dict.fromkeys(structure.TYPES, 0.5)
  row = dict.fromkeys(
    ('loss', 'seconds', 'tokens_per_second', 'live_cost', 'target_cost',
     'compile_seconds', 'data_seconds'), 1.0
  ) | {
    'kind': 'train', 'step': 5, 'tokens': 50, 'live_params': 900,
    'array_params': 1000, 'widths': per_type, 'price': per_type,
    'pruned': per_type, 'flops': dict.fromkeys(accounting.PURPOSES, 1),
  }  # fmt: skip
  (workdir / 'metrics.jsonl').write_text(json.dumps(row) + '\n')
  (workdir / 'config.json').write_text('{}')
  return params, masks


def exported(tmp_path, tokenizer_folder, edit):
  """Exports by the command, to tmp_path / 'out', and compares the logits.

  Returns the finished command, the model as it is read back, pruning.json.
  """
  workdir, out = tmp_path / 'run', tmp_path / 'out'
  params, masks = write_checkpoint(workdir, tokenizer_folder, edit)
  done = conftest.command('export', f'--workdir={workdir}', f'--out={out}')
  assert done.returncode == 0, done.stderr
  small = sources.load(out, model_files.CACHE)
  tokens = np.arange(40)[None]
  want, _ = model.forward(params, masks, tokens, CFG)
  have, _ = model.forward(
    small.params, structure.all_alive(small.cfg), tokens, small.cfg
  )
  np.testing.assert_allclose(have, want, atol=1e-3)
  return done, small, json.loads((out / 'pruning.json').read_text())


def test_command_takes_out_what_is_masked(
  tmp_path, tokenizer_folder, reference
):
  done, small, pruning = exported(
    tmp_path,
    tokenizer_folder,
    lambda m: m.replace(
      heads=m.heads.at[:, 0].set(False), ffn=m.ffn.at[:, 80:].set(False)
    ),
  )
  workdir, out = tmp_path / 'run', tmp_path / 'out'
  assert str(out) in done.stdout and 'model.safetensors' in done.stdout
  assert (small.cfg.K, small.cfg.F, small.cfg.D) == (1, 80, 64)
  assert pruning['origin']['heads'] == [[1], [1]] and pruning['step'] == 5

  again = conftest.command('export', f'--workdir={workdir}', f'--out={out}')
  assert again.returncode == 2
  assert again.stderr.strip().count('\n') == 0 and 'not empty' in again.stderr


def test_command_fills_up_narrower_layers(
  tmp_path, tokenizer_folder, reference
):
  done, small, pruning = exported(
    tmp_path,
    tokenizer_folder,
    lambda m: m.replace(
      heads=m.heads.at[0].set(False).at[1, 0].set(False),
      ffn=m.ffn.at[0, 80:].set(False).at[1, :90].set(False),
      stem=m.stem.at[5].set(False),
    ),
  )
  assert (small.cfg.K, small.cfg.F, small.cfg.D) == (1, 80, 63)
  padding = 63 * (small.cfg.head_rows() + 3 * (80 - 6))
  lines = [' '.join(x.split()) for x in done.stdout.splitlines()]
  assert f'zeros beside them, hf {padding:,}' in lines
  assert f'parameters {small.cfg.num_params() - padding:,}' in lines
  assert pruning['layer_widths'] == {'heads': [0, 1], 'ffn': [80, 6]}
  assert pruning['widths'] == {'heads': 1, 'ffn': 80, 'stem': 63}
  assert pruning['origin']['heads'] == [[-1], [1]]
  wide, narrow = pruning['origin']['ffn']
  assert sorted(wide) == list(range(80))
  assert sorted(narrow[:6]) == list(range(90, 96)) and narrow[6:] == [-1] * 74
  assert sorted(pruning['origin']['stem']) == [x for x in range(64) if x != 5]


def test_command_leaves_out_a_layer_that_lost_both_blocks(
  tmp_path, tokenizer_folder, reference
):
  done, small, pruning = exported(
    tmp_path,
    tokenizer_folder,
    lambda m: m.replace(
      heads=m.heads.at[0].set(False), ffn=m.ffn.at[0].set(False)
    ),
  )
  assert (small.cfg.N, small.cfg.K, small.cfg.F) == (1, CFG.K, CFG.F)
  lines = [' '.join(x.split()) for x in done.stdout.splitlines()]
  assert 'zeros beside them, hf 0' in lines
  assert f'parameters {small.cfg.num_params():,}' in lines
  assert pruning['layers'] == [1]
  assert pruning['layer_widths'] == {'heads': [CFG.K], 'ffn': [CFG.F]}
  assert pruning['origin']['heads'] == [list(range(CFG.K))]
  card = (tmp_path / 'out' / 'README.md').read_text()
  assert re.search(r'^\| layers +\| +1 \|$', card, re.MULTILINE)
