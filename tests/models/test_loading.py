import logging

import pytest
import torch
from safetensors.torch import load_file, save_file

from everlong.errors import ConfigurationError, ModelFileError, UnknownNameError, UnsupportedModelError
from everlong.models import hub
from everlong.models.loading import load_model
from everlong.models.store import Store
from tests import tiny
from tests.models.tiny_gguf import write_llama
from tests.models.wheels import publish


@pytest.fixture
def folder(tmp_path):
    """A tiny Llama with a byte tokenizer, as save_pretrained writes them."""
    model, tokenizer = tiny.byte_llama()
    path = tmp_path / "llama"
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture
def offline(monkeypatch):
    def unreachable(self, *arguments, **options):
        raise ConnectionError("no network\nsecond line")

    monkeypatch.setattr("huggingface_hub.HfApi.model_info", unreachable)


def test_a_folder_is_loaded_in_float32_on_the_cpu_and_evaluated(folder):
    loaded = load_model(folder, device="cpu")
    expected, _ = tiny.byte_llama()
    assert loaded.name == "llama" and loaded.source == str(folder)
    assert loaded.model.dtype == torch.float32 and not loaded.model.training
    ids = loaded.tokenizer("text", return_tensors="pt").input_ids
    torch.testing.assert_close(loaded.model(ids).logits, expected(ids).logits, rtol=0, atol=0)


def test_a_bfloat16_checkpoint_is_float32_on_the_cpu_unless_asked_otherwise(folder):
    model, _ = tiny.byte_llama()
    model.to(torch.bfloat16).save_pretrained(folder)
    assert load_model(folder, device="cpu").model.dtype == torch.float32
    assert load_model(folder, device="cpu", dtype="bfloat16").model.dtype == torch.bfloat16
    assert load_model(folder, device="cpu", dtype=torch.float16).model.dtype == torch.float16


def test_the_weights_hash_is_that_of_the_weights(folder):
    given, tokenizer = tiny.byte_llama()
    assert load_model(folder).weights_hash == load_model(given, tokenizer=tokenizer).weights_hash
    other, _ = tiny.byte_llama(seed=5)
    assert load_model(folder).weights_hash != load_model(other, tokenizer=tokenizer).weights_hash


def test_a_gguf_file_is_converted_once_and_loaded(tmp_path, monkeypatch, caplog):
    path = write_llama(tmp_path / "tiny.gguf")
    with caplog.at_level(logging.WARNING, "everlong"):
        loaded = load_model(str(path))
    assert loaded.name == "tiny.gguf" and loaded.model.config.max_position_embeddings == 128
    assert [record.message for record in caplog.records] == ["converting tiny.gguf to safetensors, once"]
    monkeypatch.setattr("everlong.models.store.convert_in_subprocess", None)
    assert load_model(path).weights_hash == loaded.weights_hash


def test_a_catalogue_name_is_pulled_with_a_log_line(tmp_path, index, monkeypatch, caplog):
    catalogue = publish(index, "tiny-one", write_llama(tmp_path / "tiny.gguf").read_bytes())
    monkeypatch.setattr("everlong.models.loading.CATALOGUE", catalogue)
    with caplog.at_level(logging.WARNING, "everlong"):
        loaded = load_model("tiny-one", store=Store(tmp_path / "home", catalogue))
    assert loaded.name == "tiny-one" and loaded.tokenizer("ab").input_ids
    assert [record.message.split()[0] for record in caplog.records] == ["fetching", "converting"]


def test_terms_that_were_not_accepted_are_refused_with_the_command(home):
    with pytest.raises(ModelFileError, match="Gemma Terms of Use.*everlong pull gemma-3-270m --accept-terms"):
        load_model("gemma-3-270m")


def test_a_loaded_model_is_taken_as_it_is():
    model, tokenizer = tiny.byte_llama()
    loaded = load_model(model, tokenizer=tokenizer)
    assert loaded.model is model and loaded.tokenizer is tokenizer and loaded.source == "given"


def test_a_loaded_model_needs_its_tokenizer():
    model, _ = tiny.byte_llama()
    with pytest.raises(ConfigurationError, match="pass tokenizer="):
        load_model(model)


@pytest.mark.parametrize("option", [{"device": "cpu"}, {"dtype": "float32"}, {"revision": "main"}])
def test_a_loaded_model_is_not_moved(option):
    model, tokenizer = tiny.byte_llama()
    with pytest.raises(ConfigurationError, match=f"{next(iter(option))} cannot be chosen"):
        load_model(model, tokenizer=tokenizer, **option)


