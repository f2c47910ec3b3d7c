"""The same work in PyTorch, and what others prune there."""

import json
import math
import os
import signal
import subprocess
import sys
import types

import jax
import numpy as np
import pytest

from effllm_jax import atomic
from effllm_jax import errors
from effllm_jax import evaluate
from effllm_jax import hf_export
from effllm_jax import model
from effllm_jax import optimizers
from effllm_jax import plan as plan_lib
from effllm_jax import sharding
from effllm_jax import sources
from effllm_jax import state as state_lib
from effllm_jax import steps
from effllm_jax import weights
from experiments import alone
from experiments import peer_arms
from experiments import torch_peers
from experiments.configs import efficientllm_a
from tests import conftest
from tests import runs

torch = pytest.importorskip('torch')
hf_export.import_transformers()


@pytest.fixture(scope='module', name='root')
def _root(tmp_path_factory):
  root = tmp_path_factory.mktemp('peers')
  conftest.write_model_folder(root / 'model')
  conftest.write_text_folder(root / 'text')
  (root / 'work').mkdir()
  return root


@pytest.fixture(name='bench')
def _bench(root):
  def make(scoring=2, **changes):
    config = efficientllm_a.get_config()
    small = conftest.small_run(root / 'model', root / 'text')
    config.update_from_flattened_dict(
      small
      | {
        'optimizer.weight_decay': 0.5,
        'optimizer.embedding': 0.8,
      }
      | changes
    )
    return peer_arms.Bench(config, root / 'work', str(root / 'cache'), scoring)

  return make


@pytest.fixture(name='net')
def _net(bench):
  return torch_peers.open_model(bench().folder())


def test_pytorch_trains_and_reads_as_we_do(bench):
  bench = bench(**{'train.accumulate': 2, 'train.tokens': 24 * 128})
  task, plan = bench.task, bench.plan
  source = sources.load(bench.config.source, bench.cache)
  tx = optimizers.optimizer(
    plan_lib.learning_rate(bench.config),
    **{
      k: bench.config.optimizer[k]
      for k in ('b1', 'b2', 'weight_decay', 'clip', 'embedding')
    },
  )
  state = state_lib.placed_state(
    source.params, source.cfg, tx, sharding.make(1, 1, 1)
  )
  net = torch_peers.open_model(task.folder)
  optimizer = torch_peers.make_optimizer(net, task.optimizer)

  def read():
    ours = evaluate.bits_per_byte(
      state.params, state.prune.masks, task.heldout, source.cfg,
      model.Compute(), 2,
    )  # fmt: skip
    theirs = evaluate.summary(
      torch_peers.nats(net, task.heldout, 2), task.heldout
    )
    for key in ('bits_per_byte', 'domains', 'nats_per_token'):
      assert theirs[key] == pytest.approx(ours[key], rel=1e-5)
    return ours['bits_per_byte']

  before = read()
  ours, theirs = [], []
  for windows_ABT, rate in zip(task.windows[:8], task.rates, strict=False):
    state, numbers = steps.train_step(
      state, windows_ABT, cfg=source.cfg, tx=tx, recipe=plan.recipe, score=False
    )
    ours.append(float(numbers['loss']))
    theirs.append(
      torch_peers.train_step(
        net, optimizer, torch.from_numpy(windows_ABT).long(), rate,
        task.optimizer['clip'],
      )
    )  # fmt: skip
  assert ours[-1] < ours[0] - 0.1
  np.testing.assert_allclose(theirs, ours, rtol=1e-4)
  assert read() < before
  # Weight by weight: scales of norms do not decay on either side.
  have = dict(net.named_parameters())
  params = jax.tree.map(np.asarray, state.params)
  for name, want in weights.views(params, weights.HUGGING_FACE):
    np.testing.assert_allclose(
      have[name].detach().numpy(), want, atol=2e-4, err_msg=name
    )


def test_an_arm_of_the_others_says_how_far_it_is(bench, capsys):
  task = bench().task
  found = torch_peers.run(task, None, None, 1)
  assert len(found['losses']) == 24 and found['pruning_seconds'] == 0
  lines = capsys.readouterr().err.splitlines()
  said = [line for line in lines if line.startswith('step ')]
  assert f'loss {found["losses"][-1]:.3f}' in said[-1]
  parts = 'step 24/24', f'{found["params"]:,} live', 'heads 2 ffn 64 stem 32'
  for part in parts:
    assert part in said[-1]


