"""Where traces lie; `faults_test` reads what is in them."""

import jax
import jax.numpy as jnp
import pytest

from effllm_jax import profiling


@pytest.mark.parametrize('names', [[''], ['process0', 'process1']])
def test_processes_of_a_host_keep_their_traces_apart(
  tmp_path, monkeypatch, names
):
  monkeypatch.setattr(jax, 'process_count', lambda: len(names))
  for index, name in enumerate(names):
    monkeypatch.setattr(jax, 'process_index', lambda index=index: index)
    said = []
    with (
      profiling.Profile(tmp_path, range(1, 2), said.append) as profile,
      profile.step(1, lambda: None),
    ):
      jnp.ones(3).block_until_ready()
    assert f': {tmp_path / name}; open it' in said[0]
  traces = tmp_path.rglob('plugins/profile/*/*.xplane.pb')
  assert sorted(x.parents[3] for x in traces) == [tmp_path / x for x in names]
