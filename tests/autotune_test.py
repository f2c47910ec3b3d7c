import concurrent.futures
import dataclasses
import functools
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effllm_jax.kernels import autotune
from effllm_jax.kernels import bucket
from effllm_jax.kernels import forms
from effllm_jax.kernels import masked_attention
from effllm_jax.kernels import masked_matmul
from effllm_jax.kernels import pallas_tpu_attention as attention
from effllm_jax.kernels import xla_loop
from tests import kernels_test


@pytest.fixture(autouse=True)
def _forget():
  yield
  assert autotune.use(None) == 0


def slowest_first():
  """A clock on which every candidate is faster than the one before."""
  ticks = iter(range(100, 0, -1))
  return lambda call: next(ticks)


def test_the_fastest_is_stored_and_used(tmp_path, monkeypatch):
  sizes = (32, 256, 64)
  row = autotune.tune(
    'xla_loop', 'nn', *sizes, 'float32', 'n', timer=slowest_first()
  )
  best = xla_loop.candidates('nn', *sizes, 'float32')[-1]
  assert row['blocks'] == {'m': best.m, 'n': best.n, 'k': best.k}
  assert best != xla_loop.default_blocks('nn', *sizes, 'float32')
  path = tmp_path / 'deep' / 'blocks.json'
  autotune.store(path, [row])
  monkeypatch.setenv('HOME', str(tmp_path))
  assert autotune.use('~/deep/blocks.json') == autotune.use(path) == 1
  assert autotune.choice('xla_loop', 'nn', *sizes, 'float32') == best
  assert autotune.choice('xla_loop', 'nn', *sizes, 'bfloat16') is None
  assert autotune.choice('xla_loop', 'nt', *sizes, 'float32') is None
  # And the ops ask for it.
  seen = []
  product = xla_loop.product
  monkeypatch.setattr(
    xla_loop,
    'product',
    lambda *args: seen.append(args[-1]) or product(*args),
  )
  masked_matmul(
    jnp.ones((32, 64)), jnp.ones((64, 256)), keep_out=jnp.arange(256) < 9,
    implementation='xla_loop',
  )  # fmt: skip
  assert seen == [best]


