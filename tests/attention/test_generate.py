"""Stock ``generate()`` on an attached model, beyond the window: against a hand loop that keeps no cache."""

import pytest
import torch
from transformers import pipeline

import tests.tiny as tiny
from everlong.attention import FullAttention, LMInfinite, StreamCache, StreamingLLM, attach
from everlong.attention.attach import _CHUNKS_CONTINUE

POLICY = LMInfinite(window=24, sinks=3)
PROMPT, NEW = 40, 14


@pytest.fixture(scope="module")
def model():
    return tiny.build("llama")


@pytest.fixture(scope="module")
def ids():
    return tiny.random_ids(2, PROMPT)


@torch.no_grad()
def hand_loop(model, ids, new, mask=None):
    """Greedy, reading everything again for each token."""
    for _ in range(new):
        newest = model(ids, attention_mask=mask, use_cache=False).logits[:, -1:].argmax(-1)
        ids = torch.cat((ids, newest), 1)
        mask = None if mask is None else torch.cat((mask, torch.ones_like(newest)), 1)
    return ids


@pytest.mark.parametrize(
    "policy",
    [POLICY, LMInfinite(window=24, sinks=3, ceiling=9), StreamingLLM(window=24), FullAttention()],
    ids=["lm-infinite", "low ceiling", "streaming-llm", "full"],
)
@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt_oss", "gemma4_text"])
def test_greedy_generation_equals_the_hand_loop(family, policy):
    model, ids = tiny.build(family), tiny.random_ids(2, PROMPT)
    with attach(model, policy):
        assert torch.equal(
            model.generate(ids, max_new_tokens=NEW, do_sample=False), hand_loop(model, ids, NEW)
        )


def test_the_window_changes_what_is_generated(model, ids):
    """Otherwise the equalities here would say nothing about a policy."""
    stock = model.generate(ids, max_new_tokens=NEW, do_sample=False)
    with attach(model, POLICY):
        assert not torch.equal(model.generate(ids, max_new_tokens=NEW, do_sample=False), stock)
    assert torch.equal(model.generate(ids, max_new_tokens=NEW, do_sample=False), stock)


def test_generation_without_a_cache_equals_generation_with_one(model, ids):
    with attach(model, POLICY):
        without = model.generate(ids, max_new_tokens=NEW, do_sample=False, use_cache=False)
        assert torch.equal(model.generate(ids, max_new_tokens=NEW, do_sample=False), without)


@pytest.mark.parametrize("size", [1, 2, 7, 24, 25, 39, 40, 1000])
def test_prefill_in_chunks_changes_nothing(model, ids, size):
    with attach(model, POLICY):
        whole = model.generate(ids, max_new_tokens=NEW, do_sample=False)
        chunked = model.generate(ids, max_new_tokens=NEW, do_sample=False, prefill_chunk_size=size)
    assert torch.equal(chunked, whole)


@pytest.mark.parametrize("size", [None, 1, 4, 11, 30])
def test_padded_rows_equal_the_rows_alone_even_where_padding_exceeds_the_first_chunks(model, size):
    lengths = [PROMPT, 31, 12, 1]  # the last two grow through the window's edge while generating
    ids, mask = tiny.left_padded(lengths)
    with attach(model, POLICY):
        batch = model.generate(
            ids, attention_mask=mask, max_new_tokens=NEW, do_sample=False, prefill_chunk_size=size
        )
        for row, length in enumerate(lengths):
            alone = hand_loop(model, ids[row : row + 1, -length:], NEW)
            assert torch.equal(batch[row : row + 1, -length - NEW :], alone), f"row of {length} tokens"


def test_embeddings_as_a_prompt(model, ids):
    embedded = model.get_input_embeddings()(ids)
    with attach(model, POLICY), torch.no_grad():
        written = model.generate(inputs_embeds=embedded, max_new_tokens=NEW, do_sample=False)
        assert torch.equal(written, hand_loop(model, ids, NEW)[:, PROMPT:])


# --- beams and samples ------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", [POLICY, StreamingLLM(window=24)], ids=["lm-infinite", "streaming-llm"])
@pytest.mark.parametrize("padded", [False, True])
def test_beam_search_equals_beam_search_without_a_cache(model, policy, padded):
    ids, mask = tiny.left_padded([PROMPT, 9 if padded else PROMPT], seed=4)
    options = {"attention_mask": mask, "max_new_tokens": NEW, "num_beams": 4, "do_sample": False}
    with attach(model, policy):
        greedy = model.generate(ids, attention_mask=mask, max_new_tokens=NEW, do_sample=False)
        without = model.generate(ids, use_cache=False, num_return_sequences=3, **options)
        beams = model.generate(ids, num_return_sequences=3, **options)
    assert torch.equal(beams, without)
    assert not torch.equal(beams[::3], greedy), "beams that never reorder would prove nothing"


