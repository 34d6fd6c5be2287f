"""Texts to measure on: their first tokens are those of the whole, and no more is read than needed."""

from __future__ import annotations

import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from everlong.errors import InputError
from everlong.evaluation.texts import LIBRARY_FILES, first_tokens, standard_library
from everlong.reading.tokens import TextCoder
from tests.reading.small_tokenizers import PAGE, trained
from tests.tiny import byte_tokenizer

LONG = PAGE * 12  # several of the batches in which text is tokenised

TOKENIZERS = {
    "bytes": lambda: byte_tokenizer(),
    "bytes with a start token": lambda: byte_tokenizer(add_bos=True),
    "gpt2": lambda: trained("gpt2"),
    "llama2": lambda: trained("llama2"),
}


def at_once(tokenizer: Any, text: str) -> list[int]:
    ids: list[int] = tokenizer(text, split_special_tokens=True)["input_ids"]
    return ids


@pytest.mark.parametrize("limit", [1, 2, 1000, 12_345, None])
@pytest.mark.parametrize("name", TOKENIZERS)
def test_they_are_the_first_of_the_whole_text_tokenised_at_once(name: str, limit: int | None) -> None:
    tokenizer = TOKENIZERS[name]()
    excerpt, whole = first_tokens(tokenizer, LONG, limit), at_once(tokenizer, LONG)
    assert excerpt.ids.dtype == torch.long
    assert excerpt.ids.tolist() == whole[:limit]
    assert excerpt.is_whole == (limit is None or limit >= len(whole))


@pytest.mark.parametrize("name", TOKENIZERS)
def test_a_text_is_whole_when_its_last_token_is_there(name: str) -> None:
    tokenizer = TOKENIZERS[name]()
    for text in ("It is a truth", LONG):
        whole = at_once(tokenizer, text)
        for limit, is_whole in ((len(whole) - 1, False), (len(whole), True), (len(whole) + 1, True)):
            excerpt = first_tokens(tokenizer, text, limit)
            assert (excerpt.ids.tolist(), excerpt.is_whole) == (whole[:limit], is_whole)


def test_a_file_gives_the_same_and_its_name(tmp_path: Path) -> None:
    path, tokenizer = tmp_path / "novel.txt", trained("gpt2")
    path.write_text(LONG, encoding="utf-8")
    with path.open(encoding="utf-8") as file:
        for source in (path, file):
            excerpt = first_tokens(tokenizer, source, 5000)
            assert excerpt.name == "novel.txt"
            assert excerpt.ids.tolist() == at_once(tokenizer, path.read_text(encoding="utf-8"))[:5000]
    assert first_tokens(tokenizer, path, 10, name="the novel").name == "the novel"


def test_no_more_is_read_than_the_first_tokens_need() -> None:
    taken = []

    def far_too_long() -> Iterator[str]:
        for _ in range(1000):
            taken.append(1)
            yield "a truth universally acknowledged\n" * 30  # about a thousand characters

    assert len(first_tokens(byte_tokenizer(), far_too_long(), 40_000).ids) == 40_000
    assert 40 < len(taken) < 80


@pytest.mark.parametrize("limit", [1, 1000, None])
@pytest.mark.parametrize("name", TOKENIZERS)
def test_a_system_text_comes_first_with_the_start_token_and_the_limit_does_not_count_it(
    name: str, limit: int | None
) -> None:
    tokenizer = TOKENIZERS[name]()
    excerpt = first_tokens(tokenizer, LONG, limit, system="Be terse.")
    assert excerpt.pinned.tolist() == at_once(tokenizer, "Be terse.\n\n")
    whole = TextCoder(tokenizer).encode_after(LONG)
    assert excerpt.ids.tolist() == whole[:limit] and excerpt.is_whole == (limit is None)
    lines = first_tokens(tokenizer, LONG, limit, system="Be terse.\n")
    assert lines.pinned.tolist() == at_once(tokenizer, "Be terse.\n")


def test_without_a_system_text_nothing_is_pinned_and_an_empty_one_is_refused() -> None:
    pinned = first_tokens(byte_tokenizer(add_bos=True), LONG, 10).pinned
    assert (pinned.shape, pinned.dtype) == ((0,), torch.long)
    with pytest.raises(InputError, match="the text to pin is empty"):
        first_tokens(byte_tokenizer(), LONG, 10, system="")


def test_ids_an_empty_text_and_a_missing_file_are_refused(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    with pytest.raises(InputError, match="the ids: texts are compared, not ids"):
        first_tokens(tokenizer, [1, 2, 3], 10)
    with pytest.raises(InputError, match="empty"):
        first_tokens(tokenizer, "", 10)
    with pytest.raises(InputError, match=r"missing\.txt"):
        first_tokens(tokenizer, tmp_path / "missing.txt", 10)
    (tmp_path / "image.png").write_bytes(b"abc\0")
    with pytest.raises(InputError, match=r"image\.png.*byte 3 "):
        first_tokens(tokenizer, tmp_path / "image.png", 10)


# --- Python's own sources -----------------------------------------------------------------------------


def test_pythons_own_sources_are_read_one_after_another() -> None:
    tokenizer, folder = byte_tokenizer(), Path(sysconfig.get_path("stdlib"))
    whole = "".join((folder / file).read_text(encoding="utf-8") for file in LIBRARY_FILES[:2])
    first = len((folder / LIBRARY_FILES[0]).read_bytes())
    excerpt = standard_library(tokenizer, first + 1000)
    assert excerpt.ids.tolist() == list(whole.encode())[: first + 1000]
    assert excerpt.name == f"Python's own {LIBRARY_FILES[0]} and {LIBRARY_FILES[1]}"
    assert not excerpt.is_whole
    assert standard_library(tokenizer, 100).name == f"Python's own {LIBRARY_FILES[0]}"
    after = standard_library(tokenizer, 100, system="Be terse.")
    assert bytes(after.pinned.tolist()) == b"Be terse.\n\n"
    assert after.ids.tolist() == excerpt.ids[:100].tolist()


def test_all_files_are_named_once_they_were_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a.py", "b.py", "c.py"):
        (tmp_path / name).write_text(f"{name}\n")
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    excerpt = standard_library(byte_tokenizer(), 100, ["a.py", "b.py", "c.py"])
    assert excerpt.name == "Python's own a.py, b.py and c.py"
    assert excerpt.is_whole and bytes(excerpt.ids.tolist()) == b"a.py\nb.py\nc.py\n"


def test_a_python_without_its_sources_is_told_to_pass_a_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(InputError, match=r"argparse\.py.*No such file.*everlong compare FILE"):
        standard_library(byte_tokenizer(), 100)
