"""Llama decoder whose layers have their own numbers of heads and channels.

Pruning leaves each layer as wide as it needs to be, and may take out its
attention or its feed-forward block altogether. Apart from these widths this is
the mathematics, and these are the names of tensors, of transformers' Llama
(with biases that of Qwen2, with norms of queries and keys that of Qwen3). The
file lies beside the weights, needs torch and transformers only (4.57 or later)
and is opened with

    AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
"""

import math

import torch
from torch import nn
from torch.nn import functional as F
from transformers import DynamicCache
from transformers import GenerationMixin
from transformers import PretrainedConfig
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils import can_return_tuple

# What the cache is called, in `forward` too, changed within transformers 5.
_CACHE = (
  'cache'
  if 'cache' in CausalLMOutputWithPast.__dataclass_fields__
  else 'past_key_values'
)


class EffllmConfig(PretrainedConfig):
  """Sizes of the model.

  Attributes:
    vocab_size: rows of the embedding.
    hidden_size: width of the residual stream.
    head_dim: width of one head.
    num_key_value_groups: query heads per key/value head.
    num_key_value_heads_per_layer: 0 where a layer has no attention.
    intermediate_size_per_layer: 0 where a layer has no feed-forward block.
    attention_bias: whether q, k and v have a bias.
    qk_norm: whether queries and keys go through an RMSNorm before the rotation.
    rms_norm_eps: added to the mean square in RMSNorm.
    rope_parameters: `rope_theta` and `rope_type`, 'default' or 'llama3', with
      the numbers that the latter needs.
    max_position_embeddings: longest sequence it was trained on, in tokens.
    tie_word_embeddings: whether the output matrix is the embedding.
    use_cache: whether a call that does not say so, outside training, returns a
      cache.
  """

  model_type = 'effllm'
  # No predictions; a list, to which transformers adds others.
  keys_to_ignore_at_inference = ['past_key_values', 'cache']  # noqa: RUF012

  def __init__(
    self,
    vocab_size=32_000,
    hidden_size=576,
    head_dim=64,
    num_key_value_groups=1,
    num_key_value_heads_per_layer=(),
    intermediate_size_per_layer=(),
    attention_bias=False,
    qk_norm=False,
    rms_norm_eps=1e-5,
    rope_parameters=None,
    max_position_embeddings=2048,
    tie_word_embeddings=True,
    use_cache=True,
    **kwargs,
  ):
    self.vocab_size = vocab_size
    self.hidden_size = hidden_size
    self.head_dim = head_dim
    self.num_key_value_groups = num_key_value_groups
    self.num_key_value_heads_per_layer = list(num_key_value_heads_per_layer)
    self.intermediate_size_per_layer = list(intermediate_size_per_layer)
    self.num_hidden_layers = len(self.num_key_value_heads_per_layer)
    self.attention_bias = attention_bias
    self.qk_norm = qk_norm
    self.rms_norm_eps = rms_norm_eps
    self.rope_parameters = rope_parameters or {
      'rope_type': 'default',
      'rope_theta': 10_000.0,
    }
    self.max_position_embeddings = max_position_embeddings
    self.use_cache = use_cache
    super().__init__(tie_word_embeddings=tie_word_embeddings, **kwargs)


class EffllmRMSNorm(nn.Module):
  """Root mean square over the last axis, in float32, to 1."""

  def __init__(self, width, eps):
    super().__init__()
    self.weight = nn.Parameter(torch.ones(width))
    self.eps = eps

  def forward(self, x):
    """Same shape and dtype as `x`."""
    wide = x.float()
    scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
    return self.weight * (wide * scale).to(x.dtype)


