import dataclasses
import io
import json

import pytest
from rich.console import Console
from rich.progress import Progress

from everlong.attention import POLICIES, LMInfinite
from everlong.cli import bench_commands
from everlong.cli.measures import measure_and_show
from everlong.errors import ConfigurationError, NumericalError
from everlong.evaluation import finding, machine_speed, memory_measure, rooflines, speed_measure
from everlong.evaluation.measures import Step
from everlong.evaluation.needles import PASSKEY_QUESTION


@pytest.fixture(autouse=True)
def _little(monkeypatch):
    monkeypatch.setattr(rooflines, "_SIDE", {"cpu": 16})
    monkeypatch.setattr(rooflines, "_BUFFER", {"cpu": 4096})


OPTIONS = ("--depths", "40,30", "--repeats", 2, "--set", "window=20")


def test_it_says_how_long_it_takes_and_shows_a_table(everlong):
    result = everlong("bench speed", *OPTIONS)
    assert result.code == 0
    assert "this will take about 10 seconds" in result.err and "measured at 40 tokens" in result.err
    for word in ("tokens of context", "30", "40", "recall", "ratio", "its kernels alone", "GFLOP/s"):
        assert word in result.out
    assert result.out.index("30") < result.out.index("40")


def test_json_is_the_report_and_quiet_is_quiet(everlong):
    result = everlong("bench speed", *OPTIONS, "--weights", "int8", "--json", "--quiet")
    report = json.loads(result.out)
    assert not result.err and (report["weights"], report["options"]["window"]) == ("int8", 20)
    assert [(row["depth"], row["repeats"]) for row in report["rows"]] == [(30, 2), (40, 2)]


def test_the_window_is_2048_unless_told_otherwise_and_some_methods_have_none(everlong):
    words = ("--depths", 30, "--repeats", 1, "--json", "--quiet")
    assert json.loads(everlong("bench speed", *words).out)["options"]["window"] == 2048
    report = json.loads(everlong("bench speed", *words, "--attention", "full").out)
    assert report["policy"] == "full" and "window" not in report["options"]


def test_an_interrupted_measurement_shows_what_there_is(everlong, monkeypatch):
    measured = []
    original = machine_speed.decode_seconds

    def interrupt(*args):
        measured.append(args)
        if len(measured) > 3:  # stock and ours once, stock a second time
            raise KeyboardInterrupt
        return original(*args)

    monkeypatch.setattr(machine_speed, "decode_seconds", interrupt)
    result = everlong("bench speed", *OPTIONS)
    assert result.code == 130 and not result.out
    assert "unfinished: 1 of 2 repeats at 30" in result.err and "not reached: 40" in result.err


def test_interrupted_before_anything_was_measured_there_is_nothing_to_show(everlong, monkeypatch):
    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(machine_speed, "prefill_seconds", interrupt)
    result = everlong("bench speed", *OPTIONS)
    assert result.code == 130 and "tokens of context" not in result.err


@pytest.mark.parametrize(
    "words, message",
    [
        (["--depths", "1k"], "--depths takes whole numbers of tokens, such as 1024,8192; got '1k'"),
        (["--depths", "0"], "each at least 1 and given once"),
        (["--depths", ","], "not none"),
        (["--depths", "5,5"], "given once"),
        (["--attention", "lm-infinte"], "did you mean 'lm-infinite'"),
        (["--set", "wndow=3"], "did you mean 'window'?"),
        (["--weights", "int5"], "unknown choice of weights 'int5'"),
        (["--device", "cuda:99"], "device 'cuda:99' cannot be used here"),
    ],
)
def test_bad_input_is_one_line(everlong, words, message):
    result = everlong("bench speed", *words, "--quiet")
    assert result.code == 2 and message in result.err and len(result.err.splitlines()) == 1


@pytest.mark.parametrize(
    "seconds, words", [(3, "10 seconds"), (61, "70 seconds"), (100, "2 minutes"), (121, "3 minutes")]
)
def test_durations_are_rounded_up(seconds, words):
    assert bench_commands._duration(seconds) == words


PASSKEY = ("bench passkey", "--lengths", "900,1k", "--digits", 7, "--samples", 2)
SMALL = ("--set", "window=400", "--set", "sinks=16", "--set", "recalled=128")


