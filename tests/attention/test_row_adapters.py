"""Streams with adapters of their own in one forward, as rows or packed: each as it would be alone."""

import threading

import peft
import pytest
import torch
from peft.tuners.lora import LoraModel
from peft.tuners.tuners_utils import BaseTunerLayer

import tests.tiny as tiny
from everlong.attention import LMInfinite, attach
from everlong.attention.sequences import PackedSequences
from everlong.errors import UnsupportedUseError
from everlong.models.packing import pack

POLICY = LMInfinite(window=24, sinks=3)
EVERYWHERE = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
LORAS = {
    "everywhere": {"r": 8, "target_modules": EVERYWHERE},
    "wide": {"r": 16, "lora_alpha": 5, "use_rslora": True, "target_modules": ["q_proj", "down_proj"]},
    "one layer": {"r": 4, "target_modules": ["v_proj", "up_proj"], "layers_to_transform": [1]},
}
OF_FAMILY = {
    "gpt_neox": ["query_key_value", "dense_4h_to_h"],
    "phi3": ["qkv_proj", "gate_up_proj"],
    "qwen3_moe": ["q_proj", "o_proj"],
}
NAMES = ["wide", None, "everywhere", "everywhere", "one layer", None, "wide"]
LENGTHS = [70, 24, 25, 60, 2, 23, 7]
FAMILIES = ["llama", "gemma3_text", "qwen3_moe", "gpt_neox", "phi3"]


def load(handle, loras, family="llama", **fields):
    """Put strong random adapters beside each other on an attached model, of that family and configuration."""
    for seed, (name, options) in enumerate(loras.items()):
        config = peft.LoraConfig(**options | {"init_lora_weights": False})
        if family in OF_FAMILY:
            config.target_modules = set(OF_FAMILY[family])
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            adapted = peft.get_peft_model(tiny.build(family, **fields), config)
        handle.adapters.load(name, config, peft.get_peft_model_state_dict(adapted))


@pytest.fixture(scope="module", params=FAMILIES)
def handle(request):
    with attach(tiny.build(request.param), POLICY) as attached, torch.no_grad():
        load(attached, LORAS, request.param)
        yield attached


@pytest.fixture
def llama():
    with attach(tiny.build("llama"), POLICY) as attached, torch.no_grad():
        load(attached, LORAS)
        yield attached


def ids_of(length, seed):
    return tiny.random_ids(1, length, seed=seed)


def alone(handle, names=NAMES, lengths=LENGTHS):
    """One cache a name, each having read its own tokens by itself."""
    caches = []
    for row, (name, length) in enumerate(zip(names, lengths, strict=False)):
        caches.append(handle.new_cache())
        caches[-1].adapter = name
        handle.model(ids_of(length, row), **tiny.cached(caches[-1]))
    return caches


def steps(handle, cache, rows, count, seed=50):
    """Logits after each of `count` single tokens, (rows, count, vocabulary); other tokens in each row."""
    ids = torch.cat([ids_of(count, seed + row) for row in rows])
    return torch.cat([handle.step(cache, ids[:, at : at + 1]) for at in range(count)], 1)


def close(ours, expected):
    torch.testing.assert_close(ours, expected, atol=1e-4, rtol=0)


def test_the_adapters_are_strong_enough_to_be_told_apart(handle):
    chunk = ids_of(9, 3)
    found = []
    for name in (None, *LORAS):
        (cache,) = alone(handle, [name])
        found.append(handle.model(chunk, **tiny.cached(cache)).logits)
    for number, logits in enumerate(found):
        assert all((logits - other).abs().max() > 0.1 for other in found[:number])


def test_rows_with_adapters_of_their_own_write_as_they_would_alone_and_go_on_alone(handle):
    caches = alone(handle)
    rows = range(len(NAMES))
    batch = handle.batch(caches)
    together = steps(handle, batch.cache, rows, 20)
    for row in rows:
        taken = batch.take(row)
        assert taken.adapter == NAMES[row]
        close(together[row : row + 1], steps(handle, caches[row], [row], 20))
        close(steps(handle, taken, [row], 5, seed=90), steps(handle, caches[row], [row], 5, seed=90))


