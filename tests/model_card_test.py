"""The card of an exported folder: what it says is what the run recorded."""

import dataclasses
import json
import shutil

import pytest

from effllm_jax import agreement
from effllm_jax import benchmark_items
from effllm_jax import environment
from effllm_jax import finished
from effllm_jax import model_card
from effllm_jax import runlog
from effllm_jax import sources
from effllm_jax import tables
from effllm_jax import widths
from tests import environment_test
from tests import model_files
from tests import report_test

FILES = {'config.json': 700, 'model.safetensors': 5_000_000}
SPEEDS = {
  'step': 60,
  'pad': 1,
  'machine': 'a phone',
  'rows': [
    {'format': 'gguf-f16', 'model': 'pruned', 'bytes': 2e8, 'prefill': 475.25,
     'decode': 94.5, 'memory': 3e8, 'bits_per_byte': 1.25},
  ],
}  # fmt: skip
# All tasks of the source and of step 40, one of step 60.
BENCHMARKS = {
  'harness': 'lm-eval 1.2',
  'rows': [
    {'step': step, 'task': task, 'metric': metric, 'items': 100, 'limit': 100,
     'value': 0.5 if metric == 'acc' else 0.25, 'stderr': 0.07}
    for step, tasks in (
      (None, benchmark_items.TABLE2),
      (40, benchmark_items.TABLE2),
      (60, ('piqa',)),
    )
    for task in tasks
    for metric in (
      ('acc',) if task in ('boolq', 'winogrande') else ('acc', 'acc_norm')
    )
  ],
}  # fmt: skip
TEXT = {
  'domains': {'verse': {'train': {'bytes': 4_700_000}}},
  'packages': [
    {'name': 'poems', 'version': '1.2', 'licence': 'CC0', 'domain': 'verse'}
  ],
}


@pytest.fixture(name='card')
def _card(tmp_path):
  """A function of what is in a workdir, to the card of its model."""
  folder = tmp_path / 'run'
  report_test.write_run(folder)
  gguf = model_files.write_gguf(tmp_path / 'toy.gguf')
  model = sources.load(gguf, model_files.CACHE)
  masks = widths.whole(None, model.cfg)

  def write(
    step=60, licence='apache-2.0', formats=('hf',), pad=1, names=(),
    params=1_234_567, **files
  ):  # fmt: skip
    for name, content in files.items():
      (folder / f'{name}.json').write_text(json.dumps(content))
    run = runlog.read(folder)
    made = model_card.Made(
      step=step,
      params=params,
      pruning={'events': finished.shrinks(run, step)},
      run=run,
    )
    found = agreement.Agreement(1e-5, 2e-4, 0.987, True)
    return model_card.text(
      dataclasses.replace(model, masks=masks, licence=licence, **dict(names)),
      made,
      FILES,
      dict.fromkeys(formats, found),
      pad,
    )

  return write


def rows(card):
  """Cells of all tables by the first one."""
  lines = [x.split('|')[1:-1] for x in card.splitlines() if x[:1] == '|']
  return {x[0].strip(): [y.strip() for y in x[1:]] for x in lines}


def test_lineage_quality_and_files(card):
  text = card(text=TEXT)
  cells = rows(text)
  assert cells['parameters'] == ['1,234,567 of 134,515,008']
  assert cells['budget'] == ['at most 107.6M parameters']
  assert cells['training'] == ['60 steps, 30,720 tokens']
  assert cells['shrink events'] == ['3']
  source, here = cells['all text']
  assert source == '0.9970' and float(here) > 0.997
  assert cells['verse'][-2:] == ['4.7 MB', 'poems 1.2: CC0']
  assert cells['model.safetensors'] == [
    '5.0\xa0MB',
    '1.0e-05',
    '2.0e-04',
    '98.7',
  ]
  assert cells['config.json'] == ['0.7\xa0kB', '', '', '']
  assert text == card(text=TEXT)


def test_shrinks_are_counted_where_their_events_are_gone(card):
  """Up to the model: the run of 60 steps shrank after 20, 32 and 42 of them."""
  for step, count in ((60, '3'), (42, '3'), (41, '2'), (19, '0')):
    assert rows(card(step=step))['shrink events'] == [count]


def test_a_model_from_before_the_end_of_its_run(card):
  cells = rows(card(step=41))
  assert cells['training'] == ['41 of 60 steps, 20,992 tokens']
  assert cells['budget'] == ['at most 107.6M parameters at the end of the run']


def test_a_model_of_a_run_that_was_stopped(card, tmp_path):
  shutil.rmtree(tmp_path / 'run')
  report_test.write_run(tmp_path / 'run', until=20)
  cells = rows(card(step=20))
  assert cells['training'] == ['20 steps, 10,240 tokens']
  assert cells['budget'] == ['at most 107.6M parameters at the end of the run']


def test_where_the_steps_of_a_model_were_computed(card, tmp_path):
  """Not those that a run made after it."""
  assert rows(card())['computed on'] == ['not recorded']
  row = environment_test.ROW
  environment.record(tmp_path / 'run', row)
  environment.record(
    tmp_path / 'run',
    row | {'step': 40, 'device': 'NVIDIA H100', 'devices': 8},
  )
  first = 'AMD EPYC (family 25, model 17), jax 0.10.2'
  assert rows(card(step=40))['computed on'] == [first]
  assert rows(card())['computed on'] == [
    f'{first}, then 8 x NVIDIA H100, jax 0.10.2'
  ]