def test_beam_search_moves_the_recalled_middle_with_its_row(model, ids):
    policy = LMInfinite(window=24, sinks=3, top_k=2, top_k_layers=0)
    with attach(model, policy):
        without = model.generate(ids, num_beams=3, max_new_tokens=NEW, do_sample=False, use_cache=False)
        assert torch.equal(model.generate(ids, num_beams=3, max_new_tokens=NEW, do_sample=False), without)


def test_sampling_with_a_seed_repeats_and_does_not_depend_on_the_cache(model, ids):
    def sample(seed, **options):
        torch.manual_seed(seed)
        return model.generate(ids, max_new_tokens=NEW, do_sample=True, temperature=1.5, top_k=20, **options)

    with attach(model, POLICY):
        first = sample(0)
        assert torch.equal(sample(0), first)
        assert torch.equal(sample(0, use_cache=False), first)
        assert not torch.equal(sample(1), first)


def test_several_samples_of_one_prompt_each_keep_their_own_stream(model, ids):
    torch.manual_seed(0)
    with attach(model, POLICY), torch.no_grad():
        several = model.generate(
            ids, max_new_tokens=NEW, do_sample=True, num_return_sequences=3,
            return_dict_in_generate=True, output_logits=True,
        )  # fmt: skip
        again = model(several.sequences, use_cache=False).logits
    assert several.sequences.shape == (6, PROMPT + NEW)
    assert len({tuple(row.tolist()) for row in several.sequences}) == 6
    logits = torch.stack(several.logits, 1)
    torch.testing.assert_close(logits, again[:, PROMPT - 1 : -1], atol=1e-4, rtol=0)


# --- going on -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["all ids", "new ids and a full-length mask"])
@pytest.mark.parametrize("size", [None, 5])
@pytest.mark.parametrize("lengths", [[PROMPT, PROMPT], [PROMPT, 8]], ids=["even", "padded"])
def test_generate_goes_on_from_a_cache(model, way, size, lengths):
    if size is not None and not _CHUNKS_CONTINUE:
        pytest.skip("this transformers cannot; refused, see test_attach_refusals")
    ids, mask = tiny.left_padded(lengths)
    question = tiny.random_ids(2, 11, seed=9)
    options = {"do_sample": False, "prefill_chunk_size": size}
    with attach(model, POLICY) as handle:
        cache = handle.new_cache()
        first = model.generate(ids, attention_mask=mask, **tiny.cached(cache), max_new_tokens=10, **options)
        assert cache.seen == PROMPT + 9, "the last token written has not been read"
        everything = torch.cat((first, question), 1)
        whole_mask = torch.cat((mask, mask.new_ones(2, 21)), 1)
        new = everything if way == "all ids" else everything[:, cache.seen :]
        second = model.generate(
            new, attention_mask=whole_mask, **tiny.cached(cache), max_new_tokens=10, **options
        )
        expected = hand_loop(model, everything, 10, whole_mask)
    assert cache.seen == PROMPT + 9 + 1 + 11 + 9
    assert torch.equal(second[:, -10:], expected[:, -10:])


def test_generate_returns_the_cache_when_asked(model, ids):
    with attach(model, POLICY):
        result = model.generate(ids, max_new_tokens=4, do_sample=False, return_dict_in_generate=True)
        cache = tiny.cache_of(result)
        assert isinstance(cache, StreamCache) and cache.kept == 24
        more = model.generate(result.sequences, **tiny.cached(cache), max_new_tokens=4, do_sample=False)
        assert torch.equal(more, hand_loop(model, ids, 8))


def test_forward_goes_on_from_what_generate_left(model, ids):
    with attach(model, POLICY) as handle, torch.no_grad():
        cache = handle.new_cache()
        written = model.generate(ids, **tiny.cached(cache), max_new_tokens=5, do_sample=False)
        logits = model(written[:, cache.seen :], **tiny.cached(cache)).logits
        expected = model(written, use_cache=False).logits
    torch.testing.assert_close(logits[:, -1], expected[:, -1], atol=1e-4, rtol=0)


# --- around it ----------------------------------------------------------------------------------------


def test_the_text_generation_pipeline_works():
    model, tokenizer = tiny.byte_llama()
    texts = ["short", "a text of more bytes than the window of twenty-four tokens can hold"]
    with attach(model, POLICY):
        pipe = pipeline("text-generation", model=model, tokenizer=tokenizer, device="cpu")
        results = pipe(texts, max_new_tokens=10, do_sample=False, return_tensors=True, batch_size=2)
        for text, result in zip(texts, results, strict=True):
            ids = tokenizer(text, return_tensors="pt").input_ids
            written = result[0]["generated_token_ids"][-10:]
            assert written == hand_loop(model, ids, 10)[0, -10:].tolist()


def test_a_streamer_sees_every_token(model, ids):
    seen: list[int] = []

    class Streamer:
        def put(self, value):
            seen.extend(value.flatten().tolist())

        def end(self):
            seen.append(-1)

    with attach(model, POLICY):
        written = model.generate(ids[:1], max_new_tokens=5, do_sample=False, streamer=Streamer())
    assert seen == [*written[0].tolist(), -1]