def test_methods_look_for_passkeys(everlong):
    result = everlong(*PASSKEY, "--methods", "stock,last,lm-infinite,inf-llm", *SMALL)
    assert result.code == 0
    for word in (
        "found",
        "told",
        "held",
        "last",
        "inf-llm",
        "first-and-last",
        "passkey of 7 digits, 1,024 tokens",
        "tokens/s",
    ):
        assert word in result.out
    assert result.err.count("lm-infinite: passkey of 7 digits in 900 tokens") == 2
    assert "28% deep: told 0%" in result.err


def test_methods_without_a_window_look_for_passkeys_too(everlong):
    words = ("--lengths", "900", "--digits", 7, "--samples", 1, "--json", "--quiet")
    words = (*words, "--methods", "self-extend, yarn", "--no-baselines")
    result = everlong("bench passkey", *words, "--set", "factor=3")
    found = json.loads(result.out)
    assert found["settings"] == {"factor": "3"}
    assert [text["way"] for text in found["texts"]] == ["self-extend", "yarn"]


def test_passkeys_as_json_hold_every_text(everlong):
    result = everlong(*PASSKEY, "--methods", "last", "--set", "window=400", "--json", "--quiet")
    found = json.loads(result.out)
    assert not result.err and len(found["texts"]) == 12 and found["settings"]["window"] == "400"
    assert {"way", "length", "depth", "told", "answer"} <= found["texts"][0].keys()
    assert [text["way"] for text in found["texts"][:6:2]] == ["stock", "last", "first-and-last"]


def test_passkeys_are_hidden_in_a_text_of_ones_own(everlong, novel):
    words = ("--methods", "stock", "--text", novel, "--quiet")
    assert "passkey of 7 digits (novel.txt), 1,024 tokens" in everlong(*PASSKEY, *words).out
    result = everlong("bench passkey", "--lengths", "4k", "--digits", 7, *words)
    assert result.code == 2 and "is too short to hide a passkey of 7 digits in 4,096" in " ".join(
        result.err.split()
    )


def test_passkeys_are_asked_for_in_words_of_ones_own(everlong):
    words = ("--methods", "stock", "--no-baselines", "--question", "What was it?", "--quiet")
    assert 'passkey of 7 digits, asked "What was it?", 900 tokens' in everlong(*PASSKEY, *words).out
    assert PASSKEY_QUESTION in " ".join(everlong("bench passkey --help").out.replace("│", " ").split())


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--attention", "inf-llm"), "--methods names all"),
        (("--lengths", "4m"), "--lengths takes whole numbers, such as 4k,8192; got '4m'"),
        (("--methods", "inflm"), "did you mean 'inf-llm'"),
        (("--lengths", "100", "--methods", "stock"), "does not fit into 100 tokens"),
        (("--question", "", "--methods", "stock"), "question is empty"),
    ],
)
def test_passkeys_that_cannot_be_looked_for_are_refused(everlong, words, said):
    result = everlong("bench passkey", *words)
    assert result.code == 2 and said in " ".join(result.err.split())


NIAH = ("bench niah", "--lengths", 900, "--samples", 2, "--set", "window=400")
OWN = ("--needle", "Ann has a key.", "--question", "What has Ann?", "--answer", "a key")


def test_a_sentence_of_ones_own_is_looked_for_in_a_text_of_ones_own(everlong, novel):
    result = everlong(*NIAH, "--methods", "lm-infinite", "--text", novel, *OWN, "--json", "--quiet")
    found = json.loads(result.out)
    assert not result.err and len(found["texts"]) == 8 and found["texts"][0]["expected"] == ["a key"]
    assert (
        found["texts"][0]["task"] == "niah: Ann has a key. (novel.txt)" and found["texts"][0]["length"] == 900
    )
    result = everlong(*NIAH, "--methods", "last", "--no-baselines")
    assert result.out.count("last") == 1 and "niah, 900 tokens" in result.out and "stock" not in result.out


def test_a_tier_that_no_method_has_is_refused(everlong):
    words = ("--methods", "lm-infinite", "--no-baselines", "--tier", "disk", "--set", "window=400")
    result = everlong(*PASSKEY, *words)
    assert result.code == 2 and "none of these methods keeps what leaves its window" in result.err


METHODS = ("bench methods", "--lengths", "900", "--set", "window=400", "--set", "sinks=16")


