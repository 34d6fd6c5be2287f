"""What a process imports before a model is ready, and that the collector is as it was before."""

import gc
import subprocess
import sys

import pytest

from everlong.models.collector import old_objects_left_out, paused
from tests.tiny import byte_llama

UNNEEDED = [
    *("peft", "matplotlib", "scipy", "sklearn", "pandas", "torchvision", "datasets"),
    *("everlong.cli", "everlong.evaluation", "transformers.trainer", "transformers.pipelines"),
    *("transformers.models.auto.processing_auto", "torch._inductor.compile_fx"),
]
LOAD = f"""
import gc, sys
import everlong
everlong.load(sys.argv[1]).session().read("Once upon a time")
assert gc.isenabled() and not gc.get_freeze_count()
models = {{name.split(".")[-1] for name in sys.modules if ".modeling_" in name and ".models." in name}}
assert models == {{"modeling_auto", "modeling_llama"}}, models
unneeded = set({UNNEEDED}) & set(sys.modules)
assert not unneeded, unneeded
"""


def test_a_ready_model_has_imported_nothing_that_only_others_need(tmp_path):
    for part in byte_llama():
        part.save_pretrained(tmp_path)
    done = subprocess.run([sys.executable, "-c", LOAD, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("context", [paused, old_objects_left_out])
def test_the_collector_is_as_it_was_after_an_error_too(context):
    with pytest.raises(RuntimeError), context():
        raise RuntimeError
    assert gc.isenabled() and not gc.get_freeze_count()


def test_nothing_is_collected_while_paused_and_what_was_made_counts_as_old():
    with paused():
        assert not gc.isenabled()
        made = [[] for _ in range(5000)]
        with paused():
            pass
        assert not gc.isenabled(), "the outer block goes on"
    old = {id(thing) for thing in gc.get_objects(generation=2)}
    assert gc.isenabled() and {id(each) for each in made} <= old


def test_only_what_is_made_in_the_block_is_collected():
    def garbage():
        knot = []
        knot.append(knot)
        return id(knot)

    gc.collect()
    gc.disable()
    try:
        old = garbage()
        with old_objects_left_out():
            new = garbage()
            assert gc.collect() == 1
            assert not {old, new} & {id(thing) for thing in gc.get_objects()}, "frozen ones are not listed"
        assert gc.collect() == 1
    finally:
        gc.enable()


@pytest.mark.parametrize("context", [paused, old_objects_left_out])
def test_objects_that_somebody_froze_stay_frozen(context):
    gc.freeze()
    try:
        with context():
            assert gc.isenabled()
        assert gc.get_freeze_count()
    finally:
        gc.unfreeze()
