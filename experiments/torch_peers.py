"""Pruning as others do it, and training as we do it, in PyTorch.

Known of the others, from their source: Torch-Pruning as of its package 1.6.1,
whose own pruner runs here; LLM-Pruner as of commit 128a07d (October 2024), of
which the criterion is written anew, as an importance for Torch-Pruning's
pruner, and the choice of layers is that of its `scripts/llama_prune.sh`.

What differs from their own recipes, so that the work is the same:

- Feed-forward channels only. Torch-Pruning's example for language models takes
  query heads and leaves the keys and values that they share, and LLM-Pruner's
  graph, under transformers 5.24, takes as many rows of q as of k: neither
  removes a key/value head with its query heads. That example also narrows the
  residual stream, and goes by magnitudes.
- Scores are of the text that is trained on, where LLM-Pruner takes ten pieces
  of 64 tokens of BookCorpus; all weights are trained, where it trains adapters.
"""

from collections.abc import Mapping
from collections.abc import Sequence
import dataclasses
import os
import time
from typing import Any
import warnings

import numpy as np

from effllm_jax import errors

# Other modules of effllm_jax are imported where they are used: they take
# seconds, and the flags come first.


@dataclasses.dataclass(frozen=True)
class Recipe:
  """How one of the others prunes.

  Attributes:
    criterion: `group_taylor` (Torch-Pruning's GroupTaylorImportance), or
      `param_first` or `param_mix` (LLM-Pruner's).
    times: in how many goes; 1 is before training, more are spread over the
      window in which our own run prunes.
    first, last: layers left alone at the start and at the end of the model.
    rounded: whether widths are multiples of `prune.multiple_of.ffn`.
  """

  criterion: str
  times: int = 1
  first: int = 0
  last: int = 0
  rounded: bool = True


@dataclasses.dataclass(frozen=True)
class Task:
  """What is the same for all, as arrays.

  Attributes:
    folder: the source model, for transformers.
    windows: int32 [steps, accumulate, batch_size, seq_len + 1].
    rates: learning rate of every step.
    optimizer: that part of the config.
    heldout: `heldout.HeldOut` by domain.
    batch_size: windows that are evaluated at a time.
    scoring: batches, the next ones of the text, whose gradient is averaged
      for a prune; they train nothing then, and are trained on in their turn.
    begin, end: steps between which our own run prunes.
  """

  folder: str
  windows: np.ndarray
  rates: Sequence[float]
  optimizer: Mapping[str, Any]
  heldout: Mapping[str, Any]
  batch_size: int
  scoring: int
  begin: int
  end: int


def run(
  task: Task, recipe: Recipe | None, width: int | None, threads: int
) -> dict[str, Any]:
  """Prunes and trains a model.

  Args:
    task: what is the same for all.
    recipe: how to prune; None: not at all.
    width: feed-forward channels that are left in every pruned layer.
    threads: of the processor.

  Returns:
    `nats` of the held-out text, by phase (`source`, `pruned`, `final`) and
    domain; `widths`, means over the layers; `params`; `losses` of the steps,
    nats per token; `seconds` of training, scoring and pruning, and
    `pruning_seconds` of it; `peak_bytes`.
  """
  import torch

  from effllm_jax import console
  from effllm_jax import timing

  torch.set_num_threads(threads)
  net = open_model(task.folder)
  read = lambda: nats(net, task.heldout, task.batch_size)
  held = {'source': read()}
  goes = prune_steps(task, recipe.times) if recipe else []
  pruner = recipe and make_pruner(net, recipe, width)
  optimizer = make_optimizer(net, task.optimizer)
  losses, seconds, pruning_seconds = [], 0.0, 0.0
  with console.Progress(len(task.windows), 0) as progress:
    progress.phase('training')
    for step in range(len(task.windows) + 1):
      if step:
        start = time.perf_counter()
        losses.append(
          train_step(
            net,
            optimizer,
            torch.from_numpy(task.windows[step - 1]).long(),
            task.rates[step - 1],
            task.optimizer['clip'],
          )
        )
        took = time.perf_counter() - start
        seconds += took
        progress.step(_shown(net, task, step, losses[-1], took))
      if step in goes:
        progress.phase('pruning')
        start = time.perf_counter()
        batches = task.windows[step : step + task.scoring]
        score(net, torch.from_numpy(batches).long().flatten(0, 2), pruner)
        pruner.step()
        # The parameters are new ones; what Adam knew of the old ones is lost.
        optimizer = make_optimizer(net, task.optimizer)
        pruning_seconds += time.perf_counter() - start
        if step == goes[-1]:
          held['pruned'] = read()
        progress.phase('training')
  left = ffn_widths(net)
  if recipe and width not in left:
    raise RuntimeError(f'{width} channels were asked for, {left} are left')
  return {
    'nats': held | {'final': read()},
    'widths': mean_widths(net),
    'params': sum(x.numel() for x in net.parameters()),
    'losses': losses,
    'seconds': seconds + pruning_seconds,
    'pruning_seconds': pruning_seconds,
    'peak_bytes': timing.memory('VmHWM'),
  }


