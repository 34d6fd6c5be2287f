"""What `generate()` of transformers asks of a cache in vain, and what it does not tell a policy."""

from __future__ import annotations

from typing import Any

from everlong.attention.policy import Policy
from everlong.errors import UnsupportedUseError


def refuse_generation(config: Any, mode: Any) -> None:
    """Raise where `generate()` is to work in a way that needs another cache.

    Parameters
    ----------
    config : GenerationConfig
        What it was asked for.
    mode : GenerationMode
        What it made of that.

    Raises
    ------
    UnsupportedUseError
        It would take tokens back, or wants a cache of its own kind.
    """
    if "assist" in str(getattr(mode, "value", mode)) or getattr(config, "is_assistant", False):
        raise UnsupportedUseError(
            "assisted decoding takes tokens back from the cache, which a ring cannot give: "
            "generate without assistant_model, prompt_lookup_num_tokens or early exit, or detach first"
        )
    if config.cache_implementation is not None:
        raise UnsupportedUseError(
            f"cache_implementation={config.cache_implementation!r} cannot follow a policy: "
            "leave it out (where the model brings it along, set "
            "model.generation_config.cache_implementation = None)"
        )


def refuse_untold(policy: Policy) -> None:
    """Raise where a policy goes by what `generate()` and a plain forward do not tell.

    Raises
    ------
    UnsupportedUseError
        It goes by surprisal, or by where reading ends.
    """
    name = type(policy).__name__
    if policy.needs_surprisal:
        raise UnsupportedUseError(
            f"{name} needs the surprisal of each token, which generate() and "
            "forward() do not report: use a session (everlong.load(...).session())"
        )
    if policy.needs_end_of_prefill:
        raise UnsupportedUseError(
            f"{name} forgets once the input is read, of which generate() and "
            "forward() do not tell: use a session, or a cache = handle.new_cache() of your own, and call "
            "cache.end_of_prefill() between reading and writing"
        )
