import hashlib
import html.parser
import json
import pathlib
import shlex
import subprocess
import sys

from absl import flags
from matplotlib import image
from ml_collections import config_flags
import numpy as np
import pytest
import rich.console

from effllm_jax import errors
from effllm_jax import plots
from effllm_jax import report
from effllm_jax import runlog
from effllm_jax import tables
from experiments.configs import smollm2_135m

ROOT = pathlib.Path(__file__).parent.parent
FIGURES = ('size', 'price', 'loss', 'widths', 'speed')

# Of SmolLM2-135M, which has three key/value heads of three query heads each.
V, N, G, H = 49152, 30, 3, 64


def _params(widths):
  per_layer = widths['heads'] * (2 * G + 2) * H + 3 * widths['ffn']
  return round(widths['stem'] * (N * per_layer + V + 2 * N + 1))


def write_run(folder, steps=60, until=None, seed=0):
  """Writes the workdir of a run of `steps`, stopped after `until` steps.

  The arithmetic of sizes is that of SmolLM2-135M; losses and times are drawn
  to look like those of a real run.
  """
  until = steps if until is None else until
  rng = np.random.default_rng(seed)
  begin, end = round(0.1 * steps), round(0.7 * steps)
  full = {'heads': 3, 'ffn': 1536, 'stem': 576}
  dense, goal, per_step = _params(full), 107_600_000, 512
  arrays, widths, metrics, trace = dict(full), dict(full), [], []
  domains = {'docs': 0.1, 'code': -0.12, 'drama': 0.3, 'verse': 0.21}

  def evaluate(step, phase, bits):
    live = _params(widths)
    metrics.append(
      {'kind': 'eval', 'step': step, 'tokens': step * per_step,
       'phase': phase, 'live_params': live, 'bits_per_byte': bits,
       'domains': {d: bits + x for d, x in domains.items()},
       'nats_per_token': bits * 3, 'bytes': 50_000,
       'seconds': 9.0}
    )  # fmt: skip

  evaluate(0, 'source', 0.997)
  for step in range(1, until + 1):
    share = min(1.0, max(0.0, (step - begin) / (end - begin)))
    target = dense - share * (dense - goal) if step > begin else None
    prunes = begin < step <= end and (step % 2 == 0 or step == end)
    if prunes:
      before = dict(widths)
      while _params(widths) > target:
        widths['ffn' if widths['ffn'] % 9 else 'stem'] -= 1
        widths['ffn'] -= 1
      trace.append(
        {'step': step, 'tokens': step * per_step, 'target_params': target,
         'live_params': _params(widths), 'price': {},
         'removed': {'ffn': [[0, i] for i in range(before['ffn'])][:3]}}
      )  # fmt: skip
    drop = 1 - _params(widths) / dense
    recovered = 0.35 * max(0.0, (step - end) / (steps - end))
    loss = 3.35 + 4.2 * drop * (1 - recovered) + rng.normal(0, 0.12)
    price = 1.6e-7 * (1 + 5 * drop)
    seconds = 3.9 * _params(arrays) / dense * rng.lognormal(0, 0.03)
    row = {
      'kind': 'train', 'step': step, 'tokens': step * per_step, 'loss': loss,
      'grad_norm': 1.3, 'learning_rate': 3e-4, 'seconds': seconds,
      'compile_seconds': 0.0, 'data_seconds': 0.001,
      'tokens_per_second': per_step / seconds,
      'live_params': _params(widths), 'array_params': _params(arrays),
      'target_params': target, 'widths': dict(widths),
      'pruned': {t: 1 - w / full[t] for t, w in widths.items()},
      'price': {
        t: price * k * rng.lognormal(0, 0.05)
        for t, k in {'heads': 1.4, 'ffn': 1.0, 'stem': 1.1}.items()
      } if step <= end else None,
    }  # fmt: skip
    smaller = dict(widths)
    if prunes and (step == end or _params(widths) < 0.93 * _params(arrays)):
      metrics.append(
        {'kind': 'shrink', 'event': sum(x['kind'] == 'shrink' for x in metrics),
         'step': step, 'tokens': step * per_step, 'widths_before': arrays,
         'widths_after': smaller, 'params_before': _params(arrays),
         'params_after': _params(smaller), 'loss_before': loss,
         'loss_after': loss * (1 + 1e-7), 'seconds': 4.2}
      )  # fmt: skip
      arrays = smaller
    metrics.append(row)
    bits = 0.997 + 1.2 * drop * (1 - recovered)
    if step == steps:
      evaluate(step, 'final', bits)
    elif step == end:
      evaluate(step, 'pruned', bits)
    elif step % max(1, steps // 6) == 0:
      evaluate(step, 'pruning' if step < end else 'recovery', bits)
  config = {
    'source': 'smollm2-135m', 'seed': seed,
    'data': {'text': 'pypi', 'seq_len': 256, 'batch_size': 2, 'weights': {}},
    'optimizer': {'schedule': 'cosine', 'peak': 3e-4, 'warmup_tokens': 1024},
    'prune': {
      'target_params': goal, 'policy': 'uniform', 'every': 2,
      'begin_tokens': begin * per_step, 'end_tokens': end * per_step,
      'schedule': 'linear', 'floors': {'heads': 1, 'ffn': 64, 'stem': 64},
      'multiple_of': {'heads': 1, 'ffn': 64, 'stem': 64}, 'ema': 0.9,
    },
    'train': {'tokens': steps * per_step, 'accumulate': 1, 'log_every': 1},
  }  # fmt: skip
  (folder / 'source').mkdir(parents=True)
  lines = lambda rows: ''.join(json.dumps(x) + '\n' for x in rows)
  (folder / 'config.json').write_text(json.dumps(config))
  (folder / 'metrics.jsonl').write_text(lines(metrics))
  (folder / 'trace.jsonl').write_text(lines(trace))
  (folder / 'source' / 'source.json').write_text(
    json.dumps({'name': 'smollm2-135m', 'description': 'a small Llama'})
  )
  return metrics


class Page(html.parser.HTMLParser):
  """Collects what a page is made of and what it would load."""

  def __init__(self, path):
    super().__init__()
    self.tags, self.links, self.rows, self.text = [], [], [], ''
    self.cell = False
    self.feed(path.read_text())

  def handle_starttag(self, tag, attrs):
    self.tags.append(tag)
    self.links += [v for k, v in attrs if k in ('src', 'href', 'srcset')]
    if tag == 'tr':
      self.rows.append([])
    elif tag in ('th', 'td'):
      self.rows[-1].append('')
    self.cell = tag in ('th', 'td')

  def handle_data(self, data):
    self.text += data
    if self.cell:
      self.rows[-1][-1] += data

  def handle_endtag(self, tag):
    self.cell = False


@pytest.fixture(name='done', scope='module')
def _done(tmp_path_factory):
  """A finished run, its report and the rows of its metrics."""
  folder = tmp_path_factory.mktemp('runs') / 'a'
  metrics = write_run(folder)
  return folder, report.build(folder), metrics


def rows_of(metrics, kind):
  return [x for x in metrics if x['kind'] == kind]


def terminal(table, width=80):
  console = rich.console.Console(width=width)
  with console.capture() as shown:
    console.print(table.rich())
  return shown.get()


def edit(path, change):
  content = json.loads(path.read_text())
  change(content)
  path.write_text(json.dumps(content))


def test_table_has_the_numbers_of_the_run(done):
  folder, _, metrics = done
  table = report.table(folder)
  rows = {r[0]: r[1:] for r in table.rows}
  train, evals = rows_of(metrics, 'train'), rows_of(metrics, 'eval')
  pruned = next(e for e in evals if e['phase'] == 'pruned')
  live = train[-1]['live_params']
  assert live <= 107_600_000
  assert table.columns[1:4] == (
    'source model', 'last prune', 'pruned model',
  )  # fmt: skip
  assert rows['live parameters'] == (
    '134,515,008', f'{pruned["live_params"]:,}', f'{live:,}',
    '\N{MINUS SIGN}20.1\N{NO-BREAK SPACE}%',
  )  # fmt: skip
  assert rows['parameters in arrays'][2] == f'{live:,}'
  ffn = train[-1]['widths']['ffn']
  assert rows['ffn channels per layer'][:3] == ('1,536', *2 * [f'{ffn:,}'])
  assert rows['heads per layer'] == ('3', '3', '3', 'unchanged')
  bits = [e['bits_per_byte'] for e in (evals[0], pruned, evals[-1])]
  assert rows['held-out bits per byte'][:3] == tuple(f'{x:.4f}' for x in bits)
  drama = [e['domains']['drama'] for e in (evals[0], pruned, evals[-1])]
  assert rows['drama, bits per byte'][:3] == tuple(f'{x:.4f}' for x in drama)
  first = next(x for x in metrics if x['kind'] == 'shrink')['tokens']
  before = np.median([x['seconds'] for x in train if x['tokens'] <= first])
  assert rows['seconds per step'][0] == f'{before:.3g}'


def test_all_forms_of_a_table_say_the_same(done):
  folder, out, metrics = done
  table = report.table(folder)
  page = Page(out / 'index.html')
  shown = terminal(table)
  summary = (out / 'summary.md').read_text().splitlines()
  for row in (table.columns, *table.rows):
    assert list(row) in page.rows
    assert [x.strip() for x in row] in [
      [x.strip() for x in line.strip('|').split('|')] for line in summary
    ]
    assert any(all(x in line for x in row) for line in shown.split('\n'))
  for event in rows_of(metrics, 'shrink'):
    a, b = event['widths_before']['ffn'], event['widths_after']['ffn']
    row = next(r for r in page.rows if r[:1] == [str(event['event'])])
    assert f'{a:,} \N{RIGHTWARDS ARROW} {b:,}' in row
    assert f'{event["step"]}' in row


def test_figures_are_pictures(done):
  _, out, _ = done
  for name in FIGURES:
    pixels = image.imread(out / f'{name}.png')[..., :3]
    height, width, _ = pixels.shape
    assert 900 < width < 1200
    assert 500 < height < 1200
    assert pixels.std() > 0.05
    # Something is drawn in each quarter, not only an axis on the left.
    for half in np.split(pixels[: height // 2 * 2], 2):
      for part in np.array_split(half, 2, axis=1):
        assert part.std() > 0.02


def test_page_is_self_contained(done):
  _, out, _ = done
  assert {x.name for x in out.iterdir()} == {
    'index.html', 'summary.md', *(f'{x}.png' for x in FIGURES)
  }  # fmt: skip
  page = Page(out / 'index.html')
  assert len(page.links) == len(FIGURES)
  assert all(x.startswith('data:image/png;base64,') for x in page.links)
  assert not {'script', 'link', 'iframe', 'object'} & set(page.tags)
  style = (out / 'index.html').read_text().split('<style>')[1].split('</')[0]
  assert 'url(' not in style
  assert '@import' not in style


def test_command_gives_the_same_config(tmp_path):
  write_run(tmp_path / 'a b')
  config = smollm2_135m.get_config()
  config.seed, config.model.remat, config.data.text = 7, True, "my 'own' texts"
  config.optimizer.peak, config.prune.target_params = 1.25e-4, 99_000_000
  path = tmp_path / 'a b' / 'config.json'
  path.write_text(json.dumps(config.to_dict()))
  page = Page(report.build(tmp_path / 'a b') / 'index.html')
  text = page.text[page.text.index('python -m ') :]
  # A shell drops an escaped line break; shlex keeps it.
  command = shlex.split(text.replace('\\\n', ' '))
  assert command[:3] == ['python', '-m', 'experiments.main']
  values = flags.FlagValues()
  flags.DEFINE_string('workdir', None, '', flag_values=values)
  command[3] = command[3].replace('=', f'={ROOT}/')
  parsed = config_flags.DEFINE_config_file(
    'config', flag_values=values, lock_config=True, sys_argv=command[2:]
  )
  assert values(command[2:]) == ['experiments.main']
  assert values.workdir == 'runs/a b-again'
  assert parsed.value.to_dict() == config.to_dict()


def test_names_cannot_break_the_page(tmp_path):
  write_run(tmp_path / 'a')
  hostile = '<script>alert("1")</script> | [x](y) `$title` \n# {b} [red]'
  edit(tmp_path / 'a/source/source.json', lambda x: x.update(name=hostile))
  edit(tmp_path / 'a/config.json', lambda x: x['data'].update(text=hostile))
  lines = (tmp_path / 'a/metrics.jsonl').read_text()
  domain = json.dumps(hostile)
  (tmp_path / 'a/metrics.jsonl').write_text(lines.replace('"drama"', domain))
  out = report.build(tmp_path / 'a')
  page = Page(out / 'index.html')
  assert 'script' not in page.tags
  assert page.text.count('<script>alert("1")</script>') >= 4
  assert f'{hostile}, bits per byte' in [r[0] for r in page.rows if r]
  summary = (out / 'summary.md').read_text()
  body, command = summary.split('## Command')
  assert not [x for x in body.split('\n') if x.startswith('# {b}')]
  assert '<script' not in body.replace('\\<', '')
  assert all(not x or x[:4] == '    ' for x in command.split('\n')[4:])
  table = report.table(tmp_path / 'a')
  assert '[red]' in terminal(table, width=300)


@pytest.mark.parametrize('until', [1, 3, 30, 42, 55])
def test_run_in_progress(tmp_path, until):
  folder = tmp_path / 'a'
  metrics = write_run(folder, until=until)
  with (folder / 'metrics.jsonl').open('a') as f:
    f.write('{"kind": "train", "step": 5')
  if until == 1:
    # Neither evaluated nor traced yet, and not yet scored.
    lines = (folder / 'metrics.jsonl').read_text().split('\n')
    row = json.loads(lines[1]) | {'price': None}
    (folder / 'metrics.jsonl').write_text(json.dumps(row) + '\n')
    (folder / 'trace.jsonl').unlink()
    (folder / 'source/source.json').unlink()
  out = report.build(folder)
  assert {x.name for x in out.glob('*.png')} == {f'{x}.png' for x in FIGURES}
  table = report.table(folder)
  rows = {r[0]: r[1:] for r in table.rows}
  assert table.columns[3] == 'so far'
  assert rows['training tokens'][2] == f'{until * 512:,}'
  assert rows['live parameters'][0] == '134,515,008'
  shrinks = rows_of(metrics, 'shrink')
  arrays = shrinks[-1]['params_after'] if shrinks else 134_515_008
  assert rows['parameters in arrays'][2] == f'{arrays:,}'
  dash = '\N{EN DASH}'
  assert (rows['live parameters'][1] == dash) == (until < 42)
  assert ('None yet.' in Page(out / 'index.html').text) == (not shrinks)


def test_same_run_same_bytes_and_nothing_left_behind(tmp_path):
  write_run(tmp_path / 'a', until=30)
  digest = lambda: {
    x.name: hashlib.sha256(x.read_bytes()).hexdigest()
    for x in (tmp_path / 'a/report').iterdir()
  }
  report.build(tmp_path / 'a')
  first = digest()
  (tmp_path / 'a/report/stale.png').touch()
  report.build(tmp_path / 'a')
  assert digest() == first
  assert not list((tmp_path / 'a').glob('.report*'))


def _cut(folder, text):
  (folder / 'metrics.jsonl').write_text(text)


def _swap(folder, old, new):
  text = (folder / 'metrics.jsonl').read_text()
  assert old in text
  _cut(folder, text.replace(old, new, 1))


BROKEN = {
  'no config.json': lambda f: (f / 'config.json').unlink(),
  'no metrics.jsonl': lambda f: (f / 'metrics.jsonl').unlink(),
  'no training step yet': lambda f: _cut(f, ''),
  'line 3 is not JSON': lambda f: _swap(f, '"step": 2,', '"step": 2'),
  "row 4 lacks or misspells 'loss'": lambda f: _swap(
    f, '"step": 3, "tokens": 1536, "loss"', '"step": 3, "tokens": 1536, "lost"'
  ),
  'row 1 lacks or misspells': lambda f: _swap(f, '{', '7\n{'),
  'config.json is not a JSON object': lambda f: (f / 'config.json').write_text(
    '[1]'
  ),
}


@pytest.mark.parametrize('said', BROKEN)
def test_bad_workdir_is_one_line_and_writes_nothing(tmp_path, said):
  folder = tmp_path / 'a'
  write_run(folder, until=5)
  BROKEN[said](folder)
  with pytest.raises(errors.InputError, match=said) as e:
    report.build(folder)
  assert '\n' not in str(e.value)
  assert str(folder) in str(e.value)
  assert not (folder / 'report').exists()


def test_a_file_in_place_of_the_folder(tmp_path):
  write_run(tmp_path / 'a', until=3)
  (tmp_path / 'a/report').write_text('a file of the user')
  out = report.build(tmp_path / 'a')
  assert out.is_dir()


def test_command_line(done, tmp_path):
  folder, _, _ = done
  run = lambda workdir: subprocess.run(
    [sys.executable, '-m', 'experiments.report', f'--workdir={workdir}'],
    cwd=ROOT, capture_output=True, text=True, check=False,
  )  # fmt: skip
  good, bad = run(folder), run(tmp_path / 'nowhere')
  assert good.returncode == 0, good.stderr
  assert 'report/index.html' in good.stdout
  assert 'held-out bits per byte' in good.stdout
  assert bad.returncode == 2
  assert bad.stderr.count('\n') == 1
  assert 'nowhere does not exist' in bad.stderr


def test_drawing_a_million_points_loses_no_spike():
  rng = np.random.default_rng(0)
  y = rng.normal(size=1_000_000)
  y[123_457], y[765_432] = 99.0, -99.0
  y[:2000] = np.nan
  kept = plots.extremes(y)
  assert len(kept) <= 1602
  assert {0, 123_457, 765_432, len(y) - 1} <= set(kept.tolist())
  assert (np.diff(kept) > 0).all()


def test_smooth_is_the_mean_of_the_neighbours():
  y = np.asarray([1.0, 2.0, np.nan, 4.0, 9.0, np.nan, np.nan, np.nan])
  want = [1.5, 1.5, 3.0, 6.5, 6.5, 9.0, np.nan, np.nan]
  np.testing.assert_allclose(plots.smooth(y, 3), want)


@pytest.mark.parametrize(
  ('x', 'want'),
  [(0, '0'), (512, '512'), (6144, '6.144k'), (20_000, '20k'),
   (999_999, '1M'), (134_515_008, '134.5M'), (1.5e9, '1.5B'), (11e12, '11T')],
)  # fmt: skip
def test_si(x, want):
  assert tables.si(x) == want


def test_numbers_of_a_run_that_pruned_before_its_first_row(tmp_path):
  write_run(tmp_path / 'a', until=20)
  path = tmp_path / 'a/metrics.jsonl'
  rows = [json.loads(x) for x in path.read_text().splitlines()]
  late = [x for x in rows if x['kind'] == 'train' and x['step'] > 12]
  path.write_text(''.join(json.dumps(x) + '\n' for x in late))
  run = runlog.read(tmp_path / 'a')
  assert late[0]['widths']['ffn'] < 1536
  assert run.source_widths() == {'heads': 3, 'ffn': 1536, 'stem': 576}