def test_all_methods_run_side_by_side(everlong, monkeypatch):
    monkeypatch.setattr(POLICIES, "_entries", dict(POLICIES._entries))

    @POLICIES.register("impossible")
    @dataclasses.dataclass(frozen=True)
    class Impossible(LMInfinite):
        def __post_init__(self):
            raise ConfigurationError("no such luck")

    result = everlong(*METHODS, "--tasks", "passkey:digits=9,vt", "--samples", 1)
    assert result.code == 0 and "left out: impossible: no such luck" in result.err
    names = set(POLICIES) - {"full", "impossible"}
    for name in ("stock", "last", "first-and-last", *names):
        assert sum(line.split()[:1] in ([name], [f"{name}*"]) for line in result.out.splitlines()) == 2, name
    assert "passkey of 9 digits, 900 tokens" in result.out and "vt, 900 tokens" in result.out


def test_a_page_is_written_and_an_interrupted_measurement_goes_on(everlong, monkeypatch, tmp_path):
    page, kept = tmp_path / "new" / "report.html", tmp_path / "new" / "report.json"
    words = (*METHODS, "--tasks", "passkey,fwe", "--methods", "lm-infinite", "--samples", 2, "--output", page)
    original, read = finding.answer, []
    reasons: list[BaseException] = []

    def interrupted(*args, **options):
        if len(read) == 3:
            raise reasons[-1]
        read.append(args)
        return original(*args, **options)

    monkeypatch.setattr(finding, "answer", interrupted)
    for reason, code in ((KeyboardInterrupt(), 130), (NumericalError("not finite"), 2)):
        reasons.append(reason)
        page.unlink(missing_ok=True)
        result = everlong(*words)
        assert result.code == code and len(json.loads(kept.read_text())["rows"]) == 3
    assert "passkey of 7 digits, 900 tokens" in result.err and "passkey" in page.read_text()
    monkeypatch.setattr(
        finding, "answer", lambda *args, **options: read.append(args) or original(*args, **options)
    )
    result = everlong(*words)
    assert result.code == 0 and len(read) == 16 and "report.html" in result.err
    assert "first-and-last" in page.read_text() and "data:image/png" in page.read_text()
    assert "this takes about" in result.err and "this takes about" not in everlong(*words).err
    result = everlong(*words, "--json", "--quiet")
    assert len(read) == 16 and len(json.loads(result.out)["texts"]) == 16
    monkeypatch.setattr("everlong.models.fingerprint.weights_hash", lambda _: "of another model")
    result = everlong(*words)  # of the same name
    assert result.code == 2 and "weights" in result.err and "choose another --output" in result.err


def test_what_leaves_the_window_goes_to_the_tier_that_is_named(everlong, tmp_path):
    words = (
        *METHODS,
        "--tasks",
        "passkey",
        "--methods",
        "recall",
        "--no-baselines",
        "--json",
        "--quiet",
        "--samples",
        2,
    )

    def held(*more):
        return [text["answer"]["bytes"] for text in json.loads(everlong(*words, *more).out)["texts"]]

    (ram, _), (disk, _) = held(), held("--tier", tmp_path, "--tier-precision", "int8")
    assert ram["ram"] > 0 and ram["disk"] == 0
    assert disk["disk"] > 0 and disk["window"] == ram["window"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("bench niah", "--needle", "x"), "--question and --answer is missing"),
        (("bench niah", *OWN[:-1], "Bob"), "the needle does not say 'Bob'"),
        (("bench niah", "--text", "missing.txt", "--methods", "stock"), "missing.txt"),
        (("bench methods", "--tasks", "vtt"), "did you mean 'vt'"),
        (("bench methods", "--tasks", "vt,vt"), "each of the tasks once"),
        (("bench methods", "--tasks", "vt", "--lengths", "300"), "does not fit into 300 tokens: at least"),
        (
            ("bench methods", "--tasks", "vt", "--output", "folder"),
            "--output names a page, such as report.html",
        ),
        (("bench methods", "--tasks", "vt", "--set", "wndow=3"), "did you mean 'window'"),
    ],
)
def test_what_cannot_be_found_is_refused(everlong, words, said):
    result = everlong(*words)
    assert result.code == 2 and said in " ".join(result.err.split())


