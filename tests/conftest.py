"""What many tests need: small models, random masks and scores."""

import collections
from collections.abc import Iterator
import contextlib
import functools
import gc
import importlib
import importlib.metadata
import inspect
import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile
import threading
from typing import Any

# Before jax is imported: tests look for no accelerator that is not asked for.
os.environ.setdefault('JAX_PLATFORMS', 'cpu')
os.environ.setdefault('HF_HUB_OFFLINE', '1')
# The threads of PyTorch's products wait for each other at full speed: beside
# other workers the export of SmolLM2 takes 21 CPU seconds, and 8 with one.
os.environ.setdefault('OMP_NUM_THREADS', '1')
# What one process compiles, a worker or a command of a test, the others load:
# many make the same training step, and files let go of it (below). Nothing is
# written into the user's cache, nor read there.
if 'EFFLLM_TESTS' not in os.environ:
  _folder = tempfile.TemporaryDirectory(prefix='effllm-tests-')
  os.environ['EFFLLM_TESTS'] = _folder.name
os.environ |= {
  'JAX_ENABLE_COMPILATION_CACHE': 'true',
  'JAX_COMPILATION_CACHE_DIR': os.environ['EFFLLM_TESTS'],
  'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0',
}
# Most of the time goes into compiling small functions once: without LLVM's
# optimisations the suite takes a third less. And half of what was left under
# jax 0.10 went, for each loop, into the dialects and passes of XLA's newer
# emitters (model_test: 86 s, now 41). The newest jax has no others: the whole
# suite tests them there, and here the real commands of `runs.Setting`, which
# are compiled as a user's are. Other devices get what users have.
if os.environ['JAX_PLATFORMS'] == 'cpu':
  os.environ['XLA_FLAGS'] = ' '.join(
    [
      os.environ.get('XLA_FLAGS', ''),
      '--xla_backend_optimization_level=0',
      '--xla_cpu_parallel_codegen_split_count=1',
      '--xla_cpu_use_fusion_emitters=false'
      if importlib.metadata.version('jaxlib').startswith('0.10.')
      else '',
    ]
  )

import jax
from jax.experimental.pallas import mosaic_gpu as plgpu
import numpy as np
import pytest
import safetensors.numpy
import tokenizers

from effllm_jax import model
from effllm_jax import shrink
from effllm_jax import structure
from tests import fork_server

ROOT = pathlib.Path(__file__).parents[1]
fork_server.step_back()

# The blocks of Llama; what those of Qwen2 (biases) and Qwen3 (norms) add. Not a
# model for each: every program takes seconds to compile.
CONFIGS = {
  'mha-tied-1': dict(K=3, G=1, tied=True, N=1),
  'gqa-untied-3-biases-norms': dict(
    K=2, G=2, tied=False, N=3, qkv_bias=True, qk_norm=True
  ),
}


def make_config(**changes) -> structure.ModelConfig:
  """A small architecture; keyword arguments replace its fields."""
  fields = dict(
    V=61, D=16, N=2, K=2, G=2, H=4, F=20, context=128,
    rope_theta=1e4, norm_eps=1e-5, tied=True,
  )  # fmt: skip
  return structure.ModelConfig(**(fields | changes))


simulated = pytest.mark.skipif(
  not hasattr(plgpu, 'InterpretGPUParams') or len(os.sched_getaffinity(0)) == 1,
  reason='no simulator of Hopper in this jax (0.11.2 has one), or one core: '
  'it waits for ever for threads that a pool of one does not run',
)


# The files that take longest, in that order. A worker takes whole files, and
# xdist starts with those of many tests: a few long ones were left for the end,
# and the last of them kept one worker busy for more than a minute by itself.
LONGEST = (
  'sharding', 'variants', 'faults', 'steps', 'end_to_end', 'kernels', 'model',
  'export', 'compare', 'kernels_lowering', 'brute_force', 'report', 'compiled',
  'edge', 'data', 'selection', 'train', 'harness', 'peers', 'repair_trials',
  'notebooks', 'overlap', 'sweep',
)  # fmt: skip


def pytest_collection_modifyitems(items):
  names = [f'{name}_test' for name in LONGEST]
  rank = {name: i for i, name in enumerate(names)}
  items.sort(key=lambda item: rank.get(item.path.stem, len(rank)))


def pytest_collection_finish():
  # What jax traces is many objects and next to no cycles: to look for these
  # took a fifth of the time under 3.11, and a tenth under 3.13.
  gc.freeze()
  gc.set_threshold(*fork_server.GARBAGE)


