"""Hub ids: asked once whether they are there, so that being offline is a clear error within seconds."""

from __future__ import annotations

import difflib
import logging

from everlong.errors import ModelFileError
from everlong.models.catalogue import CATALOGUE, DEFAULT_MODEL

_TIMEOUT_SECONDS = 10.0
_logger = logging.getLogger("everlong")


def find_on_hub(name: str, revision: str | None) -> bool:
    """See whether a hub id can be loaded, from the hub or from its local cache.

    Left to itself, a loader without a network tries for a minute.

    Parameters
    ----------
    name : str
        ``organisation/model``.
    revision : str or None
        Branch, tag or commit.

    Returns
    -------
    bool
        True if only the local cache is to be used.

    Raises
    ------
    ModelFileError
        If the hub says there is no such model or that it needs a login, or it cannot be reached and the model
        is not in the local cache.
    """
    from huggingface_hub import HfApi, try_to_load_from_cache
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        HfApi().model_info(name, revision=revision, timeout=_TIMEOUT_SECONDS)
        return False
    except HFValidationError as error:
        raise ModelFileError(f"{name!r} is not a hub id: {error}") from error
    except GatedRepoError as error:
        raise ModelFileError(
            f"{name!r} asks for its terms to be accepted: do so on its page and log in with `hf auth login`"
        ) from error
    except RevisionNotFoundError as error:
        raise ModelFileError(f"{name!r} has no revision {revision!r} on the hub") from error
    except RepositoryNotFoundError as error:
        raise ModelFileError(
            f"the hub has no model {name!r}, or it is private; {near_in_catalogue(name)}"
        ) from error
    except Exception as error:  # offline in one of the ways of several HTTP libraries
        cached = try_to_load_from_cache(name, "config.json", revision=revision)
        if isinstance(cached, str):
            _logger.info("the hub cannot be reached (%s); loading %s from its local cache", error, name)
            return True
        raise ModelFileError(
            f"{name!r} cannot be fetched: the model hub cannot be reached ({_first_line(error)}); "
            f"{near_in_catalogue(name)}"
        ) from error


def near_in_catalogue(name: str) -> str:
    """Name the catalogue's models that come near to a hub id, all of them if none does."""
    known = list(CATALOGUE)
    near = difflib.get_close_matches(name.rsplit("/", 1)[-1].lower(), known, n=2, cutoff=0.6)
    names = ", ".join(repr(known_name) for known_name in near or known)
    return f"models that need no hub: {names} (default {DEFAULT_MODEL!r})"


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
