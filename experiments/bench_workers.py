"""What `bench_train` times, each variant in a process of its own.

A variant is a function that returns facts, a step to be timed, and a function
that tells the most memory that the process ever had, in bytes.
"""

import collections
from collections.abc import Callable
import itertools
from multiprocessing import connection
import pathlib
import tempfile
import time
from typing import Any

from effllm_jax import errors

# What a variant returns, as the text above says.
Prepared = tuple[dict[str, Any], Callable[[], None], Callable[[], int | None]]


def ask(pipe: connection.Connection) -> Any:
  """What the process at the other end says next.

  Raises:
    errors.InputError: it could not start, and says why.
  """
  try:
    kind, value = pipe.recv()
  except EOFError as e:
    raise errors.InputError(
      'a process of the benchmark has ended without a word, as the system does '
      'to one that takes too much memory; take a smaller --model'
    ) from e
  if kind == 'refused':
    raise errors.InputError(value)
  return value


def serve(pipe: connection.Connection, work: Callable, *arguments) -> None:
  """Says what `work` prepared, then times or profiles a step when asked.

  Of two steps the second is timed: the caches are those of whoever ran before.
  """
  try:
    facts, step, peak = work(*arguments)
  except errors.InputError as e:
    pipe.send(('refused', str(e)))
    return
  step()  # The arrays and threads of the first one.
  pipe.send(('ready', facts))
  while (asked := pipe.recv()) != 'end':
    step()
    if asked == 'profile':
      pipe.send(('profile', profile(step)))
      continue
    start = time.perf_counter()
    step()
    pipe.send(('seconds', time.perf_counter() - start))
  pipe.send(('peak', peak()))


def profile(step: Callable[[], None]) -> dict[str, float]:
  """Seconds of XLA's threads on a CPU in one step, by kind of operation.

  Of a product that several threads share, only the one that started it counts:
  its share is a lower bound.

  The kinds are the names of the compiled program without their numbers: what
  was fused is named by its parts. Loops and branches are left out, since what
  is in them is counted.
  """
  import jax

  spent = collections.Counter()
  with tempfile.TemporaryDirectory() as folder:
    with jax.profiler.trace(folder):
      step()
    (path,) = pathlib.Path(folder).rglob('*.xplane.pb')
    read = jax.profiler.ProfileData.from_file(str(path))
    for line in itertools.chain.from_iterable(x.lines for x in read.planes):
      for event in line.events:
        # Others are the executor's own, or the ends of what runs elsewhere.
        if dict(event.stats).get('hlo_op') == event.name:
          spent[event.name.rstrip('.0123456789')] += event.duration_ns / 1e9
  for control in ('while', 'cond', 'conditional', 'call'):
    del spent[control]
  return dict(spent)


def ours(config: dict[str, Any], model: str, score: bool) -> Prepared:
  """Facts, the step of this project, and how to ask for its peak memory."""
  import jax
  import ml_collections

  from effllm_jax import accounting
  from experiments import bench_setup

  config = ml_collections.ConfigDict(config)
  bench = bench_setup.make(config, bench_setup.SHAPES[model])
  cfg, compute = bench.cfg, bench.plan.recipe.compute
  held = [bench.fresh(cfg)]
  compiled = bench.step(held[0], cfg, score)

  def step():
    held[0], numbers = compiled(held[0])
    jax.block_until_ready((held[0], numbers))

  meter = accounting.Meter(
    config.data.seq_len, bench.plan.tokens_per_step, compute.remat
  )
  meter.step(cfg, False, None)
  size = lambda tree: sum(x.nbytes for x in jax.tree.leaves(tree))
  device = jax.devices()[0]
  facts = {
    'device': f'{device.device_kind}, jax {jax.__version__}',
    'params': cfg.num_params(),
    'tokens': bench.plan.tokens_per_step,
    'dtype': compute.dtype,
    'kernels': compute.kernels,
    'flops': meter.spent['train'],
    'pruning': size(held[0].prune) / size(held[0].params),
  }

  def peak():
    from effllm_jax import timing

    found = device.memory_stats()
    return found['peak_bytes_in_use'] if found else timing.memory('VmHWM')

  return facts, step, peak


def product(dtype: str) -> Prepared:
  """One product of square matrices, by XLA, asked for as a step asks."""
  import jax
  import jax.numpy as jnp

  from effllm_jax import kernels

  n = 4096 if jax.default_backend() == 'cpu' else 16384
  a = jnp.ones((n, n), dtype)
  product = jax.jit(lambda a, b: kernels.einsum('mk,kn->mn', a, b, dtype))
  step = lambda: jax.block_until_ready(product(a, a))
  return {'flops': 2 * n**3}, step, lambda: 0


def rival(config: dict[str, Any], model: str) -> Prepared:
  """The same for the stock Llama of transformers."""
  from effllm_jax import hf_config
  from effllm_jax import hf_export
  from effllm_jax import timing
  from experiments import bench_setup

  transformers = hf_export.import_transformers()
  import torch

  if config['model']['dtype'] != 'float32':
    raise errors.InputError(
      f'--rival trains in float32, not {config["model"]["dtype"]}; set '
      '--rival=false'
    )
  cfg = bench_setup.SHAPES[model]
  torch.manual_seed(0)
  net = transformers.AutoModelForCausalLM.from_config(
    transformers.AutoConfig.for_model(**hf_config.write(cfg)),
    attn_implementation='sdpa',
  ).float()
  net.train()
  optimizer = torch.optim.AdamW(
    net.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True
  )
  data, accumulate = config['data'], config['train']['accumulate']
  tokens = torch.randint(
    cfg.V, (accumulate, data['batch_size'], data['seq_len'] + 1)
  )

  def step():
    optimizer.zero_grad()
    for windows in tokens:
      logits = net(windows[:, :-1], use_cache=False).logits
      loss = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), windows[:, 1:].flatten()
      )
      (loss / accumulate).backward()
    torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
    optimizer.step()

  facts = {'params': sum(x.numel() for x in net.parameters())}
  return facts, step, lambda: timing.memory('VmHWM')