def test_a_tokenizer_can_be_given(folder):
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer_config.json").unlink()
    with pytest.raises(ModelFileError, match="llama has no tokenizer that can be read.*pass tokenizer="):
        load_model(folder)
    _, tokenizer = tiny.byte_llama()
    assert load_model(folder, tokenizer=tokenizer).tokenizer is tokenizer


def test_truncated_weights_are_refused(folder):
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ModelFileError, match="weights of llama in .* are truncated or damaged"):
        load_model(folder)


def test_missing_weights_are_not_made_up(folder):
    path = folder / "model.safetensors"
    weights = load_file(path)
    del weights["model.layers.0.mlp.up_proj.weight"]
    save_file(weights, path, {"format": "pt"})
    with pytest.raises(ModelFileError, match=r"lacks weights .*model\.layers\.0\.mlp\.up_proj\.weight"):
        load_model(folder)


def test_pickles_are_not_read(folder):
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelFileError, match=r"read from \.safetensors files only"):
        load_model(folder)


def test_a_models_own_code_is_not_run(folder):
    marker = folder.parent / "was-run"
    (folder / "modeling_own.py").write_text(f"open({str(marker)!r}, 'w')\nclass Own: pass\n")
    config = (folder / "config.json").read_text().replace('"model_type": "llama"', '"model_type": "own"')
    own = '{"auto_map": {"AutoConfig": "modeling_own.Own", "AutoModelForCausalLM": "modeling_own.Own"},'
    (folder / "config.json").write_text(config.replace("{", own, 1))
    with pytest.raises(UnsupportedModelError, match="brings code of its own, which Everlong never runs"):
        load_model(folder)
    assert not marker.exists()


def test_a_model_of_another_kind_is_refused(folder):
    config = (folder / "config.json").read_text()
    (folder / "config.json").write_text(config.replace('"model_type": "llama"', '"model_type": "vit"'))
    with pytest.raises(UnsupportedModelError, match="not a causal language model"):
        load_model(folder)


def test_an_empty_folder_and_a_stray_file_are_named(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelFileError, match=r"empty holds no model"):
        load_model(tmp_path / "empty")
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(ModelFileError, match=r"notes\.txt is neither a folder"):
        load_model(tmp_path / "notes.txt")


@pytest.mark.parametrize("path", ["./nothing", "/no/such/model", "model.gguf", "~/nothing-here"])
def test_a_path_that_does_not_exist_is_not_looked_up_elsewhere(path):
    with pytest.raises(ModelFileError, match="there is no folder or file"):
        load_model(path)


def test_a_truncated_gguf_is_refused(tmp_path):
    path = write_llama(tmp_path / "tiny.gguf")
    path.write_bytes(path.read_bytes()[:-4000])
    with pytest.raises(ModelFileError, match=r"tiny\.gguf is truncated"):
        load_model(path)


def test_an_unknown_name_is_answered_with_near_ones():
    with pytest.raises(UnknownNameError, match="did you mean 'smollm2-135m'.*hub id"):
        load_model("smollm2-135")


def test_a_hub_that_cannot_be_reached_names_what_needs_none(offline):
    with pytest.raises(ModelFileError, match=r"cannot be reached \(no network\).*'smollm2-135m'"):
        load_model("HuggingFaceTB/SmolLM2-135M-Instruct")


def test_a_hub_model_in_the_local_cache_is_used_offline(offline, monkeypatch):
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *a, **k: "/cache/config.json")
    assert hub.find_on_hub("someone/model", None) is True


def test_the_names_near_to_a_hub_id():
    assert "'gemma-3-270m' " in hub.near_in_catalogue("google/gemma-3-270m-it")
    assert "'smollm2-135m'" in hub.near_in_catalogue("nobody/zzz")


def test_a_device_that_is_not_there_is_refused(folder):
    with pytest.raises(ConfigurationError, match="device 'nonsense' cannot be used here"):
        load_model(folder, device="nonsense")


def test_an_unknown_dtype_is_answered_with_near_ones(folder):
    with pytest.raises(UnknownNameError, match="unknown dtype 'bfloat'; did you mean 'bfloat16'"):
        load_model(folder, dtype="bfloat")
    with pytest.raises(ConfigurationError, match="cannot be loaded as torch.int8"):
        load_model(folder, dtype=torch.int8)


def test_a_revision_is_for_hub_ids(folder):
    with pytest.raises(ConfigurationError, match="revision='v2' is for hub ids"):
        load_model(folder, revision="v2")
