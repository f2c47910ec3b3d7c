"""Dependencies go one way; heavy packages stay behind one module."""

import ast
import functools
import importlib.machinery
import importlib.metadata
import os
import pathlib
import subprocess
import sys
import tomllib

import pytest

from tests import conftest
from tests import runs

ROOT = pathlib.Path(__file__).parents[1]
# The modules of `effllm_jax.kernels`.
FOLDER = ROOT / 'kernels'
# Each module imports only modules that stand above it.
ORDER = [
  'errors', 'amounts', 'untrusted', 'console', 'structure', 'sharding',
  'kernels', 'unembedding', 'model', 'distillation', 'saliency', 'budgets',
  'rules', 'moves', 'selection', 'schedules', 'optimizers', 'repair',
  'model_repair',
  'state', 'shrink', 'events', 'steps',
  'accounting', 'atomic', 'fetch', 'benchmark_items', 'workdir', 'environment',
  'digests',
  'checkpoints', 'resume', 'checkpoint_writer',
  'documents', 'packages', 'text_files', 'text_folder', 'ngrams', 'splitting',
  'dataset', 'corpus', 'tokenizing', 'workers', 'data', 'heldout',
  'hf_config', 'licences', 'bpe', 'weights', 'widths', 'hf_trimmed',
  'hf_folder', 'gguf_source', 'hf_source', 'sources', 'teacher', 'runlog',
  'tables', 'agreement', 'tokenization_effllm',
  'modeling_effllm', 'hf_export', 'timing', 'llama_cpp', 'gguf_layout',
  'gguf_export', 'onnx_export', 'executorch_export', 'formats', 'model_card',
  'export', 'finished', 'overlap', 'edge', 'config_checks', 'plan', 'forecast',
  'calibration', 'pruning', 'evaluate', 'likelihood', 'harness', 'plots',
  'figures', 'report', 'comparison', 'comparison_report', 'interrupts',
  'profiling', 'advice', 'loop', 'inputs', 'train', 'small_run', 'inspection',
  'pictures', 'notebook',
]  # fmt: skip
KERNELS = [
  'forms', 'xla', 'xla_loop', 'bucket', 'pallas_tpu', 'pallas_tpu_attention',
  'pallas_hopper', 'pallas_hopper_attention',
  'autotune', 'dispatch', 'matmul', 'swiglu', 'attention',
]  # fmt: skip
# Package -> the only modules of effllm_jax that may import it.
ONLY = {
  'orbax': {'checkpoints', 'checkpoint_writer'},
  'grain': {'data'},
  'tensorflow_datasets': {'dataset'},
  'gguf': {'gguf_source', 'gguf_layout', 'gguf_export'},
  'matplotlib': {'plots', 'figures', 'pictures', 'comparison_report'},
  'treescope': {'notebook'},
  'IPython': set(),
  'torch': {
    'hf_export',
    'modeling_effllm',
    'onnx_export',
    'executorch_export',
  },
  'transformers': {'hf_export', 'modeling_effllm', 'tokenization_effllm'},
  'onnx': {'onnx_export'},
  'executorch': {'executorch_export'},
  'onnxruntime': {'onnx_export'},
  'onnxscript': {'onnx_export'},
  'xllamacpp': {'llama_cpp'},
  'lm_eval': {'harness'},
  'datasets': {'harness'},
  'pyarrow': {'benchmark_items', 'text_files'},
  'absl': {'data'},
  'experiments': set(),
}
# The modules that may import our kernels.
USE_KERNELS = {'unembedding', 'model', 'config_checks', 'train', 'harness'}


def imports(path: pathlib.Path) -> set[str]:
  names = set()
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.Import):
      names |= {alias.name for alias in node.names}
    elif isinstance(node, ast.ImportFrom):
      names |= {f'{node.module}.{alias.name}' for alias in node.names}
  return names


MODULES = sorted(
  p.stem for p in (ROOT / 'effllm_jax').glob('*.py') if p.stem != '__init__'
)


def test_every_module_has_its_place():
  assert sorted(ORDER) == MODULES


