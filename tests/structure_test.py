import dataclasses

import jax
import jax.numpy as jnp
import pytest

from effllm_jax import structure
from tests import conftest


def test_smollm2_has_its_published_size():
  cfg = conftest.make_config(
    V=49152, D=576, N=30, K=3, G=3, H=64, F=1536, tied=True
  )
  assert cfg.num_params() == 134_515_008


def test_num_params_counts_every_array(cfg):
  sizes = jax.tree.map(lambda s: s.size, structure.shapes(cfg))
  assert cfg.num_params() == sum(jax.tree.leaves(sizes))


def test_axes_are_letters_of_the_config(cfg):
  fields = {f.name for f in dataclasses.fields(cfg)}
  for letters in jax.tree.leaves(structure.axes(cfg)):
    assert set(letters) <= fields


def test_init_has_the_declared_shapes(cfg):
  params = conftest.make_params(cfg)
  structure.check_shapes(params, cfg)
  assert (params.unembed is None) == cfg.tied


def test_check_shapes_names_the_leaf(cfg):
  params = conftest.make_params(cfg)
  layers = params.layers.replace(wv=jnp.zeros((1, 2, 3)))
  with pytest.raises(ValueError, match=r'layers\.wv has shape \(1, 2, 3\)'):
    structure.check_shapes(params.replace(layers=layers), cfg)
  with pytest.raises(ValueError, match=r'params\.unembed is'):
    structure.check_shapes(params, dataclasses.replace(cfg, tied=not cfg.tied))


def test_map_axes_walks_letters_and_leaves_together(cfg):
  ranks = structure.map_axes(
    lambda letters, leaf: len(letters) - leaf.ndim, conftest.make_params(cfg)
  )
  assert set(jax.tree.leaves(ranks)) == {0}