def test_salience_of_llm_pruner_by_hand():
  w, g = torch.tensor([[2.0, -3.0]]), torch.tensor([[0.5, 1.0]])
  h = torch.tensor([[4.0, 2.0]])
  assert torch_peers.salience(w, g, None).tolist() == [[1, 3]]
  # |1 - 4 * 4 / 2| and |-3 - 2 * 9 / 2|
  assert torch_peers.salience(w, g, h).tolist() == [[7, 12]]


def test_scores_are_means_over_windows(net, bench):
  windows = torch.from_numpy(bench().task.windows[:2]).long().flatten(0, 2)
  gradients = []
  weight = net.model.layers[1].mlp.down_proj.weight
  for window in windows:
    net.zero_grad()
    torch_peers.loss_of(net, window[None]).backward()
    gradients.append(weight.grad.clone())
  gradients = torch.stack(gradients)
  importance = torch_peers.LLMPruner('param_mix')
  torch_peers.score(net, windows, types.SimpleNamespace(importance=importance))
  torch.testing.assert_close(weight.grad, gradients.mean(0))
  torch.testing.assert_close(importance.second[weight], (gradients**2).mean(0))


def by_hand(net, layer, kind, importance):
  """Scores of the channels of a layer, by loops over its three matrices."""
  mlp = net.model.layers[layer].mlp
  scores = np.zeros(mlp.gate_proj.out_features)
  for module, turn in (('gate_proj', 0), ('up_proj', 0), ('down_proj', 1)):
    weight = getattr(mlp, module).weight
    g, w = (x.detach().double().numpy() for x in (weight.grad, weight))
    found = g * w
    if kind == 'param_mix':
      found = found - importance.second[weight].double().numpy() * w * w / 2
    scores += np.abs(found).sum(1 - turn)
  return scores


@pytest.mark.parametrize(
  'recipe',
  [
    torch_peers.Recipe('group_taylor'),
    torch_peers.Recipe('param_first', first=1),
    torch_peers.Recipe('param_mix', last=1),
  ],
)
def test_the_cheapest_channels_go(net, bench, recipe):
  pytest.importorskip('torch_pruning', reason='requirements-peers.txt')
  windows = torch.from_numpy(bench().task.windows[:2]).long().flatten(0, 2)
  pruner = torch_peers.make_pruner(net, recipe, 40)
  torch_peers.score(net, windows, pruner)
  pruned = [*range(2)][recipe.first : 2 - recipe.last]
  before = [x.mlp.up_proj.weight.detach().clone() for x in net.model.layers]
  scores = {
    n: by_hand(net, n, recipe.criterion, pruner.importance) for n in pruned
  }
  pruner.step()
  for n, layer in enumerate(net.model.layers):
    rows = np.arange(64)
    if n in pruned:
      rows = np.sort(np.argsort(scores[n])[-40:])
    torch.testing.assert_close(layer.mlp.up_proj.weight, before[n][rows])
    assert layer.mlp.down_proj.in_features == len(rows)
    assert layer.self_attn.q_proj.out_features == 32
  assert math.isfinite(torch_peers.loss_of(net, windows).item())


def together(monkeypatch):
  """Arms run in this process, on one thread: two would wait for each other."""
  monkeypatch.setattr(alone, 'call', lambda what, work, *more: work(*more))
  monkeypatch.setattr(os, 'sched_getaffinity', lambda _: {0})


