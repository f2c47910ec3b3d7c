"""The functions of notebooks against brute force."""

import dataclasses
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effllm_jax import errors
from effllm_jax import events
from effllm_jax import figures
from effllm_jax import plots
from effllm_jax import runlog
from effllm_jax import state as state_lib
from effllm_jax import structure
from tests import conftest
from tests import report_test

pytest.importorskip('treescope', reason='requirements-notebook.txt')

from effllm_jax import notebook
from effllm_jax import pictures
from effllm_jax import small_run
from experiments import cli

CFG = conftest.make_config(K=3)
RUN = notebook.Run(pathlib.Path('runs/a'), None, None, [])


def make_model(masks=None, cfg=CFG) -> notebook.Model:
  """A model with scores that have no ties, and with `masks`."""
  prune = state_lib.fresh_prune_state(cfg).replace(
    scores=conftest.make_scores(cfg), count=np.int32(1)
  )
  if masks is not None:
    prune = prune.replace(masks=masks)
  params = conftest.make_params(cfg)
  return notebook.Model('made', cfg, cfg, prune, lambda: params)


@pytest.fixture(name='masked', scope='module')
def _masked() -> notebook.Model:
  return make_model(conftest.make_masks(CFG))


@pytest.fixture(name='drawn')
def _drawn(monkeypatch) -> list:
  """The matplotlib figures behind what is rendered."""
  seen, render = [], figures.render

  def spy(fig, *words):
    seen.append(fig)
    return render(fig, *words)

  monkeypatch.setattr(figures, 'render', spy)
  return seen


def each(masks):
  """(type, layer, mask) of every axis."""
  for t in structure.TYPES:
    for n, row in enumerate(np.atleast_2d(np.asarray(getattr(masks, t)))):
      yield t, n, row


def test_lineage_is_the_ranks_of_the_survivors(masked):
  found = notebook.lineage(notebook.shrink(masked))
  for t, n, mask in each(masked.prune.masks):
    scores = np.atleast_2d(getattr(masked.prune.scores, t))[n]
    want = sorted(np.flatnonzero(mask), key=lambda i: -scores[i])
    sits = np.atleast_2d(getattr(found, t))[n]
    assert sits[: len(want)].tolist() == want
    # What a narrower layer does not fill is dead.
    assert (sits[len(want) :] == -1).all()


def test_lineage_through_two_shrinks(masked):
  once = notebook.shrink(masked)
  twice = notebook.shrink(notebook.prune(once, int(0.8 * once.live_params)))
  assert twice.live_params < once.live_params
  params = conftest.make_params(CFG)
  found = notebook.lineage(twice)
  stem = found.stem
  for n in range(CFG.N):
    for slot, source in enumerate(found.ffn[n]):
      if source >= 0:
        np.testing.assert_array_equal(
          twice.params.layers.w_up[n, :, slot],
          params.layers.w_up[n, stem, source],
        )
    for slot, source in enumerate(found.heads[n]):
      if source >= 0:
        np.testing.assert_array_equal(
          twice.params.layers.wo[n, slot],
          params.layers.wo[n, source][..., stem],
        )


def test_the_lineage_of_events_composes_the_indices_that_they_kept():
  groups = lambda *x: structure.Groups(*x)
  kept = [
    groups([[2, 0], [1, 2]], [[5, 3, 4], [0, 1, 2]], [7, 1, 3, 0]),
    groups([[1], [0]], [[2, 0], [1, 2]], [3, 1]),
  ]
  wide, mid, small = (
    dataclasses.replace(CFG, K=k, F=f, D=d)
    for k, f, d in ((3, 6, 8), (2, 3, 4), (1, 2, 2))
  )
  made = [
    events.ShrinkEvent(i, i, i, a, b, groups(0, 0, 0), kept[i], 1.0, 1.0)
    for i, (a, b) in enumerate(((wide, mid), (mid, small)))
  ]
  run = notebook.Run(None, None, None, made)
  first, second = (notebook.event_lineage(run, i) for i in range(2))
  assert first.stem.tolist() == kept[0].stem
  assert second.heads.tolist() == [[0], [1]]
  assert second.ffn.tolist() == [[4, 5], [1, 2]]
  assert second.stem.tolist() == [0, 1]
  # An event is called by its index, wherever in the list it stands.
  late = notebook.Run('late', None, None, made[1:])
  with pytest.raises(errors.InputError, match='has no event 0; it has 1: 1'):
    notebook.event_lineage(late, 0)
  with pytest.raises(errors.InputError, match=r'lost events 0, .*event=1'):
    notebook.event_lineage(late, 1)