def test_rows_leave_until_all_use_the_same_or_none(llama):
    caches = alone(llama)
    batch = llama.batch(caches)
    staying = list(range(len(NAMES)))
    for turn, places in enumerate([[6, 5, 3, 2, 0], [3, 2, 0], [1, 0], [0]]):
        together = steps(llama, batch.cache, staying, 4, seed=60 + turn)
        for place, row in enumerate(staying):
            close(together[place : place + 1], steps(llama, caches[row], [row], 4, seed=60 + turn))
        batch.keep(places)
        staying = [staying[place] for place in places]
        assert [batch.take(place).adapter for place in range(len(staying))] == [NAMES[row] for row in staying]
    assert batch.cache.adapter == NAMES[staying[0]] and batch.cache.row_adapters is None


@pytest.mark.parametrize("counts", [[5, 1, 30, 2, 9, 40, 3], [1] * 7], ids=["chunks", "single tokens"])
def test_packed_streams_with_adapters_of_their_own_read_as_they_would_alone(handle, counts):
    caches = alone(handle)
    caches[2] = handle.new_cache()  # one that has read nothing yet
    caches[2].adapter = NAMES[2]
    expected = [cache.fork() for cache in caches]
    for turn in range(2):
        pieces = [ids_of(count, 80 + row + 10 * turn) for row, count in enumerate(counts)]
        packed = PackedSequences(caches, counts)
        together = handle.model(torch.cat(pieces, 1), **tiny.cached(packed)).logits.split(counts, 1)
        for own, piece, logits in zip(expected, pieces, together, strict=True):
            close(logits, handle.model(piece, **tiny.cached(own)).logits)


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_packed_weights_stay_under_adapters_per_row(kind):
    wide = {"hidden_size": 64, "intermediate_size": 96}  # as the kernels want it
    model = tiny.build("llama", **wide)
    with attach(model, POLICY) as handle, torch.inference_mode():
        load(handle, LORAS, **wide)
        caches = alone(handle)
        floats = [cache.fork() for cache in caches]
        rows = range(len(NAMES))
        by_float = [steps(handle, cache, [row], 1) for row, cache in zip(rows, floats, strict=True)]
        packing = pack(model, kind)
        together = steps(handle, handle.batch(caches).cache, rows, 1)
        piece = torch.cat([ids_of(1, 50 + row) for row in rows], 1)
        packed = handle.model(piece, **tiny.cached(PackedSequences([c.fork() for c in caches], [1] * 7)))
        for row, cache in enumerate(caches):
            expected = steps(handle, cache, [row], 1)
            rounding = 2**-6 * expected.abs().max()
            assert (together[row] - expected[0]).abs().max() <= rounding
            assert (packed.logits[0, row] - expected[0, 0]).abs().max() <= rounding
            assert not torch.allclose(expected, by_float[row], atol=1e-4), "by the packed weights"
        packing.undo()


def test_a_bfloat16_model_rounds_what_its_rows_get():
    with attach(tiny.build("llama").bfloat16(), POLICY) as handle, torch.inference_mode():
        load(handle, LORAS)
        caches = alone(handle)
        together = steps(handle, handle.batch(caches).cache, range(len(NAMES)), 1)
        for row, cache in enumerate(caches):
            expected = steps(handle, cache, [row], 1)
            assert (together[row] - expected[0]).abs().max() <= 2**-5 * expected.abs().max()


def test_forwards_go_on_in_another_mode(llama):
    caches = alone(llama, ["wide", None, "one layer"])
    batch = llama.batch(caches)
    with torch.inference_mode():
        steps(llama, batch.cache, [0, 1, 2], 2)
    with torch.enable_grad():
        together = steps(llama, batch.cache, [0, 1, 2], 2, seed=70).detach()
    for row, cache in enumerate(caches):
        steps(llama, cache, [row], 2)
        close(together[row : row + 1], steps(llama, cache, [row], 2, seed=70))


