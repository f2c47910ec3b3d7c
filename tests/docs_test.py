"""What README, CONTRIBUTING and CITATION say is true."""

import ast
import pathlib
import re
import tomllib

import numpy as np
import pytest
import yaml

from effllm_jax import model
from effllm_jax import selection
from effllm_jax import small_run
from effllm_jax import sources
from effllm_jax import structure
from experiments.configs import smollm2_135m
from tests import conftest
from tests import saliency_test

ROOT = pathlib.Path(__file__).parents[1]


def _block(name):
  """The Python of the README that has a name in it."""
  blocks = re.findall(
    r'```python\n(.*?)```', (ROOT / 'README.md').read_text(), re.S
  )
  (code,) = [x for x in blocks if name in x]
  return code


def test_the_run_of_the_readme(tmp_path, monkeypatch):
  pytest.importorskip('torch', reason='requirements-torch.txt')
  small_run.write_inputs(tmp_path)
  config = small_run.config(tmp_path / 'model', tmp_path / 'text')
  config.train.tokens, config.prune.end_tokens = 8 * 64, 6 * 64
  monkeypatch.setattr(smollm2_135m, 'get_config', lambda: config)
  monkeypatch.chdir(tmp_path)
  code, found = _block('train.run'), {}
  for before, after in (
    ('100e6', '18e3'), ("'~/.cache/effllm_jax'", "'cache'"),
    (", 'gguf-f16'", ''),
  ):  # fmt: skip
    assert before in code
    code = code.replace(before, after)
  exec(code, found)
  assert found['made'].params <= 18e3
  assert found['pruned'].cfg.num_params() < small_run.CFG.num_params()
  assert (tmp_path / 'out' / 'b' / 'README.md').is_file()


def _run_the_parts(tmp_path, monkeypatch):
  """What the loop of one's own has made, by name, and its source."""
  small_run.write_inputs(tmp_path)
  source = sources.load(tmp_path / 'model', tmp_path)
  found = {'text': 'It was a dark and stormy night.'}
  with monkeypatch.context() as m:
    m.setattr(sources, 'load', lambda name, cache: source)
    exec(_block('take_params'), found)
  return found, source


def test_the_parts_of_the_readme(tmp_path, monkeypatch):
  found, source = _run_the_parts(tmp_path, monkeypatch)
  masks, small = found['masks'], found['small']
  left = selection.live_params(masks, small)
  assert 0.7 < left / source.cfg.num_params() <= 0.8
  tokens = found['window_BT'].shape
  assert tokens[0] == 1 < tokens[1]
  assert found['logits_BTV'].shape == (*tokens, small.V)
  structure.check_shapes(found['params'], small)


def test_the_export_of_those_parts_is_the_same_model(tmp_path, monkeypatch):
  pytest.importorskip('torch', reason='requirements-torch.txt')
  found, _ = _run_the_parts(tmp_path, monkeypatch)
  monkeypatch.chdir(tmp_path)
  exec(_block('hf_export.write'), found)
  again = sources.load(tmp_path / 'out' / 'mine', tmp_path)
  logits_BTV, _ = model.forward(
    again.params, again.masks, found['window_BT'], again.cfg
  )
  np.testing.assert_allclose(logits_BTV, found['logits_BTV'], atol=1e-5)


def test_the_saliency_of_the_readme_is_its_formula(cfg):
  code, found = _block('group_scores'), {}
  exec(code, found)
  trees = [conftest.make_params(cfg, seed) for seed in range(2)]
  want = saliency_test.brute_force(lambda w, g: np.square(g * w), cfg, *trees)
  conftest.check_close(found['taylor1_squared'](*trees), want, 1e-5, 2e-5)


def test_every_invariant_has_its_test():
  text = (ROOT / 'CONTRIBUTING.md').read_text()
  named = re.findall(r'`(\w+_test)\.(\w+)`', text)
  assert len(named) > 15
  for module, name in named:
    code = (ROOT / 'tests' / f'{module}.py').read_text()
    assert re.search(rf'^(def )?{name}\b', code, re.M), (module, name)


def test_help_shows_commands_as_they_are_written():
  """Outside of a raw string a backslash joins two lines."""
  for path in (ROOT / 'experiments').glob('*.py'):
    text = ast.get_docstring(ast.parse(path.read_text()))
    assert max(map(len, text.split('\n'))) <= 80, path


def test_the_documents_name_what_there_is():
  documents = [*ROOT.glob('*.md'), *ROOT.glob('experiments/*.md')]
  titles, named = {}, set()
  for path in documents:
    text = path.read_text()
    titles[path.name] = set(re.findall(r'^#+ (.+)$', text, re.M))
    for link in re.findall(r'\]\(([^)#:]+)\)', text):
      assert (path.parent / link).exists(), (path.name, link)
    for name in re.findall(r'python -m experiments\.(\w+)', text):
      assert (ROOT / 'experiments' / f'{name}.py').exists(), (path.name, name)
    for name in re.findall(r'experiments/(?:configs|studies)/\w+\.py', text):
      assert (ROOT / name).exists(), (path.name, name)
  names = {'README.md', 'BENCHMARKS.md', 'HYPOTHESES.md', 'STUDIES.md'}
  assert names <= set(titles)
  commands = ' '.join(path.read_text() for path in documents)
  for file, name in re.findall(r'(tests/\w+\.py) -k (\w+)', commands):
    named_tests = re.findall(r'def test_(\w+)', (ROOT / file).read_text())
    assert any(name in test for test in named_tests), (file, name)
  tests = ' '.join(path.read_text() for path in ROOT.glob('tests/*.py'))
  for name in re.findall(r'EFFLLM_\w+', commands):
    assert f"'{name}'" in tests, name
  packages = ('effllm_jax', 'experiments', 'kernels')
  code = [x for name in packages for x in (ROOT / name).rglob('*.py')]
  for path in [*documents, *code]:
    text = re.sub(r'\s+#?\s*', ' ', path.read_text())
    found = re.findall(r'(\w+\.md), "([^"]+)"', text)
    found += [x[::-1] for x in re.findall(r'"([^"]+)" in (\w+\.md)', text)]
    for name, title in found:
      assert title in titles[name], (path.name, name, title)
      named.add(path.name)
  assert {'README.md', 'STUDIES.md', 'dispatch.py'} <= named


def test_the_citation_is_of_this_version():
  cited = yaml.safe_load((ROOT / 'CITATION.cff').read_text())
  project = tomllib.loads((ROOT / 'pyproject.toml').read_text())['project']
  assert (cited['title'], cited['version'], cited['license']) == (
    project['name'], project['version'], project['license'],
  )  # fmt: skip


@pytest.mark.parametrize('package', ['effllm_jax', 'kernels'])
def test_the_layout_names_every_module(package):
  readme = (ROOT / 'README.md').read_text()
  layout = readme.split('\n## Layout\n')[1].split('\n## ')[0]
  part = re.split(r'\n(?=\w+/ )', layout.split(f'\n{package}/ ')[1])[0]
  # Names stand in front, two spaces from what is said of them.
  named = re.findall(r'^  (\w+(?: \w+)*)(?=  |$)', part, re.MULTILINE)
  modules = {path.stem for path in (ROOT / package).glob('*.py')}
  assert modules - {'__init__'} == {x for line in named for x in line.split()}
