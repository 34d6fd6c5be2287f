"""Several memories of a store as one."""

import peft
import pytest
import torch

from everlong.errors import ConfigurationError, UnknownNameError
from everlong.memory.adapter import Adapter
from everlong.memory.pairs import Pair
from everlong.memory.record import MemoryRecord, Source
from tests.memory.adapters import content, logits_with, lora, record


def test_merging_puts_adapters_records_and_pairs_together(kept):
    later = record("harbour", segments=3, source=Source.of("Tomas", 5), rank=16)
    kept.add(later, lora(1, ["k_proj"], r=16), [Pair("Who?", " Tomas", "questions", 2)])
    before = content(kept.folder)
    memory = kept.merge(["handbook", "harbour"], "all", weights=[1, 0.5])
    assert memory == kept.get("all")
    assert {name: data for name, data in content(kept.folder).items() if not name.startswith("all")} == before
    made: MemoryRecord = memory.record
    assert made.rank == 16 and made.segments == 4 and made.seconds == 25.0 and made.recall is None
    assert made.source.characters == 20 + 5 and made.source.tokens == 25
    assert made.recipe.name == "merge" and made.recipe.values == {
        "memories": ["handbook", "harbour"],
        "weights": [1, 0.5],
        "method": "cat",
        "error": 0.0,
    }
    assert [pair.segment for pair in memory.pairs()] == [0, 0, 3]
    assert not torch.allclose(logits_with(memory.adapter()), logits_with(lora()), atol=1e-2)


def test_merging_refuses_what_cannot_be_merged_and_says_which(kept):
    kept.add(record("same-name", base_hash="1" * 64), lora())
    kept.add(record("foreign", base_model="qwen", base_hash="2" * 64), lora())
    config = peft.CartridgeConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")
    kept.add(
        record("prefix", kind="cartridge", rank=None),
        Adapter(config, {"prompt_embeddings": torch.ones(3, 64)}),
    )
    cases = {
        ("handbook", "foreign"): "'handbook' was learned by tiny and 'foreign' by qwen",
        ("handbook", "same-name"): "'same-name' by other weights of it",
        ("handbook", "prefix"): "'prefix' is a cartridge",
        ("handbook",): "two memories or more",
        ("handbook", "handbook"): "each of them once",
    }
    for names, reason in cases.items():
        with pytest.raises(ConfigurationError, match=reason):
            kept.merge(names, "all")
    with pytest.raises(UnknownNameError):
        kept.merge(["handbook", "nothing"], "all")
    with pytest.raises(ConfigurationError, match="already"):
        kept.merge(["handbook", "same-name"], "foreign")
    assert "all" not in [memory.name for memory in kept.list()]
