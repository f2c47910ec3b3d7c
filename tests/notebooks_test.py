"""The notebooks of `experiments`: as they are in git, and run to their end."""

import ast
import json
import os
import pathlib
import re
import shutil

import jax
import numpy as np
import pytest

from effllm_jax import checkpoints
from effllm_jax import errors

ROOT = pathlib.Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / 'experiments' / 'notebooks').glob('*.ipynb'))
NAMES = [p.stem for p in NOTEBOOKS]


def cells(name, kind='code'):
  path = ROOT / 'experiments' / 'notebooks' / f'{name}.ipynb'
  return [
    x for x in json.loads(path.read_text())['cells'] if x['cell_type'] == kind
  ]


def test_the_notebooks_are_there():
  assert NAMES == ['inspect_masks', 'reproduce_figures', 'shrink_story']


@pytest.mark.parametrize('name', NAMES)
def test_no_output_is_in_git(name):
  for cell in cells(name):
    assert cell['outputs'] == []
    assert cell['execution_count'] is None


@pytest.mark.parametrize('name', NAMES)
def test_only_the_notebook_module_is_used(name):
  found = set()
  for cell in cells(name):
    for node in ast.walk(ast.parse(''.join(cell['source']))):
      if isinstance(node, ast.Import):
        found |= {alias.name for alias in node.names}
      elif isinstance(node, ast.ImportFrom):
        found |= {f'{node.module}.{alias.name}' for alias in node.names}
      elif isinstance(node, ast.Attribute):
        assert not node.attr.startswith('_'), node.attr
  assert found == {'effllm_jax.notebook'}


@pytest.fixture(scope='module', name='workdir')
def _workdir(tmp_path_factory) -> pathlib.Path:
  """One small real run for all tests here."""
  pytest.importorskip('treescope', reason='requirements-notebook.txt')
  from effllm_jax import notebook

  # One shrink, at the end: every architecture has to be compiled.
  folder = tmp_path_factory.mktemp('small')
  return notebook.small_run(folder, changes={'shrink.threshold': 0.99})


def test_models_are_those_that_the_run_saved(workdir):
  from effllm_jax import notebook

  run = notebook.open_run(workdir)
  assert len(run.events) == 1
  for event in (None, 0):
    model = notebook.model(run, event)
    params, prune, cfg, step = checkpoints.restore_params(workdir, event)
    assert model.cfg == cfg
    assert model.name.endswith(f'step {step}')
    jax.tree.map(np.testing.assert_array_equal, model.params, params)
    jax.tree.map(np.testing.assert_array_equal, model.prune, prune)
  # Between two shrinks some groups are masked and still in the arrays.
  masked = notebook.model(run, step=16)
  assert masked.live_params < masked.cfg.num_params()
  with pytest.raises(errors.InputError, match=r'events/7; .* are: 0'):
    notebook.model(run, event=7)
  with pytest.raises(errors.InputError, match='no event 7; it has 1'):
    notebook.event_lineage(run, 7)


class Executed:
  """What came out of a notebook that a fresh kernel ran to its end."""

  def __init__(self, name: str, folder: pathlib.Path):
    import nbclient
    import nbformat

    path = ROOT / 'experiments' / 'notebooks' / f'{name}.ipynb'
    book = nbformat.read(path, as_version=4)
    # Raises where a cell fails, with its traceback.
    nbclient.NotebookClient(
      book,
      timeout=300,
      kernel_name='python3',
      resources={'metadata': {'path': str(folder)}},
    ).execute()
    self.outputs = [o for cell in book.cells for o in cell.get('outputs', [])]
    self.text = ''.join(
      o.text for o in self.outputs if o.get('name') == 'stdout'
    )

  def of_kind(self, kind: str) -> list[str]:
    return [o.data[kind] for o in self.outputs if kind in o.get('data', {})]

  def number(self, words: str) -> float:
    return float(re.search(rf'{words}: (\S+)', self.text).group(1))


@pytest.fixture(name='execute')
def _execute(workdir, tmp_path, monkeypatch):
  for package in ('ipykernel', 'nbclient'):
    pytest.importorskip(package, reason='requirements-notebook.txt')

  def execute(name, *workdirs):
    paths = os.pathsep.join(map(str, workdirs or [workdir]))
    monkeypatch.setenv('EFFLLM_RUN', paths)
    monkeypatch.setenv('PYTHONPATH', str(ROOT))
    # Nothing is left in the home of whoever runs the tests.
    for variable in ('IPYTHONDIR', 'JUPYTER_RUNTIME_DIR'):
      monkeypatch.setenv(variable, str(tmp_path / variable))
    return Executed(name, tmp_path)

  return execute


def test_inspect_masks(execute, workdir):
  out = execute('inspect_masks')
  assert out.number('masked against shrunk') < 1e-4
  assert out.number('before against after the prune') > 1e-3
  assert re.findall(r'event (\d): .* saved origin: (\w+)', out.text) == [
    ('0', 'True')
  ]
  assert len(out.of_kind('image/png')) == 5
  shown = out.of_kind('text/html')
  for event in checkpoints.read_events(workdir):
    sizes = (x.num_params() for x in (event.before, event.after))
    assert ' → '.join(f'{x:,}' for x in sizes) in shown[0]
  assert sum('treescope' in x for x in shown) == 2


def test_shrink_story(execute):
  out = execute('shrink_story')
  assert out.number('masked against shrunk') < 1e-5
  assert out.number('before against after the prune') > 1e-3
  assert 'arrays unchanged: True' in out.text
  # All alive, after the prune, after the shrink, and put back.
  drawing = r'heads, layer 0.*?stem +[█·]+\n'
  alive, masked, shrunk, back = re.findall(drawing, out.text, re.S)
  assert '·' not in alive
  assert back == masked
  assert len(shrunk) < len(masked)
  assert shrunk.count('█') == masked.count('█') < alive.count('█')


def test_reproduce_figures(execute, workdir, tmp_path):
  again = tmp_path / 'again'
  shutil.copytree(workdir, again)
  out = execute('reproduce_figures', workdir, again)
  assert len(out.of_kind('image/png')) == 4
  said = '\n'.join(out.of_kind('text/plain'))
  bits = re.search(r'per byte now: run (\S+), again (\S+)\'', said)
  assert bits.group(1) == bits.group(2)
  # A run and its copy.
  shown = out.of_kind('text/html')[-1]
  row = re.search(r'run, again: ffn</th>(.*?)</tr>', shown).group(1)
  one, other, _, shared, *_ = re.findall(r'<td>(.*?)</td>', row)
  assert one == other == shared
