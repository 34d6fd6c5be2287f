"""Uses of an attached model that would go wrong are refused, and the message says what to do."""

import pytest
import torch
import transformers
from transformers import DynamicCache, EncoderDecoderCache, QuantizedCache, StaticCache

import tests.tiny as tiny
from everlong.attention import FullAttention, LMInfinite, attach
from everlong.attention.attach import _CHUNKS_CONTINUE
from everlong.errors import InputError, StateError, UnsupportedUseError

POLICY = LMInfinite(window=24, sinks=3)


@pytest.fixture(scope="module")
def model():
    return tiny.build("llama")


@pytest.fixture
def handle(model):
    with attach(model, POLICY) as attached, torch.no_grad():
        yield attached


@pytest.fixture
def ids():
    return tiny.random_ids(2, 40)


# --- attachments --------------------------------------------------------------------------------------


def test_a_second_attach_is_refused_and_the_first_goes_on(model, handle, ids):
    expected = model(ids).logits
    for target in (model, model.model):
        with pytest.raises(UnsupportedUseError, match="attached already.*detach"):
            attach(target, FullAttention())
    assert torch.equal(model(ids).logits, expected)


def test_a_cache_of_another_attachment(model, handle, ids):
    with attach(tiny.build("llama", seed=1), POLICY) as other:
        foreign = other.new_cache()
    with pytest.raises(StateError, match="another model, or to an attachment that has ended"):
        model(ids, **tiny.cached(foreign))
    with pytest.raises(StateError, match="another model"):
        model.generate(ids, **tiny.cached(foreign), max_new_tokens=2)


def test_a_cache_of_an_earlier_attachment_of_the_same_model(ids):
    model = tiny.build("llama")
    with attach(model, POLICY) as first:
        cache = first.new_cache()
    with attach(model, POLICY), pytest.raises(StateError, match="attachment that has ended"):
        model(ids, **tiny.cached(cache))


def test_changing_the_attention_implementation_while_attached(ids):
    model = tiny.build("llama")
    with attach(model, POLICY), torch.no_grad():
        model.model.set_attn_implementation("eager")
        with pytest.raises(UnsupportedUseError, match="0 of 2 layers.*set_attn_implementation"):
            model(ids)


def test_two_caches_under_the_two_names(model, handle, ids):
    caches = {"cache": handle.new_cache(), "past_key_values": handle.new_cache()}
    with pytest.raises(InputError, match="two caches were given"):
        handle.decoder(ids, **caches)


# --- caches of others -----------------------------------------------------------------------------------


def _filled(model, ids):
    twin = tiny.build("llama")
    return tiny.cache_of(twin(ids[:, :10]))


CACHES = {
    "an empty DynamicCache": lambda model, ids: DynamicCache(),
    "a DynamicCache for this model": lambda model, ids: DynamicCache(config=model.config),
    "a filled DynamicCache": _filled,
    "a StaticCache": lambda model, ids: StaticCache(config=model.config, max_cache_len=80),
    "a QuantizedCache": lambda model, ids: QuantizedCache.__new__(QuantizedCache),  # needs another package
    "an EncoderDecoderCache": lambda model, ids: EncoderDecoderCache(DynamicCache(), DynamicCache()),
    "a tuple": lambda model, ids: ((torch.zeros(2, 2, 1, 8),) * 2,) * 2,
}


@pytest.mark.parametrize("kind", CACHES)
def test_caches_that_hold_rotated_keys(model, handle, ids, kind):
    cache = CACHES[kind](model, ids)
    with pytest.raises(UnsupportedUseError, match=f"a {type(cache).__name__} cannot follow.*new_cache"):
        model(ids, **tiny.cached(cache))
    with pytest.raises(UnsupportedUseError, match=f"a {type(cache).__name__} cannot follow"):
        model.generate(ids, **tiny.cached(cache), max_new_tokens=2)


@pytest.mark.parametrize("kind", ["static", "offloaded_static", "dynamic", "offloaded", "quantized"])
def test_cache_implementations(model, handle, ids, kind):
    with pytest.raises(UnsupportedUseError, match=f"cache_implementation='{kind}'.*leave it out"):
        model.generate(ids, max_new_tokens=2, cache_implementation=kind)


