import errno
import json

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from everlong.errors import ConfigurationError, ModelFileError
from everlong.models import conversion
from everlong.models.conversion import convert, convert_in_subprocess, is_complete
from everlong.models.files import human_bytes, parse_bytes
from tests.models.tiny_gguf import BYTE_LEVEL_TOKENS, CONTEXT, tensors, write_llama


@pytest.fixture
def gguf_file(tmp_path):
    return write_llama(tmp_path / "tiny.gguf")


@pytest.fixture
def converted(gguf_file, tmp_path):
    convert(gguf_file, tmp_path / "converted")
    return tmp_path / "converted"


def test_the_weights_are_those_of_the_file(converted):
    state = AutoModelForCausalLM.from_pretrained(converted, use_safetensors=True).state_dict()
    written = tensors(len(BYTE_LEVEL_TOKENS))
    pairs = {
        "model.embed_tokens.weight": "token_embd.weight",
        "model.layers.1.mlp.down_proj.weight": "blk.1.ffn_down.weight",
        "model.layers.0.self_attn.v_proj.weight": "blk.0.attn_v.weight",
        "model.norm.weight": "output_norm.weight",
    }
    for ours, theirs in pairs.items():
        assert state[ours].dtype == torch.float32
        np.testing.assert_array_equal(state[ours].numpy(), written[theirs])


def test_the_model_knows_its_training_length_and_where_to_stop(converted):
    model = AutoModelForCausalLM.from_pretrained(converted, use_safetensors=True)
    assert model.config.max_position_embeddings == CONTEXT
    assert model.generation_config.eos_token_id == 2


def test_generation_stops_at_the_end_of_a_turn_as_well(tmp_path):
    path = write_llama(tmp_path / "tiny.gguf", extra=lambda writer: writer.add_eot_token_id(0))
    convert(path, tmp_path / "converted")
    config = json.loads((tmp_path / "converted" / "generation_config.json").read_text())
    assert config["eos_token_id"] == [2, 0]


def test_only_a_finished_conversion_with_its_sizes_is_complete(converted):
    assert is_complete(converted)
    assert not is_complete(converted.parent)
    weights = converted / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    assert not is_complete(converted)


def test_a_marker_that_is_damaged_means_not_complete(converted):
    (converted / "everlong.json").write_text('{"files": []}')
    assert not is_complete(converted)
    (converted / "everlong.json").write_text("{")
    assert not is_complete(converted)


def test_weights_that_are_missing_are_named_and_not_made_up(tmp_path):
    weights = tensors(len(BYTE_LEVEL_TOKENS))
    del weights["blk.1.ffn_up.weight"]
    path = write_llama(tmp_path / "tiny.gguf", weights=weights)
    with pytest.raises(ModelFileError, match=r"lacks weights of its model: model\.layers\.1\.mlp\.up_proj"):
        convert(path, tmp_path / "converted")


def test_the_subprocess_writes_the_same_and_replaces_a_damaged_conversion(gguf_file, converted, tmp_path):
    other = tmp_path / "elsewhere" / "converted-1"
    other.mkdir(parents=True)
    (other / "model.safetensors").write_bytes(b"half")
    convert_in_subprocess(gguf_file, other)
    assert is_complete(other)
    assert (other / "model.safetensors").read_bytes() == (converted / "model.safetensors").read_bytes()
    assert [path.name for path in other.parent.iterdir()] == ["converted-1"]


def test_an_architecture_that_transformers_does_not_know_is_named(tmp_path):
    path = write_llama(tmp_path / "tiny.gguf", architecture="nonesuch")
    with pytest.raises(ModelFileError, match=r"cannot read tiny\.gguf.*'nonesuch'"):
        convert_in_subprocess(path, tmp_path / "out" / "converted-1")
    assert not list((tmp_path / "out").iterdir())


def test_a_truncated_file_is_refused_before_anything_is_written(gguf_file, tmp_path):
    gguf_file.write_bytes(gguf_file.read_bytes()[:-5000])
    with pytest.raises(ModelFileError, match="truncated"):
        convert_in_subprocess(gguf_file, tmp_path / "out" / "converted-1")
    assert not (tmp_path / "out").exists()


def test_a_disk_without_room_is_found_before_the_work(gguf_file, tmp_path, monkeypatch):
    monkeypatch.setattr("everlong.models.files.shutil.disk_usage", lambda path: type("D", (), {"free": 5})())
    with pytest.raises(ModelFileError, match=r"needs about 2.0 MB and .* has 5 bytes free"):
        convert_in_subprocess(gguf_file, tmp_path / "out" / "converted-1", size=2_000_000)
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize(
    "last_words",
    ["OSError: [Errno 28] No space left on device", "SafetensorError: I/O error: storage full (os error 28)"],
)
def test_a_disk_that_fills_during_the_work_leaves_nothing(gguf_file, tmp_path, monkeypatch, last_words):
    def fills_up(command, **options):
        target = command[-1]
        (tmp_path / "seen").write_text(target)
        conversion.Path(target).mkdir()
        (conversion.Path(target) / "model.safetensors").write_bytes(b"half")
        return type("Result", (), {"returncode": 1, "stderr": last_words})()

    monkeypatch.setattr(conversion.subprocess, "run", fills_up)
    with pytest.raises(ModelFileError, match="no room to convert"):
        convert_in_subprocess(gguf_file, tmp_path / "out" / "converted-1")
    assert (tmp_path / "seen").exists() and not list((tmp_path / "out").iterdir())


def test_a_process_that_is_killed_is_explained(gguf_file, tmp_path, monkeypatch):
    killed = type("Result", (), {"returncode": -9, "stderr": ""})()
    monkeypatch.setattr(conversion.subprocess, "run", lambda command, **options: killed)
    with pytest.raises(ModelFileError, match=r"ended by SIGKILL.*of memory"):
        convert_in_subprocess(gguf_file, tmp_path / "out" / "converted-1")


def test_no_space_while_renaming_is_the_same_error(gguf_file, tmp_path, monkeypatch):
    def fails(source, target):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(conversion, "_run", lambda *arguments: None)
    monkeypatch.setattr(conversion.os, "replace", fails)
    with pytest.raises(ModelFileError, match="no room to convert"):
        convert_in_subprocess(gguf_file, tmp_path / "out" / "converted-1")


@pytest.mark.parametrize(
    ("count", "written"),
    [(0, "0 bytes"), (999, "999 bytes"), (1500, "1.5 kB"), (92_871_040, "93 MB"), (1.1e12, "1100 GB")],
)
def test_bytes_are_written_for_people(count, written):
    assert human_bytes(count) == written


@pytest.mark.parametrize(
    ("written", "count"),
    [("0", 0), ("1024", 1024), ("4GB", 4 * 10**9), ("1.5 kb", 1500), (" 20 MB ", 2 * 10**7), ("7 bytes", 7)],
)
def test_bytes_are_read_as_people_write_them(written, count):
    assert parse_bytes(written) == count


@pytest.mark.parametrize("written", ["", "9" * 400, "much", "-4GB", "4XB", "1.2.3GB", "nan", "GB"])
def test_what_is_no_number_of_bytes_is_refused(written):
    with pytest.raises(ConfigurationError, match="no number of bytes"):
        parse_bytes(written)