@pytest.mark.parametrize(
  ('until', 'words'),
  [(30, 'has no checkpoint yet; wait'), (60, 'is finished and has no check')],
)
def test_what_is_said_where_no_model_is(tmp_path, until, words):
  report_test.write_run(tmp_path / 'a', until=until)
  log = runlog.read(tmp_path / 'a')
  run = notebook.Run(tmp_path / 'a', log, None, [])
  with pytest.raises(errors.InputError, match=words):
    notebook.model(run)


def test_what_is_alive_is_told_in_the_coordinates_of_the_source(masked):
  for model in (masked, notebook.shrink(masked)):
    found = notebook.alive_in_source(model)
    jax.tree.map(np.testing.assert_array_equal, found, masked.prune.masks)


def test_bitmaps_show_the_masks_of_the_source(masked, monkeypatch):
  shown, grid = [], plots.grid
  monkeypatch.setattr(
    plots, 'grid', lambda ax, values, *x: shown.append(values) or grid(
      ax, values, *x
    ),
  )  # fmt: skip
  figure = notebook.masks(notebook.shrink(masked))
  for t, values in zip(structure.TYPES, shown, strict=True):
    want = np.atleast_2d(getattr(masked.prune.masks, t))
    np.testing.assert_array_equal(values, want)
    assert f'{want.sum()} of {want.size} alive' in figure.title
  assert figure.png.startswith(b'\x89PNG')


def test_scores_leave_out_the_dead(masked, drawn):
  shown = notebook.scores(masked)
  # Of which saliency a model has its scores it does not say.
  assert 'nats' not in shown.caption
  assert drawn[0].axes[-1].get_xlabel() == 'score'
  for (t, _), ax in zip(figures.COLORS.items(), drawn[0].axes[:3], strict=True):
    image = np.ma.filled(ax.images[0].get_array(), np.nan).T
    alive = np.atleast_2d(getattr(masked.prune.masks, t))
    want = np.where(alive, getattr(masked.prune.scores, t), np.nan)
    np.testing.assert_allclose(image, want)


def test_the_drawing_in_text_is_the_masks(masked):
  lines = notebook.bits(masked.prune.masks).splitlines()
  for line, (t, n, mask) in zip(lines, each(masked.prune.masks), strict=True):
    assert line.startswith(t if t == 'stem' else f'{t}, layer {n} ')
    assert line.split()[-1] == ''.join('█' if x else '·' for x in mask)


def test_a_masked_model_equals_the_shrunk_one_and_no_broken_one(masked):
  tokens = conftest.make_tokens(CFG)
  shrunk = notebook.shrink(masked)
  assert notebook.logit_difference(masked, shrunk, tokens) < 1e-5
  assert notebook.logit_difference(make_model(), shrunk, tokens) > 1e-2
  layers = shrunk.params.layers
  # As if values had been gathered with the indices of another layer.
  wrong = layers.replace(w_down=jnp.roll(layers.w_down, 1, axis=0))
  broken = dataclasses.replace(
    shrunk, load=lambda: shrunk.params.replace(layers=wrong)
  )
  assert notebook.logit_difference(masked, broken, tokens) > 1e-2


def test_a_prune_takes_the_cheapest_group_first():
  model = make_model()
  prices = notebook.prices(model)
  pruned = notebook.prune(model, model.live_params - 1)
  gone = [
    (t, n, i)
    for t, n, mask in each(pruned.prune.masks)
    for i in np.flatnonzero(~mask)
  ]
  cheapest = min(
    (price, t, n, i)
    for t, n, row in each(prices)
    for i, price in enumerate(row)
  )
  assert gone == [cheapest[1:]]
  assert pruned.params is model.params


def test_a_uniform_prune_keeps_one_width():
  model = make_model()
  pruned = notebook.prune(model, int(0.7 * model.live_params), 'uniform')
  for t in ('heads', 'ffn'):
    assert np.ptp(np.asarray(getattr(pruned.prune.masks, t)).sum(-1)) == 0
  assert pruned.live_params <= 0.7 * model.live_params


@pytest.mark.parametrize(
  ('target', 'policy', 'words'),
  [
    (10**9, 'ragged', 'target 1,000,000,000 is not between'),
    (1, 'ragged', 'out of reach'),
    (3000, 'rough', "policy 'rough' is not one of uniform, ragged; choose"),
    (3000, 'uniform', 'layers of different widths'),
  ],
)
def test_a_prune_that_cannot_be_made_is_refused(target, policy, words):
  uneven = jax.tree.map(np.array, structure.all_alive(CFG))
  uneven.ffn[0, 3] = False
  with pytest.raises(errors.InputError, match=words):
    notebook.prune(make_model(uneven), target, policy)