def attend(T, K, H):
  """A block of attention by the kernels for a TPU, on this CPU."""
  rng = np.random.default_rng(0)
  shapes = (1, T, 32), (32, K, 1, H), (32, K, H), (32, K, H), (K, 1, H, 32)
  arrays = [
    jnp.asarray(rng.standard_normal(x) / 4, jnp.float32) for x in shapes
  ]
  run = lambda *arrays: masked_attention(
    *arrays, jnp.arange(K) < 1, jnp.ones((2, T, H // 2)),
    implementation='pallas_tpu',
  )  # fmt: skip
  out, pull = jax.vjp(run, *arrays)
  return out, *pull(out)


def test_every_kernel_of_attention_is_timed_and_used(tmp_path, monkeypatch):
  kernels_test.interpret(monkeypatch, 'pallas_tpu', True)
  seen, causal = [], attention.causal
  monkeypatch.setattr(
    attention,
    'causal',
    lambda q, k, v, live, blocks: (
      seen.append(blocks) or causal(q, k, v, live, blocks)
    ),
  )
  before = attend(260, 2, 8)
  assert seen.pop() == [None] * 3
  path, shape = tmp_path / 'blocks.json', (1, 260, 2, 1, 8)
  # All rows in one block, or in three.
  blocks = [attention.Blocks(384), attention.Blocks(128)]
  for i, form in enumerate(forms.ATTENTION):
    sizes = 260, 260, 8, 'float32'
    assert attention.candidates(form, *sizes) == blocks
    tune = functools.partial(
      autotune.tune_attention, 'pallas_tpu_attention', form, shape, 'float32'
    )
    row = tune(timer=slowest_first())
    # Other kernels have their defaults meanwhile.
    assert {x.pop(i) for x in seen} == {*blocks}
    assert seen == [[None, None]] * len(seen)
    seen.clear()
    autotune.store(path, [row])
  assert autotune.use(path) == 3
  after = attend(260, 2, 8)
  assert seen.pop() == [blocks[1]] * 3
  for x, want in zip(after, before, strict=True):
    np.testing.assert_allclose(x, want, rtol=1e-4, atol=1e-4)
  # Of another length, or with another width of heads, nothing is known.
  for T, H in ((259, 8), (260, 16)):
    for form in forms.ATTENTION:
      key = 'pallas_tpu_attention', form, T, T, H, 'float32'
      assert autotune.choice(*key) is None


def test_only_the_kernel_that_is_asked_for_is_timed(monkeypatch):
  """What is timed for a gradient: what it needs, and not the other one."""
  kernels_test.interpret(monkeypatch, 'pallas_tpu', True)
  texts = {}

  def lowered(call):
    many = call.func
    texts.setdefault(form, many.lower(*call.args).compile().as_text())
    return 1.0

  for form in forms.ATTENTION:
    autotune.tune_attention(
      'pallas_tpu_attention', form, (1, 8, 1, 1, 8), 'float32', lowered
    )
  found = {
    form: {x for x in ('forward', 'dq', 'dkv') if f'causal_{x}' in text}
    for form, text in texts.items()
  }
  assert found == {
    'forward': {'forward'},
    'dq': {'forward', 'dq'},
    'dkv': {'forward', 'dkv'},
  }


def test_what_is_timed_are_extents_at_which_chunks_do_not_end():
  """So that long chunks show what they waste."""
  chunks, widths = set(), []

  def timer(call):
    # A loop leaves zeros beyond the last chunk that it works on.
    widths.append(np.asarray(call()).any(axis=0).sum())
    return widths[-1] / 1e3

  row = autotune.tune('xla_loop', 'nn', 32, 256, 64, 'float32', 'n', timer)
  chunks = [
    blocks.n for blocks in xla_loop.candidates('nn', 32, 256, 64, 'float32')
  ]
  assert len({*chunks}) > 1
  want = [-(-x // c) * c for c in chunks for x in (77, 141, 205)]
  assert widths == want
  # Where time goes by width the shortest chunk is the best, by its mean.
  assert row['blocks']['n'] == min(chunks)
  least = [-(-x // min(chunks)) * min(chunks) for x in (77, 141, 205)]
  assert row['seconds'] == pytest.approx(np.mean(least) / 1e3)


@pytest.mark.parametrize(
  ('platform', 'waits', 'seconds'),
  [('cpu', [1], 0.011), ('gpu', [1, 2, 4, 8, 16], 0.026 / 16)],
)
def test_calls_are_timed_many_at_a_time(monkeypatch, platform, waits, seconds):
  """On an accelerator one wait for some 20 ms of them; not on a CPU."""
  now, queued, seen = [0.0], [], []

  def wait(_):
    seen.append(len(queued))
    # A millisecond a call, and ten to be told of the end.
    now[0] += 0.001 * len(queued) + 0.01
    queued.clear()

  monkeypatch.setattr(jax, 'default_backend', lambda: platform)
  monkeypatch.setattr(jax, 'block_until_ready', wait)
  monkeypatch.setattr(autotune.time, 'perf_counter', lambda: now[0])
  spent = autotune.seconds(lambda: queued.append(None))
  assert seen == waits
  assert spent == pytest.approx(seconds)


def turns(text):
  """Of a compiled program: what its outer loop runs, what it does once, n."""
  parts = {}
  for part in re.findall(r'(?m)^(?:ENTRY )?%[^ ]+ \(.*?^}', text, re.DOTALL):
    parts[re.match(r'(ENTRY )?%([^ ]+)', part)[2]] = part
  (entry,) = (x for x in parts if f'ENTRY %{x} ' in text)
  (loop,) = re.findall(r'(?m)^.* while\(.*$', parts[entry])

  def reached(name):
    inner = {*re.findall(r'%([\w.-]+)', parts[name])} & parts.keys() - {name}
    return {name}.union(*map(reached, inner))

  body = reached(re.search(r'body=%([\w.-]+)', loop)[1])
  count = int(re.search(r'known_trip_count":{"n":"(\d+)"', loop)[1])
  join = lambda names: '\n'.join(parts[x] for x in names)
  return join(body), join(reached(entry) - body), count


DOT = re.compile(r' dot\(|custom_call_target="[^"]*matmul')


@pytest.mark.parametrize('name', ['xla', 'xla_loop', 'bucket', 'pallas_tpu'])
def test_a_repeated_product_is_computed_anew_in_every_turn(name, monkeypatch):
  """By the compiled program: no product is moved out of the loop."""
  kernels_test.interpret(monkeypatch, name, True)
  module = forms.module(name)

  def product(a, b, extent):
    extents = forms.Extents(128, extent, 128)
    return module.product(a, b, 'nn', extents, jnp.float32)

  a, b = (jax.random.normal(jax.random.key(i), (128, 128)) for i in (0, 1))
  extent = jnp.int32(70)
  many = autotune.repeated(product, 5).lower(a, b, extent).compile()
  inside, once, count = turns(many.as_text())
  assert count == 5
  assert DOT.search(inside) and not DOT.search(once)
  want = jax.jit(product)(a, b, extent)
  for times in (1, 5):
    got = autotune.repeated(product, times)(a, b, extent)
    np.testing.assert_array_equal(got[:, :70], want[:, :70])


@pytest.mark.parametrize(
  ('each', 'programs'),
  [(2e-6, [1, 256, 2048, 4096]), (0.004, [1, 2]), (0.2, [1])],
)
def test_a_call_is_long_beside_its_start(monkeypatch, each, programs):
  """Of which Python makes one in 17 us; few lengths are compiled."""
  made = []

  def repeated(product, times):
    made.append(times)
    return lambda x: times

  monkeypatch.setattr(autotune, 'repeated', repeated)
  monkeypatch.setattr(autotune, 'seconds', lambda call: 17e-6 + each * call())
  many, times = autotune.enough(None, 1.0)
  assert many(1.0) == times == programs[-1]
  assert made == programs


def test_what_is_stored_is_the_time_of_one_product(monkeypatch):
  monkeypatch.setattr(
    autotune, 'enough', lambda run, *_: (autotune.repeated(run, 4), 4)
  )
  monkeypatch.setattr(autotune, 'seconds', lambda call: 0.02)
  row = autotune.tune('xla_loop', 'nn', 32, 64, 32, 'float32', 'n')
  assert row['seconds'] == pytest.approx(0.005)


def test_the_clock_is_a_clock():
  row = autotune.tune('bucket', 'tn', 64, 64, 32, 'float32', 'm')
  assert 0 < row['seconds'] < 10
  assert bucket.Blocks(**row['blocks']) in bucket.candidates(
    'tn', 64, 64, 32, 'float32'
  )


def test_a_newer_row_replaces_an_older_one(tmp_path):
  path = tmp_path / 'blocks.json'
  row = autotune.tune('bucket', 'nn', 32, 64, 32, 'float32', 'n')
  other = row | {'m': 64}
  autotune.store(path, [row, other])
  autotune.store(path, [row | {'blocks': {'m': 1, 'n': 2, 'k': 3}}])
  rows = json.loads(path.read_text())
  assert len(rows) == 2
  assert rows[0]['blocks'] == {'m': 1, 'n': 2, 'k': 3}
  assert not [p for p in tmp_path.iterdir() if p != path]


def test_rows_of_several_writers_are_all_kept(tmp_path):
  path = tmp_path / 'blocks.json'
  row = autotune.tune('bucket', 'nn', 32, 64, 32, 'float32', 'n')

  def write(m):
    autotune.store(path, [row | {'m': m}])

  with concurrent.futures.ThreadPoolExecutor(4) as pool:
    list(pool.map(write, range(1, 41)))
  rows = json.loads(path.read_text())
  assert sorted(x['m'] for x in rows) == [*range(1, 41)]
  assert [x.name for x in tmp_path.iterdir()] == ['blocks.json']


def test_lengths_are_integers_and_a_refused_file_leaves_nothing(tmp_path):
  path = tmp_path / 'blocks.json'
  row = autotune.tune('xla_loop', 'nn', 32, 64, 32, 'float32', 'n')
  floats = row | {'blocks': {x: float(y) for x, y in row['blocks'].items()}}
  autotune.store(path, [floats])
  assert autotune.use(path) == 1
  blocks = autotune.choice('xla_loop', 'nn', 32, 64, 32, 'float32')
  assert {type(x) for x in dataclasses.asdict(blocks).values()} == {int}
  autotune.store(path, [row | {'m': 64, 'blocks': {'m': 1, 'n': 2, 'k': 3}}])
  with pytest.raises(ValueError, match='is no use here'):
    autotune.use(path)
  assert autotune.choice('xla_loop', 'nn', 32, 64, 32, 'float32') is None


def test_another_device_decides_nothing_here(tmp_path):
  path = tmp_path / 'blocks.json'
  row = autotune.tune('bucket', 'nn', 32, 64, 32, 'float32', 'n')
  autotune.store(path, [row | {'device': 'NVIDIA H100'}])
  assert autotune.use(path) == 0


@pytest.mark.parametrize('text', ['{', '[{"device": "cpu"}]', '[1]'])
def test_a_file_of_something_else(tmp_path, text):
  path = tmp_path / 'blocks.json'
  path.write_text(text)
  with pytest.raises(ValueError, match=r'blocks\.json is not a file of tuned'):
    autotune.use(path)
  with pytest.raises(ValueError, match='delete it'):
    autotune.store(path, [])
  assert path.read_text() == text


def test_candidates_that_do_not_run_are_passed_over(monkeypatch):
  """And it says so when none is left."""
  good = xla_loop.candidates('nn', 32, 64, 32, 'float32')
  bad = xla_loop.Blocks(32, 7, 32)
  monkeypatch.setattr(xla_loop, 'candidates', lambda *a: [bad, *good])
  row = autotune.tune(
    'xla_loop', 'nn', 32, 64, 32, 'float32', 'n', timer=lambda call: 1.0
  )
  assert xla_loop.Blocks(**row['blocks']) == good[0]
  monkeypatch.setattr(xla_loop, 'candidates', lambda *a: [bad])
  with pytest.raises(ValueError, match=r'no blocks of xla_loop .* 7 does not'):
    autotune.tune('xla_loop', 'nn', 32, 64, 32, 'float32', 'n')


def test_the_result_is_the_same_whatever_the_blocks(tmp_path):
  x = jax.random.normal(jax.random.key(0), (32, 64))
  w = jax.random.normal(jax.random.key(1), (64, 256))
  keep = jnp.arange(256) < 77
  run = lambda: masked_matmul(x, w, None, keep, implementation='xla_loop')
  before = run()
  path = tmp_path / 'blocks.json'
  autotune.store(
    path,
    [
      autotune.tune(
        'xla_loop', 'nn', 32, 256, 64, 'float32', 'n', slowest_first()
      )
    ],
  )
  assert autotune.use(path) == 1
  np.testing.assert_allclose(run(), before, rtol=1e-5, atol=1e-6)
  assert forms.sizes(x, w, 'nn') == (32, 256, 64)


def test_the_least_of_five_rounds_counts(monkeypatch):
  took = iter([3.0, 1.0, 2.0, 5.0, 4.0])
  monkeypatch.setattr(autotune, 'seconds', lambda call: next(took))
  assert autotune._least(None) == 1.0