def test_a_cache_cannot_be_cropped(model, handle, ids):
    cache = tiny.cache_of(model(ids))
    assert not cache.is_croppable and not cache.is_compileable
    with pytest.raises(UnsupportedUseError, match="provisional"):
        cache.crop(3)


# --- ways of generating ---------------------------------------------------------------------------------


def test_assisted_decoding(model, handle, ids):
    with pytest.raises(UnsupportedUseError, match="assisted decoding.*assistant_model"):
        model.generate(ids[:1], assistant_model=tiny.build("llama"), max_new_tokens=4)


def test_prompt_lookup(model, handle, ids):
    with pytest.raises(UnsupportedUseError, match="prompt_lookup_num_tokens"):
        model.generate(ids[:1], prompt_lookup_num_tokens=3, max_new_tokens=4)


def test_early_exit(model, handle, ids):
    with pytest.raises(UnsupportedUseError, match="early exit"):
        model.generate(ids[:1], assistant_early_exit=1, max_new_tokens=4)


def test_assisting_another_model(model, handle, ids):
    with pytest.raises(UnsupportedUseError, match="assisted decoding"):
        tiny.build("llama").generate(ids[:1], assistant_model=model, max_new_tokens=4)


@pytest.mark.skipif(_CHUNKS_CONTINUE, reason="this transformers can")
def test_a_chunked_prefill_that_would_not_go_on_from_the_cache(model, handle, ids):
    cache = tiny.cache_of(model(ids[:, :20]))
    with pytest.raises(
        UnsupportedUseError, match=f"transformers {transformers.__version__}.*prefill_chunk_size"
    ):
        model.generate(ids, **tiny.cached(cache), prefill_chunk_size=5, max_new_tokens=2)


def test_new_ids_alone_do_not_go_on_from_a_cache(model, handle, ids):
    """transformers cannot tell them from all ids; the message says how to."""
    cache = tiny.cache_of(model(ids))
    expected = (
        "pass all ids, or only the new ones with an attention_mask over all|zero tokens.*in the cache already"
    )
    for count in (1, 6, 20, 39, 40):
        with pytest.raises((StateError, InputError), match=expected):
            model.generate(ids[:, :count], **tiny.cached(cache), max_new_tokens=2)
    assert cache.seen == 40


# --- inputs of a forward ----------------------------------------------------------------------------------


def test_zero_tokens(model, handle, ids):
    with pytest.raises(InputError, match="zero tokens"):
        model(ids[:, :0])
    with pytest.raises(InputError, match="input_ids or inputs_embeds"):
        handle.decoder()


@pytest.mark.parametrize("zeros", [slice(30, None), slice(10, 12)], ids=["right", "inner"])
def test_padding_that_is_not_on_the_left(model, handle, ids, zeros):
    mask = torch.ones_like(ids)
    mask[1, zeros] = 0
    with pytest.raises(InputError, match="pad left"):
        model(ids, attention_mask=mask)
    cache = tiny.cache_of(model(ids[:, :5]))
    with pytest.raises((InputError, StateError), match="pad left|padding"):
        model(ids[:, 5:], attention_mask=mask, **tiny.cached(cache))


def test_padding_that_begins_after_the_stream_has(model, handle, ids):
    mask = torch.ones_like(ids)
    cache = tiny.cache_of(model(ids[:, :20], attention_mask=mask[:, :20]))
    mask[1, :5] = 0
    with pytest.raises(StateError, match=r"the mask says \(0, 5\)"):
        model(ids[:, 20:], attention_mask=mask, **tiny.cached(cache))


@pytest.mark.parametrize("width", [20, 39, 41, 60])
def test_a_mask_of_another_length_than_seen_and_new(model, handle, ids, width):
    cache = tiny.cache_of(model(ids[:, :20]))
    mask = torch.ones(2, width, dtype=torch.long)
    mask[0, 0] = 0
    with pytest.raises(InputError, match="2 rows of 40 tokens were expected: 20 seen before and 20 new"):
        model(ids[:, 20:], attention_mask=mask, **tiny.cached(cache))


def test_a_prepared_mask(model, handle, ids):
    mask = torch.zeros(2, 1, 40, 40)
    for prepared in (mask, {"full_attention": mask}):
        with pytest.raises(UnsupportedUseError, match="4-D mask.*2-D padding mask"):
            model(ids, attention_mask=prepared)