@pytest.fixture(autouse=True, scope='module')
def _forget_compiled():
  """Lets go of what the tests of a file have compiled.

  Linux gives a process 65,530 pieces of memory, a compiled function takes
  several of them, and XLA aborts, or fails to "materialize symbols", without.
  What refused to be read may leave unfinished coroutines in a cycle: collected
  in the middle of a test of another file, pytest keeps what its frames hold.
  """
  yield
  jax.clear_caches()
  gc.collect()


@pytest.fixture(scope='module', name='place')
def _place(tmp_path_factory):
  """A folder of all tests of a file."""
  return tmp_path_factory.mktemp('place')


@pytest.fixture(params=list(CONFIGS), name='cfg')
def _cfg(request) -> structure.ModelConfig:
  return make_config(**CONFIGS[request.param])


def _array(x: np.ndarray) -> jax.Array:
  """In float32, from numpy: jax would compile a program for each shape."""
  return jax.device_put(x.astype(np.float32))


def make_params(cfg, seed=0) -> structure.Params:
  """Parameters far from their initial values, norms and biases included."""
  rng = np.random.default_rng(seed)

  def leaf(letters, shape):
    noise = rng.standard_normal(shape.shape) * 0.15
    scale = 1.0 if letters in ('D', 'ND', 'NH') else 0.0
    return _array(scale + noise)

  return structure.map_axes(leaf, structure.shapes(cfg))


def make_scores(cfg, seed=0) -> structure.Groups:
  """Positive scores without ties."""
  rng = np.random.default_rng(seed)
  return jax.tree.map(
    lambda m: _array(rng.uniform(0.1, 1.0, m.shape)),
    structure.all_alive(cfg),
  )


