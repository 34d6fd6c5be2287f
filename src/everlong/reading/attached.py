"""What all sessions of one attached model share."""

from __future__ import annotations

import hashlib
from functools import cached_property
from typing import Any

import torch

from everlong.attention import Attachment
from everlong.errors import ConfigurationError, StateError
from everlong.models.fingerprint import weights_hash
from everlong.reading.driver import device_of
from everlong.reading.prompts import Form, find_form
from everlong.reading.tokens import TextCoder

_PROBE = (
    "It is a truth universally acknowledged, that a single man in possession of a good fortune 1234 naïve "
    "Übermut 中文 日本語 привет हिन्दी 🙂\n\n\t  def f(x): return x**2  # 100%"
)


class AttachedModel:
    """An attached model with its tokenizer.

    Parameters
    ----------
    attachment : Attachment
        The model; in eval mode.
    tokenizer : transformers.PreTrainedTokenizerBase
        Its tokenizer.
    name : str
        What reports and state files call it.
    packed_as : str
        How its weights are packed for forwards of a few rows; "float": not at all.
    """

    def __init__(self, attachment: Attachment, tokenizer: Any, name: str, packed_as: str = "float") -> None:
        if attachment.model.training:
            raise ConfigurationError(
                "the model is in training mode, where dropout makes it forgetful: call model.eval()"
            )
        self.attachment = attachment
        self.name = name
        self.packed_as = packed_as
        self.coder = TextCoder(tokenizer)
        model: Any = attachment.model
        self.vocabulary = int(model.get_input_embeddings().weight.shape[0])
        self._forms: dict[bool, Form] = {}

    @property
    def tokenizer(self) -> Any:
        """The model's tokenizer."""
        return self.coder.tokenizer

    @property
    def device(self) -> torch.device:
        """Where the model takes its token ids."""
        return device_of(self.attachment)

    def form(self, *, with_system: bool) -> Form:
        """Return how a conversation with this model is laid out."""
        if with_system not in self._forms:
            self._forms[with_system] = find_form(self.tokenizer, with_system=with_system)
        return self._forms[with_system]

    @cached_property
    def end_tokens(self) -> frozenset[int]:
        """The tokens with which the model ends a text or its turn."""
        model: Any = self.attachment.model
        configured = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
        ends = set(configured) if isinstance(configured, (list, tuple)) else {configured}
        ends.add(self.tokenizer.eos_token_id)
        turn = self.coder.split_markup(self.form(with_system=False).to_user)
        ends.add(turn[0] if turn and isinstance(turn[0], int) else None)
        return frozenset(token for token in ends if token is not None)

    @property
    def weights_hash(self) -> str:
        """What the weights are told by, as they are now."""
        with self.attachment.adapters.set_aside():
            return weights_hash(self.attachment.model)

    @cached_property
    def tokenizer_hash(self) -> str:
        """What the tokenizer is told by: how it reads a text in several scripts, and its chat template."""
        read, _, template = self._tokens
        return hashlib.sha256(repr((read, self.vocabulary, template)).encode()).hexdigest()

    @cached_property
    def _tokens(self) -> tuple[list[int], int, str]:
        """How a text in several scripts is read, how many tokens there are, and the chat template."""
        template = str(getattr(self.tokenizer, "chat_template", None))
        return self.coder.encode(_PROBE), len(self.tokenizer), template

    def has_tokens_of(self, other: AttachedModel) -> bool:
        """Whether both make the same tokens of a text and lay conversations out alike.

        Their embeddings may have more rows than there are tokens: in larger models of a family they are often
        padded further. One token added to one of them makes them others.
        """
        return self._tokens == other._tokens

    def require_attached(self) -> None:
        """Raise if the model was detached."""
        if not self.attachment.is_attached:
            raise StateError(
                "the model was closed; load it again, and llm.restore() a saved session to go on"
            )