def test_several_goes_end_where_one_does(bench, monkeypatch):
  pytest.importorskip('torch_pruning', reason='requirements-peers.txt')
  together(monkeypatch)
  bench = bench(
    **{
      'budget.target': 28_000.0,
      'train.tokens': 14 * 64,
      'prune.end_tokens': 12 * 64,
    }
  )
  rows = {
    name: bench.run(name) for name in ('torch_pruning_iterative', 'torch_dense')
  }
  row, dense = rows.values()
  width = bench.width(peer_arms.OTHERS['torch_pruning_iterative'])
  assert row['widths']['ffn'] == width < 64
  # The most that fits.
  assert row['params'] <= 28_000 < row['params'] + 2 * 3 * 32 * 8
  assert dense['params'] == bench.source.cfg.num_params()
  assert [*row['bits_per_byte']] == ['source', 'pruned', 'final']
  assert [*dense['bits_per_byte']] == ['source', 'final']
  assert (
    row['bits_per_byte']['source'] == dense['bits_per_byte']['source']
    == pytest.approx(dense['bits_per_byte']['final'], rel=0.5)
  )  # fmt: skip
  # Until the first prune it is the same run, afterwards it is not.
  first = torch_peers.prune_steps(bench.task, 5)[0]
  assert 2 < first < 12
  assert row['losses'][:first] == dense['losses'][:first]
  assert row['losses'][first] != dense['losses'][first]


def test_a_finished_arm_is_not_run_again(bench, monkeypatch, tmp_path):
  bench, calls = bench(), []
  bench.workdir = tmp_path / 'work'

  def run(name):
    with pytest.raises(atomic.HeldError, match='another run is at work in'):
      bench.results(['ours'])
    calls.append(name)
    if len(calls) == 2:
      raise errors.InputError('killed')
    return {'arm': name, 'step': 24, 'call': len(calls)}

  monkeypatch.setattr(bench, 'run', run)
  with pytest.raises(errors.InputError, match='killed'):
    bench.results(['ours', 'torch_dense'])
  with (bench.workdir / 'results.jsonl').open('a') as file:
    file.write('{"arm": "torch_de')  # Torn by the kill.
  for _ in range(2):
    rows = bench.results(['torch_dense', 'ours'])
    assert [(row['arm'], row['call']) for row in rows] == [
      ('torch_dense', 3),
      ('ours', 1),
    ]
  assert calls == ['ours', 'torch_dense', 'torch_dense']
  bench.scoring += 1
  with pytest.raises(errors.InputError, match=r'scoring_batches=2 there, 3'):
    bench.results(['torch_dense', 'ours'])
  assert len(calls) == 3


def test_arms_of_one_table_have_as_many_threads(bench, monkeypatch, tmp_path):
  bench, calls = bench(), []
  bench.workdir = tmp_path / 'work'
  on = lambda count: monkeypatch.setattr(
    os, 'sched_getaffinity', lambda _: {*range(count)}
  )

  def run(name):
    calls.append(name)
    return {'arm': name, 'step': 24, 'threads': len(os.sched_getaffinity(0))}

  monkeypatch.setattr(bench, 'run', run)
  on(1)
  bench.results(['torch_dense'])
  on(2)
  with pytest.raises(errors.InputError, match='threads=1 there, 2 now; use'):
    bench.results(['torch_dense', 'ours'])
  # One of before it was claimed goes on where its rows are of as many.
  config = bench.workdir / 'config.json'
  claim = json.loads(config.read_text())
  assert claim.pop('threads') == 1
  config.write_text(json.dumps(claim))
  with pytest.raises(errors.InputError, match='on 1 and 2 threads, this proce'):
    bench.results(['torch_dense', 'ours'])
  assert [row['threads'] for row in bench.results(['torch_dense'])] == [1]
  bench.results(['ours'])
  with pytest.raises(errors.InputError, match='set --arms to those of one, or'):
    bench.results(['torch_dense', 'ours'])
  assert calls == ['torch_dense', 'ours']
  assert json.loads(config.read_text()) == claim


def test_an_arm_has_a_process_of_its_own():
  assert alone.call('an arm', os.getpid) != os.getpid()
  with pytest.raises(
    errors.InputError, match='an arm has ended without a word'
  ):
    alone.call('an arm', os._exit, 1)


@pytest.mark.parametrize('signum', [signal.SIGINT, signal.SIGTERM])
def test_an_arm_ends_with_a_signal_to_its_command(signum):
  work = "print('ready', flush=True); import time; time.sleep(60)"
  # A shell has what it starts in the background ignore Ctrl-C.
  code = (
    'import signal; signal.signal(signal.SIGINT, signal.default_int_handler); '
    'from effllm_jax import interrupts; from experiments import alone; '
    f'interrupts.unwind_on_sigterm(); alone.call("an arm", exec, {work!r})'
  )
  with subprocess.Popen(
    [sys.executable, '-c', code],
    cwd=conftest.ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
  ) as process:  # fmt: skip
    assert process.stdout.readline() == b'ready\n'
    process.send_signal(signum)
    assert process.wait(timeout=30) != 0