class EffllmAttention(nn.Module):
  """Causal attention with rotary positions and grouped query heads."""

  def __init__(self, config, kv_heads, cache_index):
    super().__init__()
    self.head_dim = config.head_dim
    self.cache_index = cache_index
    keys = kv_heads * config.head_dim
    queries = keys * config.num_key_value_groups
    hidden, bias = config.hidden_size, config.attention_bias
    self.q_proj = nn.Linear(hidden, queries, bias=bias)
    self.k_proj = nn.Linear(hidden, keys, bias=bias)
    self.v_proj = nn.Linear(hidden, keys, bias=bias)
    self.o_proj = nn.Linear(queries, hidden, bias=False)
    self.q_norm, self.k_norm = (
      EffllmRMSNorm(config.head_dim, config.rms_norm_eps)
      if config.qk_norm
      else nn.Identity()
      for _ in range(2)
    )

  def forward(self, x, cos, sin, mask, cache, rows, keys):
    """[B, T, hidden] -> [B, T, hidden].

    Args:
      x: [B, T, hidden].
      cos: of the angles by which to rotate, [B or 1, 1, T, head_dim / 2].
      sin: of the same.
      mask: True = seen, [B or 1, 1, T, keys], broadcast; or None: each token
        sees all up to itself, and is the first one here or the only one.
      cache: or None.
      rows: of a static cache for these tokens, [T].
      keys: how many there are, these tokens' included.
    """
    q, k, v = (
      project(x).unflatten(-1, (-1, self.head_dim))
      for project in (self.q_proj, self.k_proj, self.v_proj)
    )
    q = rotate(self.q_norm(q).transpose(1, 2), cos, sin)
    k = rotate(self.k_norm(k).transpose(1, 2), cos, sin)
    v = v.transpose(1, 2)
    if cache is not None:
      # A static cache of transformers 4 has to be told which rows are next,
      # and any static cache hands out those of later tokens too.
      k, v = cache.update(k, v, self.cache_index, {'cache_position': rows})
      if getattr(cache, 'is_compileable', False):
        k, v = (states[:, :, :keys] for states in (k, v))
    causal = mask is None and q.shape[2] > 1
    heads = F.scaled_dot_product_attention(
      q, k, v, mask, is_causal=causal, enable_gqa=True
    )
    return self.o_proj(heads.transpose(1, 2).flatten(2))


class EffllmMLP(nn.Module):
  """SwiGLU."""

  def __init__(self, config, width):
    super().__init__()
    self.gate_proj = nn.Linear(config.hidden_size, width, bias=False)
    self.up_proj = nn.Linear(config.hidden_size, width, bias=False)
    self.down_proj = nn.Linear(width, config.hidden_size, bias=False)

  def forward(self, x):
    """[B, T, hidden] -> [B, T, hidden]."""
    return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class EffllmLayer(GradientCheckpointingLayer):
  """One layer; a block that it does not have adds nothing."""

  def __init__(self, config, n, cache_index):
    super().__init__()
    norm = lambda: EffllmRMSNorm(config.hidden_size, config.rms_norm_eps)
    kv_heads = config.num_key_value_heads_per_layer[n]
    width = config.intermediate_size_per_layer[n]
    self.has_attention, self.has_mlp = kv_heads > 0, width > 0
    if self.has_attention:
      self.input_layernorm = norm()
      self.self_attn = EffllmAttention(config, kv_heads, cache_index)
    if self.has_mlp:
      self.post_attention_layernorm = norm()
      self.mlp = EffllmMLP(config, width)

  def forward(self, x, *args):
    """[B, T, hidden] -> [B, T, hidden]; `args` are the attention's."""
    if self.has_attention:
      x = x + self.self_attn(self.input_layernorm(x), *args)
    if self.has_mlp:
      x = x + self.mlp(self.post_attention_layernorm(x))
    return x


