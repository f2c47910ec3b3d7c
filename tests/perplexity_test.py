"""Losses on a text of the user's own."""

import gzip
import json
import re

import jax
import numpy as np
import pytest

from effllm_jax import atomic
from effllm_jax import corpus
from effllm_jax import dataset
from effllm_jax import documents as documents_lib
from effllm_jax import errors
from effllm_jax import heldout
from effllm_jax import model
from effllm_jax import runlog
from effllm_jax import sources
from effllm_jax import structure
from effllm_jax import tables
from effllm_jax import text_folder
from tests import conftest
from tests import export_test
from tests import model_files
from tests import ngrams_test
from tests import runs

Document = documents_lib.Document


def nats(params, masks, cfg, tokenizer, separator, texts, seq_len):
  """Sum over the tokens of texts, a window at a time, and their number."""
  tokens, scored = [], []
  for text in texts:
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    tokens += [separator, *ids]
    scored += [False, *[True] * len(ids)]
  params, masks = jax.device_put((params, masks))
  forward = jax.jit(lambda x: model.forward(params, masks, x, cfg)[0])
  total = 0.0
  for start in range(0, len(tokens) - 1, seq_len):
    window = tokens[start : start + seq_len + 1]
    # What follows the last token changes nothing before it.
    inputs = np.zeros((1, seq_len), np.int32)
    inputs[0, : len(window) - 1] = window[:-1]
    logp = np.asarray(jax.nn.log_softmax(forward(inputs)[0]))
    for i, target in enumerate(window[1:]):
      if scored[start + i + 1]:
        total -= float(logp[i, target])
  return total, sum(scored)


def shown(stdout, row) -> list[str]:
  """The cells of a row of a printed table."""
  (line,) = re.findall(rf'^ *{row} +(.*)$', stdout, re.MULTILINE)
  return line.split()


def test_a_run_beside_its_source(tmp_path):
  """By hand, one window after the other; on two domains and on one file."""
  gguf = model_files.write_gguf(tmp_path / 'toy.gguf')
  found = sources.load(gguf, model_files.CACHE)
  folder = sources.save(found, tmp_path / 'saved')
  workdir = tmp_path / 'run'
  params, masks = export_test.write_checkpoint(
    workdir, folder, lambda m: m.replace(ffn=m.ffn.at[0, 64:].set(False))
  )
  # It was trained on a part of one domain of what it is measured on.
  cache, trained = tmp_path / 'cache', tmp_path / 'trained'
  trained.mkdir()
  config = {'source': str(gguf), 'data': {'text': str(trained)}}
  (workdir / 'config.json').write_text(json.dumps(config))
  texts = [x[:500] for x in conftest.real_text()[:3]]
  text = tmp_path / 'text'
  (text / 'b').mkdir(parents=True)
  (text / 'a1.txt').write_text(texts[0])
  with gzip.open(text / 'b' / 'rows.jsonl.gz', 'wt') as file:
    file.writelines(json.dumps({'text': x}) + '\n' for x in texts[1:])
  for i, document in enumerate([texts[1][:250], *conftest.real_text()[3:]]):
    (trained / f'{i}.txt').write_text(document)
  dataset_dir = corpus.prepare(str(trained), cache)
  known = {
    run
    for x in dataset.documents(dataset_dir, 'train')
    for run in ngrams_test.runs_of(x.text)
  }
  shares = [
    np.mean([run in known for x in some for run in ngrams_test.runs_of(x)])
    for some in (texts[:1], texts[1:])
  ]
  assert shares[0] == 0 and 0.2 < shares[1] < 0.8
  atomic.write_json(workdir / runlog.TEXT, dataset.manifest(dataset_dir))

  def by_hand(*domains):
    """Of the source, and of what the run has made of it."""
    domains = [[x.strip() for x in texts] for texts in domains]
    size = sum(len(x.encode()) for texts in domains for x in texts)
    losses = []
    for tree, alive in (
      (found.params, structure.all_alive(found.cfg)),
      (params, masks),
    ):
      total, count = map(
        sum,
        zip(
          *(
            nats(
              tree, alive, found.cfg, found.tokenizer, found.separator_id,
              texts, 16,
            )
            for texts in domains
          ),
          strict=True,
        ),
      )  # fmt: skip
      losses.append((total / size / np.log(2), total / count))
    return losses, size, count

  flags = f'--cache={cache}', '--seq_len=16', '--batch_tokens=50'
  of_run = f'--workdir={workdir}', f'--text={text}', *flags
  done = conftest.command('perplexity', *of_run, '--contamination')
  assert done.returncode == 0, done.stderr
  first, second = by_hand(texts[:1]), by_hand(texts[1:])
  both = by_hand(texts[:1], texts[1:])
  assert 'source' in done.stdout and 'step 5' in done.stdout
  for row, (losses, *_), share in (
    ('text', first, [f'{shares[0]:.1%}']),
    ('b', second, [f'{shares[1]:.1%}']),
    ('bits per byte', both, []),
  ):
    cells = shown(done.stdout, row)
    assert cells[2:] == share
    cells = [float(x) for x in cells[:2]]
    assert cells == pytest.approx([bits for bits, _ in losses], abs=2e-4)
  losses, size, count = both
  cells = [float(x) for x in shown(done.stdout, 'nats per token')]
  assert cells == pytest.approx([x for _, x in losses], abs=2e-4)
  cells = [float(x.replace(',', '')) for x in shown(done.stdout, 'perplexity')]
  assert cells == pytest.approx([np.exp(x) for _, x in losses], rel=1e-3)
  assert f'text: {size:,} bytes, {count:,} tokens' in done.stderr
  assert 'in windows of 16' in done.stderr

  # Another text lies there now: of it nothing is said.
  (trained / '0.txt').write_text('Something else.')
  runs.refused(
    conftest.command('perplexity', *of_run, '--contamination'),
    'data.text', 'is not the text', 'digest=',
  )  # fmt: skip
  (workdir / 'config.json').write_text(json.dumps({'source': str(gguf)}))
  runs.refused(
    conftest.command('perplexity', *of_run, '--contamination'),
    'config.json has no data.text',
  )

  done = conftest.command(
    'perplexity', f'--model={gguf}', f'--text={text / "a1.txt"}', *flags
  )
  assert done.returncode == 0, done.stderr
  (of_source, _), size, count = first
  assert f'a1: {size:,} bytes, {count:,} tokens' in done.stderr
  (cell,) = shown(done.stdout, 'bits per byte')
  assert float(cell) == pytest.approx(of_source[0], abs=2e-4)
  # One domain is all there is.
  assert len(re.findall(r'\d\.\d{4} *$', done.stdout, re.MULTILINE)) == 2