@pytest.mark.parametrize('name', MODULES)
def test_imports_go_one_way(name):
  allowed = set(ORDER[: ORDER.index(name)])
  if name == 'kernels':
    # Names the folder of its modules.
    allowed = {name}
  elif name not in USE_KERNELS:
    allowed -= {'kernels'}
  for imported in imports(ROOT / 'effllm_jax' / f'{name}.py'):
    package, _, rest = imported.partition('.')
    if package == 'effllm_jax':
      assert rest.split('.')[0] in allowed, f'{name} imports {imported}'
    assert package not in ONLY or name in ONLY[package], (
      f'{name} imports {imported}'
    )


def test_kernels_go_one_way():
  assert sorted(KERNELS) == sorted(p.stem for p in FOLDER.glob('*.py'))
  for i, name in enumerate(KERNELS):
    for imported in imports(FOLDER / f'{name}.py'):
      # Of the method they know nothing.
      assert not imported.startswith('experiments'), (name, imported)
      if imported.startswith('effllm_jax'):
        _, package, module, *_ = *imported.split('.'), '', ''
        assert package == 'kernels', (name, imported)
        assert module in KERNELS[:i], (name, imported)


def test_the_name_kernels_is_left_to_another_package(tmp_path):
  """`python -m` finds our folder first, and transformers needs a package."""
  other = tmp_path / 'kernels' / '__init__.py'
  other.parent.mkdir()
  other.touch()
  found = importlib.machinery.PathFinder.find_spec(
    'kernels', [str(ROOT), str(tmp_path)]
  )
  assert found.origin == str(other)


def test_an_installation_has_every_package():
  settings = tomllib.loads((ROOT / 'pyproject.toml').read_text())
  settings = settings['tool']['setuptools']
  folders = [
    settings['package-dir'].get(name, name.replace('.', '/'))
    for name in settings['packages']
  ]
  wanted = {
    path.parent.relative_to(ROOT).as_posix()
    for folder in ('effllm_jax', 'experiments', 'kernels')
    for path in (ROOT / folder).rglob('*.py')
  }
  assert sorted(folders) == sorted(wanted)
  assert settings['package-dir'] == {'effllm_jax.kernels': 'kernels'}


@functools.cache
def names_of(path: pathlib.Path) -> set[str]:
  """What a module has: of its own, imported, and the modules below it."""
  tree, names = ast.parse(path.read_text()), {'__name__', '__file__', '__doc__'}
  for node in ast.walk(tree):
    if isinstance(node, ast.ClassDef | ast.FunctionDef):
      names.add(node.name)
    elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
      names.add(node.id)
    elif isinstance(node, ast.Import | ast.ImportFrom):
      names |= {alias.asname or alias.name for alias in node.names}
  if path.stem == '__init__':
    names |= {p.stem for p in path.parent.iterdir()}
  return names


def missing(path: pathlib.Path) -> list[str]:
  """What a file asks our modules for and they do not have.

  A command imports within its main, which no test may run: a function that was
  renamed there is an error of a user. Names that stand for something else, too,
  in a file are left out.
  """
  tree = ast.parse(path.read_text())
  modules, others = {}, set()
  for node in ast.walk(tree):
    if isinstance(node, ast.Import | ast.ImportFrom):
      for alias in node.names:
        name = f'{getattr(node, "module", "")}.{alias.name}'.strip('.')
        name = name.replace('effllm_jax.kernels.', 'kernels.')
        file = ROOT / name.replace('.', '/')
        file = (
          file / '__init__.py' if file.is_dir() else file.with_suffix('.py')
        )
        if file.is_file():
          modules[alias.asname or alias.name] = file
    elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
      others.add(node.id)
    elif isinstance(node, ast.arg):
      others.add(node.arg)
  return [
    f'{path.name}:{node.lineno} {node.value.id}.{node.attr}'
    for node in ast.walk(tree)
    if isinstance(node, ast.Attribute)
    and isinstance(node.value, ast.Name)
    and node.value.id in modules.keys() - others
    and node.attr not in names_of(modules[node.value.id])
  ]


def test_what_is_asked_of_a_module_is_there(tmp_path):
  for package in ('effllm_jax', 'experiments', 'kernels', 'tests'):
    for path in (ROOT / package).rglob('*.py'):
      assert missing(path) == []
  wrong = tmp_path / 'wrong.py'
  wrong.write_text(
    'def main():\n'
    '  from effllm_jax import workdir as workdir_lib\n'
    '  workdir_lib.claim()\n'
    '  workdir_lib.claimed()\n'
  )
  assert missing(wrong) == ['wrong.py:3 workdir_lib.claim']


