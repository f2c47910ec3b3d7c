"""The class that exported folders carry: our function, as transformers runs it.

Against our own forward pass with masks, and against the classes of transformers
with the same weights.
"""

import dataclasses
import shutil
import sys

import jax.numpy as jnp
import numpy as np
import pytest

from effllm_jax import hf_folder
from effllm_jax import hf_trimmed
from effllm_jax import sources
from effllm_jax import structure
from effllm_jax import weights
from effllm_jax import widths
from tests import conftest
from tests import model_files

torch = pytest.importorskip('torch', reason='the class is for PyTorch')
transformers = pytest.importorskip('transformers', reason='opens the folder')
modeling_effllm = pytest.importorskip('effllm_jax.modeling_effllm')

CFG = dataclasses.replace(model_files.CFG, N=4, K=3)


def ragged(cfg, seed=0, no_heads=(), no_ffn=()) -> structure.Groups:
  """Random masks with a whole stem; some layers lose a block."""
  masks = conftest.make_masks(cfg, seed)
  return masks.replace(
    heads=masks.heads.at[jnp.array(no_heads, int)].set(False),
    ffn=masks.ffn.at[jnp.array(no_ffn, int)].set(False),
    stem=jnp.ones_like(masks.stem),
  )


UNTIED = dataclasses.replace(
  CFG, D=60, G=1, tied=False, qkv_bias=True, qk_norm=True,
  rope_scaling=structure.RopeScaling(8.0, 1.0, 4.0, 16),
)  # fmt: skip
# Architecture, layers without heads, layers without feed-forward.
SHAPES = {
  'gqa-tied': (CFG, (), ()),
  'mha-untied': (UNTIED, (), (2,)),
  'first-without-heads': (CFG, (0,), (2,)),
  'layer-without-both': (UNTIED, (1, 3), (1,)),
  'no-heads-at-all': (CFG, (0, 1, 2, 3), ()),
}


def make(name) -> weights.Source:
  cfg, no_heads, no_ffn = SHAPES[name]
  return model_files.finished(
    cfg, model_files.random_params(cfg), ragged(cfg, 0, no_heads, no_ffn)
  )


def write_folder(made, folder):
  """What an export consists of."""
  model_files.write_trimmed(made, folder, dtype='float32')
  shutil.copy(hf_trimmed.MODELING, folder)
  return folder


@pytest.fixture(name='opened')
def _opened(tmp_path, monkeypatch):
  """Opens a model from a folder as a user does; code is copied to a cache."""
  monkeypatch.setattr(
    transformers.dynamic_module_utils,
    'HF_MODULES_CACHE',
    str(tmp_path / 'modules'),
  )

  def open_(made):
    return transformers.AutoModelForCausalLM.from_pretrained(
      write_folder(made, tmp_path / 'out'), trust_remote_code=True
    ).eval()

  return open_


def logits(torch_model, tokens, **kwargs):
  with torch.no_grad():
    return torch_model(torch.tensor(tokens), **kwargs).logits.numpy()


def generate(torch_model, tokens, **kwargs):
  """Sixteen greedy tokens that no end of text cuts short."""
  kwargs = {'attention_mask': torch.ones(tokens.shape, dtype=int)} | kwargs
  out = torch_model.generate(
    torch.tensor(tokens), max_new_tokens=16, do_sample=False,
    eos_token_id=None, pad_token_id=0, **kwargs,
  )  # fmt: skip
  return out[:, tokens.shape[1] :].tolist()