FAST = (
    *("generators=text", "selection=all", "passes=1", "rank=8"),
    *("anchors=0", "ewc=0", "continuations=0", "readings=0"),
)
LITTLE = [word for setting in FAST for word in ("--recipe-set", setting)]
METHODS_OF_ONE = (*METHODS, "--methods", "lm-infinite", "--tasks", "passkey", "--samples", 1)


@pytest.fixture
def in_bytes(monkeypatch):
    """A tokenizer of bytes is good enough for long texts."""
    monkeypatch.setattr("everlong.memory.segments._SHATTERED", 2.0)


@pytest.mark.usefixtures("in_bytes")
def test_one_page_holds_all_measures_and_goes_on_at_the_row_where_it_was_interrupted(
    everlong, monkeypatch, tmp_path
):
    page, kept = tmp_path / "report.html", tmp_path / "report.json"
    words = (*METHODS_OF_ONE, "--measures", "memory,speed,finding,perplexity", *LITTLE, "--output", page)
    original, read = speed_measure.decode_seconds, []

    def interrupted(*args):
        if len(read) == 1:
            raise KeyboardInterrupt
        read.append(args)
        return original(*args)

    monkeypatch.setattr(speed_measure, "decode_seconds", interrupted)
    result = everlong(*words)
    assert result.code == 130 and "recall of invented facts" in result.err
    for measure in ("memory: 3 steps, about", "speed: 2 steps, about 10 seconds", "perplexity: 2 steps"):
        assert measure in result.err
    assert "document 1: learned, and asked: done" in result.err
    names = [key.split(";")[0] for key in json.loads(kept.read_text())["rows"]]
    assert names == ["memory", "memory", "memory", "speed"]
    assert "Long-term memory" in page.read_text() and "Percent told" not in page.read_text()
    monkeypatch.setattr(speed_measure, "decode_seconds", original)
    monkeypatch.setattr(memory_measure, "recall", None)  # is not asked again
    result = everlong(*words)
    assert result.code == 0, result.err
    assert "memory: 3 steps" not in result.err and "speed: 1 step, about" in result.err
    for title in ("Long-term memory", "Speed by length", "Percent told", "Perplexity by position"):
        assert title in page.read_text()
    for title in (
        "passkey of 7 digits, 900",
        "perplexity by position",
        "speed, 900 tokens",
        "forgetting, on",
    ):
        assert title in result.out
    found = json.loads(everlong(*words, "--json", "--quiet").out)
    assert len(found["texts"]) == 4 and len(found["speed"]) == len(found["perplexity"]) == 2
    assert found["memory"]["forgetting"][0]["memory"] == "document 1"
    assert not everlong(*words, "--json", "--quiet").err


def test_measures_of_ones_own_text_need_no_tasks(everlong, novel):
    words = ("bench methods", "--measures", "perplexity", "--methods", "streaming-llm", "--text", novel)
    result = everlong(*words, "--lengths", "300", "--set", "window=50", "--bucket", 100)
    assert result.code == 0, result.err
    assert "200-300" in result.out and "streaming-llm" in result.out and "stock" in result.out


