"""Byte-level BPE tokenizers: of the vocabulary of a GGUF file, or of bytes."""

from collections.abc import Sequence
import json

import tokenizers
from tokenizers import decoders
from tokenizers import models
from tokenizers import pre_tokenizers
from tokenizers import processors

from effllm_jax import errors
from effllm_jax import untrusted

# Digits of a number come three at a time in Llama 3, one at a time in Qwen2.
_WORDS = (
  r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s"
  r'| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+'
)


def _split(digits):
  """Splits by `_WORDS`, which then need no rule of the byte alphabet's own."""
  return (
    pre_tokenizers.Split(
      tokenizers.Regex(_WORDS % digits), behavior='isolated'
    ),
    pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
  )


# llama.cpp's name of the rule that splits text into words -> that rule. The
# digit split of SmolLM matters: transformers' own conversion leaves it out.
_RULES = {
  'gpt-2': (pre_tokenizers.ByteLevel(add_prefix_space=False),),
  'smollm': (
    pre_tokenizers.Digits(individual_digits=True),
    pre_tokenizers.ByteLevel(add_prefix_space=False),
  ),
  'llama-bpe': _split('{1,3}'),
  'qwen2': _split(''),
  'deepseek-r1-qwen': _split(''),
}
# Values of `tokenizer.ggml.token_type`.
_UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED = 2, 3, 4, 5


def tokenizer(
  tokens: Sequence[str],
  kinds: Sequence[int],
  merges: Sequence[str],
  pre: str,
  bos_id: int | None,
  file: str,
) -> tokenizers.Tokenizer:
  """Builds the tokenizer that llama.cpp uses for the same metadata.

  The rules are those of llama.cpp's `llama-vocab.cpp`. With the vocabulary of
  SmolLM2, each of the first three gave the tokens of llama.cpp itself
  (xllamacpp) on 1.7M characters of speeches, plays, wiki, code and random
  Unicode. Of Qwen2 llama.cpp leaves out the composition of characters (NFC)
  that the model's own tokenizer starts with: composed text has the same tokens.

  Args:
    tokens: `tokenizer.ggml.tokens`, in the byte-level alphabet.
    kinds: `tokenizer.ggml.token_type`; 3 is a control token.
    merges: `tokenizer.ggml.merges`, two tokens separated by a space.
    pre: `tokenizer.ggml.pre`, a key of `_RULES`.
    bos_id: token to start every text with when special tokens are asked for.
    file: named in errors.

  Raises:
    errors.InputError: an unknown rule, or parts that do not fit together.
  """
  if pre not in _RULES:
    raise errors.InputError(
      f'{file}: tokenizer.ggml.pre = {pre}, only {", ".join(_RULES)} are '
      "known; use the model's Hugging Face folder"
    )
  if len(kinds) != len(tokens) or len(set(tokens)) != len(tokens):
    raise errors.InputError(
      f'{file}: {len(tokens)} tokens ({len(set(tokens))} different) with '
      f'{len(kinds)} token types; fetch the file again'
    )
  with untrusted.parsing(
    f'{file}: merges do not fit the vocabulary', 'fetch the file again'
  ):
    model = models.BPE(
      # llama.cpp's converter names the rows of the embedding that no token has;
      # in the model's own tokenizer they are not.
      vocab={
        token: i
        for i, (token, kind) in enumerate(zip(tokens, kinds, strict=True))
        if kind != _UNUSED or token != f'[PAD{i}]'
      },
      merges=[tuple(merge.split(' ')) for merge in merges],
      # As llama.cpp does for this rule: a word that is a token stays whole.
      ignore_merges=pre == 'llama-bpe',
    )
  result = tokenizers.Tokenizer(model)
  result.pre_tokenizer = pre_tokenizers.Sequence(list(_RULES[pre]))
  result.decoder = decoders.ByteLevel()
  result.add_tokens(
    [
      tokenizers.AddedToken(
        token, special=kind != _USER_DEFINED, normalized=False
      )
      for token, kind in zip(tokens, kinds, strict=True)
      if kind in (_UNKNOWN, _CONTROL, _USER_DEFINED)
    ]
  )
  if bos_id is not None:
    if bos_id >= len(tokens):
      raise errors.InputError(
        f'{file}: tokenizer.ggml.bos_token_id = {bos_id} of {len(tokens)} '
        'tokens; use another conversion of the model'
      )
    bos = tokens[bos_id]
    result.post_processor = processors.TemplateProcessing(
      single=[bos, '$A'],
      pair=[bos, '$A', bos, '$B:1'],
      special_tokens=[(bos, bos_id)],
    )
  return result


def of_bytes(separator: str) -> tuple[tokenizers.Tokenizer, int]:
  """A tokenizer of 257 tokens, the bytes and a separator; the latter's id."""
  alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
  vocab = {x: i for i, x in enumerate([*alphabet, separator])}
  result = tokenizers.Tokenizer(models.BPE(vocab, []))
  result.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  result.decoder = decoders.ByteLevel()
  return result, vocab[separator]


def rule(source: tokenizers.Tokenizer, file: str, remedy: str) -> str:
  """The name under which llama.cpp splits text as a tokenizer does.

  Unicode normalisation to NFC is passed over: llama.cpp does none, for no rule.

  Args:
    source: a byte-level BPE tokenizer.
    file: named in errors.
    remedy: what to do where there is none.

  Raises:
    errors.InputError: another kind of tokenizer, or an unknown rule.
  """
  parts = json.loads(source.to_str())
  normalizer = parts['normalizer'] or {'type': 'NFC'}
  if parts['model']['type'] == 'BPE' and normalizer == {'type': 'NFC'}:
    for pre, steps in _RULES.items():
      built = tokenizers.Tokenizer(models.BPE())
      built.pre_tokenizer = pre_tokenizers.Sequence(list(steps))
      whole = parts['model'].get('ignore_merges', False)
      if (_steps(parts), whole) == (
        _steps(json.loads(built.to_str())),
        pre == 'llama-bpe',
      ):
        return pre
  raise errors.InputError(
    f'{file}: its tokenizer splits text by none of the rules known here, those '
    f'that llama.cpp calls {", ".join(_RULES)}; {remedy}'
  )


def is_qwen2(source: tokenizers.Tokenizer) -> bool:
  """Whether transformers' Qwen2Tokenizer with its words and merges is the same.

  It knows nothing but these of a tokenizer.json, and adds its <|endoftext|>.
  """
  parts = json.loads(source.to_str())
  own = {**parts['model'], 'vocab': None, 'merges': None}
  built = tokenizers.Tokenizer(models.BPE())
  built.pre_tokenizer = pre_tokenizers.Sequence(list(_RULES['qwen2']))
  return (
    own.pop('type') == 'BPE'
    and not any(own.values())
    and parts['normalizer'] == {'type': 'NFC'}
    and _steps(parts) == _steps(json.loads(built.to_str()))
    and source.token_to_id('<|endoftext|>') is not None
  )


def _steps(parts):
  """What a pre-tokenizer does, in order; offsets are no matter of the ids."""
  step = parts['pre_tokenizer'] or {'type': 'Sequence', 'pretokenizers': []}
  steps = step['pretokenizers'] if step['type'] == 'Sequence' else [step]
  return [{k: v for k, v in s.items() if k != 'trim_offsets'} for s in steps]
