"""The tokenizer that a GGUF describes, the same under every transformers release.

Two kinds are built here, because transformers' reading of them is wrong in some or all releases: Gemma's,
whose merges follow the order of the vocabulary and not its scores, and byte-level ones that take every digit
alone. The others are transformers' own. Special tokens, and whether inputs begin with one, always come from
the file.
"""

from __future__ import annotations

from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from everlong.errors import ModelFileError
from everlong.models.gguf_header import GgufHeader

DIGITS_ALONE = ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b")
"""``tokenizer.ggml.pre`` of the byte-level vocabularies whose text is cut at every digit first."""

_CONTROL, _USER_DEFINED = 3, 4
_SPACE = "▁"


def read_tokenizer(header: GgufHeader) -> PreTrainedTokenizerFast:
    """Build the tokenizer of a GGUF file.

    Parameters
    ----------
    header : GgufHeader
        As :func:`~everlong.models.gguf_header.read_header` returns it.

    Raises
    ------
    ModelFileError
        If the file holds no tokenizer, or one of a kind that cannot be built.
    """
    described, kind = _described(header), header.metadata.get("tokenizer.ggml.model")
    if not described["tokens"]:
        raise ModelFileError(
            f"{header.path} holds no tokenizer; give a folder with the model and its tokenizer"
        )
    if kind == "llama" and header.architecture.startswith("gemma"):
        backend = _gemma(described["tokens"])
        _add_marked(backend, described)
    elif kind == "gpt2" and described["pre"] in DIGITS_ALONE:
        backend = _byte_level_digits_alone(described["tokens"], described["merges"])
        _add_marked(backend, described)
    else:
        auto: Any = AutoTokenizer
        loaded = auto.from_pretrained(
            str(header.path.parent), gguf_file=header.path.name, trust_remote_code=False
        )
        backend = loaded.backend_tokenizer
    if _begins_with_bos(header):
        _prepend(backend, header.token("bos"))
    named = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
    fast: Any = PreTrainedTokenizerFast
    tokenizer: PreTrainedTokenizerFast = fast(
        tokenizer_object=backend,
        clean_up_tokenization_spaces=False,
        **{name: token for name, which in named.items() if (token := header.token(which)) is not None},
    )
    template = header.metadata.get("tokenizer.chat_template")
    if isinstance(template, str):
        tokenizer.chat_template = template
    return tokenizer


def _described(header: GgufHeader) -> dict[str, Any]:
    """Gather what the file says of its vocabulary, with empty lists for what it leaves out."""
    keys = {"tokens": "tokens", "merges": "merges", "types": "token_type"}
    found = {name: header.metadata.get(f"tokenizer.ggml.{key}", []) for name, key in keys.items()}
    return {**found, "pre": header.metadata.get("tokenizer.ggml.pre", "")}


def _begins_with_bos(header: GgufHeader) -> bool:
    """Tell whether inputs begin with BOS; a sentencepiece file that is silent means yes, as in llama.cpp."""
    default = header.metadata.get("tokenizer.ggml.model") == "llama"
    return bool(header.metadata.get("tokenizer.ggml.add_bos_token", default))


def _gemma(tokens: list[str]) -> Tokenizer:
    """Sentencepiece BPE with byte fallback, no prefix space, and merges in the vocabulary's order."""
    # Runs of spaces are stored as spaces, and looked up as the sentencepiece underscore.
    spelled = [_SPACE * len(token) if token.strip(" ") == "" else token for token in tokens]
    vocabulary = {token: index for index, token in enumerate(spelled)}
    backend = Tokenizer(
        models.BPE(
            vocab=vocabulary, merges=_implied_merges(spelled, vocabulary), unk_token="<unk>",
            fuse_unk=True, byte_fallback=True,
        )
    )  # fmt: skip
    backend.normalizer = normalizers.Replace(" ", _SPACE)
    backend.pre_tokenizer = pre_tokenizers.Split(" ", behavior="merged_with_previous")
    backend.decoder = decoders.Sequence(
        [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    return backend


def _implied_merges(tokens: list[str], vocabulary: dict[str, int]) -> list[tuple[str, str]]:
    """Derive the merges from a vocabulary that lists none: every cut of a token into two known pieces."""
    merges = []
    for token in tokens:
        cuts = [(token[:at], token[at:]) for at in range(1, len(token))]
        merges += [
            (left, right) for left, right in reversed(cuts) if left in vocabulary and right in vocabulary
        ]
    return merges


def _byte_level_digits_alone(tokens: list[str], merges: list[str]) -> Tokenizer:
    """GPT-2's byte-level BPE over text that was cut before and after every digit."""
    pairs = [(left, right) for left, _, right in (merge.partition(" ") for merge in merges)]
    backend = Tokenizer(models.BPE(vocab={token: index for index, token in enumerate(tokens)}, merges=pairs))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    backend.decoder = decoders.ByteLevel()
    return backend


def _add_marked(backend: Tokenizer, described: dict[str, Any]) -> None:
    """Keep the tokens whole that the file marks as control (special) or user-defined (plain)."""
    by_kind: dict[int, list[AddedToken]] = {_CONTROL: [], _USER_DEFINED: []}
    for token, kind in zip(described["tokens"], described["types"], strict=False):
        if kind in by_kind and backend.token_to_id(token) is not None:
            by_kind[kind].append(AddedToken(token, normalized=False, special=kind == _CONTROL))
    backend.add_special_tokens(by_kind[_CONTROL])
    backend.add_tokens(by_kind[_USER_DEFINED])


def _prepend(backend: Tokenizer, bos: str | None) -> None:
    """Begin every encoded text with `bos`, unless that happens already."""
    index = backend.token_to_id(bos) if bos is not None else None
    if bos is None or index is None or backend.encode("a").ids[:1] == [index]:
        return
    template = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos} $B:1", special_tokens=[(bos, index)]
    )
    existing = backend.post_processor
    backend.post_processor = processors.Sequence([existing, template]) if existing is not None else template