@pytest.mark.parametrize('name', SHAPES)
def test_folder_is_the_masked_model(opened, name):
  made = make(name)
  cfg = made.cfg
  have = opened(made)
  assert type(have).__name__ == 'EffllmForCausalLM'
  # Exactly what is alive, and no norm of a block that is gone.
  live = widths.of_layers(made.masks)
  blocks = sum(k > 0 for kind in live.values() for k in kind)
  attentions = sum(k > 0 for k in live['heads'])
  assert have.num_parameters() == (
    cfg.D * ((1 if cfg.tied else 2) * cfg.V + 1 + blocks)
    + sum(live['heads']) * (cfg.D * cfg.head_rows() + cfg.head_biases())
    + sum(live['ffn']) * 3 * cfg.D
    + attentions * cfg.norm_scales() // cfg.N
  )
  tied = have.lm_head.weight is have.model.embed_tokens.weight
  assert tied == cfg.tied

  tokens = np.asarray(conftest.make_tokens(cfg, length=40))
  want, _ = conftest.forward(made.params, made.masks, tokens, cfg)
  np.testing.assert_allclose(logits(have, tokens), want, atol=1e-4)
  # Each token is the most likely one after what stands before it.
  new = generate(have, tokens)
  whole = np.concatenate([tokens, new], 1)
  likely = logits(have, whole).argmax(-1)[:, tokens.shape[1] - 1 : -1]
  assert new == likely.tolist() == generate(have, tokens, use_cache=False)
  for _ in range(2):
    assert new == generate(have, tokens, cache_implementation='static')
  # Beams reorder the cache.
  beams = [
    generate(have, tokens, num_beams=3, use_cache=cache)
    for cache in (True, False)
  ]
  assert beams[0] == beams[1]


@pytest.mark.parametrize('name', ['gqa-tied', 'layer-without-both'])
def test_what_was_trained_further_in_pytorch_is_a_source(
  opened, name, tmp_path
):
  made = make(name)
  have = opened(made)
  tokens = np.asarray(conftest.make_tokens(made.cfg, length=40))
  ids = torch.tensor(tokens).long()
  have.train()(ids, labels=ids).loss.backward()
  torch.optim.SGD(have.parameters(), 0.1).step()
  folder = tmp_path / 'again'
  have.eval().save_pretrained(folder)
  hf_folder.write_tokenizer(made, folder)
  found = sources.load(folder, model_files.CACHE)
  assert widths.of_layers(found.masks) == widths.of_layers(made.masks)
  mine, _ = conftest.forward(found.params, found.masks, tokens, found.cfg)
  np.testing.assert_allclose(mine, logits(have, tokens), atol=1e-4)
  before, _ = conftest.forward(made.params, made.masks, tokens, made.cfg)
  assert np.abs(mine - before).max() > 0.01


def test_cache_grows_by_chunks(opened):
  made = make('first-without-heads')
  have = opened(made)
  tokens = np.asarray(conftest.make_tokens(made.cfg, length=24))
  want = logits(have, tokens)
  static = transformers.StaticCache(config=have.config, max_cache_len=40)
  for cache in (None, static):
    parts = []
    for part in np.split(tokens, [7, 8, 9, 20], 1):
      with torch.no_grad():
        out = have(torch.tensor(part), past_key_values=cache, use_cache=True)
      cache = out.past_key_values
      parts.append(out.logits.numpy())
    np.testing.assert_allclose(np.concatenate(parts, 1), want, atol=1e-4)
    assert cache.get_seq_length() == 24
  last = logits(have, tokens, logits_to_keep=2)
  np.testing.assert_allclose(last, want[:, -2:], atol=1e-5)


@pytest.mark.parametrize('name', ['gqa-tied', 'first-without-heads'])
@pytest.mark.parametrize('cache', ['dynamic', 'static'])
def test_a_prompt_that_is_read_by_chunks_goes_on_the_same(opened, name, cache):
  made = make(name)
  have = opened(made)
  tokens = np.asarray(conftest.make_tokens(made.cfg, length=24))
  mask = torch.ones(tokens.shape, dtype=int)
  mask[0, :6] = 0
  want = generate(have, tokens, attention_mask=mask)
  for chunk in (5, 24):
    assert want == generate(
      have,
      tokens,
      attention_mask=mask,
      cache_implementation=cache,
      prefill_chunk_size=chunk,
    )


