import pytest
from transformers import AutoTokenizer

from everlong.errors import ModelFileError
from everlong.models.gguf_header import GgufHeader, read_header
from everlong.models.gguf_tokenizer import read_tokenizer
from tests.models.tiny_gguf import write_gemma_header, write_llama

TEXTS = ["ab a  1 22\n\n x", "naïve 🤗", "<|start|>ab<|end|><think>", ""]


@pytest.fixture
def byte_level(tmp_path):
    return read_tokenizer(read_header(write_llama(tmp_path / "tiny.gguf")))


@pytest.fixture
def gemma(tmp_path):
    return read_tokenizer(read_header(write_gemma_header(tmp_path / "gemma.gguf")))


def test_digits_are_cut_off_before_spaces_are_counted(byte_level):
    # Cut at digits first, both spaces are one piece; GPT-2's own rule would leave one of them to the digit.
    assert byte_level.tokenize("b  12") == ["b", "ĠĠ", "1", "2"]


def test_special_tokens_are_the_files(byte_level):
    named = (byte_level.bos_token, byte_level.eos_token, byte_level.unk_token, byte_level.pad_token)
    assert named == ("<|start|>", "<|end|>", "<|endoftext|>", "<|end|>")
    assert byte_level("<|start|>a<|end|>").input_ids == [1, *byte_level("a").input_ids, 2]


def test_user_defined_tokens_stay_whole_and_are_not_special(byte_level):
    assert "<think>" in byte_level.tokenize("a<think>b")
    assert byte_level.decode(byte_level("a<think>b").input_ids, skip_special_tokens=True) == "a<think>b"


def test_a_file_that_says_no_bos_gets_none(byte_level):
    assert byte_level("ab").input_ids[0] != byte_level.bos_token_id


def test_the_chat_template_is_the_files(byte_level):
    asked = byte_level.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False)
    assert asked == "<|start|>Hi<|end|>"


def test_gemma_begins_with_bos(gemma):
    assert gemma("ab").input_ids[0] == gemma.bos_token_id == 2
    assert gemma("ab", add_special_tokens=False).input_ids[0] != 2


def test_gemma_merges_in_the_order_of_its_vocabulary(gemma):
    assert gemma.tokenize("abc") == ["abc"]
    assert gemma.tokenize("abcd") == ["abc", "d"]
    assert gemma.tokenize("abbc") == ["ab", "bc"]


def test_gemma_looks_up_runs_of_spaces_and_bytes(gemma):
    assert gemma.tokenize("a  b") == ["a", "▁▁", "b"]
    assert gemma.tokenize("é") == ["<0xC3>", "<0xA9>"]
    assert gemma.decode(gemma("a  é\n\nb").input_ids, skip_special_tokens=True) == "a  é\n\nb"


def test_gemma_keeps_its_turn_marker_whole(gemma):
    assert gemma.tokenize("<start_of_turn>a") == ["<start_of_turn>", "a"]


@pytest.mark.parametrize("kind", ["byte_level", "gemma"])
def test_saved_and_loaded_it_is_the_same(kind, request, tmp_path):
    ours = request.getfixturevalue(kind)
    ours.save_pretrained(tmp_path / "saved")
    loaded = AutoTokenizer.from_pretrained(tmp_path / "saved")
    for text in TEXTS:
        assert loaded(text).input_ids == ours(text).input_ids
    assert loaded.special_tokens_map == ours.special_tokens_map
    assert loaded.chat_template == ours.chat_template


def test_a_file_without_a_tokenizer_is_refused(tmp_path):
    header = GgufHeader(tmp_path / "bare.gguf", {"general.architecture": "llama"}, (), 0)
    with pytest.raises(ModelFileError, match=r"bare\.gguf holds no tokenizer"):
        read_tokenizer(header)
