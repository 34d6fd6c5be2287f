"""A plain model with a memory, as PEFT loads it: what measures of recall ask."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from everlong.models.adapters import take_out_adapters, while_peft_wraps
from everlong.models.loading import LoadedModel


@contextmanager
def adapted(loaded: LoadedModel, folder: str | Path) -> Iterator[LoadedModel]:
    """Yield a model with the adapter in a folder; it is as it was at the end, gradients wanted or not too.

    Parameters
    ----------
    loaded : LoadedModel
        The model, detached.
    folder : str or Path
        A memory's folder, or another one with PEFT's two files.
    """
    from peft import PeftModel

    wanted = {parameter: parameter.requires_grad for parameter in loaded.model.parameters()}
    model: Any = None
    try:
        with while_peft_wraps():
            model = PeftModel.from_pretrained(loaded.model, str(folder))
        yield dataclasses.replace(loaded, model=model)
    finally:
        if model is None:  # interrupted: some layers may have it
            take_out_adapters(loaded.model)
        elif not model.active_peft_config.is_prompt_learning:  # a cartridge leaves the model's layers alone
            model.unload()
        for parameter, wants in wanted.items():
            parameter.requires_grad_(wants)
