r"""A training step beside transformers and PyTorch: speed, memory, utilisation.

    python -m experiments.bench_train \
      --config=experiments/configs/efficientllm_a.py [--model=360m] \
      [--repeats=7] [--rival=false]

Random weights in a shape, on one device; batch, dtype and kernels as in the
config. The rival (CPU, float32) trains the stock Llama of transformers on as
many tokens: the same micro-batches, clip and AdamW, all threads of the machine.
Every variant has a process of its own, which tells its peak memory; they take
turns step by step, so that a machine that drifts drifts for all of them.
Utilisation is the share of the speed of one large product of matrices, which
takes its turn too.
"""

from collections.abc import Callable
import multiprocessing
from multiprocessing import connection
import statistics
import time
from typing import Any

from absl import flags
from ml_collections import config_flags

from experiments import cli

_CONFIG = config_flags.DEFINE_config_file(
  'config', None, 'A file in experiments/configs.', lock_config=True
)
_MODEL = flags.DEFINE_enum(
  'model', '135m', ['135m', '360m', '1.7b'], 'Whose shape: that of SmolLM2.'
)
_REPEATS = flags.DEFINE_integer('repeats', 7, 'Timed rounds.', lower_bound=1)
_RIVAL = flags.DEFINE_bool(
  'rival', True, 'Whether to train in transformers and PyTorch as well.'
)


_PRODUCT = 'a large product'


def main(argv: list[str]) -> None:
  """Times the variants in turns and prints one table."""
  del argv
  import rich.console
  import rich.table

  config = cli.config(_CONFIG).to_dict()
  jobs = {
    'effllm_jax': (_ours, config, _MODEL.value, False),
    'effllm_jax, scoring': (_ours, config, _MODEL.value, True),
  }
  if _RIVAL.value:
    jobs['transformers, PyTorch'] = (_rival, config, _MODEL.value)
  jobs[_PRODUCT] = (_product, config['model']['dtype'])
  context = multiprocessing.get_context('spawn')
  pipes, processes = {}, []
  for name, (work, *arguments) in jobs.items():
    pipes[name], theirs = context.Pipe()
    process = context.Process(
      target=_serve, args=(theirs, work, *arguments), daemon=True
    )
    process.start()
    processes.append(process)
    theirs.close()
  about = {name: _ask(pipe) for name, pipe in pipes.items()}
  seconds = {name: [] for name in pipes}
  for _ in range(_REPEATS.value):
    for name, pipe in pipes.items():
      pipe.send('step')
      seconds[name].append(_ask(pipe))
  memory = {}
  for name, pipe in pipes.items():
    pipe.send('end')
    memory[name] = _ask(pipe)
  for process in processes:
    process.join()

  facts = about['effllm_jax']
  best = about[_PRODUCT]['flops'] / statistics.median(seconds.pop(_PRODUCT))
  table = rich.table.Table(
    '', 'seconds, median', 'tokens/s', 'ratio', 'peak memory, GB', 'utilisation'
  )
  median = {name: statistics.median(x) for name, x in seconds.items()}
  for name, value in median.items():
    table.add_row(
      name,
      f'{value:.3f}',
      f'{facts["tokens"] / value:,.0f}',
      f'{value / median["effllm_jax"]:.3f}',
      '' if memory[name] is None else f'{memory[name] / 1e9:.2f}',
      f'{facts["flops"] / value / best:.1%}',
    )
  console = rich.console.Console()
  console.print(
    f'{facts["device"]}; {facts["params"]:,} parameters, {facts["tokens"]} '
    f'tokens a step, {facts["dtype"]}, kernels {facts["kernels"]}; '
    f'{facts["flops"] / 1e12:.2f} TFLOP a step, {best / 1e12:.2f} TFLOP/s in a '
    f'large product; masks, scores and origins are '
    f'{facts["pruning"]:.3%} of the parameters',
    soft_wrap=True,
  )
  console.print(table)


def _ask(pipe: connection.Connection) -> Any:
  """What the process at the other end says next.

  Raises:
    errors.InputError: it could not start, and says why.
  """
  from effllm_jax import errors

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


def _serve(pipe: connection.Connection, work: Callable, *arguments) -> None:
  """Says what `work` prepared, then times its step as often as asked."""
  from effllm_jax import errors

  try:
    facts, step, peak = work(*arguments)
  except errors.InputError as e:
    pipe.send(('refused', str(e)))
    return
  step()  # Not counted.
  pipe.send(('ready', facts))
  while pipe.recv() == 'step':
    start = time.perf_counter()
    step()
    pipe.send(('seconds', time.perf_counter() - start))
  pipe.send(('peak', peak()))


def _ours(config, model, score):
  """Facts, the step of this project, and how to ask for its peak memory."""
  import jax
  import ml_collections

  from effllm_jax import accounting
  from experiments import step_bench

  config = ml_collections.ConfigDict(config)
  bench = step_bench.make(config, step_bench.SHAPES[model])
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


def _product(dtype):
  """One product of square matrices, by XLA."""
  import jax
  import jax.numpy as jnp

  n = 4096 if jax.default_backend() == 'cpu' else 16384
  a = jnp.ones((n, n), dtype)
  product = jax.jit(jnp.dot)
  step = lambda: jax.block_until_ready(product(a, a))
  return {'flops': 2 * n**3}, step, lambda: 0


def _rival(config, model):
  """The same for the stock Llama of transformers."""
  from effllm_jax import errors
  from effllm_jax import hf_config
  from effllm_jax import hf_export
  from effllm_jax import timing
  from experiments import step_bench

  transformers = hf_export.import_transformers()
  import torch

  if config['model']['dtype'] != 'float32':
    raise errors.InputError(
      f'--rival trains in float32, not {config["model"]["dtype"]}; set '
      '--rival=false'
    )
  cfg = step_bench.SHAPES[model]
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


if __name__ == '__main__':
  flags.mark_flag_as_required('config')
  cli.run(main)