class EffllmModel(nn.Module):
  """Embedding, layers and the last norm."""

  def __init__(self, config):
    super().__init__()
    self.config = config
    # Set by `gradient_checkpointing_enable`, here and in the layers.
    self.gradient_checkpointing = False
    self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
    # The cache numbers only layers that write to it: it reads its length off
    # entry 0.
    kv_heads = config.num_key_value_heads_per_layer
    self.layers = nn.ModuleList(
      EffllmLayer(config, n, sum(k > 0 for k in kv_heads[:n]))
      for n in range(len(kv_heads))
    )
    self.norm = EffllmRMSNorm(config.hidden_size, config.rms_norm_eps)

  def forward(self, x, attention_mask, position_ids, cache, rows, inside):
    """[B, T, hidden] -> [B, T, hidden].

    Args:
      x: [B, T, hidden].
      attention_mask: as `EffllmForCausalLM` takes it, like the next two.
      position_ids: see there.
      cache: see there.
      rows: of the cache for these tokens, [T]; None: after what is in it.
      inside: list to which is added what goes into each layer; or None.
    """
    length = x.shape[1]
    padded = attention_mask is not None and attention_mask.ndim == 2
    if padded:
      # A model without any attention has nothing in its cache to count.
      past = attention_mask.shape[1] - length
    else:
      # A tensor in some versions, of a static cache.
      past = 0 if cache is None else int(cache.get_seq_length())
    if rows is None:
      rows = past + torch.arange(length, device=x.device)
    queries = rows[:, None]
    keys = past + length
    if unmasked(attention_mask, cache) and (past == 0 or length == 1):
      mask = None
    elif attention_mask is None or padded:
      columns = torch.arange(keys, device=x.device)
      mask = columns <= queries
      if padded:
        # Padding sees itself: a row without any key would be NaN.
        seen = attention_mask[:, None, None].bool()
        mask = (mask & seen) | (columns == queries)
    else:
      mask = attention_mask
      keys = mask.shape[-1]
    if position_ids is None:
      position_ids = queries.T
    angles = position_ids[:, None, :, None] * frequencies(self.config, x.device)
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    for layer in self.layers:
      if inside is not None:
        inside.append(x)
      x = layer(x, cos, sin, mask, cache, rows, keys)
    return self.norm(x)


class EffllmForCausalLM(PreTrainedModel, GenerationMixin):
  """The decoder with its output matrix."""

  config_class = EffllmConfig
  base_model_prefix = 'model'
  _no_split_modules = ('EffllmLayer',)
  supports_gradient_checkpointing = True
  _supports_sdpa = True
  _tied_weights_keys = {'lm_head.weight': 'model.embed_tokens.weight'}  # noqa: RUF012

  def __init__(self, config):
    super().__init__(config)
    self.model = EffllmModel(config)
    self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
    self.post_init()

  @can_return_tuple
  def forward(
    self,
    input_ids=None,
    attention_mask=None,
    position_ids=None,
    cache=None,
    past_key_values=None,
    inputs_embeds=None,
    labels=None,
    use_cache=None,
    logits_to_keep=0,
    output_hidden_states=None,
    **kwargs,
  ):
    """As transformers' other decoders: logits, cache, and loss with labels.

    Args:
      input_ids: [B, T]; or `inputs_embeds` [B, T, hidden].
      attention_mask: [B, past + T], 0 where there is padding; or, as `generate`
        makes it for a static cache, [B, 1, T, rows of the cache], True = seen.
      position_ids: [B, T]; counted from the start of the row when absent. With
        neither mask nor cache given, a position that does not follow on the one
        before it begins another sequence, which does not see the last one.
      cache: grows by T; `past_key_values` is its older name.
      past_key_values: see `cache`.
      inputs_embeds: see `input_ids`.
      labels: [B, T], -100 where the loss does not count.
      use_cache: whether to start a cache when none is given; by default as the
        configuration says, and never in training. None is started where
        gradients are checkpointed.
      logits_to_keep: only for so many tokens at the end, 0 is all; or only for
        those at these indices, [kept].
      output_hidden_states: whether to return the embeddings and what comes out
        of each layer, after the last norm for the last one; by default as the
        configuration says.
      **kwargs: go to the loss, but for `return_dict`, False for a tuple, and
        `cache_position` of transformers 4.

    Raises:
      ValueError: a cache is given where gradients are checkpointed.
    """
    cache = past_key_values if cache is None else cache
    if cache is None and attention_mask is None and position_ids is not None:
      attention_mask = packed(position_ids)
    if use_cache is None:
      use_cache = self.config.use_cache and not self.training
    replayed = self.model.gradient_checkpointing and self.training
    if replayed and torch.is_grad_enabled():
      if cache is not None:
        raise ValueError(
          'checkpointed layers run a second time for the gradient and would '
          'write to the cache again; give none, or call '
          'gradient_checkpointing_disable()'
        )
      use_cache = False
    if use_cache and cache is None:
      cache = DynamicCache()
    if inputs_embeds is None:
      inputs_embeds = self.model.embed_tokens(input_ids)
    # From transformers 4, which counts a static cache's rows that are not 0.
    rows = kwargs.pop('cache_position', None)
    if output_hidden_states is None:
      output_hidden_states = self.config.output_hidden_states
    inside = [] if output_hidden_states else None
    x = self.model(
      inputs_embeds, attention_mask, position_ids, cache, rows, inside
    )
    if isinstance(logits_to_keep, int):
      logits_to_keep = slice(-logits_to_keep, None)
    logits = self.lm_head(x[:, logits_to_keep])
    loss = None
    if labels is not None:
      loss = self.loss_function(
        logits, labels, vocab_size=self.config.vocab_size, **kwargs
      )
    return CausalLMOutputWithPast(
      loss=loss,
      logits=logits,
      hidden_states=None if inside is None else (*inside, x),
      **{_CACHE: cache},
    )

  def tie_weights(self, *args, **kwargs):
    """Also where transformers (5.3) believes that the file had both."""
    super().tie_weights(*args, **kwargs)
    if self.config.tie_word_embeddings:
      self.lm_head.weight = self.model.embed_tokens.weight

  def _get_cache(self, *args, **kwargs):
    """A new static cache for each call, in transformers up to 5.0.

    They ask every layer of the last one for its size, which those without
    attention do not have.
    """
    self.__dict__.pop('_cache', None)
    return super()._get_cache(*args, **kwargs)

  def _prepare_static_cache(self, *args, **kwargs):
    """The same, as versions from 5.1 on call it."""
    self.__dict__.pop('_cache', None)
    return super()._prepare_static_cache(*args, **kwargs)

  def _get_static_cache_init_shape(self):
    """No one shape: each layer of a cache takes that of what it is given.

    transformers 5 would ask a config for one, to prefill by chunks.
    """
    return None


