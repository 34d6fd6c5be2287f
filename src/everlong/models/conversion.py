"""From GGUF to safetensors, once: de-quantising takes seconds at every start, reading safetensors none.

The work is done in a process of its own, so that its memory is given back and its progress bars are not seen.
Weights are stored in float32: the values of 4-bit blocks are not exact in 16 bits.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from everlong.errors import EverlongError, ModelFileError
from everlong.models.files import (
    disk_full,
    full_disk_explained,
    human_bytes,
    make_folder,
    require_space,
    scratch_folder,
)

FORMAT = "converted-1"
"""The folder's name; the number changes when what is written changes, and everything is converted again."""

_MARKER = "everlong.json"
_VOCABULARY_BYTES = 40_000_000
_REFUSED = 3


def is_complete(folder: Path) -> bool:
    """Tell whether `folder` holds a finished conversion whose files still have their sizes."""
    try:
        sizes = json.loads((folder / _MARKER).read_text(encoding="utf-8"))["files"]
        return all((folder / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def convert_in_subprocess(gguf: Path, folder: Path, size: int | None = None) -> None:
    """Convert `gguf` into `folder` in a process of its own; afterwards `folder` is complete, or not there.

    Parameters
    ----------
    gguf : Path
        The file to read.
    folder : Path
        Where ``from_pretrained`` will find model and tokenizer; replaced if it is there but incomplete.
    size : int, optional
        Bytes the result takes; by default estimated from the file's header.

    Raises
    ------
    ModelFileError
        If the file is truncated, of an unknown architecture, or there is no room for the result.
    """
    from everlong.models.gguf_header import read_header

    needed = size or 4 * read_header(gguf).elements + _VOCABULARY_BYTES
    task = f"convert {gguf.name}"
    parent = make_folder(folder.parent)
    require_space(parent, needed, task)
    with scratch_folder(parent) as scratch, full_disk_explained(parent, needed, task):
        _run(gguf, scratch / FORMAT, needed, task)
        if folder.exists():
            os.replace(folder, scratch / "replaced")
        os.replace(scratch / FORMAT, folder)


def _run(gguf: Path, target: Path, needed: int, task: str) -> None:
    """Run :func:`main` in another interpreter and explain how it ended."""
    source = str(Path(__file__).resolve().parents[2])
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, [source, os.environ.get("PYTHONPATH")])),
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_VERBOSITY": "error",
        "TQDM_DISABLE": "1",
    }
    command = [sys.executable, "-P", "-m", "everlong.models.conversion", str(gguf.resolve()), str(target)]
    result = subprocess.run(
        command, capture_output=True, text=True, errors="replace", stdin=subprocess.DEVNULL, env=environment
    )
    if result.returncode == 0:
        return
    if "No space left on device" in result.stderr or "os error 28" in result.stderr:
        raise disk_full(target.parent.parent, needed, task)
    last = (result.stderr.strip().splitlines() or ["no message"])[-1]
    if result.returncode == _REFUSED:
        raise ModelFileError(last)
    if result.returncode < 0:
        ended_by = signal.Signals(-result.returncode).name
        raise ModelFileError(
            f"cannot {task}: the process was ended by {ended_by}; "
            f"it takes up to {human_bytes(3 * needed)} of memory"
        )
    raise ModelFileError(f"cannot {task}: {last}")


def convert(gguf: Path, folder: Path) -> None:
    """Convert in this process: read `gguf`, write model, tokenizer and a marker with their sizes to `folder`.

    Raises
    ------
    ModelFileError
        If the file is truncated, or of an architecture that transformers cannot read from a GGUF.
    """
    import torch
    import transformers
    from transformers import AutoConfig, AutoModelForCausalLM, GgufConfig

    from everlong.models.gguf_header import read_header
    from everlong.models.gguf_tokenizer import read_tokenizer

    header = read_header(gguf)
    where: dict[str, Any] = {"gguf_file": gguf.name, "trust_remote_code": False}
    auto: Any = AutoModelForCausalLM
    # Without it the weights may stay in their blocks, and the model then refuses to be saved.
    unpacked: Any = GgufConfig
    try:
        config = AutoConfig.from_pretrained(str(gguf.parent), **where)
        model, loaded = auto.from_pretrained(
            str(gguf.parent),
            config=config,
            dtype=torch.float32,
            quantization_config=unpacked(dequantize=True),
            output_loading_info=True,
            **where,
        )
    except (ValueError, KeyError, NotImplementedError, RuntimeError, IndexError) as error:
        raise ModelFileError(
            f"transformers {transformers.__version__} cannot read {gguf.name} "
            f"(architecture {header.architecture or 'not stated'!r}): {error}"
        ) from error
    if missing := sorted(loaded["missing_keys"]):
        raise ModelFileError(
            f"{gguf.name} lacks weights of its model: {', '.join(missing[:3])} ({len(missing)} in all)"
        )
    tokenizer = read_tokenizer(header)
    _set_stop_tokens(model, header.token("eos"), header.token("eot"), tokenizer)
    model.save_pretrained(str(folder))
    tokenizer.save_pretrained(str(folder))
    marker = {
        "source": gguf.name,
        "transformers": transformers.__version__,
        "files": {path.name: path.stat().st_size for path in sorted(folder.iterdir())},
    }
    (folder / _MARKER).write_text(json.dumps(marker, indent=2) + "\n", encoding="utf-8")


def _set_stop_tokens(model: Any, eos: str | None, end_of_turn: str | None, tokenizer: Any) -> None:
    """Let generation stop at the end of a turn as well, where the file names a token for it."""
    stops = [tokenizer.convert_tokens_to_ids(token) for token in (eos, end_of_turn) if token is not None]
    if stops:
        model.generation_config.eos_token_id = stops[0] if len(set(stops)) == 1 else stops


def main() -> None:
    """Convert ``sys.argv[1]`` into ``sys.argv[2]``; exit code 3 and one line where that is refused."""
    try:
        convert(Path(sys.argv[1]), Path(sys.argv[2]))
    except EverlongError as error:
        print(" ".join(str(error).split()), file=sys.stderr)
        raise SystemExit(_REFUSED) from None


if __name__ == "__main__":
    main()
