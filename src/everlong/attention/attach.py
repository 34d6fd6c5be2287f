"""Makes one loaded model follow a policy, and leaves no trace when it ends."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from contextlib import ExitStack
from contextvars import ContextVar
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from everlong.attention.batch import StreamBatch, why_apart
from everlong.attention.budget import resolved
from everlong.attention.cache import StreamCache
from everlong.attention.cache_interface import PolicyCache
from everlong.attention.forward import Forward, Layers, Underway
from everlong.attention.generation import refuse_generation, refuse_untold
from everlong.attention.inputs import Inputs, clamped_positions, read_padding, refuse_foreign_cache
from everlong.attention.merging import Merging
from everlong.attention.policy import Policy, make_policy
from everlong.attention.prefix import Prefix, begun_with
from everlong.attention.recordable import RecordableStep
from everlong.attention.recording import StepRecorder, recorder_for
from everlong.attention.sequences import PackedSequences
from everlong.attention.tiers import Tier
from everlong.errors import ConfigurationError, StateError, UnknownNameError, UnsupportedUseError
from everlong.models.adapters import Adapters
from everlong.models.anatomy import decoder_of, dissect, replaced_rotaries
from everlong.models.cache_argument import cache_argument
from everlong.models.lean_layers import lean_layers
from everlong.models.packing import by_float_weights
from everlong.models.refusals import refuse_prompt_learning
from everlong.models.rotary import IdentityRotary
from everlong.models.seam import Seam, instance_attribute
from everlong.models.unrotated import unrotated
from everlong.models.watch import ModelWatch

_CHUNKS_CONTINUE = tuple(int(part) for part in transformers.__version__.split(".")[:2]) >= (5, 21)


_forward: ContextVar[Underway | None] = ContextVar("everlong_forward", default=None)


class Attachment:
    """An attached model; what :func:`attach` returns. Ends with :meth:`detach` or its ``with`` block.

    Attributes
    ----------
    model : nn.Module
        The model as it was given.
    decoder : nn.Module
        The model without its head.
    policy : Policy
        What full-attention layers follow, resolved for this model.
    tier : Tier
        Where what leaves the window goes, where a policy keeps it.
    training_length : int or None
        Tokens the model was trained on at most.
    adapters : Adapters
        That streams may bring along: a cache's ``adapter`` names the one its forwards use.
    cache_argument : str
        What its forward calls the cache: ``"cache"``, or ``"past_key_values"`` before transformers 5.24.
    steps : StepRecorder
        What :meth:`step` goes through: records steps, to repeat them at once, until its ``stop()``; as CUDA
        graphs where the model is on such a device.
    """

    def __init__(self, model: nn.Module, policy: Policy, tier: Tier | str | Path | None = None) -> None:
        if not isinstance(policy, Policy):
            raise ConfigurationError(
                f"attach() takes a policy, such as LMInfinite(), not {policy!r}; by name: make_policy(name)"
            )
        inner: Any = model
        if hasattr(inner, "get_base_model") and hasattr(inner, "peft_config"):
            refuse_prompt_learning(inner)
            inner = inner.get_base_model()
        decoder = decoder_of(model)
        if "_everlong_attachment" in decoder.__dict__:
            raise UnsupportedUseError("this model is attached already: detach it first, policies do not nest")
        with by_float_weights(decoder):
            anatomy = dissect(model)
        self.model = model
        self.decoder = decoder
        self.training_length = anatomy.training_length
        self.cache_argument = cache_argument(decoder)
        self.tier = Tier.of(tier)
        self.owner = uuid.uuid4().hex
        self._generator = inner
        self.adapters = Adapters(inner, self._end_forward)
        self._with_adapter: set[int] = set()  # forwards that hold its lock
        self._layers = Layers(anatomy.layers)
        self._closing = self._open([layer.module for layer in anatomy.layers if anatomy.can_skip_rotation])
        self.is_attached = True
        device: torch.device = inner.get_input_embeddings().weight.device
        watch = partial(ModelWatch, model, is_own=lambda hook: getattr(hook, "__self__", None) is self)
        self.steps = StepRecorder(recorder_for(device), watch, self._layers, self.owner)
        with ExitStack() as refused:
            refused.callback(self.detach)
            self.policy = resolved(policy, self)
            refused.pop_all()

    # --- opening and closing -----------------------------------------------------------------------

    def _open(self, skip_rotation: list[nn.Module]) -> ExitStack:
        """Put ourselves under the model; closing the stack undoes it. Undone at once if a step fails."""
        with ExitStack() as stack:
            stack.enter_context(replaced_rotaries(self.decoder, IdentityRotary))
            stack.enter_context(unrotated(skip_rotation))
            stack.enter_context(Seam(self.decoder, self._attention))
            stack.enter_context(lean_layers(self.decoder))
            stack.enter_context(instance_attribute(self.decoder, "_everlong_attachment", self.owner))
            if hasattr(self._generator, "_prepare_cache_for_generation"):
                ours = instance_attribute(
                    self._generator, "_prepare_cache_for_generation", self._prepare_cache
                )
                stack.enter_context(ours)
            before = self.decoder.register_forward_pre_hook(self._before, with_kwargs=True, prepend=True)
            stack.callback(before.remove)
            after = self.decoder.register_forward_hook(self._after, with_kwargs=True, always_call=True)
            stack.callback(after.remove)
            return stack.pop_all()

    def detach(self) -> None:
        """Give the model back exactly as it was. A second call does nothing."""
        if not self.is_attached:
            return
        self.is_attached = False
        self._end_forward()  # one that a KeyboardInterrupt ended is still open: no hook runs after it
        self.adapters.remove()
        self._closing.close()
        self.steps.stop()

    def __enter__(self) -> Attachment:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.detach()

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Refuse copies: a copied or pickled model would half belong to this attachment."""
        raise UnsupportedUseError("an attached model cannot be copied or pickled: detach it first")

    # --- caches ------------------------------------------------------------------------------------

    def new_cache(
        self, policy: Policy | None = None, *, offset: int = 0, prefix: Prefix | None = None
    ) -> StreamCache:
        """Return a cache for one stream, empty but for a prefix.

        Parameters
        ----------
        policy : Policy, optional
            This stream's own policy instead of the attachment's.
        offset : int
            Stream position of its first token, for streams that continue an earlier count.
        prefix : Prefix, optional
            Keys and values to begin with (:func:`~everlong.attention.prefix.begun_with`), at position 0.
        """
        followed = self.policy if policy is None else resolved(policy, self)
        if prefix is not None:
            return begun_with(prefix, followed, self._layers, self.owner, self.tier)
        return StreamCache(followed, self._layers.kept, self.owner, offset, self.tier)

    @property
    def layers(self) -> Layers:
        """The model's attention layers."""
        return self._layers

    def why_apart(self, caches: Sequence[StreamCache]) -> str | None:
        """Say why streams cannot be the rows of one batch (see :meth:`batch`); None: they can."""
        for cache in caches:
            refuse_foreign_cache(cache, self.owner, StreamCache)
        if len({self.adapters.group(cache.adapter) for cache in caches}) > 1:
            return "the memory of one of them is not plain LoRA on linear layers"
        changes = any(self.tables_change(cache.policy) for cache in caches)
        return why_apart(caches, tables_change=changes)

    def tables_change(self, policy: Policy) -> bool:
        """Whether, under `policy`, some rotary table depends on the length of the input."""
        return self._layers.tables_change(policy)

    def batch(self, caches: Sequence[StreamCache], *, moved: bool = False) -> StreamBatch:
        """Put streams of whatever length into the rows of one batch.

        Parameters
        ----------
        caches : sequence of StreamCache
            Of this attachment, each of a single row that has read something.
        moved : bool
            Whether they move into it, so that no more than a layer is held twice; else they are copied.

        Raises
        ------
        UnsupportedUseError
            They cannot be the rows of one batch: they can be packed into one row
            (:class:`~everlong.attention.sequences.PackedSequences`).
        """
        reason = self.why_apart(caches)
        if reason is not None:
            raise UnsupportedUseError(f"these streams cannot be the rows of one batch: {reason}")
        return StreamBatch(caches, self._layers.kept, moved=moved)

    def restore_cache(self, tensors: dict[str, Tensor], meta: dict[str, Any]) -> StreamCache:
        """Rebuild a cache from what :meth:`StreamCache.state` returned.

        Raises
        ------
        StateError
            The state is incomplete, or of a model with other layers.
        """
        try:
            policy, seen = make_policy(meta["policy"], meta["options"]), int(meta["seen"])
        except UnknownNameError as error:
            raise StateError(f"the saved state follows a policy that is not known here: {error}") from error
        except (KeyError, TypeError, ValueError) as error:
            raise StateError(f"the saved state is not complete: {error!r}") from error
        rotations = self._layers.rotations(policy, seen if policy.span is None else min(seen, policy.span))
        return StreamCache.from_state(tensors, meta, self._layers.kept, self.owner, rotations, self.tier)

    # --- writing -----------------------------------------------------------------------------------

    def step(
        self, cache: StreamCache, ids: Tensor, *, hidden: bool = False, undisturbed: bool = False
    ) -> Tensor:
        """Run one token a row, as writing does.

        Parameters
        ----------
        cache : StreamCache
            What they go on from.
        ids : Tensor (rows, 1)
            The tokens.
        hidden : bool
            Whether hidden states are wanted, without the head.
        undisturbed : bool
            Whether nothing but Everlong's own code has run since the last step of `cache`.

        Returns
        -------
        Tensor (rows, 1, vocabulary or d)
            Logits, or hidden states.
        """
        module, output = (self.decoder, "last_hidden_state") if hidden else (self.model, "logits")

        def run(cache: PolicyCache, ids: Tensor) -> Tensor:
            call = {"input_ids": ids, "use_cache": True, self.cache_argument: cache}
            found: Tensor = getattr(module(**call), output)
            return found

        if cache.row_adapters is not None:
            return run(cache, ids)  # a recording knows of one adapter, or none
        with self.adapters.active(cache.adapter):
            return self.steps.run(cache, ids, run, output, undisturbed=undisturbed)

    # --- generate() --------------------------------------------------------------------------------

    def _prepare_cache(
        self, generation_config: Any, model_kwargs: dict[str, Any], generation_mode: Any, *_: Any, **__: Any
    ) -> None:
        """Stand in for ``GenerationMixin._prepare_cache_for_generation``."""
        refuse_generation(generation_config, generation_mode)
        given = model_kwargs.get(self.cache_argument)
        if given is not None:
            refuse_foreign_cache(given, self.owner, StreamCache)
            if given.needs_surprisal:
                refuse_untold(given.policy)
            if given.seen and generation_config.prefill_chunk_size is not None and not _CHUNKS_CONTINUE:
                raise UnsupportedUseError(
                    f"transformers {transformers.__version__} begins a chunked prefill at position 0, "
                    "whatever the cache holds: leave prefill_chunk_size out when going on from a cache, "
                    "or use transformers 5.21 or newer"
                )
        elif generation_config.use_cache is not False:
            model_kwargs[self.cache_argument] = self._implicit_cache()

    def _implicit_cache(self) -> StreamCache:
        refuse_untold(self.policy)
        return self.new_cache()

    # --- one forward -------------------------------------------------------------------------------

    def _before(
        self, decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Any, dict[str, Any]]:
        """Read the decoder's inputs, choose the cache, and take padding and positions over."""
        inputs = Inputs.read(decoder, args, kwargs)
        given = inputs.cache
        use_cache = inputs.arguments.get("use_cache")
        if use_cache is None:
            use_cache = getattr(decoder.config, "use_cache", True)
        if given is not None:
            refuse_foreign_cache(given, self.owner)
        cache = self._implicit_cache() if given is None else given
        spans = cache.adapters(inputs.rows, inputs.tokens) if self.adapters.are_needed else []
        self.adapters.refuse_mixture(spans)
        is_kept = given is not None or bool(use_cache)
        if isinstance(cache, (PackedSequences, RecordableStep, Merging)):
            positions = cache.positions(inputs.device)
            _forward.set(cache.begin(inputs, self._layers, self._end_forward()))
        else:
            cache.admit(inputs.rows)
            if inputs.tokens > 1 and not cache.is_provisional:
                self.steps.forget_growing(cache)
            pads = read_padding(inputs, cache)
            positions = clamped_positions(inputs, cache, pads, cache.window)
            outer = self._end_forward()
            cache.begin(inputs.rows, pads)
            _forward.set(Forward(self.owner, self._layers, cache, inputs.tokens, is_kept, outer))
        if spans:
            self.adapters.begin(spans)
            self._with_adapter.add(id(_forward.get()))
        inputs.arguments.update(use_cache=is_kept, attention_mask=None, position_ids=positions)
        inputs.arguments[self.cache_argument] = cache if is_kept else None
        return (), inputs.arguments

    def _after(self, decoder: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        """Count the tokens if the forward came through; called after an error too."""
        forward = _forward.get()
        self._end_forward()
        if forward is None or forward.owner != self.owner or output is None:
            return
        forward.finish()

    def _end_forward(self) -> Underway | None:
        """Close this attachment's forward if one is open in this thread; return the one around it."""
        forward = _forward.get()
        if forward is None or forward.owner != self.owner:
            return forward
        forward.cache.abandon()
        _forward.set(forward.outer)
        if id(forward) in self._with_adapter:
            self._with_adapter.remove(id(forward))
            self.adapters.end()
        return forward.outer

    def _attention(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Any,
        scaling: float | None = None,
        dropout: float = 0.0,
        softcap: float | None = None,
        s_aux: Tensor | None = None,
        **_: Any,
    ) -> tuple[Tensor, None]:
        """Attend as the policy says; transformers' attention interface. Returns (batch, n, heads, d)."""
        forward = _forward.get()
        if forward is None or forward.owner != self.owner:
            raise StateError("an attached model's layers were called outside its decoder's forward")
        if dropout:
            raise UnsupportedUseError("attention dropout is not supported under a policy: call model.eval()")
        output = forward.attend(
            int(module.layer_idx),  # type: ignore[arg-type]
            query,
            key,
            value,
            scaling=query.shape[-1] ** -0.5 if scaling is None else scaling,
            softcap=softcap,
            sink_logits=s_aux,
        )
        return output.transpose(1, 2).contiguous(), None


def attach(model: nn.Module, policy: Policy, *, tier: Tier | str | Path | None = None) -> Attachment:
    """Make `model` follow `policy`, in stock ``generate()`` and ``forward()``, until detached.

    Parameters
    ----------
    model : nn.Module
        A loaded transformers causal language model, or a PEFT model around one.
    policy : Policy
        For example ``LMInfinite(window=4096)``.
    tier : Tier, "ram", "disk" or a folder, optional
        Where what leaves the window goes, where the policy keeps it; in RAM, in half precision, by default.

    Returns
    -------
    Attachment
        A context manager: ``with everlong.attach(model, policy) as handle: model.generate(...)``.

    Raises
    ------
    UnsupportedModelError
        The model's attention cannot be driven; the message names what is missing.
    UnsupportedUseError
        The model is attached already, or wrapped in a way that cannot be followed.
    """
    return Attachment(model, policy, tier)
