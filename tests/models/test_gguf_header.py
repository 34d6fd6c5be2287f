import pytest

from everlong.errors import ModelFileError
from everlong.models.gguf_header import read_header
from tests.models.tiny_gguf import BYTE_LEVEL_TOKENS, CONTEXT, tensors, write_llama


@pytest.fixture
def gguf_file(tmp_path):
    return write_llama(tmp_path / "tiny.gguf")


def test_it_reads_metadata_tokens_and_tensors(gguf_file):
    header = read_header(gguf_file)
    assert header.architecture == "llama"
    assert header.metadata["llama.context_length"] == CONTEXT
    assert header.metadata["tokenizer.ggml.tokens"] == BYTE_LEVEL_TOKENS
    assert header.token("eos") == "<|end|>"
    assert header.token("eot") is None
    assert header.elements == sum(value.size for value in tensors(len(BYTE_LEVEL_TOKENS)).values())


def test_its_tensors_end_where_the_file_ends(gguf_file):
    header = read_header(gguf_file)
    last = max(header.tensors, key=lambda tensor: tensor.offset)
    unpadded = header.data_start + last.offset + last.bytes
    assert 0 <= gguf_file.stat().st_size - unpadded < 32


@pytest.mark.parametrize("keep", [5, 30, 1000, 0.5, 0.99])
def test_a_truncated_file_is_refused(gguf_file, keep):
    content = gguf_file.read_bytes()
    gguf_file.write_bytes(content[: keep if keep > 1 else int(len(content) * keep)])
    with pytest.raises(ModelFileError, match=r"tiny\.gguf is truncated"):
        read_header(gguf_file)


def test_another_kind_of_file_is_refused(tmp_path):
    path = tmp_path / "model.gguf"
    path.write_bytes(b"PK\x03\x04 something else entirely")
    with pytest.raises(ModelFileError, match="not a GGUF file"):
        read_header(path)


@pytest.mark.parametrize("content", [b"", b"GGUF\x63\x00\x00\x00" + bytes(64)])
def test_an_empty_file_and_an_unknown_version_are_refused(tmp_path, content):
    path = tmp_path / "model.gguf"
    path.write_bytes(content)
    with pytest.raises(ModelFileError, match="not a readable GGUF file"):
        read_header(path)


def test_a_length_that_lies_is_refused_without_reading_it(gguf_file):
    content = bytearray(gguf_file.read_bytes())
    content[24:32] = (1 << 62).to_bytes(8, "little")  # the length of the first key
    gguf_file.write_bytes(content)
    with pytest.raises(ModelFileError, match="truncated"):
        read_header(gguf_file)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ModelFileError, match=r"cannot read .*nothing\.gguf"):
        read_header(tmp_path / "nothing.gguf")


def test_one_part_of_a_split_model_is_refused_with_the_remedy(tmp_path):
    path = write_llama(tmp_path / "a.gguf", extra=lambda writer: writer.add_uint16("split.count", 3))
    with pytest.raises(ModelFileError, match=r"one of 3 parts.*llama-gguf-split --merge"):
        read_header(path)