def test_what_was_never_scored_is_not_pruned():
  model = make_model()
  prune = model.prune.replace(count=np.int32(0))
  with pytest.raises(errors.InputError, match='made has no scores'):
    notebook.prune(dataclasses.replace(model, prune=prune), 3000)


@pytest.mark.parametrize('tokens', ([[61]], [1, 2], [[0.7, 3.2]], [[]], 'text'))
def test_tokens_of_no_vocabulary_are_refused(masked, tokens):
  with pytest.raises(errors.InputError, match='within 0 and 60'):
    notebook.logit_difference(masked, masked, tokens)


def test_survivors_are_listed_up_to_a_number(masked):
  sits = notebook.lineage(masked)
  table = notebook.survivors(masked, most=2)
  live = sits.ffn[1][sits.ffn[1] >= 0]
  assert table.rows[2][2] == f'{live[0]} {live[1]} and {len(live) - 2} more'
  assert f'<td>{table.rows[2][2]}</td>' in table._repr_html_()


def test_the_small_model_is_scored_by_its_gradient():
  model = notebook.small_model('abc, and so on')
  for _, _, row in each(model.prune.scores):
    assert (row > 0).all()
  other = notebook.small_model('something else')
  assert np.abs(model.prune.scores.ffn - other.prune.scores.ffn).max() > 0


@pytest.mark.parametrize('text', ['', 'a'])
def test_a_text_with_nothing_to_predict_is_refused(text):
  with pytest.raises(errors.InputError, match=f"text '{text}' has fewer than"):
    notebook.small_model(text)


def test_a_figure_in_a_notebook_has_its_words(log):
  (size,) = figures.draw(log, ['size'])
  formatters = pytest.importorskip('IPython.core.formatters')
  data, about = formatters.DisplayFormatter().format(size)
  assert data['image/png'] == size.png
  assert about['image/png']['alt'] == f'{size.title}. {size.caption}'


def test_runs_are_drawn_side_by_side(tmp_path, drawn):
  for name, seed in (('a', 0), ('b', 1)):
    report_test.write_run(tmp_path / name, seed=seed, ragged=name == 'b')
  _, b = runs = [runlog.read(tmp_path / name) for name in 'ab']
  size, quality = pictures.sizes(runs), pictures.quality(runs)
  pictures.architecture(b)
  for line, run in zip(drawn[0].axes[0].lines, runs, strict=True):
    assert line.get_label() == run.name
    want = [run.source_params(), *run.train['live_params']]
    np.testing.assert_array_equal(line.get_ydata(), want)
  for run in runs:
    end = run.evals[-1]
    assert f'{run.name} {end["bits_per_byte"]:.3f}' in quality.title
    assert [end['live_params'], end['bits_per_byte']] in [
      [x[-1] for x in line.get_data()] for line in drawn[1].axes[0].lines
    ]
  assert '134.5M' in size.title
  widths, prices = drawn[2].axes
  for t, width, price in zip(
    structure.TYPES, widths.lines, prices.lines, strict=True
  ):
    share = b.train[f'widths.{t}'] / b.source_widths()[t]
    np.testing.assert_allclose(width.get_ydata()[1:], 100 * share)
    np.testing.assert_array_equal(price.get_ydata(), b.train[f'price.{t}'])
  assert prices.get_ylabel() == 'mean price, score\nper parameter'


def named(run, *workdirs):
  """One run under several names."""
  made = [pathlib.Path('/runs', x) for x in workdirs]
  return [dataclasses.replace(run, workdir=x) for x in made]


@pytest.fixture(name='log', scope='module')
def _log(tmp_path_factory):
  folder = tmp_path_factory.mktemp('log') / 'a'
  report_test.write_run(folder)
  return runlog.read(folder)


def test_names_are_the_ends_of_paths_that_differ(log):
  names = lambda *x: runlog.names([x.workdir for x in named(log, *x)])
  assert names('a', 'b/a', 'b/c') == ['runs/a', 'b/a', 'b/c']
  assert names('t/x/0', 't/y/0', 't/y/1') == ['x/0', 'y/0', 'y/1']
  # One run twice has one name.
  assert names('a', 'b', 'a') == ['a', 'b', 'a']
  assert runlog.names(['runs/a/', './runs/a', 'runs/b']) == ['a', 'a', 'b']
  assert runlog.names(['/a', '/b/a']) == ['/a', 'b/a']


