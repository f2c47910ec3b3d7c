"""`make docs`: a page for each module."""

import pathlib

import pytest

from tests import conftest


def test_a_page_for_each_module(tmp_path):
  """With all packages; what else lies in the folder stays."""
  pytest.importorskip('torch', reason='requirements-torch.txt')
  pytest.importorskip('pdoc', reason='requirements-dev.txt')
  out = tmp_path / 'out' / 'api'
  out.mkdir(parents=True)
  (out / 'mine.txt').write_text('mine')
  done = conftest.command('api', f'--out={out}')
  assert done.returncode == 0, done.stderr
  assert done.stdout == f'{out / "index.html"}\n'
  ours = {
    f'effllm_jax/{sub}{path.stem}.html'
    for folder, sub in (('effllm_jax', ''), ('kernels', 'kernels/'))
    for path in (conftest.ROOT / folder).glob('*.py')
    if path.stem not in ('__init__', 'kernels')
  }
  pages = {str(x.relative_to(out)) for x in out.rglob('*.html')}
  assert pages - ours == {
    'effllm_jax.html', 'effllm_jax/kernels.html', 'index.html'
  }  # fmt: skip
  assert ours <= pages
  page = (out / 'effllm_jax/selection.html').read_text('utf-8')
  assert 'id="select"' in page
  assert (out / 'mine.txt').read_text() == 'mine'
  assert [x.name for x in pathlib.Path(out.parent).iterdir()] == ['api']
