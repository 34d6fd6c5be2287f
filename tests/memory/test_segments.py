"""A text in segments of whole sentences: nothing lost, nothing too long, however it arrives."""

from __future__ import annotations

import random

import pytest

from everlong.errors import InputError
from everlong.memory import segments as segments_module
from everlong.memory.segments import Cutter, Segment, segments, split_sentences
from everlong.reading.tokens import TextCoder
from tests.reading.small_tokenizers import trained
from tests.tiny import byte_tokenizer

NASTY = {
    "prose": "Orla Finch keeps bees. She sells honey! Does she? “Yes,” she said… Then it rained.",
    "abbreviations": "Mr. Finch met Dr. A. B. Stone at No. 5, e.g. by day. It rained, cf. Fig. 2.",
    "quotes": '"Is it?" he asked. "It is." (So it was.) [Truly.] Then he left.\' "Bye."',
    "list": "Buy:\n- honey\n- bread, etc.\n* milk\n1. first\n2. second\n\n# Notes\n| a | b |\n|--|--|\nEnd.",
    "code": "def f(x):\n    return {\n        'a': 1,\n    }\n\n\nfor (;;) {\n  x++;\n}\nprint(3.14)\n",
    "CJK": "奥拉养蜂。她卖蜂蜜！是吗？是的。\n\n然后下雨了。最后她回家",
    "no punctuation": "orla keeps bees and sells honey and it rains " * 6,
    "a very long sentence": "Orla, " + "who keeps bees, " * 40 + "left. Then it rained.",
    "a very long word": "See " + "0123456789abcdef" * 20 + " there. Then it rained.",
    "a script without spaces": "奥拉养蜂她卖蜂蜜然后下雨了" * 12,
    "white space": "\n\n   Orla keeps bees.   \n\n\n \t\n  It rained.\n   ",
    "lines": "one two\nthree four\nfive six\n\nseven eight",
    "dots": "... . . .. And then . . . it rained ?! !! Yes.",
    "small letters": "it rained. then it snowed. iPhones rang. 5 of them.",
    "emoji": "Bees 🐝. Honey 🍯! naïve café. Übermut. привет. Да.",
    "windows": "Orla keeps bees.\r\n\r\nIt rained.\r\n- honey\r\n",
}
CODERS = {"bytes": TextCoder(byte_tokenizer()), "gpt2": TextCoder(trained("gpt2"))}
CODERS["llama2"] = TextCoder(trained("llama2"))


@pytest.fixture(autouse=True)
def _bytes_are_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(segments_module, "_SHATTERED", 10.0)


def random_text(draws: random.Random) -> str:
    parts = ["Orla", "it", " ", " ", " ", "\n", "\n\n", ". ", ".", "! ", "? ", "Mr. ", "{\n", "。", "- ", "5"]
    parts += ["\t", '" ', "(", "…", ": ", ";\n", "蜂", "bees", "a", "etc. ", "A. ", "\r\n"]
    return "".join(draws.choice(parts) for _ in range(draws.randrange(12, 90)))


def pieces_of(text: str, draws: random.Random) -> list[str]:
    found = []
    while text:
        size = draws.choice([0, 1, 1, 2, 3, 8, 30])
        found.append(text[:size])
        text = text[size:]
    return found


@pytest.mark.parametrize("text", NASTY.values(), ids=NASTY)
def test_sentences_joined_are_the_text(text: str) -> None:
    assert "".join(split_sentences(text)) == text
    assert all(sentence.strip() for sentence in split_sentences(text))


@pytest.mark.parametrize("most", [32, 70])
@pytest.mark.parametrize("coder", CODERS.values(), ids=CODERS)
@pytest.mark.parametrize("text", NASTY.values(), ids=NASTY)
def test_segments_joined_are_the_text_and_none_is_too_long(text: str, coder: TextCoder, most: int) -> None:
    found = list(segments([text], coder, most))
    assert "".join(sentence for part in found for sentence in part.sentences).rstrip() == text.rstrip()
    assert [part.number for part in found] == list(range(len(found)))
    for part in found:
        assert 0 < part.tokens <= most
        assert part.tokens == sum(len(coder.encode_after(sentence)) for sentence in part.sentences)
        assert part.text == "".join(part.sentences).strip() != ""


def test_so_are_those_of_any_text_in_any_pieces() -> None:
    draws = random.Random(3)
    coder = CODERS["bytes"]
    for _ in range(300):
        text = random_text(draws)
        if len(text.strip()) < 5:
            continue
        assert "".join(split_sentences(text)) == text
        whole = list(segments([text], coder, 32))
        assert "".join(s for part in whole for s in part.sentences).rstrip() == text.rstrip()
        assert all(part.tokens <= 32 for part in whole)
        assert list(segments(pieces_of(text, draws), coder, 32)) == whole, repr(text)


