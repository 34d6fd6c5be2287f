"""An attached model: every way of calling it, beside other models, in threads, in other precisions."""

import subprocess
import sys
import threading

import pytest
import torch

import tests.tiny as tiny
from everlong.attention import FullAttention, LMInfinite, StreamCache, StreamingLLM, attach, forward
from everlong.attention.parts import Triangle
from everlong.errors import ConfigurationError

POLICY = LMInfinite(window=24, sinks=3)
LENGTH = 60  # two and a half windows


@pytest.fixture(scope="module")
def model():
    return tiny.build("llama")


@pytest.fixture(scope="module")
def ids():
    return tiny.random_ids(2, LENGTH)


@pytest.fixture(scope="module")
def expected(model, ids):
    """Logits of one forward that keeps nothing."""
    with torch.no_grad(), attach(model, POLICY):
        return model(ids, use_cache=False).logits


# --- groups -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "policy, padding, groups",
    [
        (FullAttention(), 0, [LENGTH]),
        (FullAttention(), 1, [16, 16, 16, 12]),
        (LMInfinite(window=24, sinks=3), 0, [24, 2, 16, 16, 2]),
        (LMInfinite(window=70, sinks=3), 0, [LENGTH]),
        (FullAttention(ceiling=20), 0, [20, 16, 16, 8]),
    ],
)
@torch.no_grad()
def test_plain_causal_attention_is_one_group_and_the_rest_is_cut(model, policy, padding, groups, monkeypatch):
    monkeypatch.setattr(forward, "GROUP", 16)
    seen = []
    real = type(policy).parts
    monkeypatch.setattr(
        type(policy), "parts", lambda self, q, view: seen.append(q.stop - q.first) or real(self, q, view)
    )
    mask = torch.ones(1, LENGTH)
    mask[:, :padding] = 0
    with attach(model, policy):
        model(tiny.random_ids(1, LENGTH), attention_mask=mask)
    assert seen == groups * model.config.num_hidden_layers


@torch.no_grad()
def test_no_mask_is_made_before_a_ceiling_inside_the_window(model, monkeypatch):
    seen = []
    real = LMInfinite.parts
    monkeypatch.setattr(
        LMInfinite, "parts", lambda self, q, view: seen.append((q.stop, real(self, q, view))) or seen[-1][1]
    )
    with attach(model, LMInfinite(window=50, sinks=3, ceiling=20)):
        model(tiny.random_ids(1, LENGTH))
    plain = [parts for stop, parts in seen if stop <= 20]
    assert plain and all(isinstance(part.visible, Triangle) for parts in plain for part in parts)


# --- ways of calling ----------------------------------------------------------------------------------


@torch.no_grad()
def test_forward_with_use_cache_false_returns_no_cache(model, ids):
    with attach(model, POLICY):
        assert tiny.cache_of(model(ids, use_cache=False)) is None


@torch.no_grad()
@pytest.mark.parametrize("arguments", [{}, {"use_cache": True}], ids=["nothing said", "use_cache=True"])
def test_forward_without_a_cache_returns_one_that_continues(model, ids, expected, arguments):
    with attach(model, POLICY):
        first = model(ids[:, :41], **arguments)
        cache = tiny.cache_of(first)
        second = model(ids[:, 41:], **tiny.cached(cache))
    assert isinstance(cache, StreamCache)
    assert (cache.seen, cache.kept, cache.forgotten) == (LENGTH, 24, LENGTH - 24)
    assert tiny.cache_of(second) is cache
    torch.testing.assert_close(torch.cat((first.logits, second.logits), 1), expected, atol=1e-4, rtol=0)


@pytest.mark.filterwarnings("ignore::FutureWarning")
@torch.no_grad()
@pytest.mark.parametrize("by", ["model", "decoder"])
def test_the_cache_may_be_given_by_its_older_name(model, ids, expected, by):
    head = model.get_output_embeddings()
    with attach(model, POLICY) as handle:
        cache = handle.new_cache()
        forward = model if by == "model" else handle.decoder
        output = [forward(part, past_key_values=cache) for part in (ids[:, :41], ids[:, 41:])]
    assert cache.seen == LENGTH
    logits = [each.logits if by == "model" else head(each.last_hidden_state) for each in output]
    torch.testing.assert_close(torch.cat(logits, 1), expected, atol=1e-4, rtol=0)


