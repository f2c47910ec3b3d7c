"""Zeros that fill up, layers that are cut: always the same function."""

import dataclasses

import jax
import numpy as np
import pytest

from effllm_jax import errors
from effllm_jax import structure
from effllm_jax import weights
from effllm_jax import widths
from tests import conftest


def masks_of(cfg, seed=0):
  """Random masks of heads and ffn, the last layer without ffn; numpy."""
  masks = jax.tree.map(np.array, conftest.make_masks(cfg, seed))
  masks.stem[:] = True
  masks.ffn[-1] = False
  return masks


def logits(params, masks, cfg):
  tokens = conftest.make_tokens(cfg)
  return np.asarray(conftest.forward(params, masks, tokens, cfg)[0])


@pytest.mark.parametrize('multiple', [5, 64])
def test_padding_changes_nothing(cfg, multiple):
  params, masks = conftest.make_params(cfg), masks_of(cfg)
  padded, filled, new = widths.padded(params, masks, cfg, multiple)
  structure.check_shapes(padded, new)
  assert (new.D % multiple, (new.D - 1) // multiple) == (
    0,
    (cfg.D - 1) // multiple,
  )
  live, before = (np.asarray(m.ffn).sum(-1) for m in (filled, masks))
  assert (live % multiple == 0).all() and (live - before < multiple).all()
  assert live[-1] == 0
  assert not widths.odd(filled, new, multiple)
  want = logits(params, masks, cfg)
  # The same sums with other roundings: sqrt(D / D') enters every norm.
  np.testing.assert_allclose(
    logits(padded, filled, new), want, atol=2e-5 * np.abs(want).max()
  )


def test_arrays_that_are_wider_than_every_layer_stay_so(cfg):
  masks = masks_of(cfg)
  masks.ffn[:, 5:] = False
  filled, new = widths.padded_shape(masks, cfg, 4)
  assert new.F == cfg.F == filled.ffn.shape[-1] > filled.ffn.sum(-1).max()


def test_without_its_scale_the_padded_stem_is_another_function(cfg):
  params, masks = conftest.make_params(cfg), masks_of(cfg)
  padded, filled, new = widths.padded(params, masks, cfg, 64)
  wrong = dataclasses.replace(new, norm_eps=cfg.norm_eps)
  scaled = padded.replace(final_norm=2 * padded.final_norm)
  want = logits(params, masks, cfg)
  assert np.abs(logits(scaled, filled, new) - want).max() > 1e-3
  # A stem so small that the epsilon counts.
  tiny = params.replace(embed=params.embed * 1e-3)
  padded, filled, new = widths.padded(tiny, masks, cfg, 64)
  right, off = (logits(padded, filled, c) for c in (new, wrong))
  want = logits(tiny, masks, cfg)
  assert np.abs(right - want).max() < 0.1 * np.abs(off - want).max()


def test_filled_is_what_the_masks_compute(cfg):
  params, masks = conftest.make_params(cfg), masks_of(cfg)
  filled = widths.filled(params, masks)
  np.testing.assert_allclose(
    logits(filled, structure.all_alive(cfg), cfg),
    logits(params, masks, cfg),
    atol=1e-5,
  )

  def check(letters, leaf, kept):
    alive = conftest.alive_entries(letters, leaf.shape, masks)
    np.testing.assert_array_equal(kept, np.where(alive, leaf, 0))

  structure.map_axes(check, params, filled)


def test_trimmed_is_what_is_alive_of_a_layer(cfg):
  params, masks = conftest.make_params(cfg), masks_of(cfg)
  for n in range(cfg.N):
    layer = widths.trimmed(params, masks, n)
    assert layer.embed is None and layer.unembed is None

    def check(letters, leaf, cut, n=n):
      for axis, letter in enumerate(letters):
        if letter in ('K', 'F'):
          mask = getattr(masks, structure.PRUNABLE[letter])[n]
          leaf = np.take(np.asarray(leaf), np.flatnonzero(mask), axis=axis)
      np.testing.assert_array_equal(cut, leaf[n : n + 1])

    structure.map_axes(check, params.replace(
      embed=None, final_norm=None, unembed=None), layer)  # fmt: skip
    shapes = {name: x.shape for name, x in weights.views(layer, weights.GGUF)}
    heads, ffn = int(masks.heads[n].sum()), int(masks.ffn[n].sum())
    assert shapes['blk.0.attn_q.weight'] == (heads * cfg.G * cfg.H, cfg.D)
    assert shapes['blk.0.attn_output.weight'] == (cfg.D, heads * cfg.G * cfg.H)
    assert shapes['blk.0.ffn_down.weight'] == (cfg.D, ffn)


def test_odd_names_the_widths():
  cfg = conftest.make_config(D=60, F=130, N=2)
  masks = jax.tree.map(np.array, structure.all_alive(cfg))
  masks.ffn[1, 128:] = False
  assert widths.odd(masks, cfg, 64) == {'stem': [60], 'ffn': [130]}
  assert widths.odd(masks, cfg, 2) == {}


@pytest.mark.parametrize('multiple', [-1, 0, 257, 100_000_000])
def test_a_model_of_zeros_is_refused(multiple):
  cfg = conftest.make_config(D=60, F=130, N=2)
  for fits in (1, 64, 256):
    widths.check_multiple(fits, cfg)
  # As wide as it is.
  for width in ('D', 'F'):
    widths.check_multiple(512, dataclasses.replace(cfg, **{width: 512}))
  with pytest.raises(errors.InputError, match=rf'pad {multiple} is not .* 256'):
    widths.check_multiple(multiple, cfg)
