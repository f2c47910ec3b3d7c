from concurrent import futures
import dataclasses
import errno
import hashlib
import html.parser
import json
import os
import pathlib
import shlex
import shutil

from absl import flags
from matplotlib import colors
from matplotlib import figure
from matplotlib import image
from ml_collections import config_flags
import numpy as np
import pytest
import rich.console

from effllm_jax import amounts
from effllm_jax import environment
from effllm_jax import errors
from effllm_jax import figures
from effllm_jax import plots
from effllm_jax import report
from effllm_jax import runlog
from effllm_jax import structure
from effllm_jax import tables
from experiments import cli
from experiments.configs import smollm2_135m
from tests import conftest
from tests import environment_test
from tests import runs

FIGURES = ('size', 'price', 'loss', 'widths', 'layers', 'speed')

# Of SmolLM2-135M, which has three key/value heads of three query heads each.
CFG = {'V': 49152, 'D': 576, 'N': 30, 'K': 3, 'G': 3, 'H': 64, 'F': 1536}
N = CFG['N']
# Cost of a parameter in the unit of each budget.
UNITS = {'params': 1, 'bytes': 2.0, 'flops': 1.9, 'ms': 1e-7}
# In a ragged run: layers that lose all of a type.
NO_HEADS, NO_FFN = (7, 12), (28,)


def _rows(heads, ffn):
  """Rows of length D: `heads` and `ffn` are sums over the layers."""
  per_head = (2 * CFG['G'] + 2) * CFG['H']
  return heads * per_head + 3 * ffn + CFG['V'] + 2 * N + 1


def _params(widths):
  """Parameters of arrays with these widths."""
  return widths['stem'] * _rows(N * widths['heads'], N * widths['ffn'])


class _Masks:
  """What is alive: the bookkeeping of a synthetic run."""

  def __init__(self, rng, ragged):
    self.rng, self.ragged = rng, ragged
    self.alive = {
      'heads': np.ones((N, CFG['K']), bool),
      'ffn': np.ones((N, CFG['F']), bool),
      'stem': np.ones(CFG['D'], bool),
    }
    self.removed = {}
    # Layers in the middle get narrower, as they do in real runs.
    weights = 0.2 + np.exp(-(((np.arange(N) - 14) / 7) ** 2))
    self.weights = weights / weights.sum()

  def widths(self):
    """As the log says: means over the layers."""
    return {t: float(x.sum(-1).mean()) for t, x in self.alive.items()}

  def arrays(self):
    """Those of the widest layer."""
    return {t: int(x.sum(-1).max()) for t, x in self.alive.items()}

  def spans(self):
    """Least and most of a layer."""
    counts = {t: np.atleast_1d(x.sum(-1)) for t, x in self.alive.items()}
    return {t: [int(n.min()), int(n.max())] for t, n in counts.items()}

  def params(self):
    rows = _rows(*(int(self.alive[t].sum()) for t in ('heads', 'ffn')))
    return int(self.alive['stem'].sum()) * rows

  def remove(self, t, count, layer=None):
    live = self.alive[t] if layer is None else self.alive[t][layer]
    index = self.rng.permutation(np.flatnonzero(live))[:count].tolist()
    live[index] = False
    self.removed.setdefault(t, []).extend(
      index if layer is None else [[layer, i] for i in index]
    )

  def prune(self, target, progress):
    """Removes until `target` parameters are left; returns what went."""
    self.removed = {'heads': [], 'ffn': [], 'stem': []}
    if self.ragged:
      # One head after another, the last one late.
      for layer in NO_HEADS:
        more = round(4 * progress - layer / 12) - int(
          (~self.alive['heads'][layer]).sum()
        )
        self.remove('heads', max(0, more), layer)
      for layer in NO_FFN:
        self.remove('ffn', 400 if progress > 0.5 else 0, layer)
    while self.params() > target:
      if self.ragged:
        self.remove('ffn', 8, int(self.rng.choice(N, p=self.weights)))
      else:
        for layer in range(N):
          self.remove('ffn', 1, layer)
      if self.rng.random() < (0.02 if self.ragged else 0.1):
        self.remove('stem', 1)
    return self.removed