def test_windows_are_no_longer_than_the_context(tmp_path):
  folder = conftest.write_model_folder(tmp_path / 'model')
  (tmp_path / 'a.txt').write_text(conftest.real_text()[0])
  done = conftest.command(
    'perplexity', f'--model={folder}', f'--text={tmp_path / "a.txt"}',
    '--tokens=300',
  )  # fmt: skip
  assert done.returncode == 0, done.stderr
  assert '300 tokens' in done.stderr and 'in windows of 128' in done.stderr


def test_windows_are_those_of_a_dataset():
  """In the order in which documents come, whatever their ids are."""
  bpe = conftest.byte_bpe(conftest.real_text()[:6])
  texts = [Document('a', 'z', 'one two'), Document('b', 'y', 'three'),
           Document('a', 'x', 'four')]  # fmt: skip
  found = heldout.windows(texts, bpe, 7, seq_len=4, tokens_per_domain=0)
  assert [*found] == ['a', 'b']
  ids = [bpe.encode(x).ids for x in ('one two', 'four')]
  tokens = [7, *ids[0], 7, *ids[1]]
  held = found['a']
  assert held.num_bytes == len('one twofour')
  ends = held.windows[1:, 0] == held.windows[:-1, -1]
  flat = [held.windows[0, 0], *held.windows[:, 1:].ravel()]
  assert ends.all() and flat[: len(tokens)] == tokens
  weight = held.weight.ravel()[: len(tokens) - 1]
  assert weight.tolist() == [*[1] * len(ids[0]), 0, *[1] * len(ids[1])]
  assert not held.weight.ravel()[len(tokens) - 1 :].any()
  for settings in ({'seq_len': 0}, {'tokens_per_domain': -1}):
    with pytest.raises(errors.InputError, match='is too small; set a positive'):
      heldout.windows(
        texts, bpe, 7, **{'seq_len': 4, 'tokens_per_domain': 0} | settings
      )


def test_what_is_no_text(tmp_path):
  (tmp_path / 'a.md').write_text('x')
  (tmp_path / 'empty').mkdir()
  for text in (tmp_path / 'a.md', tmp_path / 'no', '', '~nobody/x', 'a\0b'):
    with pytest.raises(
      errors.InputError, match=r'is neither a \.txt, .* such; set --text$'
    ):
      text_folder.read(str(text), 'set --text')
  with pytest.raises(errors.InputError, match=r'holds no text; .* set --text$'):
    list(text_folder.read(str(tmp_path / 'empty'), 'set --text'))
  (tmp_path / 'a.jsonl').write_text('{"body": "x"}\n')
  with pytest.raises(errors.InputError, match=r'a\.jsonl:1: no string under'):
    list(text_folder.read(str(tmp_path / 'a.jsonl'), 'set --text'))


@pytest.mark.parametrize(
  ('arguments', 'words'),
  [
    (['--text=a'], 'set one of --workdir and --model'),
    (['--model=a', '--event=1', '--text=a'], '--event 1 is that of a run'),
    (['--model=a', '--contamination', '--text=a'], "what 'a' was trained on"),
    (['--model=a'], '--text is not given'),
    (['--model=a', '--text=README.md'], "'README.md' is neither a .txt"),
    (['--model=a', '--text=requirements.txt'], "source 'a' is not known"),
    (['--workdir=no', '--text=requirements.txt'], 'no'),
    (['--model=a', '--text=a', '--seq_len=0'], 'seq_len'),
  ],
)
def test_refused(arguments, words):
  runs.refused(conftest.command('perplexity', *arguments), words)


def test_a_table_of_one_domain_does_not_say_it_twice():
  result = {
    'bits_per_byte': 1.25, 'domains': {'a': 1.25}, 'nats_per_token': 0.0,
  }  # fmt: skip
  table = tables.perplexity({'model': result}, 'Losses')
  assert table.rows == (
    ('bits per byte', '1.2500'),
    ('nats per token', '0.0000'),
    ('perplexity', '1.00'),
  )
  two = result | {'domains': {'a': 1.0, 'b': 1.5}}
  table = tables.perplexity({'model': result}, 'Losses', {'a': 0.1234})
  assert table.columns == ('', 'model', 'in training text')
  assert [row[2] for row in table.rows] == ['12.3%', '', '']
  rows = tables.perplexity({'model': two, 'other': two}, 'Losses').rows
  assert rows[1:3] == (('a', '1.0000', '1.0000'), ('b', '1.5000', '1.5000'))
