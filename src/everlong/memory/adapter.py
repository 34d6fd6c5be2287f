"""An adapter in PEFT's own files: read and written as safetensors, never as pickles."""

from __future__ import annotations

import copy
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from everlong.errors import InputError, MemoryStoreError
from everlong.memory.compatible import CONFIG_FILE, WEIGHTS_FILE, lora_problems

if TYPE_CHECKING:
    from peft import PeftConfig
    from torch import Tensor


@dataclass(frozen=True)
class Adapter:
    """Weights and configuration, as PEFT saves them.

    Attributes
    ----------
    config : peft.PeftConfig
        A ``LoraConfig``, or a ``CartridgeConfig``.
    tensors : mapping of str to Tensor
        By PEFT's saved names, which do not contain the adapter's: what ``get_peft_model_state_dict`` returns.
    """

    config: PeftConfig
    tensors: Mapping[str, Tensor]

    def require_plain(self, kind: str) -> None:
        """Raise unless this is an adapter of that kind which every server loads as it is.

        Raises
        ------
        InputError
            With all reasons.
        """
        problems = []
        if kind == "lora":
            shapes = {name: tuple(tensor.shape) for name, tensor in self.tensors.items()}
            problems = lora_problems(self.config.to_dict(), shapes)
        elif _type_of(self.config) != kind.upper():
            problems = [f"it is of type {_type_of(self.config)}, not {kind.upper()}"]
        problems += [
            f"its weight {name!r} is not finite"
            for name, tensor in self.tensors.items()
            if not tensor.isfinite().all()
        ][:1]
        if problems:
            raise InputError(
                f"this adapter is not a {kind} that servers load as it is: {'; '.join(problems)}"
            )

    def save(self, folder: Path, base_model: str) -> None:
        """Write PEFT's two files into a folder.

        Raises
        ------
        OSError
            If there is no room, or no right to.
        """
        from safetensors import SafetensorError
        from safetensors.torch import save_file

        config = copy.deepcopy(self.config)
        config.base_model_name_or_path = base_model
        config.inference_mode = True
        config.save_pretrained(str(folder))
        tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in self.tensors.items()}
        try:
            save_file(tensors, folder / WEIGHTS_FILE, metadata={"format": "pt"})
        except SafetensorError as error:
            number = re.search(r"os error (\d+)", str(error))
            if number is None:
                raise
            raise OSError(int(number[1]), os.strerror(int(number[1]))) from error

    @classmethod
    def load(cls, folder: Path) -> Adapter:
        """Read PEFT's two files from a folder.

        Raises
        ------
        MemoryStoreError
            If the files cannot be read, or the weights are not safetensors.
        """
        from peft import PeftConfig
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        check_files(folder)
        try:
            return cls(PeftConfig.from_pretrained(str(folder)), load_file(folder / WEIGHTS_FILE))
        except (OSError, ValueError, TypeError, KeyError, SafetensorError) as error:
            raise MemoryStoreError(f"the adapter in {folder} cannot be read: {error}") from error


def check_files(folder: Path) -> None:
    """Raise unless a folder holds a configuration, and weights in a whole safetensors file.

    Raises
    ------
    MemoryStoreError
        It does not.
    """
    from safetensors import SafetensorError, safe_open

    if not (folder / CONFIG_FILE).is_file():
        raise MemoryStoreError(f"{folder} has no {CONFIG_FILE}")
    if not (folder / WEIGHTS_FILE).is_file():
        pickled = any(folder.glob("adapter_model.*"))
        raise MemoryStoreError(
            f"{folder} has no {WEIGHTS_FILE}{'; weights in other formats are not read' if pickled else ''}"
        )
    try:
        with safe_open(folder / WEIGHTS_FILE, framework="np"):
            pass
    except (OSError, SafetensorError) as error:
        raise MemoryStoreError(f"{folder / WEIGHTS_FILE} is damaged: {error}") from error


def _type_of(config: PeftConfig) -> str:
    return str(getattr(config.peft_type, "value", config.peft_type))