def write_run(
  folder, steps=60, until=None, seed=0, ragged=False, kind='params'
):
  """Writes the workdir of a run of `steps`, stopped after `until` steps.

  The arithmetic of sizes is that of SmolLM2-135M; losses and times are drawn
  to look like those of a real run.
  """
  until = steps if until is None else until
  rng = np.random.default_rng(seed)
  begin, end = round(0.1 * steps), round(0.7 * steps)
  full = {'heads': 3, 'ffn': 1536, 'stem': 576}
  dense, goal, per_step = _params(full), 107_600_000, 512
  unit, masks = UNITS[kind], _Masks(np.random.default_rng(seed), ragged)
  arrays, metrics, trace = dict(full), [], []
  domains = {'docs': 0.1, 'code': -0.12, 'drama': 0.3, 'verse': 0.21}
  flops = dict.fromkeys(('train', 'score', 'repair', 'teacher'), 0.0)

  def evaluate(step, phase, bits):
    metrics.append(
      {'kind': 'eval', 'step': step, 'tokens': step * per_step,
       'phase': phase, 'live_params': masks.params(), 'bits_per_byte': bits,
       'domains': {d: bits + x for d, x in domains.items()},
       'nats_per_token': bits * 3, 'bytes': 50_000,
       'seconds': 9.0}
    )  # fmt: skip

  evaluate(0, 'source', 0.997)
  for step in range(1, until + 1):
    share = min(1.0, max(0.0, (step - begin) / (end - begin)))
    target = round(dense - share * (dense - goal)) if step > begin else None
    prunes = begin < step <= end and (step % 2 == 0 or step == end)
    flops['train'] += 6.0 * _params(arrays) * per_step
    flops['score'] += 5e8 * (step <= end)
    if prunes:
      removed = masks.prune(target, share)
      flops['repair'] += 4e10
      trace.append(
        {'step': step, 'tokens': step * per_step, 'target_cost': target * unit,
         'live_cost': masks.params() * unit, 'live_params': masks.params(),
         'price': {}, 'removed': removed}
      )  # fmt: skip
    live, widths = masks.params(), masks.widths()
    drop = 1 - live / dense
    recovered = 0.35 * max(0.0, (step - end) / (steps - end))
    loss = 3.35 + 4.2 * drop * (1 - recovered) + rng.normal(0, 0.12)
    price = 1.6e-7 * (1 + 5 * drop)
    seconds = 3.9 * _params(arrays) / dense * rng.lognormal(0, 0.03)
    row = {
      'kind': 'train', 'step': step, 'tokens': step * per_step, 'loss': loss,
      'grad_norm': 1.3, 'learning_rate': 3e-4, 'seconds': seconds,
      'compile_seconds': 0.0, 'data_seconds': 0.001,
      'tokens_per_second': per_step / seconds,
      'live_params': live, 'array_params': _params(arrays),
      'live_cost': live * unit, 'target_cost': target and target * unit,
      'flops': dict(flops), 'widths': widths,
      'pruned': {t: 1 - w / full[t] for t, w in widths.items()},
      'price': {
        t: price * k * rng.lognormal(0, 0.05)
        for t, k in {'heads': 1.4, 'ffn': 1.0, 'stem': 1.1}.items()
      } if step <= end else None,
    }  # fmt: skip
    smaller = masks.arrays()
    if prunes and (step == end or _params(smaller) < 0.93 * _params(arrays)):
      metrics.append(
        {'kind': 'shrink', 'event': sum(x['kind'] == 'shrink' for x in metrics),
         'step': step, 'tokens': step * per_step, 'widths_before': arrays,
         'widths_after': smaller, 'widths_live': masks.spans(),
         'params_before': _params(arrays), 'params_after': _params(smaller),
         'live_params': masks.params(), 'loss_before': loss,
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
    'budget': {'kind': kind, 'target': goal * unit},
    'prune': {
      'policy': 'ragged' if ragged else 'uniform', 'every': 2,
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
    json.dumps(
      {'name': 'smollm2-135m', 'description': 'a small Llama', 'cfg': CFG}
    )
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


@pytest.fixture(name='draw_only')
def _draw_only(monkeypatch):
  """Reports with these figures alone, which are what takes time."""
  draw = figures.draw
  return lambda *names: monkeypatch.setattr(
    figures, 'draw', lambda run: draw(run, names)
  )


@pytest.fixture(name='undrawn')
def _undrawn(draw_only):
  """Reports without figures."""
  draw_only()


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


def edit_rows(folder, change):
  """Changes the training rows of a run in place."""
  path = folder / 'metrics.jsonl'
  rows = [json.loads(x) for x in path.read_text().splitlines()]
  for row in rows_of(rows, 'train'):
    change(row)
  path.write_text(''.join(json.dumps(x) + '\n' for x in rows))


def test_table_has_the_numbers_of_the_run(done):
  folder, _, metrics = done
  table = tables.compare(runlog.read(folder))
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
    '\N{MINUS SIGN}20.0\N{NO-BREAK SPACE}%',
  )  # fmt: skip
  assert rows['parameters in arrays'][2] == f'{live:,}'
  ffn = train[-1]['widths']['ffn']
  assert rows['ffn channels per layer'][:3] == ('1,536', *2 * [f'{ffn:,.0f}'])
  assert rows['heads per layer'] == ('3', '3', '3', 'unchanged')
  bits = [e['bits_per_byte'] for e in (evals[0], pruned, evals[-1])]
  assert rows['held-out bits per byte'][:3] == tuple(f'{x:.4f}' for x in bits)
  drama = [e['domains']['drama'] for e in (evals[0], pruned, evals[-1])]
  assert rows['drama, bits per byte'][:3] == tuple(f'{x:.4f}' for x in drama)
  first = next(x for x in metrics if x['kind'] == 'shrink')['tokens']
  before = np.median([x['seconds'] for x in train if x['tokens'] <= first])
  assert rows['seconds per step'][0] == f'{before:.3g}'


def test_a_shrink_names_the_widths_that_are_alive(ragged):
  _, out, metrics = ragged
  event = rows_of(metrics, 'shrink')[-1]
  least, most = event['widths_live']['ffn']
  assert least < most
  row = next(
    r for r in Page(out / 'index.html').rows if r[:1] == [str(event['event'])]
  )
  before = event['widths_before']['ffn']
  arrow = '\N{RIGHTWARDS ARROW}'
  assert f'{before:,} {arrow} {least:,} to {most:,}' in row
  assert f'{event["live_params"]:,}' in row


def test_all_forms_of_a_table_say_the_same(done):
  folder, out, metrics = done
  table = tables.compare(runlog.read(folder))
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


@pytest.fixture(name='ragged', scope='module')
def _ragged(tmp_path_factory):
  """As `done`, of layers with different widths and a budget in bytes."""
  folder = tmp_path_factory.mktemp('runs') / 'r'
  metrics = write_run(folder, ragged=True, kind='bytes')
  return folder, report.build(folder), metrics


@pytest.mark.parametrize('which', ['done', 'ragged'])
def test_figures_are_pictures(which, request):
  _, out, _ = request.getfixturevalue(which)
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


@pytest.mark.parametrize('none', [None, 0.0])
def test_prices_of_two_types_are_prices(tmp_path, none):
  """One that saves nothing, has nothing left, or broke the model in a trial."""
  write_run(tmp_path / 'a')

  def change(row):
    if row['price']:
      row['price'] = {'heads': 2e-7, 'ffn': 3e-7, 'stem': none}
      if row['step'] % 4 == 0:
        row['price']['heads'] = none

  edit_rows(tmp_path / 'a', change)
  (price,) = figures.draw(runlog.read(tmp_path / 'a'), ['price'])
  assert price.title.startswith(
    'Lowest mean price: heads, at 76\N{NO-BREAK SPACE}% of the scored steps; '
  )
  edit_rows(
    tmp_path / 'a',
    lambda row: row.update(price=dict.fromkeys(structure.TYPES, none)),
  )
  (price,) = figures.draw(runlog.read(tmp_path / 'a'), ['price'])
  assert price.title.startswith('Price of each type; ')


UNITS_OF_PRICES = {
  'params': 'parameter', 'bytes': 'byte', 'flops': 'FLOP', 'ms': 'ms'
}  # fmt: skip


@pytest.mark.parametrize('kind', UNITS_OF_PRICES)
@pytest.mark.parametrize(
  ('prune', 'score'),
  [
    ({'saliency': 'taylor1'}, 'nats per token'),
    ({'saliency': 'fisher', 'calibrate': False}, 'nats per token'),
    ({'saliency': 'magnitude', 'calibrate': False}, 'score'),
    ({'saliency': 'activation', 'calibrate': True}, 'nats per token'),
    ({'saliency': 'random'}, 'score'),
    # A run from before it was written, and what a stranger wrote.
    ({}, 'score'),
    ({'saliency': ['taylor1']}, 'score'),
  ],
)
def test_a_price_is_not_in_a_unit_that_its_score_does_not_have(
  done, kind, prune, score
):
  run = runlog.read(done[0])
  run.config['prune'].update(prune)
  run.config['budget']['kind'] = kind
  want = f'{score}\nper {UNITS_OF_PRICES[kind]}'
  assert figures.price_unit(run) == want
  assert run.in_nats == (score == 'nats per token')


@pytest.mark.parametrize(
  ('config', 'want'),
  [
    ({'prune': {'policy': 'none'}}, 'none'),
    ({'prune': {'policy': None}}, None),
    ({'prune': {}}, None),
    ({}, None),
    # What a stranger wrote.
    ({'prune': 'policy'}, None),
    ({'prune': ['policy']}, None),
    ({'prune': None}, None),
    ({'prune.policy': 'none'}, None),
  ],
)
def test_a_setting_that_is_not_there_is_none(done, config, want):
  run = dataclasses.replace(runlog.read(done[0]), config=config)
  assert run.setting('prune.policy') == want
  assert run.only_trains == (want == 'none')
  assert not run.in_nats and run.budget == ('params', None)
  assert run.setting('prune.policy.name') is None


@pytest.mark.parametrize('saliency', ['taylor1', 'random'])
def test_only_scores_in_nats_are_the_loss_of_a_removal(done, saliency):
  run = runlog.read(done[0])
  run.config['prune']['saliency'] = saliency
  (price,) = figures.draw(run, ['price'])
  assert ('expected to cost' in price.caption) == (saliency == 'taylor1')


def test_the_loss_is_told_of_the_steps_that_have_one(tmp_path):
  write_run(tmp_path / 'a', steps=240)
  loss = lambda: figures.draw(runlog.read(tmp_path / 'a'), ['loss'])[0].title

  def change(row):
    known = 30 < row['step'] < 200
    row['loss'] = 2.0 + 1e-4 * (row['step'] % 2) if known else None

  edit_rows(tmp_path / 'a', change)
  assert loss().startswith(
    'Training loss 2.00 at the start, 2.00 at the end; Held-out'
  )
  edit_rows(tmp_path / 'a', lambda row: row.update(loss=None))
  assert loss().startswith('Training loss; Held-out')


@pytest.mark.parametrize('layers', [1, 2, 3, 40])
def test_no_layer_has_a_fraction(layers):
  ax = figure.Figure().subplots()
  plots.grid(ax, np.ones((layers, 7)), 'viridis', colors.Normalize(0, 1))
  ticks = [x for x in ax.get_xticks() if -0.5 <= x <= layers - 0.5]
  assert ticks and all(x == round(x) for x in ticks)
  assert (layers > 1) == (len(ticks) > 1)


@pytest.mark.parametrize('kind', ['params', 'bytes'])
def test_a_run_that_only_trains_waits_for_no_prune(tmp_path, kind):
  folder = tmp_path / 'a'
  write_run(folder, kind=kind)
  edit(folder / 'config.json', lambda x: x['prune'].update(policy='none'))
  lines = (folder / 'metrics.jsonl').read_text().splitlines()
  rows = [json.loads(x) for x in lines]
  first = rows_of(rows, 'train')[0]
  same = ('widths', 'pruned', 'live_params', 'array_params', 'live_cost')
  for row in rows:
    row.update((x, first[x]) for x in same if x in row)
    row.update({x: None for x in ('price', 'target_cost') if x in row})
  kept = [
    x for x in rows if x['kind'] != 'shrink' and x.get('phase') != 'pruned'
  ]
  _cut(folder, ''.join(json.dumps(x) + '\n' for x in kept))
  (folder / 'trace.jsonl').unlink()
  out = report.build(folder)
  said = [(out / x).read_text() for x in ('index.html', 'summary.md')]
  for text in said:
    assert 'Training only: 134.5M live parameters' in text
    assert 'Source model against trained model' in text
    assert not [x for x in (' yet', 'pruned model') if x in text]
  assert tables.compare(runlog.read(folder)).columns[3] == 'trained model'


def replay(folder):
  """Masks after every prune, by tokens, as the trace tells it."""
  alive = {
    'heads': np.ones((N, CFG['K']), bool), 'ffn': np.ones((N, CFG['F']), bool)
  }  # fmt: skip
  for line in (folder / 'trace.jsonl').read_text().splitlines():
    row = json.loads(line)
    for t, mask in alive.items():
      for layer, index in row['removed'][t]:
        assert mask[layer, index]
        mask[layer, index] = False
    yield row['tokens'], {t: mask.copy() for t, mask in alive.items()}


@pytest.mark.parametrize('which', ['done', 'ragged'])
def test_layer_maps_are_what_the_trace_says(which, request):
  folder, _, metrics = request.getfixturevalue(which)
  run = runlog.read(folder)
  maps = figures.layer_maps(run)
  prunes = dict(replay(folder))
  assert maps['heads'].shape == (N, 3) and maps['ffn'].shape == (N, 1536)
  for tokens, alive in prunes.items():
    np.testing.assert_array_equal(maps['heads'] > tokens, alive['heads'])
    width = alive['ffn'].sum(-1)
    # The live ones at the bottom, and nothing alive above a dead one.
    np.testing.assert_array_equal(
      maps['ffn'] > tokens, np.arange(1536) < width[:, None]
    )
    np.testing.assert_array_equal(run.layer_widths('ffn', [tokens])[0], width)
  gone = maps['ffn'][np.isfinite(maps['ffn'])]
  assert set(gone.tolist()) <= set(prunes)
  # Another way to the same widths: the rows of the metrics.
  for t in ('heads', 'ffn'):
    means = run.layer_widths(t, run.tokens).mean(-1)
    np.testing.assert_allclose(means, run.train[f'widths.{t}'], rtol=1e-12)
    first = run.layer_widths(t, [0])[0]
    np.testing.assert_array_equal(first, run.source_widths()[t])
  stem = np.isinf(run.removed['stem']).sum()
  assert stem == rows_of(metrics, 'train')[-1]['widths']['stem'] < 576
  live = {t: np.isinf(x).sum(-1) for t, x in maps.items()}
  if which == 'ragged':
    assert np.flatnonzero(live['heads'] == 0).tolist() == list(NO_HEADS)
    assert np.flatnonzero(live['ffn'] == 0).tolist() == list(NO_FFN)
    assert len(set(maps['heads'][NO_HEADS[0]].tolist())) == 3
  else:
    assert (live['heads'] == 3).all() and np.ptp(live['ffn']) == 0


def test_layer_maps_before_the_first_prune(tmp_path, draw_only):
  draw_only('layers')
  write_run(tmp_path / 'a', until=3)
  run = runlog.read(tmp_path / 'a')
  assert all(np.isinf(x).all() for x in figures.layer_maps(run).values())
  summary = (report.build(tmp_path / 'a') / 'summary.md').read_text()
  assert (
    '![heads: all 3 alive in every layer; ffn channels: all 1,536 alive in '
    'every layer](layers.png)'
  ) in summary
  # A source model whose shape is not recorded: said so, and no table.
  edit(tmp_path / 'a/source/source.json', lambda x: x.pop('cfg'))
  summary = (report.build(tmp_path / 'a') / 'summary.md').read_text()
  assert '![heads by layer; ffn channels by layer](layers.png)' in summary


def test_title_names_the_layers(done, ragged):
  _, out, _ = ragged
  live = np.isinf(runlog.read(ragged[0]).removed['ffn']).sum(-1)
  most, least = int(live.argmax()), int(np.where(live, live, 9999).argmin())
  summary = (out / 'summary.md').read_text()
  assert (
    'heads: none left in layers 7, 12, elsewhere 3 (28 layers) of 3; '
    f'ffn channels: none left in layer 28, elsewhere {live[least]:,} '
    f'(layer {least}) to {live[most]:,} (layer {most}) of 1,536'
  ) in summary
  summary = (done[1] / 'summary.md').read_text()
  assert 'heads: all 3 alive in every layer; ffn channels: 1,1' in summary
  assert 'of 1,536 alive in every layer' in summary


def test_says_where_the_run_was_computed(tmp_path):
  write_run(tmp_path)
  facts = lambda: dict(report._heading(runlog.read(tmp_path))[1])
  assert 'computed on' not in facts()
  for step, code in enumerate(('v1', 'v2', None, 'v2')):
    row = environment_test.ROW | {'step': step, 'code': code}
    environment.record(tmp_path, row)
  assert facts()['computed on'] == (
    'AMD EPYC (family 25, model 17), jax 0.10.2; code v1, v2'
  )


def test_table_of_layers_only_where_they_differ(done, ragged):
  assert tables.layers(runlog.read(done[0])) is None
  for form in ('index.html', 'summary.md'):
    assert 'Live widths by layer' not in (done[1] / form).read_text()
    assert 'Live widths by layer' in (ragged[1] / form).read_text()
  *_, (_, alive) = replay(ragged[0])
  page = Page(ragged[1] / 'index.html')
  for n in range(N):
    heads, ffn = alive['heads'][n].sum(), alive['ffn'][n].sum()
    assert [str(n), f'{heads}', f'{ffn:,}'] in page.rows
  assert ['layer', 'heads of 3', 'ffn channels of 1,536'] in page.rows
  rows = {r[0] for r in tables.compare(runlog.read(ragged[0])).rows}
  assert {'heads per layer, mean', 'stem width'} <= rows


def goes_on(folder):
  """Makes of a ragged run one that began with the half of its prunes done.

  Returns:
    Live groups of every layer when it began, and its live parameters.
  """
  rows = {
    name: [json.loads(x) for x in (folder / name).read_text().splitlines()]
    for name in ('metrics.jsonl', 'trace.jsonl')
  }
  trace = rows['trace.jsonl']
  before, after = trace[: len(trace) // 2], trace[len(trace) // 2 :]
  masks = _Masks(None, True)
  for row in before:
    for t, gone in row['removed'].items():
      index = np.array(gone, int).reshape(-1, masks.alive[t].ndim)
      masks.alive[t][tuple(index.T)] = False
  start, metrics = masks.widths(), []
  for row in rows['metrics.jsonl']:
    if row['kind'] == 'train':
      row['pruned'] = {t: 1 - w / start[t] for t, w in row['widths'].items()}
    if row['step'] > before[-1]['step']:
      metrics.append(row)
    elif row.get('phase') == 'source':
      metrics.append(row | {'live_params': masks.params()})
  lines = lambda rows: ''.join(json.dumps(x) + '\n' for x in rows)
  (folder / 'metrics.jsonl').write_text(lines(metrics))
  (folder / 'trace.jsonl').write_text(lines(after))
  groups = structure.Groups(**masks.alive)
  edit(
    folder / 'source/source.json',
    lambda x: x.update(masks=structure.masks_to_json(groups)),
  )
  return masks.alive, masks.params()


def test_what_was_dead_before_the_run_was_not_pruned_by_it(tmp_path):
  """Of a run that goes on from a ragged event of another one."""
  folder = tmp_path / 'a'
  write_run(folder, ragged=True)
  end = runlog.read(folder)
  start, params = goes_on(folder)
  run = runlog.read(folder)
  arrays = int(run.shrinks[0]['params_before'])
  assert params < arrays
  widths = {t: x.sum(-1) for t, x in start.items()}
  assert np.ptp(widths['ffn']) > 0
  for t, alive in start.items():
    np.testing.assert_array_equal(run.removed[t] > 0, alive)
    # What is alive in the end is what it was.
    now, want = np.isinf(run.removed[t]), np.isinf(end.removed[t])
    np.testing.assert_array_equal(now, want)
    assert run.source_widths()[t] == widths[t].mean()
  np.testing.assert_array_equal(run.layer_widths('ffn', [0])[0], widths['ffn'])
  rows = {r[0]: r[1:] for r in tables.compare(runlog.read(folder)).rows}
  live = int(run.train['live_params'][-1])
  assert rows['live parameters'] == (
    f'{params:,}', *2 * [f'{live:,}'], amounts.change(params, live)
  )  # fmt: skip
  assert rows['parameters in arrays'][0] == f'{arrays:,}'
  ffn = f'{widths["ffn"].mean():,.1f}'
  assert rows['ffn channels per layer, mean'][0] == ffn
  layers, now = tables.layers(run), np.isinf(run.removed['ffn']).sum(-1)
  assert layers.columns[2] == 'ffn channels'
  assert [r[2] for r in layers.rows] == [
    f'{k:,} of {n:,}' for n, k in zip(widths['ffn'], now, strict=True)
  ]
  share = amounts.change(params, 107_600_000)
  title, facts = report._heading(run)
  assert title.startswith(f'smollm2-135m: {amounts.si(params)} to ')
  assert share in dict(facts)['target']
  assert 'scored on' not in dict(facts)
  config = run.config | {'eval': {'text': 'mine.txt'}}
  _, facts = report._heading(dataclasses.replace(run, config=config))
  assert dict(facts)['scored on'] == 'mine.txt'
  record = {'shared': {'a': 0.002, 'b': 0.0313}}
  _, facts = report._heading(
    dataclasses.replace(run, config=config, eval_text=record)
  )
  want = 'mine.txt; at most 3.1% of a domain of it is trained on'
  assert dict(facts)['scored on'] == want
  size, drawn, maps = figures.draw(run, ['size', 'widths', 'layers'])
  assert f'{amounts.si(params)} to {amounts.si(live)} live' in size.title
  assert f'mean: {widths["ffn"].mean():,.6g} to ' in drawn.title
  assert f'of up to {widths["ffn"].max():,}' in maps.title
  assert 'dead before the run began is white' in maps.caption
  # A workdir from before the masks were written.
  edit(folder / 'source/source.json', lambda x: x.pop('masks'))
  old = runlog.read(folder)
  assert old.source_params() == params
  assert old.source_widths() == {'heads': 3, 'ffn': 1536, 'stem': 576}


def test_table_of_cost(done):
  folder, out, metrics = done
  spent = rows_of(metrics, 'train')[-1]['flops']
  total = sum(spent.values())
  dash, space = '\N{EN DASH}', '\N{NO-BREAK SPACE}'
  table = tables.spent(runlog.read(folder))
  rows = {r[0]: r[1:] for r in table.rows}
  share = 100 * spent['score'] / total
  assert rows['scoring'] == (
    dash, f'{spent["score"] / 1e9:.4g}{space}GFLOP', f'{share:.1f}{space}%',
  )  # fmt: skip
  assert rows['training'][:2] == (
    '30.72k', f'{spent["train"] / 1e12:.4g}{space}TFLOP',
  )  # fmt: skip
  assert rows['teacher'] == (dash, f'0{space}FLOP', f'0.0{space}%')
  assert rows['total'] == (
    '30.72k', f'{total / 1e12:.4g}{space}TFLOP', f'100.0{space}%',
  )  # fmt: skip
  page = Page(out / 'index.html')
  assert all(list(row) in page.rows for row in (table.columns, *table.rows))
  assert table.markdown() in (out / 'summary.md').read_text()


COSTS = {
  'bytes': ('size', '269 MB', '215.2 MB', '215.2 MB'),
  'flops': (
    'FLOPs per token', '255.6 MFLOP', '204.4 MFLOP', '204.4 MFLOP per token',
  ),
  'ms': ('time', '13.45 ms', '10.76 ms', '10.76 ms'),
}  # fmt: skip


@pytest.mark.parametrize('kind', COSTS)
def test_budgets_other_than_parameters(tmp_path, draw_only, kind):
  # Those that tell of the budget.
  draw_only('size', 'price')
  name, before, after, target = COSTS[kind]
  write_run(tmp_path / 'a', kind=kind, ragged=True)
  spaced = lambda text: text.replace('\N{NO-BREAK SPACE}', ' ')
  rows = {r[0]: r[1:] for r in tables.compare(runlog.read(tmp_path / 'a')).rows}
  change = '\N{MINUS SIGN}20.0 %'
  assert tuple(map(spaced, rows[name])) == (before, after, after, change)
  summary = spaced((report.build(tmp_path / 'a') / 'summary.md').read_text())
  assert f'- target: at most {target} ({change}), ragged policy\n' in summary
  title = f'{name[0].upper()}{name[1:]}: {before} to {after} ({change})'
  assert f'tokens; {title}](size.png)' in summary


def test_budget_of_parameters_is_one_panel(done):
  text = (done[1] / 'summary.md').read_text()
  assert 'tokens](size.png)' in text
  assert '- target: at most 107,600,000 parameters (' in text
  assert image.imread(done[1] / 'size.png').shape[0] < 700


@pytest.mark.parametrize('pad', [1, 64])
def test_what_was_measured_on_the_edge_names_its_model(done, tmp_path, pad):
  folder = shutil.copytree(done[0], tmp_path / 'a')
  event = rows_of(done[2], 'shrink')[1]
  row = {
    'format': 'gguf-f16', 'model': 'pruned', 'bytes': 2e8, 'prefill': 475.2,
    'decode': 94.5, 'memory': None, 'bits_per_byte': 1.25,
  }  # fmt: skip
  record = {
    'step': event['step'], 'pad': pad, 'machine': 'a phone', 'rows': [row]
  }  # fmt: skip
  (folder / 'edge.json').write_text(json.dumps(record))
  said = f'On the edge: a phone; pruned: step {event["step"]}, event 1'
  said += ', padded to multiples of 64' if pad > 1 else ''
  assert tables.edge(runlog.read(folder)).title == said


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


@pytest.mark.usefixtures('undrawn')
def test_command_gives_the_same_config(tmp_path):
  write_run(tmp_path / 'a b')
  config = smollm2_135m.get_config()
  config.seed, config.train.log_every, config.data.text = 7, 3, "my 'own' texts"
  config.optimizer.peak, config.prune.every = 1.25e-4, 3
  config.data.weights = {'drama': 2.0, "l'été 🙂": 1}
  path = tmp_path / 'a b' / 'config.json'
  path.write_text(json.dumps(config.to_dict()))
  page = Page(report.build(tmp_path / 'a b') / 'index.html')
  text = page.text[page.text.index('python -m ') :]
  # A shell drops an escaped line break; shlex keeps it.
  command = shlex.split(text.replace('\\\n', ' '))
  assert command[:3] == ['python', '-m', 'experiments.main']
  values = flags.FlagValues()
  flags.DEFINE_string('workdir', None, '', flag_values=values)
  command[3] = command[3].replace('=', f'={conftest.ROOT}/')
  parsed = config_flags.DEFINE_config_file(
    'config', flag_values=values, lock_config=True, sys_argv=command[2:]
  )
  assert values(command[2:]) == ['experiments.main']
  assert values.workdir == 'runs/a b-again'
  assert parsed.value.to_dict() == config.to_dict()
  cli.check(parsed.value, 'the file')


def test_names_cannot_break_the_page(tmp_path):
  write_run(tmp_path / 'a')
  hostile = '<script>alert("1")</script> | [x](y) `$title` \n# {b} [red]'
  edit(tmp_path / 'a/source/source.json', lambda x: x.update(name=hostile))
  edit(tmp_path / 'a/config.json', lambda x: x['data'].update(text=hostile))
  lines = (tmp_path / 'a/metrics.jsonl').read_text()
  domain = json.dumps(hostile)
  start = environment_test.ROW | {'processor': hostile}
  environment.record(tmp_path / 'a', start)
  (tmp_path / 'a/metrics.jsonl').write_text(lines.replace('"drama"', domain))
  out = report.build(tmp_path / 'a')
  page = Page(out / 'index.html')
  assert 'script' not in page.tags
  assert page.text.count('<script>alert("1")</script>') >= 5
  assert f'{hostile}, bits per byte' in [r[0] for r in page.rows if r]
  summary = (out / 'summary.md').read_text()
  body, command = summary.split('## Command')
  assert not [x for x in body.split('\n') if x.startswith('# {b}')]
  assert '<script' not in body.replace('\\<', '')
  assert all(not x or x[:4] == '    ' for x in command.split('\n')[4:])
  table = tables.compare(runlog.read(tmp_path / 'a'))
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
  table = tables.compare(runlog.read(folder))
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


def test_seconds_are_those_of_all_steps_whatever_is_logged(tmp_path):
  """A row has the mean since the last: 3 steps of 2 s, then 4 of 1 s."""
  write_run(tmp_path / 'a', until=7)
  rows = [
    json.loads(x)
    for x in (tmp_path / 'a/metrics.jsonl').read_text().splitlines()
  ]
  kept = [
    x | {'seconds': 2.0 if x['step'] == 3 else 1.0}
    for x in rows
    if x['kind'] == 'train' and x['step'] in (3, 7)
  ]
  _cut(tmp_path / 'a', ''.join(json.dumps(x) + '\n' for x in kept))
  run = runlog.read(tmp_path / 'a')
  assert run.step_seconds == 10
  assert tables.time(run).rows[0][:2] == ('training steps and prunes', '10.0')


def test_the_home_folder_of_a_flag_is_that_of_the_user():
  """Of one folder and of several."""
  home = pathlib.Path('~').expanduser()
  for name, flag in (
    ('report', '--workdir=~/no/run'),
    ('overlap', '--workdirs=~/no/run,~/no/other'),
  ):
    done = conftest.command(name, flag)
    runs.refused(done, f'workdir {home}/no/run does not exist')
  done = conftest.command('main', '--config=~/no/config.py', '--workdir=~/no')
  runs.refused(done, f'{home}/no/config.py')


def test_a_bucket_is_no_folder(tmp_path):
  for name, flag in (
    ('report', '--workdir=gs://bucket/run'),
    ('overlap', f'--workdirs={tmp_path},gs://bucket/run'),
  ):
    done = conftest.command(name, flag)
    runs.refused(done, 'gs://bucket/run is no folder of this machine; mount it')


@pytest.mark.parametrize('ragged', [False, True])
def test_same_run_same_bytes_and_nothing_left_behind(tmp_path, ragged):
  write_run(tmp_path / 'a', until=30, ragged=ragged)
  digest = lambda: {
    x.name: hashlib.sha256(x.read_bytes()).hexdigest()
    for x in (tmp_path / 'a/report').iterdir()
  }
  report.build(tmp_path / 'a')
  first = digest()
  (tmp_path / 'a/report/stale.png').touch()
  report.build(tmp_path / 'a')
  assert digest() == first
  assert not list((tmp_path / 'a').glob('.effllm*'))


@pytest.mark.usefixtures('undrawn')
def test_a_report_stays_where_its_successor_fails(tmp_path, monkeypatch):
  folder = tmp_path / 'a'
  write_run(folder, until=3)
  out = report.build(folder)
  before = (out / 'index.html').read_bytes()
  rename = pathlib.Path.rename

  def refuse(path, target):
    if path.name == 'new':
      raise OSError(errno.EIO, 'Input/output error')
    return rename(path, target)

  with monkeypatch.context() as patch:
    patch.setattr(pathlib.Path, 'rename', refuse)
    with pytest.raises(
      errors.InputError, match=r'cannot write .*report: Input'
    ):
      report.build(folder)
  assert (out / 'index.html').read_bytes() == before
  assert not list(folder.glob('.effllm*'))


@pytest.mark.usefixtures('undrawn')
def test_what_a_killed_build_left_is_taken_away(tmp_path):
  folder = tmp_path / 'a'
  write_run(folder, until=3)
  for name in ('killed', 'at-work'):
    (folder / f'.effllm-{name}' / 'new').mkdir(parents=True)
  os.utime(folder / '.effllm-killed', (0, 0))
  report.build(folder)
  # Where there are no locks, another build may be at work.
  assert [x.name for x in folder.glob('.effllm*')] == ['.effllm-at-work']


@pytest.mark.usefixtures('undrawn')
def test_builds_at_the_same_time_take_turns(tmp_path):
  folder = tmp_path / 'a'
  write_run(folder, until=3)
  run = runlog.read(folder)
  with futures.ThreadPoolExecutor(4) as pool:
    for made in [pool.submit(report.build, folder, run) for _ in range(40)]:
      assert made.result() == folder / 'report'
  assert {x.name for x in (folder / 'report').iterdir()} == {
    'index.html', 'summary.md'
  }  # fmt: skip


@pytest.mark.usefixtures('undrawn')
def test_the_page_and_the_terminal_are_of_one_moment(tmp_path):
  """Of a run in progress the log has grown between two readings."""
  write_run(tmp_path / 'a', until=5)
  run = runlog.read(tmp_path / 'a')
  row = json.loads((tmp_path / 'a/metrics.jsonl').read_text().splitlines()[-1])
  row |= {'step': 6, 'tokens': 6 * 512}
  with (tmp_path / 'a/metrics.jsonl').open('a') as file:
    file.write(json.dumps(row) + '\n')
  page = Page(report.build(tmp_path / 'a', run) / 'index.html')
  assert list(tables.compare(run).rows[0]) in page.rows


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
  "row 2 lacks or misspells 'flops'": lambda f: _swap(f, '"flops"', '"flips"'),
  'row 1 lacks or misspells': lambda f: _swap(f, '{', '7\n{'),
  'trace.jsonl row 1 lacks or misspells removed.heads': lambda f: (
    f / 'trace.jsonl'
  ).write_text(
    '{"tokens": 9, "removed": {"heads": [[0, 3]], "ffn": [], "stem": []}}\n'
  ),
  "source.json lacks or misspells 'F' in cfg": lambda f: edit(
    f / 'source/source.json', lambda x: x['cfg'].pop('F')
  ),
  'source.json lacks or misspells masks.ffn': lambda f: edit(
    f / 'source/source.json',
    lambda x: x.update(
      masks={'heads': ['111'] * N, 'ffn': ['1'], 'stem': ['1' * 576]}
    ),
  ),
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
  if 'row ' in said or 'line ' in said:
    assert str(e.value).endswith('; take that line out')
  assert str(folder) in str(e.value)
  assert not (folder / 'report').exists()


@pytest.mark.usefixtures('undrawn')
def test_a_file_in_place_of_the_folder(tmp_path):
  write_run(tmp_path / 'a', until=3)
  (tmp_path / 'a/report').write_text('a file of the user')
  out = report.build(tmp_path / 'a')
  assert out.is_dir()


def test_command_line(done, tmp_path):
  folder, _, _ = done
  run = lambda workdir: conftest.command('report', f'--workdir={workdir}')
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
  assert amounts.si(x) == want


@pytest.mark.parametrize(
  ('kind', 'x', 'want'),
  [('params', 107_600_000, '107.6M'), ('bytes', 25e9, '25,000 MB'),
   ('bytes', 1.5e6, '1.5 MB'), ('flops', 2.05e9, '2.05 GFLOP'),
   ('flops', 999_999_999, '1 GFLOP'), ('ms', 0.0123, '0.0123 ms'),
   ('ms', float('nan'), '\N{EN DASH}')],
)  # fmt: skip
def test_costs(kind, x, want):
  assert amounts.costs(kind, x).replace('\N{NO-BREAK SPACE}', ' ') == want


def test_numbers_of_a_run_that_pruned_before_its_first_row(tmp_path):
  write_run(tmp_path / 'a', until=20)
  path = tmp_path / 'a/metrics.jsonl'
  rows = [json.loads(x) for x in path.read_text().splitlines()]
  late = [x for x in rows if x['kind'] == 'train' and x['step'] > 12]
  path.write_text(''.join(json.dumps(x) + '\n' for x in late))
  run = runlog.read(tmp_path / 'a')
  assert late[0]['widths']['ffn'] < 1536
  assert run.source_widths() == {'heads': 3, 'ffn': 1536, 'stem': 576}