def says_its_encoding(call: ast.Call) -> bool:
  """Whether a call opens no text, or says in which encoding."""
  name = getattr(call.func, 'attr', getattr(call.func, 'id', None))
  if any(x.arg == 'encoding' for x in call.keywords):
    return True
  if name in ('read_text', 'write_text'):
    ours = {'untrusted', 'workdir', 'workdir_lib'}
    encodings = call.args[name == 'write_text' :]
    return (
      not isinstance(call.func, ast.Attribute)
      or getattr(call.func.value, 'id', None) in ours
      or bool(encodings)
    )
  # Of the built-in function the mode comes second, of a path's first; what is
  # opened by a name of its own is no text.
  modes = call.args[isinstance(call.func, ast.Name) :][:1]
  return name != 'open' or any(
    not isinstance(x, ast.Constant) or 'b' in x.value for x in modes
  )


def test_text_is_in_utf8_whatever_the_locale():
  for package in ('effllm_jax', 'experiments', 'kernels'):
    for path in (ROOT / package).rglob('*.py'):
      for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call):
          assert says_its_encoding(node), f'{path}:{node.lineno}'


def test_files_that_are_started_first_are_there():
  found = {path.name for path in (ROOT / 'tests').glob('*_test.py')}
  assert {f'{name}_test.py' for name in conftest.LONGEST} <= found


def test_the_model_needs_jax_and_flax_only():
  heavy = ['tokenizers', *sorted(ONLY.keys() - {'absl'})]
  code = (
    'import sys, effllm_jax.model; '
    f'print([m for m in {heavy} if m in sys.modules])'
  )
  done = subprocess.run(
    [sys.executable, '-c', code],
    capture_output=True, text=True, check=True, cwd=ROOT,
  )  # fmt: skip
  assert done.stdout.strip() == '[]'


COMMANDS = [
  f'experiments.{p.stem}'
  for p in sorted((ROOT / 'experiments').glob('*.py'))
  if 'cli.run(main)' in p.read_text()
]


def test_flags_are_parsed_before_jax_is_imported():
  # Two commands may have flags of one name.
  code = f"""
import importlib, sys
from absl import flags
for name in ['experiments.cli', *{COMMANDS}]:
  for flag in [*flags.FLAGS]:
    delattr(flags.FLAGS, flag)
  importlib.import_module(name)
  if 'jax' in sys.modules:
    sys.exit(name + ' imports jax')
"""
  done = subprocess.run(
    [sys.executable, '-c', code], capture_output=True, text=True, cwd=ROOT
  )
  assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
  'name', ['aot_hopper', 'aot_slice', 'aot_steps', 'aot_tpu']
)
def test_jax_finds_the_environment_that_a_compiler_needs(name):
  code = f"""
import os, runpy, sys
from experiments import cli
def run(main):
  print('jax' in sys.modules, os.environ.get('JAX_PLATFORMS'))
cli.run = run
runpy.run_module('experiments.{name}', run_name='__main__')
"""
  others = {k: v for k, v in os.environ.items() if k != 'JAX_PLATFORMS'}
  done = subprocess.run(
    [sys.executable, '-c', code],
    capture_output=True, text=True, check=True, cwd=ROOT, env=others,
  )  # fmt: skip
  assert done.stdout.split() == ['False', 'cpu']


@pytest.mark.parametrize(
  'name, wheel, words',
  [
    ('aot_hopper', 'jax-cuda13-plugin', 'no CUDA plugin of jax here'),
    ('aot_slice', 'libtpu', 'libtpu is not installed'),
    ('aot_steps', 'jax-cuda13-plugin', 'no CUDA plugin of jax here'),
    ('aot_tpu', 'libtpu', 'libtpu is not installed'),
  ],
)
def test_says_which_compiler_is_missing(name, wheel, words):
  if any(x.name == wheel for x in importlib.metadata.distributions()):
    pytest.skip(f'{wheel} is here')
  runs.refused(conftest.command(name), words, 'pip install')