def unmasked(attention_mask, cache):
  """Whether each token sees all before it, by what is known of the call.

  Attention that needs no mask reads half as much of a text. Not while a program
  is traced, which has no values to look at and is for every length, nor for a
  static cache, whose rows transformers 4 numbers itself.
  """
  if torch.compiler.is_compiling() or torch.jit.is_tracing():
    return False
  if getattr(cache, 'is_compileable', False):
    return False
  if attention_mask is None:
    return True
  return attention_mask.ndim == 2 and bool(attention_mask.all())


def packed(position_ids):
  """Causal mask of the sequences in a row, [B, T] -> [B, 1, T, T]."""
  begins = position_ids.diff(dim=1, prepend=position_ids[:, :1] - 1) != 1
  sequence = begins.cumsum(1)[:, None]
  return (sequence[..., None] == sequence[..., None, :]).tril()


def frequencies(config, device):
  """Angle of each pair of channels per position, [head_dim / 2], float32."""
  rope = config.rope_parameters
  pairs = torch.arange(0, config.head_dim, 2, device=device).float()
  frequency = rope['rope_theta'] ** (-pairs / config.head_dim)
  if rope['rope_type'] == 'default':
    return frequency
  # Llama 3: pairs that turn rarely within the first context are slowed down.
  low, high = rope['low_freq_factor'], rope['high_freq_factor']
  context = rope['original_max_position_embeddings']
  turns = context * frequency / (2 * math.pi)
  keep = ((turns - low) / (high - low)).clamp(0, 1)
  return frequency * (keep + (1 - keep) / rope['factor'])


def rotate(x, cos, sin):
  """Turns channel i and i + head_dim / 2 by their angle."""
  a, b = x.chunk(2, dim=-1)
  return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)