def ffn_widths(net) -> list[int]:
  """Feed-forward channels of every layer."""
  return [layer.mlp.gate_proj.out_features for layer in net.model.layers]


def mean_widths(net) -> dict[str, float]:
  """Means over the layers; of heads and stem nothing is pruned here."""
  return {
    'heads': net.config.num_key_value_heads,
    'ffn': float(np.mean(ffn_widths(net))),
    'stem': net.config.hidden_size,
  }


def _shown(
  net, task: Task, step: int, loss: float, seconds: float
) -> dict[str, Any]:
  """The row of a step that `console.Progress` shows."""
  return {
    'step': step,
    'loss': loss,
    'seconds': seconds,
    'tokens_per_second': task.windows[0, ..., 1:].size / seconds,
    'live_params': sum(x.numel() for x in net.parameters()),
    'widths': mean_widths(net),
  }


def prune_steps(task: Task, times: int) -> list[int]:
  """Steps after which is pruned; the last of several is the window's end."""
  if times == 1:
    return [0]
  return [
    task.begin + (task.end - task.begin) * (i + 1) // times
    for i in range(times)
  ]


def open_model(folder: str | os.PathLike):
  """A causal language model of transformers, float32, ready to train."""
  from effllm_jax import hf_export

  transformers = hf_export.import_transformers()
  import torch

  net = transformers.AutoModelForCausalLM.from_pretrained(
    folder,
    dtype=torch.float32,
    local_files_only=True,
    attn_implementation='sdpa',
  )
  return net.train()


def make_optimizer(net, settings: Mapping[str, Any]):
  """AdamW as `effllm_jax.optimizers` has it: decay and rate of each group."""
  import torch

  tables = [net.get_input_embeddings(), net.get_output_embeddings()]
  # One tensor where they are tied.
  tables = {id(m.weight): m.weight for m in tables}
  others = [p for p in net.parameters() if id(p) not in tables]
  groups = (
    (list(tables.values()), settings['weight_decay'], settings['embedding']),
    ([p for p in others if p.ndim > 1], settings['weight_decay'], 1.0),
    ([p for p in others if p.ndim == 1], 0.0, 1.0),
  )
  return torch.optim.AdamW(
    [
      {'params': params, 'weight_decay': decay, 'share': share}
      for params, decay, share in groups
    ],
    betas=(settings['b1'], settings['b2']),
    fused=True,
  )


def loss_of(net, windows_BT):
  """Mean cross-entropy, nats per token."""
  import torch

  logits_BTV = net(windows_BT[:, :-1], use_cache=False).logits
  return torch.nn.functional.cross_entropy(
    logits_BTV.flatten(0, 1), windows_BT[:, 1:].flatten()
  )


def train_step(net, optimizer, windows_ABT, rate: float, clip: float) -> float:
  """One update by the mean gradient of A micro-batches; returns the loss."""
  import torch

  optimizer.zero_grad()
  total = 0.0
  for windows_BT in windows_ABT:
    loss = loss_of(net, windows_BT) / len(windows_ABT)
    loss.backward()
    total += loss.item()
  torch.nn.utils.clip_grad_norm_(net.parameters(), clip)
  for group in optimizer.param_groups:
    group['lr'] = rate * group['share']
  optimizer.step()
  return total


