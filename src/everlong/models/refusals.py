"""Models that cannot be driven yet: refused by name, with what is missing."""

from __future__ import annotations

from typing import Any

from torch import nn

from everlong.errors import UnsupportedModelError

_KNOWN_LAYER_TYPES = {"full_attention", "sliding_attention"}

_BY_TYPE = {
    "mpt": "its attention (ALiBi) does not go through transformers' attention interface",
    "bloom": "its attention (ALiBi) does not go through transformers' attention interface",
    "falcon": "its attention does not go through transformers' attention interface",
    "gptj": "its attention does not go through transformers' attention interface",
    "codegen": "its attention does not go through transformers' attention interface",
    "deepseek_v2": "its multi-head latent attention keeps a compressed cache",
    "deepseek_v3": "its multi-head latent attention keeps a compressed cache",
    "llama4_text": "its chunked local attention and per-position query scaling are not supported yet",
    "llama4": "its chunked local attention and per-position query scaling are not supported yet",
}


def refuse_unsupported(model: nn.Module, decoder: nn.Module) -> None:
    """Raise `UnsupportedModelError` where the model's design is known not to fit.

    Parameters
    ----------
    model : nn.Module
        The whole model, for its name.
    decoder : nn.Module
        Its decoder, with ``config``.
    """
    name = type(model).__name__
    config: Any = getattr(decoder, "config", None)
    if config is None:
        raise UnsupportedModelError(f"{name} is not a transformers model (it has no config)")
    if any(_is_compiled(module) for module in model.modules()):
        raise UnsupportedModelError(
            "a compiled model cannot be attached: its compiled code would go on without the policy; "
            "attach the model as it was before torch.compile"
        )
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedModelError(
            f"{name} is an encoder-decoder model; only decoder-only models are supported"
        )
    reason = _BY_TYPE.get(config.model_type)
    if reason is None and getattr(config, "kv_lora_rank", None):
        reason = "its multi-head latent attention keeps a compressed cache"
    if reason is None:
        strange = sorted(set(getattr(config, "layer_types", None) or ()) - _KNOWN_LAYER_TYPES)
        if strange:
            reason = f"its layers of type {', '.join(strange)} have no keys a policy could keep"
    if reason is None and (
        not getattr(config, "is_causal", True) or getattr(config, "use_bidirectional_attention", None)
    ):
        reason = "its attention is not causal"
    if reason is None and _learned_positions(decoder):
        reason = "its learned absolute positions end at the training length"
    reason = reason or _missing_weights(decoder)
    if reason is not None:
        raise UnsupportedModelError(f"{name} ({config.model_type}) is not supported: {reason}")


def _is_compiled(module: nn.Module) -> bool:
    return (
        type(module).__name__ == "OptimizedModule"
        or getattr(module, "_compiled_call_impl", None) is not None
        or hasattr(module.__dict__.get("forward"), "_torchdynamo_orig_callable")
    )


def _missing_weights(decoder: nn.Module) -> str | None:
    """Say which weights are not at hand; accelerate's hooks bring offloaded parameters, but no tables."""
    is_offloaded = any("_hf_hook" in module.__dict__ for module in decoder.modules())
    if not is_offloaded and any(parameter.is_meta for parameter in decoder.parameters()):
        return "its weights are not loaded (they are on the meta device)"
    if any(
        buffer is not None and buffer.is_meta for m in decoder.modules() for buffer in m._buffers.values()
    ):
        return "its buffers are offloaded: dispatch it with offload_buffers=False"
    return None


def _learned_positions(decoder: nn.Module) -> bool:
    names = {"wpe", "embed_positions", "position_embeddings", "position_embedding"}
    return any(name.rsplit(".")[-1] in names for name, _ in decoder.named_modules())


def refuse_prompt_learning(model: Any) -> None:
    """Refuse adapters that are keys rather than weights."""
    for name, config in model.peft_config.items():
        if getattr(config, "is_prompt_learning", False):
            raise UnsupportedModelError(
                f"adapter {name!r} ({config.peft_type}) hands over keys that are rotated already; "
                "prompt-learning adapters are not supported, weight adapters such as LoRA are, and a "
                "cartridge that Everlong made is: llm.session(memories=[...])"
            )
