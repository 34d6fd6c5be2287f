"""CUDA graphs: as far as they can be followed without a GPU, and on one where there is one."""

import contextlib
import inspect

import pytest
import torch

import tests.tiny as tiny
from everlong.attention import LMInfinite, StreamingLLM, attach
from everlong.attention.call_tape import CallTapes
from everlong.attention.cuda_graphs import CudaGraphs
from everlong.attention.recording import recorder_for
from tests.attention.trace_recorder import Trace

STEPS = 70
POLICIES = {
    "lm-infinite": LMInfinite(window=20, sinks=3),
    "no sinks": LMInfinite(window=20, sinks=0),
    "streaming-llm": StreamingLLM(window=20, sinks=3),
}


class _Cuda:
    """Stands for torch.cuda: a capture records operations on the CPU; what is done to streams is noted."""

    def __init__(self):
        self.notes = []
        self.trace = None

    def device(self, device):
        return contextlib.nullcontext()

    def current_stream(self):
        return _Stream(self, "current")

    def Stream(self):
        return _Stream(self, "side")

    @contextlib.contextmanager
    def stream(self, stream):
        self.notes.append(f"on {stream.name}")
        yield
        self.notes.append("back")

    def CUDAGraph(self):
        return self

    @contextlib.contextmanager
    def graph(self, graph, capture_error_mode):
        assert capture_error_mode == "thread_local"
        self.notes.append("capture")
        with Trace() as self.trace:
            yield

    def replay(self):
        self.trace.replay()


class _Stream:
    def __init__(self, cuda, name):
        self.cuda, self.name = cuda, name

    def wait_stream(self, other):
        self.cuda.notes.append(f"{self.name} waits for {other.name}")


def test_a_step_is_warmed_up_on_a_stream_of_its_own_captured_and_repeated(monkeypatch):
    cuda = _Cuda()
    monkeypatch.setattr(torch, "cuda", cuda)
    x, ran = torch.ones(3), []

    def run():
        ran.append(len(cuda.notes))
        return x * 2

    replay, result = CudaGraphs(torch.device("cuda")).record(run)
    assert cuda.notes == ["side waits for current", "on side", "back", "current waits for side", "capture"]
    assert ran == [2, 2, 2, 5]  # three times on the side, once captured
    x.fill_(4.0)
    replay()
    assert result.tolist() == [8.0] * 3 and len(ran) == 4


def test_what_is_called_is_there_in_this_torch():
    assert "capture_error_mode" in inspect.signature(torch.cuda.graph.__init__).parameters
    assert all(hasattr(torch.cuda, name) for name in ("CUDAGraph", "Stream", "stream", "current_stream"))


def test_each_device_has_its_recorder(monkeypatch):
    assert isinstance(recorder_for(torch.device("cpu")), CallTapes)
    assert recorder_for(torch.device("meta")) is None
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert recorder_for(torch.device("cuda")) is None
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert isinstance(recorder_for(torch.device("cuda")), CudaGraphs)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU: CUDA graphs are untested here")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3_text", "phi", "gemma2", "smollm3", "gpt_neox"])
@torch.inference_mode()
def test_on_a_gpu_graphs_give_what_eager_steps_give(family, policy, dtype):
    with torch.inference_mode(False):
        model = tiny.build(family).to("cuda", dtype)
    with attach(model, POLICIES[policy]) as handle:
        assert isinstance(handle.steps.recorder, CudaGraphs)
        ids = tiny.random_ids(1, 30 + STEPS).cuda()
        ours, theirs = handle.new_cache(), handle.new_cache()
        for cache in (ours, theirs):
            model(ids[:, :30], **tiny.cached(cache))
        for at in range(30, 30 + STEPS):
            token = ids[:, at : at + 1]
            expected = model(token, **tiny.cached(theirs)).logits.float()
            error = (handle.step(ours, token).float() - expected).abs().max()
            assert error <= (1e-4 if dtype == torch.float32 else 5e-2) * expected.abs().max()
        assert ours.recorded is not None and ours.recorded.replay is not None