@pytest.mark.parametrize(
    "positions",
    [torch.arange(20), torch.arange(21, 41), torch.arange(20, 40).flip(0)],
    ids=["0", "21", "backwards"],
)
def test_positions_that_do_not_go_on(model, handle, ids, positions):
    cache = tiny.cache_of(model(ids[:, :20]))
    with pytest.raises(StateError, match="continue the cache's count from 20"):
        model(ids[:, 20:], position_ids=positions[None], **tiny.cached(cache))


def test_positions_that_jump_at_the_start(model, handle, ids):
    with pytest.raises(StateError, match="count from 0"):
        model(ids, position_ids=torch.arange(5, 45)[None])


def test_positions_of_another_shape(model, handle, ids):
    with pytest.raises(InputError, match=r"\(1, 39\)"):
        model(ids, position_ids=torch.arange(39)[None])
    with pytest.raises(UnsupportedUseError, match="several dimensions"):
        model(ids, position_ids=torch.arange(40).expand(3, 2, 40))


def test_another_number_of_rows(model, handle, ids):
    padded, mask = tiny.left_padded([40, 30])
    cache = tiny.cache_of(model(padded, attention_mask=mask))
    with pytest.raises(StateError, match="holds 2 rows, the input has 1"):
        model(ids[:1, :1], attention_mask=torch.tensor([[0] * 10 + [1] * 31]), **tiny.cached(cache))
    cache = tiny.cache_of(model(ids))
    with pytest.raises(StateError, match="holds 2 rows, the input has 1"):
        model(ids[:1], **tiny.cached(cache))
    assert tiny.cache_of(model(ids, **tiny.cached(cache))).seen == 80, "refused before anything was read"


def test_attention_weights(model, handle, ids):
    with pytest.raises(UnsupportedUseError, match="output_attentions"):
        model(ids, output_attentions=True)


# --- training ----------------------------------------------------------------------------------------------


def test_attention_dropout(ids):
    model = tiny.build("llama", attention_dropout=0.1).train()
    with attach(model, POLICY), pytest.raises(UnsupportedUseError, match=r"dropout.*model\.eval\(\)"):
        model(ids)


@pytest.mark.filterwarnings("ignore")
def test_gradient_checkpointing(ids):
    model = tiny.build("llama").train()
    model.gradient_checkpointing_enable()
    with attach(model, POLICY):
        with pytest.raises(UnsupportedUseError, match="gradient_checkpointing_disable"):
            model(ids)
        model.eval()
        model(ids)  # checkpoints are for training only


# --- after a failure ----------------------------------------------------------------------------------


def test_a_refused_input_leaves_the_cache_as_it_was(model, handle, ids):
    expected = model(ids, use_cache=False).logits
    cache = tiny.cache_of(model(ids[:, :20]))
    for refused in (
        {"attention_mask": torch.zeros(2, 1, 20, 20)},
        {"position_ids": torch.zeros(1, 20, dtype=torch.long)},
        {"output_attentions": True},
    ):
        with pytest.raises((InputError, StateError, UnsupportedUseError)):
            model(ids[:, 20:], **tiny.cached(cache), **refused)
    logits = model(ids[:, 20:], **tiny.cached(cache)).logits
    torch.testing.assert_close(logits, expected[:, 20:], atol=1e-4, rtol=0)


@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt])
def test_a_forward_that_fails_between_layers_leaves_the_cache_half_done(model, handle, ids, error):
    cache = tiny.cache_of(model(ids[:, :20]))
    before = cache.fork()

    def fail(*_):
        raise error

    hook = model.model.layers[1].register_forward_pre_hook(fail)
    with pytest.raises(error):
        model(ids[:, 20:], **tiny.cached(cache))
    hook.remove()
    for use in (
        lambda: model(ids[:, 20:], **tiny.cached(cache)),
        lambda: model.generate(ids, **tiny.cached(cache), max_new_tokens=2),
        cache.state,
    ):
        with pytest.raises(StateError, match="half-done|ended in an error"):
            use()
    expected = model(ids, use_cache=False).logits[:, 20:]
    torch.testing.assert_close(model(ids[:, 20:], **tiny.cached(before)).logits, expected, atol=1e-4, rtol=0)