@torch.no_grad()
def test_the_models_own_config_may_turn_the_cache_off(ids, expected):
    quiet = tiny.build("llama", use_cache=False)
    with attach(quiet, POLICY):
        result = quiet(ids)
    assert tiny.cache_of(result) is None
    torch.testing.assert_close(result.logits, expected, atol=1e-4, rtol=0)


@torch.no_grad()
def test_use_cache_false_beside_a_cache_still_continues_it_as_stock_does(model, ids, expected):
    with attach(model, POLICY) as handle:
        cache = handle.new_cache()
        model(ids[:, :50], **tiny.cached(cache), use_cache=False)
        result = model(ids[:, 50:], **tiny.cached(cache), use_cache=False)
    assert cache.seen == LENGTH
    torch.testing.assert_close(result.logits, expected[:, 50:], atol=1e-4, rtol=0)


@torch.no_grad()
def test_two_implicit_caches_do_not_share_anything(model, ids, expected):
    with attach(model, POLICY):
        one, other = tiny.cache_of(model(ids[:1, :50])), tiny.cache_of(model(ids[1:, :50]))
        first = model(ids[:1, 50:], **tiny.cached(one)).logits
        second = model(ids[1:, 50:], **tiny.cached(other)).logits
    torch.testing.assert_close(torch.cat((first, second)), expected[:, 50:], atol=1e-4, rtol=0)


@torch.no_grad()
def test_decoder_positional_arguments_embeddings_and_tuples_are_understood(model, ids, expected):
    embedded = model.get_input_embeddings()(ids)
    with attach(model, POLICY) as handle:
        by_position = handle.decoder(ids, torch.ones_like(ids)).last_hidden_state
        by_embedding = model(inputs_embeds=embedded).logits
        logits, cache = model(ids, return_dict=False)[:2]
    torch.testing.assert_close(model.lm_head(by_position), expected)
    torch.testing.assert_close(by_embedding, expected)
    torch.testing.assert_close(logits, expected)
    assert cache.seen == LENGTH


@torch.no_grad()
def test_logits_to_keep_and_hidden_states_work(model, ids, expected):
    with attach(model, POLICY):
        result = model(ids, logits_to_keep=1, output_hidden_states=True)
    torch.testing.assert_close(result.logits, expected[:, -1:])
    assert len(result.hidden_states) == model.config.num_hidden_layers + 1


@torch.no_grad()
def test_position_ids_that_continue_the_count_are_taken(model, ids, expected):
    with attach(model, POLICY) as handle:
        cache = handle.new_cache()
        for begin, stop in ((0, 7), (7, 40), (40, LENGTH)):
            positions = torch.arange(begin, stop)[None]
            logits = model(ids[:, begin:stop], position_ids=positions, **tiny.cached(cache)).logits
            torch.testing.assert_close(logits, expected[:, begin:stop], atol=1e-4, rtol=0)


@torch.no_grad()
def test_a_cache_begun_in_one_grad_mode_goes_on_in_another(model, ids, expected):
    modes = [torch.inference_mode, torch.no_grad, torch.enable_grad, torch.inference_mode, torch.no_grad]
    edges = [0, 1, 2, 30, 31, LENGTH]
    for shift in range(len(modes)):
        with attach(model, POLICY) as handle:
            cache = handle.new_cache()
            for step, (begin, stop) in enumerate(zip(edges, edges[1:], strict=False)):
                with modes[(step + shift) % len(modes)]():
                    logits = model(ids[:, begin:stop], **tiny.cached(cache)).logits
                torch.testing.assert_close(logits, expected[:, begin:stop], atol=1e-4, rtol=0)


@torch.no_grad()
def test_other_rows_of_a_model_call_are_not_disturbed_by_a_nested_call_to_another_model(ids, expected):
    """A hook inside one attached model runs another attached model; each keeps its own forward."""
    outer, inner = tiny.build("llama"), tiny.build("qwen3", seed=5)
    with attach(inner, StreamingLLM(window=16)), attach(outer, POLICY):
        alone = inner(ids).logits
        nested = []
        hook = outer.model.layers[0].register_forward_pre_hook(lambda *_: nested.append(inner(ids).logits))
        torch.testing.assert_close(outer(ids).logits, expected)
        hook.remove()
        assert torch.equal(nested[0], alone)


# --- several models, threads ----------------------------------------------------------------------------