@pytest.mark.parametrize('number', [2, 4, 6, 24])
@pytest.mark.parametrize('letters', [1, 12, 90])
@pytest.mark.parametrize('draw', [pictures.sizes, pictures.quality])
def test_a_legend_of_many_runs_fits(log, drawn, alone, draw, number, letters):
  runs = named(log, *(f't/{i:x}{letters * "n"}/0-61440' for i in range(number)))
  # The same for every number.
  if (draw, letters) not in alone:
    draw(runs[:1])
    alone[draw, letters] = drawn.pop().axes[0].get_window_extent()
  draw(runs)
  (shown,) = drawn
  panel, one = shown.axes[0], alone[draw, letters]
  many, legend = (x.get_window_extent() for x in (panel, panel.get_legend()))
  # No letters fall out, and no panel is squeezed; a long title takes its own.
  assert legend.x1 <= shown.bbox.x1 and legend.y1 <= shown.bbox.y1
  assert many.width > 0.95 * one.width
  assert many.height > 0.8 * one.height
  texts = [x.get_text() for x in panel.get_legend().get_texts()]
  assert len(set(texts)) == number


@pytest.fixture(name='alone', scope='module')
def _alone() -> dict:
  """The panel of one run, by what is drawn and the letters of its name."""
  return {}


def test_long_names_stay_apart(log, drawn):
  """Also where they differ in the middle alone, which is left out of others."""
  runs = named(log, *(f'{"a" * 40}{i}{"b" * 40}' for i in range(2)))
  pictures.sizes(runs)
  texts = drawn[0].axes[0].get_legend().get_texts()
  assert [x.get_text() for x in texts] == [x.name for x in runs]


@pytest.mark.parametrize('name', ['_draft', '$a$', '_$a$_', 'a_$', '$'])
def test_a_name_is_drawn_as_it_is(log, drawn, name):
  runs = named(log, name, 'b')
  size, quality = pictures.sizes(runs), pictures.quality(runs)
  for fig in drawn:
    text, _ = fig.axes[0].get_legend().get_texts()
    assert text.get_text().strip().replace(r'\$', '$') == name
    # Or what stands between the dollars would be a formula.
    assert text.get_text().count(r'\$') == name.count('$')
  assert f'now: {name} ' in quality.title
  assert size.png and quality.png


def test_the_config_of_the_small_run_has_the_keys_of_the_shipped_one(tmp_path):
  cli.check(small_run.config(tmp_path, tmp_path), 'small_run')


def test_an_unknown_key_is_refused_before_anything_is_written(tmp_path):
  with pytest.raises(errors.InputError, match=r'prune\.polcy'):
    notebook.small_run(tmp_path / 'new', changes={'prune.polcy': 'ragged'})
  assert not (tmp_path / 'new').exists()


def test_a_folder_that_cannot_be_written_is_told_without_flags(tmp_path):
  (tmp_path / 'file').write_text('x')
  with pytest.raises(errors.InputError, match=r'cannot write .*file/new') as e:
    notebook.small_run(tmp_path / 'file' / 'new')
  assert 'choose another folder' in str(e.value) and '--' not in str(e.value)


def test_a_run_that_does_not_exist_is_one_line(tmp_path, monkeypatch):
  monkeypatch.setenv(notebook.VARIABLE, str(tmp_path / 'none'))
  for opened in (notebook.open_run, notebook.open_runs):
    with pytest.raises(errors.InputError, match='none does not exist') as e:
      opened()
    (line,) = e.value._render_traceback_()
    assert line.startswith('error: workdir')


@pytest.mark.parametrize(
  ('call', 'words'),
  [
    (lambda: notebook.open_runs('runs/a'), 'runs/a is one workdir; open it by'),
    (lambda: notebook.figure_2c([]), 'no run is given'),
    (lambda: notebook.quality([]), 'no run is given'),
    (lambda: notebook.overlap([]), 'no run is given'),
    (lambda: notebook.figure_2c(RUN), 'runs/a is one run; give a list'),
    (lambda: notebook.model(RUN, event=0, step=24), 'event 0 and step 24 are'),
    (lambda: notebook.overlap([None], part='dead'), "no part 'dead'; 'alive'"),
  ],
)
def test_calls_that_make_no_sense_are_one_line(call, words):
  with pytest.raises(errors.InputError, match=words):
    call()