def test_a_run_that_pruned_nothing_does_not_claim_it(card, tmp_path):
  config = json.loads((tmp_path / 'run' / 'config.json').read_text())
  assert 'Pruned from' in card()
  config['prune']['policy'] = 'none'
  # Nor does one that has not pruned yet.
  early = card(step=1, params=134_515_008)
  assert 'nothing pruned' in early and 'Pruned from' not in early
  assert '- pruning\n' in card() and '- pruning\n' not in early
  text = card(config=config)
  assert rows(text)['budget'] == ['none: training only']
  assert 'nothing pruned' in text and 'Pruned from' not in text


def test_a_run_from_new_weights_claims_none_of_its_source(card, tmp_path):
  config = json.loads((tmp_path / 'run' / 'config.json').read_text())
  config['init'] = 'random'
  names = {'description': 'from scratch, in the shape of Toy'}
  text = card(config=config, names=names)
  assert 'Trained from scratch, in the shape of Toy, and pruned by' in text
  assert rows(text)['its weights, sha256'] == ['not used: new ones']
  assert 'what its source may say' not in text
  text = card(config=config, names=names, step=1, params=134_515_008)
  assert 'parameters, trained from scratch' in text


def test_a_library_is_named_where_it_opens_the_folder(card):
  named = 'library_name: transformers\n'
  assert named in card(formats=('gguf-f16', 'hf-trimmed'))
  assert named not in card(formats=('gguf-f16', 'onnx'))


def test_what_was_not_measured_is_not_claimed(card):
  text = card(step=1)
  assert rows(text)['all text'] == ['0.9970', 'not measured']
  assert rows(text)['not recorded'] == ['', '']
  assert 'a phone' not in text


def test_speeds_are_those_of_this_model(card):
  text = card(edge=SPEEDS)
  assert 'On the edge: a phone' in text
  assert rows(text)['gguf-f16'] == [
    'pruned', '200.0', '475.2', '94.5', '300.0', '1.2500',
  ]  # fmt: skip
  assert 'a phone' not in card(step=1)
  # Padded it is another file, and another speed.
  assert 'a phone' not in card(pad=64)
  padded = SPEEDS | {'pad': 64}
  assert 'a phone' not in card(edge=padded)
  assert 'a phone' in card(edge=padded, pad=64)


def test_benchmarks_are_those_of_this_model(card):
  text = card(benchmarks=BENCHMARKS)
  assert 'Benchmarks: lm-eval 1.2' in text and 'step 40' not in text
  assert rows(text)['piqa, acc'] == ['100', *['0.500 ± 0.070'] * 2]
  assert rows(text)['boolq, acc'] == ['100', '0.500 ± 0.070', '\N{EN DASH}']
  assert 'lm-eval' not in card(step=1)


def test_average_of_benchmarks():
  """Of acc_norm where there is one; of models that were asked all seven."""
  table = tables.benchmarks(BENCHMARKS)
  assert table.columns == ('task', 'items', 'source', 'step 40', 'step 60')
  (row,) = [x for x in table.rows if 'average' in x[0]]
  # (5 * 0.25 + 2 * 0.5) / 7 and 0.07 / sqrt(7).
  assert row[1:] == ('700', *['0.321 ± 0.026'] * 2, '\N{EN DASH}')
  known = [x for x in BENCHMARKS['rows'] if x['task'] != 'piqa']
  table = tables.benchmarks({'harness': '', 'rows': known})
  assert not any('average' in x[0] for x in table.rows)
  one = {**known[0], 'items': 1, 'stderr': None, 'metric': 'perplexity'}
  table = tables.benchmarks({'harness': '', 'rows': [one]})
  assert table.rows == (('arc_easy, perplexity', '1', '0.50'),)


@pytest.mark.parametrize(
  ('licence', 'front'),
  [
    ('apache-2.0', 'apache-2.0'),
    (None, 'unknown'),
    ('mine: all\nmine', 'other'),
  ],
)
def test_front_matter(card, tmp_path, licence, front):
  folder = model_files.hugging_face(tmp_path / 'toy')
  (folder / 'README.md').write_text(card(licence=licence))
  again = sources.load(folder, model_files.CACHE, params=False)
  assert again.licence == front
  hub = pytest.importorskip('huggingface_hub')
  data = hub.ModelCard.load(folder / 'README.md').data
  assert data.license == front and data.pipeline_tag == 'text-generation'
  assert 'pruning' in data.tags


def test_another_licence_keeps_its_name(card, tmp_path):
  names = {'licence_name': 'llama3.2', 'licence_link': 'https://a.b/c#d'}
  text = card(licence='other', names=names)
  assert rows(text)['its licence'] == ['other, llama3.2, https://a.b/c#d']
  folder = model_files.hugging_face(tmp_path / 'toy')
  (folder / 'README.md').write_text(text)
  again = sources.load(folder, model_files.CACHE, params=False)
  assert {k: getattr(again, k) for k in names} == names

  hub = pytest.importorskip('huggingface_hub')
  hostile = 'x" y\\\nlicense: mit\x85---\u2028: #'
  card_file = tmp_path / 'README.md'
  card_file.write_text(card(licence='other', names={'licence_name': hostile}))
  data = hub.ModelCard.load(card_file).data
  assert data.license == 'other' and 'pruning' in data.tags
  assert data.license_name == 'x" y\\license: mit---: #'
  assert data.license_link is None


def test_how_to_use_it(card):
  text = card(formats=('hf', 'gguf-f16', 'gguf-q8_0', 'onnx'))
  assert "from_pretrained('.')" in text and 'trust_remote_code' not in text
  assert 'llama-cli -m model-f16.gguf' in text and 'model.onnx' in text
  # Model and tokenizer: transformers reads config.json for either.
  assert card(formats=('hf-trimmed',)).count('trust_remote_code=True') == 2