@torch.no_grad()
def test_models_side_by_side_follow_their_own_policies(model, ids, expected):
    other = tiny.build("gemma3_text", seed=3)
    stock = other(ids[:, :LENGTH]).logits
    with attach(model, POLICY), attach(other, FullAttention()):
        torch.testing.assert_close(other(ids).logits, stock, atol=1e-4, rtol=0)
        torch.testing.assert_close(model(ids).logits, expected)


@torch.no_grad()
def test_attachments_may_end_in_any_order(model, ids, expected):
    other = tiny.build("llama", seed=3)
    first, second = attach(model, POLICY), attach(other, POLICY)
    first.detach()
    changed = other(ids).logits
    second.detach()
    assert not torch.allclose(other(ids).logits, changed, atol=1e-3)
    with attach(model, POLICY):
        torch.testing.assert_close(model(ids).logits, expected)


@torch.no_grad()
def test_of_two_models_built_from_one_config_only_the_attached_one_changes(ids):
    config = tiny.build("llama").config
    torch.manual_seed(0)
    one, other = (type(tiny.build("llama"))(config).eval() for _ in range(2))
    assert one.config is other.config
    stock_one, stock_other = one(ids).logits, other(ids).logits
    with attach(one, POLICY):
        assert not torch.allclose(one(ids).logits, stock_one, atol=1e-4)
        assert torch.equal(other(ids).logits, stock_other)
    assert torch.equal(one(ids).logits, stock_one)


