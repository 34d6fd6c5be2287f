"""Tokenizers of every common kind, trained on a page of text in a moment."""

from __future__ import annotations

import json
from functools import cache

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

PAGE = (
    "It is a truth universally acknowledged, that a single man in possession of a good fortune, must be in "
    "want of a wife.\n\nHowever little known the feelings or views of such a man may be on his first "
    'entering a neighbourhood, this truth is so well fixed.  "My dear Mr. Bennet," said his lady to him, '
    "\"have you heard that Netherfield Park is let at last?\"\nThey'll say we're 1234567 or 89, isn't it?"
    "\n    def f(x):\n        return x + 1\n----------------\n================\nnaïve café Übermut Straße "
    "中文字符 日本語 привет мир 👩\u200d👧 🙂🏽 e\u0301 don't can't 1 22 333 4444 55555\t\ttabs\r\n"
    "   spaces     and      more        spaces\n"
) * 8

LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
FROM_THE_RIGHT = r"\d{1,3}(?=(?:\d{3})*(?!\d))| ?\p{L}+| ?[^\s\p{L}\d]+|\s+(?!\S)|\s+"


def _byte_level(pattern: str | None = None, normalizer: normalizers.Normalizer | None = None) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pattern is None)
    if pattern is not None:
        split = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    else:
        tokenizer.pre_tokenizer = byte_level
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        max_token_length=24,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([PAGE], trainer)
    return tokenizer


def _sentencepiece(prefix: bool) -> Tokenizer:
    """Merges over word boundaries, as Gemma's; with a prefix, the blank before the text of Llama 2's."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    replace = normalizers.Replace(" ", "▁")
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), replace]) if prefix else replace
    fallback = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=900, special_tokens=["<unk>", *fallback], max_token_length=12, show_progress=False
    )
    tokenizer.train_from_iterator(PAGE.splitlines(keepends=True), trainer)
    tokenizer = Tokenizer.from_str(
        json.dumps(json.loads(tokenizer.to_str()) | {"added_tokens": []})
    )  # ordinary ones
    after = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*after, *([decoders.Strip(" ", 1, 0)] if prefix else [])])
    return tokenizer


def _metaspace(unigram: bool) -> Tokenizer:
    tokenizer = Tokenizer(models.Unigram() if unigram else models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="first")
    trainer = (
        trainers.UnigramTrainer(
            vocab_size=300, unk_token="<unk>", special_tokens=["<unk>"], show_progress=False
        )
        if unigram
        else trainers.BpeTrainer(vocab_size=500, special_tokens=["<unk>"], show_progress=False)
    )
    tokenizer.train_from_iterator([PAGE], trainer)
    return tokenizer


def _chained() -> Tokenizer:
    """Pairs of neighbours in the alphabet, the last first: each letter to come turns all before it over."""
    letters = "abcdefghijklmnopqrstuvwxyz"
    merges = [(first, second) for first, second in zip(letters, letters[1:], strict=False)][::-1]
    words = ["<unk>", *dict.fromkeys([*PAGE, *letters]), *(first + second for first, second in merges)]
    vocabulary = {word: number for number, word in enumerate(words)}
    return Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>"))


_KINDS = {
    "gpt2": lambda: _byte_level(),
    "llama3": lambda: _byte_level(LLAMA_3),
    "qwen": lambda: _byte_level(LLAMA_3.replace(r"\p{N}{1,3}", r"\p{N}"), normalizers.NFC()),
    "digits-from-the-right": lambda: _byte_level(FROM_THE_RIGHT),
    "gemma": lambda: _sentencepiece(prefix=False),
    "llama2": lambda: _sentencepiece(prefix=True),
    "metaspace": lambda: _metaspace(unigram=False),
    "chained": _chained,
    "unigram": lambda: _metaspace(unigram=True),
}

KINDS = tuple(_KINDS)


@cache
def trained(kind: str) -> PreTrainedTokenizerFast:
    """Train a tokenizer of this kind; it knows <|start|> and <|end|> as special tokens."""
    tokenizer = _KINDS[kind]()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in ("<|start|>", "<|end|>")])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<|start|>", eos_token="<|end|>")
