"""Writes a page for each module of the library, out of its docstrings.

    python -m experiments.api --out=out/api

A module is left out, with a line, where a package that it needs is not
installed. Any warning of pdoc is an error, and leaves the folder as it was.
"""

from absl import flags

from effllm_jax import errors
from experiments import cli

_OUT = flags.DEFINE_string('out', None, 'Folder to write.')


def main(argv: list[str]) -> None:
  """Imports what can be imported and renders it."""
  del argv
  import importlib
  import pathlib
  import pkgutil
  import shutil
  import warnings

  with errors.installed('to make API pages', '-r requirements-dev.txt'):
    import pdoc
  import effllm_jax
  from effllm_jax import atomic
  from effllm_jax import kernels

  def names(package):
    found = pkgutil.iter_modules(package.__path__, f'{package.__name__}.')
    return [x.name for x in found]

  of_kernels = names(kernels)
  missing = []
  for name in [*names(effllm_jax), *of_kernels]:
    try:
      importlib.import_module(name)
    except (ImportError, errors.InputError) as e:
      print(f'{name} is left out: {e}')
      missing.append(f'!{name}')
  # In the language of pdoc: without what follows a `!`. It looks no further
  # than the modules of a package.
  wanted = ['effllm_jax', *of_kernels, *missing]
  pdoc.render.configure(docformat='google', show_source=False)
  out = pathlib.Path(_OUT.value)
  with errors.writing(out), warnings.catch_warnings():
    warnings.simplefilter('error')
    # Said above, in a line.
    warnings.filterwarnings('ignore', "Couldn't import")
    # Of what a class there inherits: transformers 5.25 annotates it with a name
    # that its own dependencies have elsewhere by now.
    of_transformers = r'.* for effllm_jax\.modeling_effllm\.'
    warnings.filterwarnings('ignore', of_transformers)
    out.parent.mkdir(parents=True, exist_ok=True)
    with atomic.scratch(out.parent) as scratch:
      pdoc.pdoc(*wanted, output_directory=scratch / 'api')
      shutil.copytree(scratch / 'api', out, dirs_exist_ok=True)
  print(f'{out / "index.html"}')


if __name__ == '__main__':
  flags.mark_flag_as_required('out')
  cli.run(main)