def test_two_threads_generate_on_one_attached_model(model):
    prompts = [tiny.random_ids(1, 30, seed=seed) for seed in range(2)]
    with attach(model, POLICY):
        alone = [model.generate(ids, max_new_tokens=20, do_sample=False) for ids in prompts]
        together: list = [[], []]
        start = threading.Barrier(2)

        def work(which):
            start.wait()
            for _ in range(3):
                together[which].append(model.generate(prompts[which], max_new_tokens=20, do_sample=False))

        threads = [threading.Thread(target=work, args=(which,)) for which in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not torch.equal(alone[0], alone[1])
    for which in range(2):
        assert len(together[which]) == 3
        assert all(torch.equal(output, alone[which]) for output in together[which])


def test_two_threads_on_a_model_whose_tables_change_with_the_length():
    """Each forward keeps one table, whatever the other thread asks the same module for meanwhile."""
    model = tiny.build("llama", **DYNAMIC)
    lengths = (40, 90)
    prompts = [tiny.random_ids(1, length, seed=length) for length in lengths]
    with attach(model, FullAttention()), torch.no_grad():
        alone = [model(ids, use_cache=False).logits for ids in prompts]
        wrong = []
        start = threading.Barrier(2)

        @torch.no_grad()
        def work(which):
            start.wait()
            for _ in range(20):
                if not torch.equal(model(prompts[which], use_cache=False).logits, alone[which]):
                    wrong.append(which)

        threads = [threading.Thread(target=work, args=(which,)) for which in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not wrong


# --- tables that change with the length -------------------------------------------------------------------

DYNAMIC = {
    "rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0},
    "max_position_embeddings": 64,
}
LONGROPE = {
    "rope_parameters": {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": [1.0, 1.1, 1.2, 1.3],
        "long_factor": [1.0, 2.0, 4.0, 8.0],
        "original_max_position_embeddings": 64,
    },
    "max_position_embeddings": 256,
}


@torch.no_grad()
@pytest.mark.parametrize("scaling", [DYNAMIC, LONGROPE], ids=["dynamic", "longrope"])
def test_changing_tables_give_what_a_fresh_stock_model_gives_at_each_length(scaling):
    ids = tiny.random_ids(1, 100)
    model = tiny.build("llama", **scaling)
    model(ids)  # stock remembers the longest input; that must not reach us
    for length in (20, 100, 70, 64, 65, 20):
        stock = tiny.build("llama", **scaling)(ids[:, :length]).logits
        with attach(model, FullAttention()) as handle:
            torch.testing.assert_close(model(ids[:, :length]).logits, stock, atol=1e-4, rtol=0)
            cache = handle.new_cache()
            for begin in range(0, length, 9):
                last = model(ids[:, begin : min(begin + 9, length)], **tiny.cached(cache)).logits[:, -1]
            if length <= 64:  # beyond, hidden states of earlier chunks saw the earlier tables
                torch.testing.assert_close(last, stock[:, -1], atol=1e-4, rtol=0)
            restored = handle.restore_cache(*cache.state())
            again = model(ids[:, :3], **tiny.cached(restored)).logits
            assert torch.equal(again, model(ids[:, :3], **tiny.cached(cache)).logits)


# --- precision, positions, lengths ------------------------------------------------------------------------


@torch.no_grad()
def test_bfloat16_stays_as_close_to_float32_as_stock_bfloat16_does(model):
    """Derived, not chosen: stock's own rounding error inside the window, same weights, is the yardstick.

    The rounding of a bfloat16 run does not depend on which keys are visible: each layer rounds a convex
    combination of the same kind of values to eight bits. Everlong rotates in float32 and merges in float32,
    so that its error should not exceed stock's by more than the scatter between inputs; half as much again
    is allowed.
    """
    wide = tiny.build("llama", initializer_range=0.1)
    half = tiny.build("llama", initializer_range=0.1).bfloat16()

    def error(length, attached):
        ids = tiny.random_ids(8, length, seed=length)
        if attached:
            with attach(wide, POLICY), attach(half, POLICY):
                exact, rounded = wide(ids).logits, half(ids).logits
        else:
            exact, rounded = wide(ids).logits, half(ids).logits
        assert rounded.dtype == torch.bfloat16
        return (rounded.float() - exact).pow(2).mean().sqrt() / exact.pow(2).mean().sqrt()

    assert error(96, attached=True) < 1.5 * error(24, attached=False)


@torch.no_grad()
def test_queries_scaled_by_absolute_position_stay_in_the_trained_range():
    """ministral3 scales queries from its training length on; a stream's queries must not leave that range."""
    ids = tiny.random_ids(1, 200)
    scaled = tiny.build("ministral3")
    beta_off = {**scaled.config.rope_parameters, "llama_4_scaling_beta": 0.0}
    unscaled = tiny.build("ministral3", rope_parameters=beta_off)
    assert not torch.allclose(scaled(ids).logits, unscaled(ids).logits, atol=1e-2), "the scaling does nothing"
    with attach(scaled, LMInfinite(sinks=3)) as ours, attach(unscaled, LMInfinite(sinks=3)):
        assert ours.policy.window == tiny.TRAINING_LENGTH
        assert torch.equal(scaled(ids).logits, unscaled(ids).logits)


def test_a_model_that_does_not_say_its_training_length_asks_for_a_window(ids):
    silent = tiny.build("llama")
    silent.config.__dict__["max_position_embeddings"] = None  # as of formats that leave it out
    before = silent(ids).logits
    with pytest.raises(ConfigurationError, match=r"LMInfinite\(window=...\)"):
        attach(silent, LMInfinite())
    assert torch.equal(silent(ids).logits, before)
    with attach(silent, LMInfinite(window=24)) as handle:
        assert handle.training_length is None
        assert tiny.cache_of(silent(ids)).kept == 24


def test_a_stream_that_grows_has_little_room_to_spare(model):
    ids, room = tiny.random_ids(1, 700), []
    with attach(model, FullAttention()) as handle, torch.no_grad():
        cache = handle.new_cache()
        for start in range(0, 700, 7):
            model(ids[:, start : start + 7], **tiny.cached(cache))
            room.append(cache.bytes()["window"] / cache.bytes_at(1)["window"])
    assert all(
        slots <= max(1.25 * seen, seen + 64) for slots, seen in zip(room, range(7, 701, 7), strict=True)
    )
    assert len(set(room)) < 12  # and is seldom copied


def test_the_window_is_filled_in_from_the_training_length(model):
    with attach(model, LMInfinite()) as handle:
        assert handle.training_length == handle.policy.window == tiny.TRAINING_LENGTH
    stretched = tiny.build("llama", **tiny.YARN)
    with attach(stretched, LMInfinite()) as handle:
        assert handle.policy.window == tiny.TRAINING_LENGTH, "the original length, not the stretched one"


# --- nothing at import --------------------------------------------------------------------------------


def test_importing_everlong_patches_nothing():
    script = """
import inspect, transformers
from transformers.generation import GenerationMixin
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama import modeling_llama
watched = [GenerationMixin, transformers.PreTrainedModel, transformers.Cache, modeling_llama.LlamaModel,
           modeling_llama.LlamaAttention, modeling_llama]
def look():
    return ([dict(vars(thing)) for thing in watched], dict(ALL_ATTENTION_FUNCTIONS.items()),
            dict(ALL_MASK_ATTENTION_FUNCTIONS.items()))
before = look()
import everlong.attention
assert look() == before
"""
    subprocess.run([sys.executable, "-c", script], check=True)
