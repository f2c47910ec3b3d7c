r"""Our run beside Torch-Pruning and LLM-Pruner: same work, one table.

    pip install -r requirements-torch.txt -r requirements-peers.txt
    python -m experiments.peers \
      --config=experiments/configs/efficientllm_a.py --workdir=runs/peers \
      [--arms=ours,torch_dense,torch_pruning] [--scoring_batches=10]

Every arm starts from the same weights, trains on the same windows in the same
order with the same AdamW and rates, on as many threads (`taskset -c` says how
many), and ends within the same number of parameters; bits per byte are of the
same held-out windows. The others train in PyTorch.

| arm | |
| --- | --- |
| `ours` | the config as it is, through the loop of `experiments.main` |
| `ours_ragged` | the same by `obd`, layers keep different widths |
| `torch_dense` | the source model, not pruned |
| `torch_pruning` | Torch-Pruning's Taylor importance, once, before training |
| `torch_pruning_iterative` | five times, in the window in which ours prunes |
| `llm_pruner` | LLM-Pruner's `param_first` and its choice of layers |
| `llm_pruner_mix` | its `param_mix`, in all layers |

All but `llm_pruner`, which leaves the first four and the last two layers alone,
end in one width of `prune.multiple_of.ffn`. There `param_first` ranks as
Torch-Pruning's importance does, and has no arm of its own. A prune of theirs
scores --scoring_batches of the text that is to come, which train nothing yet:
these passes are counted in the seconds, not in the tokens.

Arms run one after another, each in a process of its own; a finished one has its
row in `results.jsonl` and is not run again. One of ours that was stopped goes
on (memory and the time in all are then left out), one of the others starts
again.
"""

import pathlib

from absl import flags
from ml_collections import config_flags
import rich.table

from experiments import cli
from experiments import peer_arms

_CONFIG = config_flags.DEFINE_config_file(
  'config', None, 'A file in experiments/configs.', lock_config=True
)
_WORKDIR = flags.DEFINE_string('workdir', None, 'Folder of the comparison.')
_ARMS = flags.DEFINE_list(
  'arms', [*peer_arms.OURS, *peer_arms.OTHERS], 'Which arms to run.'
)
_SCORING = flags.DEFINE_integer(
  'scoring_batches', 10, 'That the others score before a prune.', lower_bound=1
)


def main(argv: list[str]) -> None:
  """Runs the arms that are not there yet, then prints all."""
  del argv
  from effllm_jax import checkpoint_writer

  config, folder = cli.config(_CONFIG), pathlib.Path(_WORKDIR.value)
  peer_arms.check(_ARMS.value)
  bench = peer_arms.Bench(config, folder, cli.CACHE.value, _SCORING.value)
  try:
    _print(bench.results(_ARMS.value))
  except OSError as e:
    raise checkpoint_writer.write_error(e) from e


def _print(rows) -> None:
  domains = [*rows[0]['domains']]
  table = rich.table.Table(
    'arm', 'parameters', 'heads', 'ffn', 'stem', 'source', 'pruned', 'end',
    *domains, 'tokens/s', 'seconds', 'in all', 'GB',
    title=f'bits per byte; {rows[0]["tokens"]:,} tokens, '
    f'{rows[0]["threads"]} threads',
  )  # fmt: skip
  for row in rows:
    bits = row['bits_per_byte']
    peak, total = row['peak_bytes'], row['total_seconds']
    table.add_row(
      row['arm'],
      f'{row["params"]:,}',
      *(f'{row["widths"][t]:,.4g}' for t in ('heads', 'ffn', 'stem')),
      *(
        f'{bits[phase]:.4f}' if phase in bits else ''
        for phase in ('source', 'pruned', 'final')
      ),
      *(f'{row["domains"][d]:.4f}' for d in domains),
      f'{row["tokens_per_second"]:.0f}',
      f'{row["seconds"]:.0f}',
      '' if total is None else f'{total:.0f}',
      '' if peak is None else f'{peak / 1e9:.2f}',
    )
  cli.tables().print(table)


if __name__ == '__main__':
  flags.mark_flags_as_required(['config', 'workdir'])
  cli.run(main)