def test_who_does_not_ask_gets_a_cache_outside_training(opened):
  """A loop by hand goes on from it; it is no prediction."""
  made = make('first-without-heads')
  have = opened(made)
  tokens = torch.tensor(np.asarray(conftest.make_tokens(made.cfg, length=8)))
  want = generate(have, tokens.numpy())
  new, cache = [tokens], None
  with torch.no_grad():
    for _ in range(16):
      out = have(new[-1], past_key_values=cache)
      cache = out.past_key_values
      new.append(out.logits[:, -1:].argmax(-1))
    assert torch.cat(new[1:], 1).tolist() == want
    off = have(tokens, use_cache=False)
    training = have.train()(tokens)
  assert off.past_key_values is None and training.past_key_values is None
  # As a trainer joins what is no prediction.
  ignored = have.config.keys_to_ignore_at_inference + ['loss']  # noqa: RUF005
  assert [k for k in out if k not in ignored] == ['logits']


def test_padding_changes_nothing(opened):
  made = make('first-without-heads')
  have = opened(made)
  short = np.asarray(conftest.make_tokens(made.cfg, batch=1, length=9))
  long = np.asarray(conftest.make_tokens(made.cfg, batch=1, length=20, seed=1))
  # As in models made by transformers: without attention biases its keys are 0.
  with torch.no_grad():
    have.model.embed_tokens.weight[0] = 0
  padded = np.concatenate([np.pad(short, ((0, 0), (11, 0))), long])
  mask = torch.ones(2, 20, dtype=int)
  mask[0, :11] = 0
  both = logits(have, padded, attention_mask=mask)
  assert np.isfinite(both).all()
  np.testing.assert_allclose(both[:1, 11:], logits(have, short), atol=1e-4)
  np.testing.assert_allclose(both[1:], logits(have, long), atol=1e-4)
  apart = [*generate(have, short), *generate(have, long)]
  for cache in ('dynamic', 'static'):
    assert apart == generate(
      have, padded, attention_mask=mask, cache_implementation=cache
    )
  # On the other side, as for training, with a loss that leaves it out.
  mask, labels = mask.flip(1), torch.tensor(padded).long()
  padded[0] = np.pad(short, ((0, 0), (0, 11)))
  labels[0] = torch.as_tensor(padded[0]).masked_fill(mask[0] == 0, -100)
  with torch.no_grad():
    out = have(torch.as_tensor(padded), attention_mask=mask, labels=labels)
  np.testing.assert_allclose(out.logits[:1, :9], logits(have, short), atol=1e-4)
  losses = [
    torch.nn.functional.cross_entropy(
      torch.tensor(logits(have, x)[0, :-1]),
      torch.tensor(x[0, 1:]).long(),
      reduction='none',
    )
    for x in (short, long)
  ]
  np.testing.assert_allclose(out.loss, torch.cat(losses).mean(), rtol=1e-4)


def test_attention_has_a_mask_only_where_it_needs_one(opened, monkeypatch):
  """Without one it reads half as much; what comes out is the same."""
  made = make('first-without-heads')
  have = opened(made)
  tokens = np.asarray(conftest.make_tokens(made.cfg, length=24))
  ones = torch.ones(tokens.shape, dtype=int)
  hole = ones.clone()
  hole[0, :5] = 0
  seen, attend = set(), torch.nn.functional.scaled_dot_product_attention

  def recorded(q, k, v, mask, **kwargs):
    seen.add((q.shape[2], mask is not None))
    return attend(q, k, v, mask, **kwargs)

  monkeypatch.setattr(
    torch.nn.functional, 'scaled_dot_product_attention', recorded
  )

  def masked(run, *args, **kwargs):
    seen.clear()
    return run(have, *args, **kwargs), seen.copy()

  for mask in (None, ones):
    plain, how = masked(logits, tokens, attention_mask=mask)
    assert how == {(24, False)}
  new, how = masked(generate, tokens, attention_mask=ones)
  assert how == {(24, False), (1, False)}
  _, how = masked(generate, tokens, attention_mask=hole)
  assert how == {(24, True), (1, True)}
  # A second chunk is neither first nor one token.
  cache = transformers.DynamicCache()
  masked(logits, tokens[:, :20], past_key_values=cache)
  last, how = masked(logits, tokens[:, 20:], past_key_values=cache)
  assert how == {(4, True)}
  np.testing.assert_allclose(last, plain[:, 20:], atol=1e-4)

  module = sys.modules[type(have).__module__]
  monkeypatch.setattr(module, 'unmasked', lambda *_: False)
  want, how = masked(logits, tokens, attention_mask=ones)
  assert how == {(24, True)}
  np.testing.assert_allclose(plain, want, atol=1e-5)
  assert new == generate(have, tokens, attention_mask=ones)