def test_an_adapter_loaded_and_adapters_set_aside_between_steps_change_nothing(llama):
    caches = alone(llama, ["wide", None, "one layer"])
    batch = llama.batch(caches)
    together = [steps(llama, batch.cache, [0, 1, 2], 2)]
    bare = caches[1].fork()
    expected = steps(llama, bare.fork(), [1], 1)
    together.append(steps(llama, batch.cache, [0, 1, 2], 2, seed=70))
    load(llama, {"late": {"r": 8, "target_modules": ["k_proj"]}})
    close(steps(llama, bare, [1], 1), expected)
    together.append(steps(llama, batch.cache, [0, 1, 2], 2, seed=90))
    with llama.adapters.set_aside():
        for _ in range(2):
            assert not any("lora" in name for name, _ in llama.model.named_modules())
            assert not any(module._forward_hooks for module in llama.decoder.layers.modules())
            with llama.adapters.set_aside():
                pass
    together.append(steps(llama, batch.cache, [0, 1, 2], 2, seed=110))
    for row, cache in enumerate(caches):
        for seed, logits in zip((50, 70, 90, 110), together, strict=True):
            close(logits[row : row + 1], steps(llama, cache, [row], 2, seed=seed))


def test_a_copied_or_reset_batch_keeps_its_adapters(llama):
    batch = llama.batch(alone(llama, ["wide", None])).cache
    twin = batch.fork()
    close(steps(llama, twin, [0, 1], 2), steps(llama, batch, [0, 1], 2))
    twin.reset()
    fresh = [llama.new_cache() for _ in range(2)]
    fresh[0].adapter = "wide"
    together = llama.model(torch.cat([ids_of(9, 0), ids_of(9, 1)]), **tiny.cached(twin)).logits
    for row, cache in enumerate(fresh):
        close(together[row : row + 1], llama.model(ids_of(9, row), **tiny.cached(cache)).logits)


def test_what_is_not_plain_lora_runs_with_its_like_alone(llama):
    load(llama, {"dora": {"r": 4, "target_modules": ["q_proj"], "use_dora": True}})
    plain, none, dora, other = alone(llama, ["wide", None, "dora", "dora"])
    assert llama.why_apart([plain, none]) is None and llama.why_apart([dora, other]) is None
    for apart in ([plain, dora], [none, dora]):
        with pytest.raises(UnsupportedUseError, match="not plain LoRA"):
            llama.batch(apart)
        with pytest.raises(UnsupportedUseError, match="not plain LoRA"):
            llama.model(ids_of(5, 0), **tiny.cached(PackedSequences(apart, [2, 3])))
    caches = [dora, other]
    together = steps(llama, llama.batch(caches).cache, [0, 1], 3)
    for row, cache in enumerate(caches):
        close(together[row : row + 1], steps(llama, cache, [row], 3))


def test_a_layer_that_is_not_given_all_tokens_is_noticed(llama):
    load(llama, {"head": {"r": 4, "target_modules": ["lm_head"]}})
    caches = alone(llama, ["head", None])
    packed = PackedSequences(caches, [4, 3])
    with pytest.raises(UnsupportedUseError, match="2 of 7 tokens"):
        llama.model(ids_of(7, 0), logits_to_keep=2, **tiny.cached(packed))


# --- interrupted, and beside others -------------------------------------------------------------------


def interrupt_once(monkeypatch, after):
    """Raise KeyboardInterrupt when PEFT has put so many layers in, once."""
    replace, count = LoraModel._create_and_replace, [0]

    def replaced(*args, **kwargs):
        count[0] += 1
        if count[0] == after + 1:
            raise KeyboardInterrupt
        return replace(*args, **kwargs)

    monkeypatch.setattr(LoraModel, "_create_and_replace", replaced)


def has_adapters_in(handle):
    return any(isinstance(module, BaseTunerLayer) for module in handle.model.modules())


def test_what_an_interruption_kept_out_is_put_back_by_the_next_forward(llama, monkeypatch):
    expected = [llama.model(ids_of(9, 3), **tiny.cached(cache)).logits for cache in alone(llama, LORAS)]
    caches = alone(llama, LORAS)
    interrupt_once(monkeypatch, after=1)
    with pytest.raises(KeyboardInterrupt), llama.adapters.set_aside():
        assert not has_adapters_in(llama)
    assert not has_adapters_in(llama), "all of them or none"
    assert all(parameter.requires_grad for parameter in llama.model.parameters())
    for cache, logits in zip(caches, expected, strict=True):
        assert torch.equal(llama.model(ids_of(9, 3), **tiny.cached(cache)).logits, logits)


