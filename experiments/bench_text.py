r"""How fast a text becomes a dataset and tokens, and in how much memory.

    python -m experiments.bench_text
    python -m experiments.bench_text --documents=4 --size=16000000

Writes a folder of documents, each of random words of the tokenizer of --source,
and builds from it what a run would: the dataset (deduplicated, a twentieth held
out), then the tokens of its training text. Each in a process of its own, which
tells the most memory that it had before, and in all. The folder is in that of
temporary files, and deleted afterwards; the source is kept, below --cache.
"""

import contextlib
import pathlib
import random
import tempfile
import time

from absl import flags

from effllm_jax import atomic
from effllm_jax import errors
from effllm_jax import timing
from experiments import alone
from experiments import cli

_DOCUMENTS = flags.DEFINE_integer('documents', 4000, 'How many.', lower_bound=2)
_SIZE = flags.DEFINE_integer(
  'size', 16_000, 'Bytes of each.', lower_bound=1_000
)
_SOURCE = flags.DEFINE_string(
  'source', 'smollm2-135m', 'Whose tokenizer; what --config.source takes.'
)
_KINDS, _PARAGRAPH = 20_000, 80  # Of words; words of each.


def main(argv: list[str]) -> None:
  """Builds both, and prints the table."""
  del argv
  # After the flags have been checked: these imports take seconds.
  import rich.table

  from effllm_jax import sources

  source = sources.load(
    _SOURCE.value, cli.CACHE.value, params=False, flag='--source'
  )
  above = pathlib.Path(tempfile.gettempdir())
  remedy = 'free some space, or set TMPDIR to a folder on another disk'
  with contextlib.ExitStack() as stack:
    with errors.writing(above, remedy):
      folder = stack.enter_context(atomic.scratch(above))
      size = _write(folder / 'text', source.tokenizer)
    ids = source.tokenizer.to_str(), source.separator_id
    rows = [
      alone.call('the dataset', _dataset, folder),
      alone.call('the tokens', _tokens, folder, *ids),
    ]
  table = rich.table.Table(
    '', 'seconds', 'MB/s', 'memory before, GB', 'at the peak'
  )
  for name, (seconds, *memory) in zip(('dataset', 'tokens'), rows, strict=True):
    held = ('unknown' if x is None else f'{x / 1e9:.2f}' for x in memory)
    table.add_row(name, f'{seconds:.1f}', f'{size / seconds / 1e6:.2f}', *held)
  console = cli.tables()
  console.print(
    f'{_DOCUMENTS.value:,} documents, {size / 1e6:.1f} MB, words of '
    f'{_SOURCE.value}'
  )
  console.print(table)


def _write(folder: pathlib.Path, tokenizer) -> int:
  """Writes the documents, a file each; returns their bytes."""
  folder.mkdir()
  # A token that begins a word says so by one of these letters.
  words = [x[1:] for x in tokenizer.get_vocab() if x[0] in 'Ġ▁']
  words = sorted(filter(str.isalpha, words))[:_KINDS] or ['word']
  rng, size = random.Random(0), 0
  for i in range(_DOCUMENTS.value):
    # No word is shorter than a letter and a blank. In a list: what a signal
    # raised while an array of numpy was joined was lost 2 of 6 times.
    drawn = rng.choices(words, k=_SIZE.value // 2)
    text = '\n\n'.join(
      ' '.join(drawn[j : j + _PARAGRAPH])
      for j in range(0, len(drawn), _PARAGRAPH)
    )
    data = text.encode()[: _SIZE.value].decode(errors='ignore').encode()
    (folder / f'{i:07d}.txt').write_bytes(data)
    size += len(data)
  return size


def _dataset(folder):
  from effllm_jax import corpus

  return _measured(lambda: corpus.prepare(f'{folder}/text', folder))


def _tokens(folder, tokenizer, separator_id):
  import tokenizers

  from effllm_jax import corpus
  from effllm_jax import tokenizing

  # It is there, and not read again.
  data_dir = corpus.prepare(f'{folder}/text', folder)
  tokenizer = tokenizers.Tokenizer.from_str(tokenizer)
  return _measured(
    lambda: tokenizing.tokenize(data_dir, tokenizer, separator_id)
  )


def _measured(work):
  before, start = timing.memory('VmHWM'), time.perf_counter()
  work()
  return time.perf_counter() - start, before, timing.memory('VmHWM')


if __name__ == '__main__':
  cli.run(main)
