r"""A training step beside transformers and PyTorch: speed, memory, utilisation.

    python -m experiments.bench_train \
      --config=experiments/configs/efficientllm_a.py [--model=360m] \
      [--repeats=7] [--rival=false] [--profile]

Random weights in a shape, on one device; batch, dtype and kernels as in the
config. The rival (CPU, float32) trains the stock Llama of transformers on as
many tokens: the same micro-batches, clip and AdamW, all threads of the machine.
Every variant has a process of its own, which tells its peak memory; they take
turns, in another order each round, so that a machine that drifts drifts for all
of them. A turn is two steps, of which the second counts: the first after others
have had the cores and their caches takes up to a third longer. Utilisation is
the share of the speed of one large product of matrices, which takes its turn
too. With --profile, on a CPU, one more table says where the time of our step
goes.
"""

import multiprocessing
import random
import statistics

from absl import flags
from ml_collections import config_flags

from experiments import bench_workers
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
_PROFILE = flags.DEFINE_bool(
  'profile', False, 'Whether to say where our step spends its time.'
)

_PRODUCT = 'a large product'


def main(argv: list[str]) -> None:
  """Times the variants in turns and prints one table."""
  del argv
  import rich.table

  config = cli.config(_CONFIG).to_dict()
  jobs = {
    'effllm_jax': (bench_workers.ours, config, _MODEL.value, False),
    'effllm_jax, scoring': (bench_workers.ours, config, _MODEL.value, True),
  }
  if _RIVAL.value:
    jobs['transformers, PyTorch'] = (bench_workers.rival, config, _MODEL.value)
  jobs[_PRODUCT] = (bench_workers.product, config['model']['dtype'])
  context = multiprocessing.get_context('spawn')
  pipes, processes = {}, []
  for name, (work, *arguments) in jobs.items():
    pipes[name], theirs = context.Pipe()
    process = context.Process(
      target=bench_workers.serve, args=(theirs, work, *arguments), daemon=True
    )
    process.start()
    processes.append(process)
    theirs.close()
  about = {name: bench_workers.ask(pipe) for name, pipe in pipes.items()}
  seconds = {name: [] for name in pipes}
  order = random.Random(0)
  for _ in range(_REPEATS.value):
    for name in order.sample(list(pipes), len(pipes)):
      pipes[name].send('step')
      seconds[name].append(bench_workers.ask(pipes[name]))
  if _PROFILE.value:
    pipes['effllm_jax'].send('profile')
    spent = bench_workers.ask(pipes['effllm_jax'])
  memory = {}
  for name, pipe in pipes.items():
    pipe.send('end')
    memory[name] = bench_workers.ask(pipe)
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
  console = cli.tables()
  console.print(
    f'{facts["device"]}; {facts["params"]:,} parameters, {facts["tokens"]} '
    f'tokens a step, {facts["dtype"]}, kernels {facts["kernels"]}; '
    f'{facts["flops"] / 1e12:.2f} TFLOP a step, {best / 1e12:.2f} TFLOP/s in a '
    f'large product; masks, scores and origins are '
    f'{facts["pruning"]:.3%} of the parameters',
    soft_wrap=True,
  )
  console.print(table)
  if _PROFILE.value:
    table = rich.table.Table('kind of operation', 'seconds', 'share')
    total = sum(spent.values())
    for kind, value in sorted(spent.items(), key=lambda x: -x[1]):
      if value >= 0.01 * total:
        table.add_row(kind, f'{value:.3f}', f'{value / total:.1%}')
    table.add_row('all', f'{total:.3f}', '')
    console.print(table)


if __name__ == '__main__':
  flags.mark_flag_as_required('config')
  cli.run(main)