def test_packed_sequences_do_not_see_each_other(opened):
  made = make('first-without-heads')
  have = opened(made)
  a, b = (np.asarray(conftest.make_tokens(made.cfg, 2, n)) for n in (9, 15))
  alone = np.concatenate([logits(have, a), logits(have, b)], 1)
  for batch in (1, 2):
    rows = torch.tensor(np.tile(np.r_[:9, :15], (batch, 1)))
    both = logits(have, np.concatenate([a, b], 1), position_ids=rows)
    np.testing.assert_allclose(both, alone, atol=1e-4)


def test_checkpointed_gradients_are_the_same(opened):
  made = make('first-without-heads')
  have = opened(made).train()
  tokens = torch.tensor(np.asarray(conftest.make_tokens(made.cfg, length=24)))

  def gradients(**kwargs):
    have.zero_grad()
    have(tokens, labels=tokens.long(), **kwargs).loss.backward()
    return {k: p.grad.numpy().copy() for k, p in have.named_parameters()}

  want = gradients()
  assert all((x != 0).any() for x in want.values())
  for reentrant in (True, False):
    have.gradient_checkpointing_enable({'use_reentrant': reentrant})
    runs, layer = [], have.model.layers[1].mlp.gate_proj
    hook = layer.register_forward_hook(lambda *_, runs=runs: runs.append(1))
    for kwargs in ({}, {'use_cache': True}):
      found = gradients(**kwargs)
      for name, gradient in want.items():
        np.testing.assert_allclose(found[name], gradient, rtol=1e-5, atol=1e-6)
    hook.remove()
    assert len(runs) == 4  # Each forward pass twice.
  with pytest.raises(ValueError, match='give none, or call grad'):
    have(tokens, past_key_values=transformers.DynamicCache())
  # Without a gradient nothing runs twice, and the cache may stay.
  new = generate(have, tokens.numpy())
  assert new == generate(have.eval(), tokens.numpy())


def test_saved_again_it_opens_again(opened, tmp_path):
  have = opened(make('first-without-heads'))
  have.save_pretrained(tmp_path / 'again')
  again = transformers.AutoModelForCausalLM.from_pretrained(
    tmp_path / 'again', trust_remote_code=True
  )
  tokens = np.arange(30)[None]
  np.testing.assert_array_equal(logits(again, tokens), logits(have, tokens))
  half = transformers.AutoModelForCausalLM.from_pretrained(
    tmp_path / 'again', trust_remote_code=True, dtype=torch.bfloat16
  )
  assert half.lm_head.weight.dtype == torch.bfloat16
  with torch.no_grad():
    rounded = half(torch.tensor(tokens)).logits.float().numpy()
  full = logits(have, tokens)
  assert 0 < np.abs(rounded - full).max() < 0.1 * np.abs(full).max()


LLAMA3 = {
  'rope_type': 'llama3', 'rope_theta': 5e4, 'factor': 8.0,
  'low_freq_factor': 1.0, 'high_freq_factor': 4.0,
  'original_max_position_embeddings': 64,
}  # fmt: skip
DEFAULT = {'rope_type': 'default', 'rope_theta': 5e4}
# Class of transformers -> rotary parameters, and what it has beyond Llama.
STOCK = {
  'Llama': (LLAMA3, {}),
  'Qwen2': (DEFAULT, {'attention_bias': True}),
  'Qwen3': (DEFAULT, {'qk_norm': True}),
}