def make_masks(cfg, seed=0, uniform=False) -> structure.Groups:
  """Random masks; something of each type is dead, something alive.

  With `uniform` every layer keeps the same number of groups.
  """
  rng = np.random.default_rng(seed)

  def leaf(mask):
    rows = np.atleast_2d(np.ones(mask.shape, bool))
    width = rows.shape[-1]
    dead = rng.integers(1, max(width // 2, 2), len(rows))
    for row, count in zip(rows, dead, strict=True):
      row[rng.permutation(width)[: dead[0] if uniform else count]] = False
    return jax.device_put(rows.reshape(mask.shape))

  return jax.tree.map(leaf, structure.all_alive(cfg))


def alive_entries(letters, shape, masks) -> np.ndarray:
  """Which entries of a parameter belong to live groups only, bool [shape]."""
  alive = np.ones(shape, bool)
  for axis, letter in enumerate(letters):
    if letter in structure.PRUNABLE:
      mask = np.asarray(getattr(masks, structure.PRUNABLE[letter]))
      view = [1] * len(shape)
      view[axis] = shape[axis]
      if mask.ndim == 2:
        view[0] = shape[0]
      alive &= mask.reshape(view)
  return alive


def make_tokens(cfg, batch=2, length=12, seed=0):
  """Random token ids, int32 [batch, length]."""
  rng = np.random.default_rng(seed)
  tokens = rng.integers(0, cfg.V, (batch, length))
  return jax.device_put(tokens.astype(np.int32))


def _on_host(function):
  """Its results as numpy, of which no test makes programs by the way.

  On the newest jax each takes some 20 ms.
  """

  @functools.wraps(function)
  def call(*arrays, **static):
    return jax.tree.map(np.asarray, function(*arrays, **static))

  return call


forward = _on_host(
  jax.jit(model.forward, static_argnames=('cfg', 'compute', 'taps'))
)
loss_and_grad = _on_host(
  jax.jit(jax.value_and_grad(model.loss), static_argnames=('cfg', 'compute'))
)
kept_indices = _on_host(jax.jit(shrink.kept_indices, static_argnames='cfg'))
take_params = _on_host(jax.jit(shrink.take_params))
take_groups = _on_host(jax.jit(shrink.take_groups))


def copied(tree):
  """Arrays of their own, for what donates them."""
  return jax.tree.map(lambda x: jax.device_put(np.array(x)), tree)


def refitted(w, x, keep, damping, alive=slice(None)):
  """A matrix whose survivors are repaired over the tokens of x, float64.

  In closed form; the damping is a share of the mean over the inputs alive.
  """
  S = x.T @ x / len(x)
  H = S + damping * np.diag(S)[alive].mean() * np.eye(len(S))
  out = np.where(keep[:, None], w, 0)
  out[keep] += np.linalg.solve(
    H[np.ix_(keep, keep)], S[np.ix_(keep, ~keep)] @ w[~keep]
  )
  return out


def precisions(traced) -> set[str]:
  """Those of all products and both operands, on a TPU and on a GPU."""
  found = set()
  for platform in ('tpu', 'cuda'):
    text = traced.lower(lowering_platforms=(platform,)).as_text()
    for line in text.splitlines():
      if 'dot_general' in line:
        named = re.search(r'precision = \[(\w+), (\w+)\]', line)
        found.update(named.groups() if named else ['none'])
  return found


def check_close(a, b, rtol=1e-5, atol=1e-6):
  """Asserts that two trees are equal to tolerance, naming the leaf."""
  jax.tree_util.tree_map_with_path(
    lambda path, x, y: np.testing.assert_allclose(
      x, y, rtol=rtol, atol=atol, err_msg=jax.tree_util.keystr(path)
    ),
    a,
    b,
  )


def real_text() -> list[str]:
  """English documents that every machine has: the standard library's own."""
  names = (
    'argparse', 'asyncio', 'bisect', 'calendar', 'collections', 'csv',
    'datetime', 'decimal', 'difflib', 'doctest', 'email.message', 'enum',
    'fractions', 'heapq', 'inspect', 'json', 'logging', 'optparse', 'pathlib',
    'pickletools', 'random', 'shutil', 'statistics', 'string', 'textwrap',
    'threading', 'typing', 'unittest', 'urllib.parse', 'zipfile',
  )  # fmt: skip
  documents = []
  for name in names:
    module = importlib.import_module(name)
    members = [m for _, m in sorted(vars(module).items()) if callable(m)]
    texts = [inspect.getdoc(x) or '' for x in (module, *members)]
    # A first occurrence only: subclasses inherit their docs.
    documents.append('\n\n'.join(dict.fromkeys(t for t in texts if t)))
  return [d for d in documents if len(d) > 1000]


def byte_bpe(texts, size=400) -> tokenizers.Tokenizer:
  """A byte-level BPE, so that any text can be tokenised."""
  bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
  bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(
    add_prefix_space=False
  )
  bpe.decoder = tokenizers.decoders.ByteLevel()
  bpe.train_from_iterator(
    texts,
    tokenizers.trainers.BpeTrainer(
      vocab_size=size,
      special_tokens=['<|endoftext|>'],
      initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
      show_progress=False,
    ),
  )
  return bpe


def write_text_folder(folder: pathlib.Path) -> pathlib.Path:
  """A user's own text: one .txt per document."""
  folder.mkdir()
  for i, document in enumerate(real_text()):
    (folder / f'{i:02d}.txt').write_text(document, encoding='utf-8')
  return folder


@functools.cache
def _initial(cfg) -> structure.Params:
  """As numpy: some forty small programs make them, which files let go of."""
  return jax.tree.map(np.asarray, model.init(jax.random.key(0), cfg))


def write_model_folder(folder: pathlib.Path, cfg=None) -> pathlib.Path:
  """A Llama as a Hugging Face folder: random weights, trained tokenizer.

  Written by hand, not by `effllm_jax.export`, so that neither checks itself.
  """
  cfg = cfg or make_config(
    V=512, D=32, N=2, K=2, G=2, H=8, F=64, context=128, tied=True
  )
  folder.mkdir()
  bpe = byte_bpe(real_text(), cfg.V)
  bpe.save(str(folder / 'tokenizer.json'))
  config = {
    'architectures': ['LlamaForCausalLM'],
    'model_type': 'llama',
    'vocab_size': cfg.V,
    'hidden_size': cfg.D,
    'num_hidden_layers': cfg.N,
    'num_attention_heads': cfg.K * cfg.G,
    'num_key_value_heads': cfg.K,
    'head_dim': cfg.H,
    'intermediate_size': cfg.F,
    'max_position_embeddings': cfg.context,
    'rope_theta': cfg.rope_theta,
    'rms_norm_eps': cfg.norm_eps,
    'tie_word_embeddings': cfg.tied,
    'hidden_act': 'silu',
    'eos_token_id': 0,
    'bos_token_id': 0,
  }
  (folder / 'config.json').write_text(json.dumps(config))
  params = _initial(cfg)
  layers = params.layers
  tensors = {
    'model.embed_tokens.weight': params.embed,
    'model.norm.weight': params.final_norm,
  }
  for n in range(cfg.N):
    at = f'model.layers.{n}'
    tensors |= {
      f'{at}.input_layernorm.weight': layers.attn_norm[n],
      f'{at}.post_attention_layernorm.weight': layers.ffn_norm[n],
      f'{at}.self_attn.q_proj.weight': layers.wq[n].reshape(cfg.D, -1).T,
      f'{at}.self_attn.k_proj.weight': layers.wk[n].reshape(cfg.D, -1).T,
      f'{at}.self_attn.v_proj.weight': layers.wv[n].reshape(cfg.D, -1).T,
      f'{at}.self_attn.o_proj.weight': layers.wo[n].reshape(-1, cfg.D).T,
      f'{at}.mlp.gate_proj.weight': layers.w_gate[n].T,
      f'{at}.mlp.up_proj.weight': layers.w_up[n].T,
      f'{at}.mlp.down_proj.weight': layers.w_down[n].T,
    }
  if not cfg.tied:
    tensors['lm_head.weight'] = params.unembed.T
  safetensors.numpy.save_file(
    {k: np.ascontiguousarray(v) for k, v in tensors.items()},
    folder / 'model.safetensors',
  )
  return folder


def small_run(model_folder, text_folder, **changes):
  """The paper's variant A, on a small model and text: 24 steps, 2 shrinks."""
  return {
    'source': str(model_folder),
    'data.text': str(text_folder),
    'data.seq_len': 32,
    'data.batch_size': 2,
    'data.workers': 0,
    # The plainest kernels compile fastest.
    'model.kernels': 'xla',
    'train.tokens': 24 * 64,
    'train.accumulate': 1,
    'optimizer.peak': 3e-3,
    'optimizer.warmup_tokens': 128,
    'optimizer.decay_tokens': 256,
    'optimizer.embedding': 1.0,
    'budget.target': 22_000.0,
    'prune.policy': 'uniform',
    'prune.saliency': 'taylor1',
    'prune.ema': 0.9,
    'prune.every': 2,
    'prune.floors.heads': 1,
    'repair.enabled': False,
    'distill.weight': 0.0,
    'prune.begin_tokens': 128,
    'prune.end_tokens': 18 * 64,
    'prune.floors.ffn': 8,
    'prune.floors.stem': 16,
    'prune.multiple_of.ffn': 8,
    'prune.multiple_of.stem': 8,
    # Each has programs of its own, which take most of the time.
    'shrink.threshold': 0.2,
    'eval.tokens_per_domain': 512,
    'checkpoint.every_steps': 5,
  } | changes


@contextlib.contextmanager
def counted_programs() -> Iterator[collections.Counter]:
  """How often each program is compiled, or loaded where one is kept."""
  counts = collections.Counter()

  def count(name, seconds, fun_name='', **_):
    if name == '/jax/core/compile/backend_compile_duration':
      counts[re.sub(r'^jit\((.*)\)$', r'\1', fun_name)] += 1

  jax.monitoring.register_event_duration_secs_listener(count)
  try:
    yield counts
  finally:
    jax.monitoring.unregister_event_duration_listener(count)


def flags_of(changes) -> list[str]:
  """Command-line overrides of a config."""
  return [f'--config.{key}={value}' for key, value in changes.items()]


_servers = {}


def command(
  name: str, *arguments, env: dict[str, str] | None = None
) -> subprocess.CompletedProcess:
  """Runs `python -m experiments.<name>` as a user would.

  One `tests.fork_server` for each environment: most commands take less time
  than the import of jax. And for each thread, as a server runs one at a time.
  """
  env = dict(os.environ if env is None else env)
  env.pop('PYTEST_CURRENT_TEST', None)
  key = threading.get_ident(), frozenset(env.items())
  if key not in _servers:
    _servers[key] = fork_server.Server(env, ROOT)
  return _servers[key].run(name, [*map(str, arguments)])


def python(*arguments) -> subprocess.CompletedProcess:
  """Runs Python in the root of the repository."""
  return subprocess.run(
    [sys.executable, *map(str, arguments)],
    cwd=ROOT, capture_output=True, text=True, check=False,
  )  # fmt: skip


def on_eight_devices(script: str, *arguments) -> tuple[Any, str]:
  """Runs a script in a process with eight simulated devices.

  Returns:
    What its last line says, in JSON, and its standard error.
  """
  flags = os.environ['XLA_FLAGS']
  done = subprocess.run(
    [sys.executable, '-c', script, *map(str, arguments)],
    cwd=ROOT,
    env=os.environ
    | {'XLA_FLAGS': f'{flags} --xla_force_host_platform_device_count=8'},
    capture_output=True, text=True, check=False,
  )  # fmt: skip
  assert done.returncode == 0, done.stderr[-3000:]
  return json.loads(done.stdout.splitlines()[-1]), done.stderr


CONFIG_FILE = '--config=experiments/configs/smollm2_135m.py'