@pytest.mark.parametrize("text", NASTY.values(), ids=NASTY)
def test_a_text_in_pieces_gives_what_the_whole_gives(text: str) -> None:
    draws = random.Random(0)
    whole = list(segments([text], CODERS["bytes"], 40))
    for _ in range(5):
        assert list(segments(pieces_of(text, draws), CODERS["bytes"], 40)) == whole


def test_no_more_than_a_segment_is_held() -> None:
    taken = 0

    def pieces():
        nonlocal taken
        for _ in range(100):
            taken += 1
            yield "It rained today. "

    next(segments(pieces(), CODERS["bytes"], 40))
    assert taken < 6


@pytest.mark.parametrize("word", ["rain ", "rain, left. nobody ", "rain", "雨"])
def test_so_it_is_where_no_sentence_ends(word: str) -> None:
    cutter = Cutter(CODERS["bytes"], 64)
    found = []
    for _ in range(400):
        found += cutter.feed(word)
        assert cutter.waiting < 4 * 64
    assert len(found) > 400 * len(word) // 64 - 4
    found += cutter.finish()
    assert found == list(segments([word * 400], CODERS["bytes"], 64))
    assert all(part.tokens > 24 for part in found[:-1])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Mr. Finch left. It rained.", ["Mr. Finch left. ", "It rained."]),
        ("J. R. Finch left. It rained.", ["J. R. Finch left. ", "It rained."]),
        ("See Fig. 2 there. 3 bees came.", ["See Fig. 2 there. ", "3 bees came."]),
        ("It was 3.5 m. so far.", ["It was 3.5 m. so far."]),
        ('"It is." "No?" He left.', ['"It is." ', '"No?" ', "He left."]),
        ("Buy:\n- honey\n- milk", ["Buy:\n", "- honey\n", "- milk"]),
        ("Title\n\nIt rained.", ["Title\n\n", "It rained."]),
        ("她卖蜂蜜！是吗？是的。", ["她卖蜂蜜！", "是吗？", "是的。"]),
        ("one line\nand another", ["one line\nand another"]),
        ("वह शहद बेचती है। बारिश हुई।", ["वह शहद बेचती है। ", "बारिश हुई।"]),
        ("هل تبيع العسل؟ نعم.", ["هل تبيع العسل؟ ", "نعم."]),
        ("", []),
    ],
)
def test_where_sentences_end(text: str, expected: list[str]) -> None:
    assert split_sentences(text) == expected


def test_white_space_beyond_measure_is_left_out() -> None:
    found = list(segments(["It rained." + "\n" * 200 + "It snowed." + " " * 99], CODERS["bytes"], 32))
    assert [part.text for part in found] == ["It rained.", "It snowed."]
    assert [part.number for part in found] == [0, 1]


def test_sentences_fill_segments() -> None:
    text = "One two three. " * 10  # fifteen tokens each
    found = list(segments([text], CODERS["bytes"], 32))
    assert [len(part.sentences) for part in found] == [2] * 5
    assert found[0] == Segment(0, ("One two three. ",) * 2, 30)
    assert found[0].text == "One two three. One two three."


@pytest.mark.parametrize("pieces", [[], [""], ["", ""], [" \n "], ["ab"], ["a", "b", "c"], ["。"]])
def test_a_text_with_nothing_in_it_is_refused(pieces: list[str]) -> None:
    with pytest.raises(InputError, match="nothing in it to remember"):
        list(segments(pieces, CODERS["bytes"], 32))


def test_a_text_that_the_tokenizer_shatters_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    with pytest.raises(InputError, match="does not know this script"):
        list(segments(["奥拉养蜂。" * 40], CODERS["gpt2"], 64))
    prose = "It is a truth universally acknowledged. " * 40
    assert len(list(segments([prose], CODERS["gpt2"], 64))) > 4


def test_a_script_of_three_bytes_a_character_is_known_if_each_is_a_token(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.undo()

    class Known(TextCoder):
        def encode_after(self, text: str) -> list[int]:
            return list(map(ord, text))

    text = "子曰學而時習之不亦說乎。" * 40
    assert len(list(segments([text], Known(byte_tokenizer()), 64))) > 4
    with pytest.raises(InputError, match="does not know this script"):
        list(segments(["9f86d081 884c7d65 " * 40], Known(byte_tokenizer()), 64))
