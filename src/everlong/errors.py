"""Every error Everlong raises on purpose: each names the input, the limit and the remedy."""


class EverlongError(Exception):
    """Base of all errors raised by Everlong. The command line prints them as one line, exit code 2."""


class ConfigurationError(EverlongError, ValueError):
    """An option has a value, or a combination of values, that cannot work."""


class UnknownNameError(ConfigurationError, KeyError):
    """A method, model or option name is not known; the message lists near matches."""

    def __str__(self) -> str:
        # KeyError would print the message's repr.
        return str(self.args[0]) if self.args else ""


class InputError(EverlongError, ValueError):
    """A text, file or tensor that was given cannot be read as asked."""


class UnsupportedModelError(EverlongError, NotImplementedError):
    """The model is of a kind Everlong cannot drive; the message says what is missing."""


class UnsupportedUseError(EverlongError, NotImplementedError):
    """An attached model is used in a way that Everlong refuses rather than get wrong."""


class ModelFileError(EverlongError, OSError):
    """A model could not be found, fetched, checked or converted."""


class MemoryStoreError(EverlongError, OSError):
    """A long-term memory could not be read, written or deleted."""


class StateError(EverlongError, RuntimeError):
    """A cache or a saved session does not fit what it is used with, or was left half-done."""


class NumericalError(EverlongError, ArithmeticError):
    """The model produced logits that are not finite."""


class MemoryGateError(EverlongError, ValueError):
    """A text is worth nothing to the model that should learn it: it would teach itself what it knows."""
