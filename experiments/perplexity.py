r"""Bits per byte and perplexity of a model on a text of your own.

    python -m experiments.perplexity --workdir=runs/a [--event=1] \
      --text=wiki.test.txt [--seq_len=2048] [--contamination]
    python -m experiments.perplexity --model=smollm2-135m --text=texts

A run's model is measured beside its source, on the same text. `--text` is a
.txt, .jsonl or .parquet file, packed or not, or a folder of such, as
`data.text` takes them; nothing of it is split off or cleaned away. Documents
follow each other, each after a separator, and are read in windows of
`--seq_len` that do not overlap, so that every token counts once. Perplexity is
e to the nats per token, and so compares models with one tokenizer only, at one
`--seq_len`; bits per byte compare any. `--contamination` also counts how much
of the text, as runs of 13 words, a run was trained on.
"""

from absl import flags

from effllm_jax import errors
from experiments import cli

_WORKDIR = flags.DEFINE_string('workdir', None, 'Folder of the run.')
_EVENT = flags.DEFINE_integer('event', None, 'Index of a shrink event.')
_MODEL = flags.DEFINE_string(
  'model', None,
  'Instead of --workdir: any model that --config.source takes.',
)  # fmt: skip
_TEXT = flags.DEFINE_string(
  'text', None, 'A file, or a folder whose subfolders are domains.'
)
_SEQ_LEN = flags.DEFINE_integer(
  'seq_len', 2048,
  'Tokens of a window; at most the context of the model, which is taken where '
  'it is shorter.', lower_bound=1,
)  # fmt: skip
_TOKENS = flags.DEFINE_integer(
  'tokens', 0, 'The first tokens of each domain; 0: all.', lower_bound=0
)
_BATCH_TOKENS = flags.DEFINE_integer(
  'batch_tokens', 2048, 'Tokens that are read at once.', lower_bound=1
)
_CONTAMINATION = flags.DEFINE_bool(
  'contamination', False,
  'Of a run: how much of each domain is in the text that it was trained on, '
  'which is looked through once, some 7 MB a second.',
)  # fmt: skip
flags.mark_flag_as_required('text')


def main(argv: list[str]) -> None:
  """Measures, and prints the table."""
  del argv
  cli.check_model(_WORKDIR.value, _EVENT.value, _MODEL.value)
  if _CONTAMINATION.value and _WORKDIR.value is None:
    raise errors.InputError(
      f'what {_MODEL.value!r} was trained on is not known; leave '
      '--contamination out, or set --workdir instead of --model'
    )
  # After the flags have been checked: these imports take seconds.
  import rich.progress

  from effllm_jax import console as console_lib
  from effllm_jax import evaluate
  from effllm_jax import finished
  from effllm_jax import heldout as heldout_lib
  from effllm_jax import inputs
  from effllm_jax import kernels
  from effllm_jax import model as model_lib
  from effllm_jax import sources
  from effllm_jax import tables
  from effllm_jax import text_folder
  from effllm_jax import widths

  documents, shared = text_folder.read(_TEXT.value, 'set --text'), None
  if _WORKDIR.value is None:
    found = sources.load(_MODEL.value, cli.CACHE.value, flag='--model')
    models = {'model': finished.tight(found)}
  else:
    model, made = finished.read(_WORKDIR.value, _EVENT.value)
    source = finished.source(_WORKDIR.value, made, cli.CACHE.value)
    models = {'source': source, f'step {made.step:,}': model}
    if _CONTAMINATION.value:
      trained = finished.training_text(_WORKDIR.value, made, cli.CACHE.value)
      shared = inputs.shared(documents, trained)
  last = [*models.values()][-1]
  seq_len = min(_SEQ_LEN.value, last.cfg.context)
  text = heldout_lib.windows(
    documents,
    last.tokenizer,
    last.separator_id,
    seq_len=seq_len,
    tokens_per_domain=_TOKENS.value,
  )
  results = {}
  console = console_lib.plain(stderr=True)
  size = sum(held.num_bytes for held in text.values())
  tokens = sum(int(held.weight.sum()) for held in text.values())
  console.print(
    f'{documents.label}: {size:,} bytes, {tokens:,} tokens of '
    f'{last.name}, in windows of {seq_len:,}',
    highlight=False,
    soft_wrap=True,
  )
  with rich.progress.Progress(console=console, transient=True) as bars:
    for name, model in models.items():
      bar = bars.add_task(name, total=None)
      results[name] = evaluate.bits_per_byte(
        model.params,
        widths.whole(model.masks, model.cfg),
        text,
        model.cfg,
        model_lib.Compute(remat='none', kernels=kernels.resolve(None)),
        max(1, _BATCH_TOKENS.value // seq_len),
        lambda done, total, bar=bar: bars.update(
          bar, completed=done, total=total
        ),
      )
  table = tables.perplexity(results, f'Losses on {documents.label}', shared)
  cli.tables().print(table.rich())


if __name__ == '__main__':
  cli.run(main)
