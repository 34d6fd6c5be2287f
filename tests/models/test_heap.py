"""What a forward frees is there for the next one, unless the environment says what the C library does."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

needs_glibc = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="of glibc")

SCRIPT = """
import ctypes, resource, sys
from everlong.models.heap import keep_what_is_freed
c, size, count = ctypes.CDLL(None), ctypes.c_size_t, 40
c.prctl(41, 1, 0, 0, 0)  # no huge pages, of which few hold it all
c.malloc.restype, c.malloc.argtypes = ctypes.c_void_p, [size]
c.free.argtypes, c.memset.argtypes = [ctypes.c_void_p], [ctypes.c_void_p, ctypes.c_int, size]
def forward():
    some = [c.malloc(2**20) for _ in range(count)]
    for each in some:
        c.memset(each, 1, 2**20)
    for each in reversed(some):
        c.free(each)
done = sys.argv[1] == "keep" and keep_what_is_freed()
for _ in range(3):
    forward()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    forward()
pages = 5 * count * 2**20 / resource.getpagesize()
print(done, (resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) / pages)
"""
"""Tells which share of what is wanted comes from the system, page by page."""


def told(argument: str, **environment: str) -> tuple[str, float]:
    plain = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, argument],
        env={**plain, **environment},
        stdout=subprocess.PIPE,
        check=True,
        text=True,
    )
    kept, share = done.stdout.split()
    return kept, float(share)


@needs_glibc
def test_what_is_freed_is_not_given_back_to_the_system():
    kept, share = told("keep")
    assert kept == "True" and share < 0.01
    assert told("leave")[1] > 0.5, "glibc by itself has each forward get its pages anew"


HOLES = """
import ctypes, resource, sys
from everlong.models.heap import TOKENS, give_holes_back, keep_what_is_freed
c, size = ctypes.CDLL(None), ctypes.c_size_t
c.malloc.restype, c.malloc.argtypes = ctypes.c_void_p, [size]
c.free.argtypes, c.memset.argtypes = [ctypes.c_void_p], [ctypes.c_void_p, ctypes.c_int, size]
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()
if sys.argv[1] == "keep":
    keep_what_is_freed()
else:
    c.mallopt(-3, 2**25), c.mallopt(-1, 2**28)
come_and_go = []
for _ in range(200):
    come_and_go.append(c.malloc(2**19))
    c.memset(come_and_go[-1], 1, 2**19)
    c.malloc(2**15)  # stays
held = resident()
for each in come_and_go:
    c.free(each)
shares = []
for tokens in (0, TOKENS - 1, 1, TOKENS - 1):
    give_holes_back(tokens)
    shares.append((held - resident()) / (200 * 2**19))
print(*shares)
"""
"""Tells which share of what was freed, and does not lie at the end, the system has again, at four moments."""


@needs_glibc
@pytest.mark.parametrize("keeps", [True, False])
def test_holes_are_given_back_once_so_many_tokens_were_read(keeps):
    plain = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
    argument = "keep" if keeps else "leave"
    done = subprocess.run(
        [sys.executable, "-c", HOLES, argument], env=plain, stdout=subprocess.PIPE, check=True, text=True
    )
    first, early, now, later = map(float, done.stdout.split())
    assert max(first, early) < 0.1
    assert (now > 0.9) == (later > 0.9) == keeps


def test_forwards_tell_how_many_tokens_they_read(monkeypatch):
    import tests.tiny as tiny
    from everlong.attention import LMInfinite, attach, forward

    told = []
    monkeypatch.setattr(forward, "give_holes_back", told.append)
    with attach(tiny.build("llama"), LMInfinite(window=24, sinks=3)) as handle:
        handle.model(tiny.random_ids(1, 50), **tiny.cached(handle.new_cache()))
    assert told == [50]


@needs_glibc
@pytest.mark.parametrize("name", ["MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES"])
def test_what_the_environment_sets_is_left_alone(name):
    value = "glibc.malloc.trim_threshold=4096" if name == "GLIBC_TUNABLES" else "4096"
    assert told("keep", **{name: value})[0] == "False"


def test_loading_sees_to_it(monkeypatch):
    from everlong.models import loading
    from tests.tiny import build, byte_tokenizer

    called = []
    monkeypatch.setattr(loading, "keep_what_is_freed", lambda: called.append(True))
    loading.load_model(build("llama"), tokenizer=byte_tokenizer())
    assert called


def test_other_c_libraries_are_left_alone(monkeypatch):
    from everlong.models.heap import keep_what_is_freed

    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    assert not keep_what_is_freed.__wrapped__()