@pytest.mark.parametrize('name', STOCK)
def test_stock_classes_with_the_same_weights(name):
  rope, extra = STOCK[name]
  sizes = dict(
    vocab_size=320, hidden_size=64, head_dim=16, rms_norm_eps=1e-5,
    max_position_embeddings=512, tie_word_embeddings=False,
  )  # fmt: skip
  torch.manual_seed(0)
  config = getattr(transformers, f'{name}Config')(
    **sizes, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
    intermediate_size=96, rope_parameters=rope,
    # What transformers 4 reads instead.
    rope_theta=rope['rope_theta'],
    rope_scaling=None if rope is DEFAULT else rope,
  )  # fmt: skip
  stock = getattr(transformers, f'{name}ForCausalLM')(config).eval()
  for parameter in stock.parameters():
    torch.nn.init.normal_(parameter, std=0.15)
  config = modeling_effllm.EffllmConfig(
    **sizes, num_key_value_groups=2, num_key_value_heads_per_layer=[2] * 3,
    intermediate_size_per_layer=[96] * 3, rope_parameters=rope, **extra,
  )  # fmt: skip
  ours = modeling_effllm.EffllmForCausalLM(config).eval()
  ours.load_state_dict(stock.state_dict())
  tokens = np.asarray(conftest.make_tokens(CFG, length=200))
  want = logits(stock, tokens)
  assert want.std() > 0.1
  np.testing.assert_allclose(logits(ours, tokens), want, atol=1e-4)
  assert generate(ours, tokens) == generate(stock, tokens)
  with torch.no_grad():
    outs = [
      m(torch.tensor(tokens), labels=torch.tensor(tokens).long(), **kwargs)
      for kwargs in (
        {'output_hidden_states': True, 'return_dict': False},
        {'use_cache': False, 'return_dict': False},
      )
      for m in (stock, ours)
    ]
    kept = ours(torch.tensor(tokens), logits_to_keep=torch.tensor([3, 7]))
  assert [len(x) for x in outs] == [4, 4, 2, 2]
  for a, b in zip(outs[0][-1], outs[1][-1], strict=True):
    np.testing.assert_allclose(b, a, atol=1e-4)
  np.testing.assert_allclose(outs[1][0], outs[0][0], rtol=1e-4)
  np.testing.assert_allclose(kept.logits, want[:, [3, 7]], atol=1e-4)
  assert kept.hidden_states is None
  # Two sequences in a row of one batch, one in that of the other.
  rows = np.stack([np.r_[:80, 5:125], np.r_[:200]])
  kwargs = {'position_ids': torch.tensor(rows), 'use_cache': False}
  want = logits(stock, tokens, **kwargs)
  np.testing.assert_allclose(logits(ours, tokens, **kwargs), want, atol=1e-4)


def test_what_a_config_does_not_say_is_what_its_class_means():
  live = {
    'num_key_value_heads_per_layer': [2, 1],
    'intermediate_size_per_layer': [8, 0],
  }
  sizes = {
    'hidden_size': 64, 'vocab_size': 320, 'max_position_embeddings': 512,
  }  # fmt: skip
  cfg, _ = hf_trimmed.read_config(live | sizes, 'config.json')
  want = modeling_effllm.EffllmConfig(**live, **sizes)
  said = {
    'H': want.head_dim, 'G': want.num_key_value_groups,
    'norm_eps': want.rms_norm_eps, 'tied': want.tie_word_embeddings,
    'qkv_bias': want.attention_bias, 'qk_norm': want.qk_norm,
    'rope_theta': want.rope_parameters['rope_theta'], 'rope_scaling': None,
  }  # fmt: skip
  assert {k: getattr(cfg, k) for k in said} == said
  assert want.rope_parameters['rope_type'] == 'default'


def test_config_says_what_a_block_has():
  cfg = dataclasses.replace(
    UNTIED, tied=True, rope_scaling=structure.RopeScaling(8.0, 1.0, 4.0, 64)
  )
  made = model_files.finished(
    cfg, model_files.random_params(cfg), ragged(cfg, 0, (1,), (2,))
  )
  config = hf_trimmed.config(made)
  assert config['rope_parameters'] == LLAMA3
  torch_model = modeling_effllm.EffllmForCausalLM(
    modeling_effllm.EffllmConfig(**config)
  )
  want = {k: tuple(x.shape) for k, x in torch_model.state_dict().items()}
  del want['lm_head.weight']
  have = {k: x.shape for k, x in hf_trimmed.tensors(made)}
  assert have == want
  assert 'model.layers.0.self_attn.q_proj.bias' in have
  assert 'model.layers.0.self_attn.k_norm.weight' in have
  assert not [k for k in have if k.startswith('model.layers.1.self_attn')]