@pytest.mark.usefixtures("in_bytes")
def test_a_memory_is_asked_by_name_and_methods_are_not_tried(everlong, monkeypatch, tmp_path, novel):
    monkeypatch.setenv("EVERLONG_HOME", str(tmp_path / "home"))
    settings = [word for setting in FAST for word in ("--set", setting)]
    assert everlong("memorize", novel, "--name", "novel", "--force", *settings).code == 0
    monkeypatch.setattr("everlong.evaluation.long_inputs.usable_methods", None)
    result = everlong("bench methods", "--measures", "memory", "--memory", "novel")
    assert result.code == 0, result.err
    assert "recall of what novel was learned from" in result.out and "left out" not in result.err
    result = everlong("bench methods", "--measures", "memory", "--memory", "nowel")
    assert result.code == 2 and "did you mean 'novel'" in result.err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--measures", "perplexty"), "did you mean 'perplexity'"),
        (("--measures", "speed,speed"), "--measures names each once"),
        (("--measures", ","), "at least one: finding, perplexity, speed, memory"),
        (("--memory", "novel"), "--memory is for the measure memory: name it with --measures"),
        (("--text", "novel.txt"), "--text is for the measure perplexity or speed or memory"),
        (("--measures", "perplexity", "--text", "missing.txt"), "missing.txt"),
        (("--measures", "speed", "--text", "."), "name a file, not '.'"),
        (("--measures", "perplexity,finding", "--lengths", "300", "--tasks", "vt"), "does not fit into 300"),
        (("--measures", "perplexity", "--text", ""), "name a file, not ''"),
        (("--text", ""), "--text is for the measure perplexity or speed or memory"),
        (("--measures", "speed", "--tasks", "vt"), "--tasks is for the measure finding: name it"),
        (("--measures", "perplexity", "--samples", "5"), "--samples is for the measure finding"),
        (("--measures", "perplexity", "--lengths", "64,64"), "lengths must be whole numbers from 1 on, each"),
        (
            ("--measures", "perplexity", "--lengths", "0"),
            "lengths must be whole numbers from 1 on, each once",
        ),
        (("--measures", "speed", "--tier", "disk"), "none of these methods keeps"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_anything_is(everlong, monkeypatch, tmp_path, words, said):
    monkeypatch.setenv("EVERLONG_HOME", str(tmp_path))
    monkeypatch.setattr("everlong.evaluation.measures.taken", None)
    result = everlong("bench methods", "--methods", "stock", "--no-baselines", *words)
    assert result.code == 2 and said in " ".join(result.err.split()), result.err


_OF_WAYS = "is for the measure finding or perplexity or speed: name it with --measures"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--bucket", "7"), "--bucket is for the measure perplexity"),
        (("--memory", "x", "--documents", "2"), "where no --memory is named"),
        (("--recipe-set", "pases=1"), "passes"),
        (("--documents", "9999"), "no more"),
        (("--memory", "nowel"), "nowel"),
        (("--text", "missing.txt"), "missing.txt"),
        (("--methods", "lm-infinite"), f"--methods {_OF_WAYS}"),
        (("--set", "window=7"), f"--set {_OF_WAYS}"),
        (("--lengths", "4k"), f"--lengths {_OF_WAYS}"),
        (("--no-baselines",), f"--baselines {_OF_WAYS}"),
        (("--tier", "disk"), f"--tier {_OF_WAYS}"),
        (("--tier-precision", "int8"), f"--tier-precision {_OF_WAYS}"),
    ],
)
def test_what_cannot_be_measured_of_memories_is_refused_before_a_model_is_loaded(
    everlong, monkeypatch, tmp_path, words, said
):
    monkeypatch.setenv("EVERLONG_HOME", str(tmp_path))
    monkeypatch.setattr("everlong.models.loading.load_model", None)
    result = everlong("bench methods", "--measures", "memory", *words)
    assert result.code == 2 and said in " ".join(result.err.split()), result.err


def test_a_method_that_cannot_run_is_refused_before_another_reads(everlong, monkeypatch):
    monkeypatch.setattr(POLICIES, "_entries", dict(POLICIES._entries))

    @POLICIES.register("impossible")
    @dataclasses.dataclass(frozen=True)
    class Impossible(LMInfinite):
        def resolve(self, training_length):
            raise ConfigurationError("no such luck")

    monkeypatch.setattr(finding, "answer", None)
    result = everlong(*METHODS, "--tasks", "vt", "--methods", "lm-infinite,impossible", "--samples", 1)
    assert result.code == 2 and "impossible cannot run here: no such luck" in " ".join(result.err.split())


def test_a_bar_follows_steps_and_what_they_tell(monkeypatch):
    target, rows, bars = io.StringIO(), [], []
    console = Console(file=target, force_terminal=True, width=100)
    update = Progress.update

    def followed(self, task, **changes):
        update(self, task, **changes)
        at = self.tasks[0]
        bars.append((at.completed, at.total, at.description, at.fields["note"]))

    def run(on_step):
        on_step(0.5, "halfway there")
        return {"done": len(rows)}

    steps = [Step(f"step {number}", f"counting {number}", 10 * number, run) for number in (1, 2, 3)]
    monkeypatch.setattr(Progress, "update", followed)
    measure_and_show(steps, None, rows, console)
    assert rows == [{"done": 0}, {"done": 1}, {"done": 2}]
    assert bars == [
        (5, 60, "counting 1", "halfway there"),
        (10, 60, "counting 2", ""),
        (20, 60, "counting 2", "halfway there"),
        (30, 60, "counting 3", ""),
        (45, 60, "counting 3", "halfway there"),
        (60, 60, "counting 3", ""),
    ]
    assert "done" not in target.getvalue()  # lines are for where no bar is drawn