def test_our_own_arm_is_a_run(bench, monkeypatch):
  together(monkeypatch)
  bench = bench(
    **{
      'train.tokens': 6 * 64,
      'train.log_every': 2,
      'optimizer.decay_tokens': 64,
      'prune.begin_tokens': 64,
      'prune.end_tokens': 4 * 64,
      'shrink.threshold': 0.9,
    }
  )
  row = bench.run('ours')
  assert row['params'] <= 22_000
  assert row['step'] == 6 and len(row['losses']) == 3
  assert row['tokens'] == 6 * 64
  assert row['seconds'] < row['total_seconds']
  assert [*row['bits_per_byte']] == ['source', 'pruned', 'final']
  # What a process before took is not known; the run is the same.
  again = bench.run('ours')
  assert again['total_seconds'] is again['peak_bytes'] is None
  assert again['losses'] == row['losses']


def test_the_command_prints_every_arm(root, tmp_path):
  work = tmp_path / 'work'

  def peers(*flags, **changes):
    small = conftest.small_run(root / 'model', root / 'text')
    return conftest.command(
      'peers', conftest.CONFIG_FILE, f'--workdir={work}',
      f'--cache={root / "cache"}', *flags,
      *conftest.flags_of(small | changes),
    )  # fmt: skip

  done = peers('--arms=torch_dense', '--scoring_batches=2')
  assert done.returncode == 0, done.stderr
  (row,) = map(json.loads, (work / 'results.jsonl').read_text().splitlines())
  said, line = (x for x in done.stdout.splitlines() if 'torch_dense' in x)
  assert said == 'torch_dense: 24 steps'
  assert f'{row["params"]:,}' in line
  assert f'{row["bits_per_byte"]["final"]:.4f}' in line
  # There already: it is printed, and not run.
  again = peers('--arms=torch_dense', '--scoring_batches=2')
  assert [x for x in again.stdout.splitlines() if 'torch_dense' in x] == [line]
  # In a folder of another config.
  other = peers('--arms=torch_dense', '--scoring_batches=3')
  runs.refused(other, 'scoring_batches=2 there, 3 now')


def test_a_mistake_is_one_line(bench):
  for names in ([], ['ours', 'ours'], ['wanda']):
    with pytest.raises(errors.InputError, match=r'set --arms$'):
      peer_arms.check(names)
  with pytest.raises(errors.InputError, match="did you mean 'llm_pruner'"):
    peer_arms.check(['ours', 'llm_prunr'])
  with pytest.raises(errors.InputError, match=r'--config\.budget\.kind=params'):
    bench(**{'budget.kind': 'flops'})
  for change, remedy in (
    ({'init': 'random', 'optimizer.embedding': 1.0}, 'init=source'),
    ({'distill.weight': 0.5}, r'distill\.weight=0\.0'),
    ({'prune.policy': 'none'}, r'prune\.policy=uniform'),
  ):
    with pytest.raises(errors.InputError, match=rf'--config\.{remedy}'):
      bench(**change)
  narrow = {'prune.begin_tokens': 64, 'prune.end_tokens': 4 * 64}
  narrow = bench(**narrow | {'budget.target': 28_000.0})
  with pytest.raises(errors.InputError, match=r'5 times, .* are 3 steps'):
    narrow.results(['torch_pruning_iterative'])
  with pytest.raises(errors.InputError, match=r'--scoring_batches 99'):
    bench(scoring=99)
  with pytest.raises(errors.InputError, match=r'0 of 2 layers'):
    bench().width(peer_arms.OTHERS['llm_pruner'])


def test_a_missing_package_is_named(monkeypatch):
  monkeypatch.setitem(sys.modules, 'torch_pruning', None)
  with pytest.raises(errors.InputError, match=r'requirements-peers\.txt'):
    peer_arms.check(['torch_pruning'])
  peer_arms.check(['torch_dense', 'ours'])