def test_an_adapter_whose_loading_was_interrupted_is_not_there(llama, monkeypatch):
    cache, other = (alone(llama, ["wide"])[0] for _ in range(2))
    expected = llama.model(ids_of(9, 3), **tiny.cached(other)).logits
    interrupt_once(monkeypatch, after=1)
    with pytest.raises(KeyboardInterrupt):
        llama.adapters.load("another", *llama.adapters.loaded("wide"))
    assert len(llama.adapters) == len(LORAS)
    assert torch.equal(llama.model(ids_of(9, 3), **tiny.cached(cache)).logits, expected)


@pytest.mark.parametrize("loras", [{}, LORAS], ids=["none", "some"])
def test_other_threads_wait_while_all_are_aside(loras):
    with attach(tiny.build("llama"), POLICY) as handle, torch.no_grad():
        load(handle, loras)
        expected = handle.model(ids_of(9, 3)).logits
        found = []

        def read():
            with torch.no_grad():
                found.append(handle.model(ids_of(9, 3)).logits)

        other = threading.Thread(target=read)
        with handle.adapters.set_aside():
            config = peft.LoraConfig(**LORAS["everywhere"] | {"init_lora_weights": False})
            student = peft.get_peft_model(handle.model, config)
            other.start()
            assert not torch.allclose(student(ids_of(9, 3)).logits, expected, atol=0.1)
            other.join(0.3)
            assert other.is_alive() and not found
            student.unload()
        other.join()
        assert torch.equal(found[0], expected)


@pytest.mark.parametrize("loras", [{}, LORAS], ids=["none", "some"])
def test_a_forward_that_was_interrupted_while_all_are_aside_holds_up_nobody(loras):
    with attach(tiny.build("llama"), POLICY) as handle, torch.no_grad():
        load(handle, loras)
        expected, found = handle.model(ids_of(9, 3)).logits, []

        def interrupt(*_):
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt), handle.adapters.set_aside():
            handle.decoder.layers[1].register_forward_pre_hook(interrupt)
            handle.model(ids_of(9, 3))
        handle.decoder.layers[1]._forward_pre_hooks.clear()

        def read():
            with torch.no_grad():
                found.append(handle.model(ids_of(9, 3)).logits)

        other = threading.Thread(target=read, daemon=True)
        other.start()
        other.join(60)
        assert not other.is_alive() and torch.equal(found[0], expected)
        assert torch.equal(handle.model(ids_of(9, 3)).logits, expected)


@pytest.mark.parametrize("where", ["taken out", "switched on"])
def test_layers_that_an_interruption_left_half_changed_are_made_anew(llama, where, monkeypatch):
    names = ["wide", "everywhere"]
    expected = [llama.model(ids_of(9, 3), **tiny.cached(cache)).logits for cache in alone(llama, names)]
    caches, count = alone(llama, names), [0]
    last = [module for module in llama.model.modules() if isinstance(module, BaseTunerLayer)][-1]
    whole = type(last).get_base_layer if where == "taken out" else type(last).enable_adapters

    def interrupted(layer, *args):
        if layer is last and not count[0]:
            count[0] = 1
            raise KeyboardInterrupt
        return whole(layer, *args)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(BaseTunerLayer, whole.__name__, interrupted)
        if where == "taken out":
            with llama.adapters.set_aside():
                pass
        else:
            llama.model(ids_of(9, 3))  # with none, after one
    for cache, logits in zip(caches, expected, strict=True):
        assert torch.equal(llama.model(ids_of(9, 3), **tiny.cached(cache)).logits, logits)


def test_no_session_with_an_adapter_runs_where_all_are_aside(llama):
    (cache,) = alone(llama, ["wide"])
    with llama.adapters.set_aside():
        with pytest.raises(UnsupportedUseError, match="while a text is learned"):
            llama.step(cache, ids_of(1, 3))
        llama.model(ids_of(9, 3))
