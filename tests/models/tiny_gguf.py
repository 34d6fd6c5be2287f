"""GGUF files of a few kilobytes: a tiny Llama and a tiny Gemma, each with a tokenizer of its kind."""

import gguf
import numpy as np

LAYERS, WIDTH, HEADS, KV_HEADS, FEED_FORWARD, CONTEXT = 2, 32, 4, 2, 48, 128
CONTROL, USER_DEFINED, NORMAL, BYTE = 3, 4, 1, 6

_BYTES = [*range(33, 127), *range(161, 173), *range(174, 256)]
_OTHERS = [byte for byte in range(256) if byte not in _BYTES]
LETTERS = {byte: chr(byte) for byte in _BYTES} | {byte: chr(256 + n) for n, byte in enumerate(_OTHERS)}
"""How byte-level vocabularies write each byte."""

BYTE_LEVEL_TOKENS = [
    *("<|endoftext|>", "<|start|>", "<|end|>"),
    *(LETTERS[byte] for byte in range(256)),
    *("ĠĠ", "ab", "Ġa", "<think>"),
]
BYTE_LEVEL_MERGES = ["Ġ Ġ", "a b", "Ġ a"]

GEMMA_TOKENS = [
    *("<pad>", "<eos>", "<bos>", "<unk>"),
    *(f"<0x{byte:02X}>" for byte in range(256)),
    *("ab", "bc", "abc", "  ", "▁", "a", "b", "c", "d", "<start_of_turn>", "\n\n", "\n"),
]
"""Here "ab" comes before "bc" and is merged first; by the scores below it would be the other way round."""


def tensors(vocabulary, seed=0):
    """Random weights under llama.cpp's names."""
    random = np.random.default_rng(seed)

    def values(*shape):
        return (random.standard_normal(shape) * 0.2).astype(np.float32)

    found = {"token_embd.weight": values(vocabulary, WIDTH), "output_norm.weight": 1 + values(WIDTH)}
    key_width = WIDTH // HEADS * KV_HEADS
    for layer in range(LAYERS):
        found |= {
            f"blk.{layer}.attn_norm.weight": 1 + values(WIDTH),
            f"blk.{layer}.ffn_norm.weight": 1 + values(WIDTH),
            f"blk.{layer}.attn_q.weight": values(WIDTH, WIDTH),
            f"blk.{layer}.attn_k.weight": values(key_width, WIDTH),
            f"blk.{layer}.attn_v.weight": values(key_width, WIDTH),
            f"blk.{layer}.attn_output.weight": values(WIDTH, WIDTH),
            f"blk.{layer}.ffn_gate.weight": values(FEED_FORWARD, WIDTH),
            f"blk.{layer}.ffn_up.weight": values(FEED_FORWARD, WIDTH),
            f"blk.{layer}.ffn_down.weight": values(WIDTH, FEED_FORWARD),
        }
    return found


def _write(path, architecture, weights, fill):
    writer = gguf.GGUFWriter(str(path), architecture)
    fill(writer)
    for name, value in weights.items():
        writer.add_tensor(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _shape(writer):
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(FEED_FORWARD)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_dimension_count(WIDTH // HEADS)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(1e-6)


def write_llama(path, *, weights=None, architecture="llama", pre="smollm", extra=lambda writer: None):
    """Write a tiny Llama with a byte-level tokenizer that takes digits alone and has a chat template."""

    def fill(writer):
        _shape(writer)
        writer.add_vocab_size(len(BYTE_LEVEL_TOKENS))
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(pre)
        writer.add_token_list(BYTE_LEVEL_TOKENS)
        ordinary = [NORMAL] * (len(BYTE_LEVEL_TOKENS) - 4)
        writer.add_token_types([CONTROL] * 3 + ordinary + [USER_DEFINED])
        writer.add_token_merges(BYTE_LEVEL_MERGES)
        writer.add_bos_token_id(1)
        writer.add_eos_token_id(2)
        writer.add_unk_token_id(0)
        writer.add_pad_token_id(2)
        writer.add_add_bos_token(False)
        writer.add_chat_template("{% for m in messages %}<|start|>{{ m['content'] }}<|end|>{% endfor %}")
        extra(writer)

    weights = tensors(len(BYTE_LEVEL_TOKENS)) if weights is None else weights
    return _write(path, architecture, weights, fill)


def write_gemma_header(path):
    """Write the head of a Gemma: its tokenizer, and one tensor so that there is something to count."""

    def fill(writer):
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        writer.add_token_list(GEMMA_TOKENS)
        writer.add_token_scores([-float(len(GEMMA_TOKENS) - n) for n in range(len(GEMMA_TOKENS))])
        ordinary = [NORMAL] * (len(GEMMA_TOKENS) - 4 - 256 - 3)
        marked = [USER_DEFINED, USER_DEFINED, USER_DEFINED]
        writer.add_token_types([CONTROL] * 4 + [BYTE] * 256 + ordinary + marked)
        writer.add_bos_token_id(2)
        writer.add_eos_token_id(1)
        writer.add_unk_token_id(3)
        writer.add_pad_token_id(0)
        writer.add_add_bos_token(True)
        writer.add_add_space_prefix(False)

    return _write(path, "gemma3", {"token_embd.weight": tensors(4)["token_embd.weight"]}, fill)