def nats(net, heldout: Mapping[str, Any], batch_size: int) -> dict[str, float]:
  """Cross-entropy by domain, summed, of what `heldout.windows` returns."""
  import torch

  found = {}
  with torch.no_grad():
    for domain, held in heldout.items():
      total = 0.0
      for i in range(0, len(held.windows), batch_size):
        windows = torch.from_numpy(held.windows[i : i + batch_size]).long()
        weight = torch.from_numpy(held.weight[i : i + batch_size])
        logits_BTV = net(windows[:, :-1], use_cache=False).logits
        losses = torch.nn.functional.cross_entropy(
          logits_BTV.flatten(0, 1), windows[:, 1:].flatten(), reduction='none'
        )
        total += float((losses * weight.flatten()).sum())
      found[domain] = total
  return found


def require() -> None:
  """Raises InputError where Torch-Pruning is not installed."""
  with errors.installed(
    'an arm of others in --arms',
    '-r requirements-torch.txt', '-r requirements-peers.txt',
  ):  # fmt: skip
    import torch_pruning  # noqa: F401


def make_pruner(net, recipe: Recipe, width: int):
  """Torch-Pruning's pruner; every `step` of it is one of `recipe.times`.

  Every layer is ranked for itself. All but the feed-forward channels of the
  layers that the recipe prunes is left alone.
  """
  import torch_pruning

  layers = net.model.layers
  alone = [*layers[: recipe.first], *layers[len(layers) - recipe.last :]]
  channels = layers[0].mlp.gate_proj.out_features
  importance = (
    torch_pruning.importance.GroupTaylorImportance()
    if recipe.criterion == 'group_taylor'
    else LLMPruner(recipe.criterion)
  )
  with warnings.catch_warnings():
    # That scales of norms are pruned along their last axis.
    warnings.simplefilter('ignore', UserWarning)
    return torch_pruning.pruner.BasePruner(
      net,
      net.dummy_inputs['input_ids'],
      importance=importance,
      # It rounds what is left down; half a channel is far from both sides.
      pruning_ratio=1 - (width + 0.5) / channels,
      iterative_steps=recipe.times,
      ignored_layers=[
        net.get_input_embeddings(),
        net.get_output_embeddings(),
        *(layer.self_attn for layer in layers),
        *(layer.mlp for layer in alone),
      ],
      forward_fn=lambda net, tokens: net(tokens, use_cache=False),
      output_transform=lambda out: out.logits,
    )


def score(net, windows_BT, pruner) -> None:
  """Leaves the mean gradient of windows where an importance looks for it.

  And, where that is LLM-Pruner's, the mean square of the gradients of single
  windows.
  """
  import torch

  weights = [w for layer in net.model.layers for w in layer.mlp.parameters()]
  second = getattr(pruner.importance, 'second', None)
  if second is not None:
    second.clear()
  for w in weights:
    w.grad = torch.zeros_like(w)
    if second is not None:
      second[w] = torch.zeros_like(w)
  for window in windows_BT:
    grads = torch.autograd.grad(loss_of(net, window[None]), weights)
    for w, g in zip(weights, grads, strict=True):
      w.grad += g / len(windows_BT)
      if second is not None:
        second[w] += g**2 / len(windows_BT)


class LLMPruner:
  """The criterion of LLM-Pruner, as its code has it, for Torch-Pruning.

  A weight's salience is abs(g w) under `param_first`, and under `param_mix`
  abs(g w - h w^2 / 2), g being the mean gradient and h the mean square of the
  gradients of single examples; a channel's is the sum over its weights. The
  code takes `param_first` where nothing is said, as does its script; its README
  names `param_mix` as the default. Ma et al., arXiv 2305.11627.

  Attributes:
    second: h of every weight; None: not needed.
  """

  def __init__(self, kind: str):
    """Takes `param_first` or `param_mix`."""
    self.second = {} if kind == 'param_mix' else None

  def __call__(self, group):
    """Scores of the channels of a group of Torch-Pruning, float [channels]."""
    import torch
    import torch_pruning

    total = 0.0
    for dep, idxs in group:
      layer = dep.target.module
      if isinstance(layer, torch.nn.Linear):
        weight = layer.weight.detach()
        h = None if self.second is None else self.second[layer.weight]
        found = salience(weight, layer.weight.grad, h)
        outputs = dep.handler == torch_pruning.prune_linear_out_channels
        total = total + found.sum(1 if outputs else 0)[idxs]
    return total


def salience(weight, grad, second):
  """What LLM-Pruner says of every weight; without `second`, `param_first`."""
  found = weight * grad
  if second is not None:
    found = found - 0.5 * weight * second * weight
  return found.abs()
