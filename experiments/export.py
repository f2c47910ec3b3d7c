"""Writes the model of a run as a Hugging Face folder, checked in PyTorch.

    python -m experiments.export --workdir=runs/a [--event=3] --out=out/

Without --event it is the newest checkpoint; with it, the model right after that
shrink. Groups that are masked but still in the arrays are taken out first;
where layers differ in width, zeros fill up the narrower ones.
"""

from absl import flags

from experiments import cli

_WORKDIR = flags.DEFINE_string('workdir', None, 'Folder of the run.')
_EVENT = flags.DEFINE_integer('event', None, 'Index of a shrink event.')
_OUT = flags.DEFINE_string('out', None, 'Folder to write; new or empty.')


def main(argv: list[str]) -> None:
  """Exports, then prints where the folder is and what it holds."""
  del argv
  # After the flags have been parsed: these imports take seconds.
  import pathlib

  import numpy as np

  from effllm_jax import checkpoints
  from effllm_jax import events
  from effllm_jax import export
  from effllm_jax import shrink
  from effllm_jax import sources
  from effllm_jax import structure

  params, prune, cfg, step = checkpoints.restore_params(
    _WORKDIR.value, _EVENT.value
  )
  after = shrink.shrunk_config(prune.masks, cfg, structure.Groups(1, 1, 1))
  kept = shrink.kept_indices(prune.masks, prune.scores, after)
  masks = shrink.take_groups(prune.masks, kept)
  saved = pathlib.Path(_WORKDIR.value) / 'source'
  origin = events.compose(
    sources.load_saved(saved).origin, shrink.take_groups(prune.origin, kept)
  )
  # For every slot, the index of its group in the model that the first run of
  # the family started from; -1 is padding.
  origin = {
    t: np.where(getattr(masks, t), getattr(origin, t), -1).tolist()
    for t in structure.TYPES
  }
  report = export.hugging_face(
    shrink.take_params(params, kept),
    masks,
    after,
    _OUT.value,
    saved,
    {
      'step': step,
      'widths': after.widths(),
      'events': [
        {
          'index': event.index,
          'step': event.step,
          'tokens': event.tokens,
          'widths': event.after.widths(),
        }
        for event in checkpoints.read_events(_WORKDIR.value)
        if event.step <= step
      ],
      'origin': origin,
    },
  )
  print(f'{report["path"]}: {report["architecture"]}')
  print(f'  parameters                {report["params"]:15,}')
  print(f'  of them zero padding      {report["padding"]:15,}')
  print(f'  logit difference, largest {report["max_logit_diff"]:15.1e}')
  print(f'  greedy tokens, all equal  {report["greedy_tokens"]:15}')
  for name, size in report['files'].items():
    print(f'  {name:25} {size / 1e6:12,.2f} MB')


if __name__ == '__main__':
  flags.mark_flags_as_required(['workdir', 'out'])
  cli.run(main)
