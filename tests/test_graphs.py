"""What is around a CUDA graph, with a stand-in for the graph; tests/test_gpu.py has real ones."""

from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import pytest
import torch

from outputs import Outputs
from util import graphs
from util.runtime import Runtime


@pytest.fixture
def recorded(monkeypatch):
    """Stand-ins that record what the function was called with, and replay by calling it with that again."""
    found = SimpleNamespace(calls=[], recording=False, replays=0, replay=None)

    @contextmanager
    def recording(graph, stream):
        found.recording, graph.replay = True, found.replay
        try:
            yield
        finally:
            found.recording = False

    stream = SimpleNamespace(wait_stream=lambda other: None)
    monkeypatch.setattr(torch.cuda, "Stream", lambda: stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    monkeypatch.setattr(torch.cuda, "CUDAGraph", SimpleNamespace)
    monkeypatch.setattr(torch.cuda, "graph", recording)
    return found


def graphed(found, function):
    """The function as one graph; found.calls are the inputs of each call of the function itself."""

    def watched(*inputs):
        found.calls.append(inputs)
        result = function(*inputs)
        if found.recording:
            found.result = result
        return result

    def replay():
        found.replays += 1
        found.result.copy_(function(*found.own))

    def record(*given):
        before = len(found.calls)
        graphs.Graphed._record(whole, *given)
        found.own = found.calls[before]

    whole = graphs.Graphed(watched, "this")
    whole._record, found.replay = record, replay
    return whole


def weighed(outputs, weight, share):
    return outputs.logits * weight * share + outputs.maps["stage1"]


def inputs(k, n=2):
    return Outputs(logits=torch.full((n,), float(k)), maps={"stage1": torch.full((n,), 0.5)}), torch.tensor(2.0), 1.0


def test_a_graph_gives_what_the_function_does(recorded):
    whole = graphed(recorded, weighed)
    for k in range(8):
        assert whole(*inputs(k)).tolist() == weighed(*inputs(k)).tolist()
    # The inputs of each replay are copied to where those of the recording were.
    assert recorded.replays == 5 and len(recorded.calls) == graphs.WARM_UP + 1


def test_inputs_of_another_form_are_for_the_function(recorded):
    whole = graphed(recorded, weighed)
    for k in range(5):
        whole(*inputs(k))
    replays = recorded.replays
    short, (outputs, weight, _) = inputs(7, n=1), inputs(7)
    for other in (short, (outputs, weight, 0.5), (outputs, weight.double(), 1.0)):
        assert whole(*other).tolist() == weighed(*other).tolist()
    assert recorded.replays == replays
    assert whole(*inputs(9)).tolist() == weighed(*inputs(9)).tolist() and recorded.replays == replays + 1


def test_a_short_batch_in_each_epoch_delays_nothing(recorded):
    whole = graphed(recorded, weighed)
    for k in range(4):
        whole(*inputs(k)), whole(*inputs(k, n=1))
    assert recorded.replays == 1


def failing(outputs, weight, share):
    raise RuntimeError("operation not permitted when stream is capturing\nand more")


def drawing(outputs, weight, share):
    return outputs.logits * torch.rand(())


@pytest.mark.parametrize(
    "function, why",
    [(drawing, "it draws random numbers on the CPU"), (failing, "operation not permitted when stream is capturing")],
)
def test_what_cannot_be_recorded_is_called(recorded, capfd, function, why):
    whole = graphs.Graphed(lambda *given: function(*given) if recorded.recording else drawing(*given), "a step")
    torch.manual_seed(3)
    given = [whole(*inputs(k)).tolist() for k in range(6)]
    torch.manual_seed(3)
    assert given == [drawing(*inputs(k)).tolist() for k in range(6)]
    assert capfd.readouterr().err == f"a step can't be a CUDA graph (RuntimeError: {why}); going on without one\n"


@pytest.mark.parametrize("device, size, expected", [("cuda", 1, True), ("cuda", 2, False), ("cpu", 1, False)])
def test_where_graphs_are_possible(device, size, expected):
    where = Runtime(torch.device(device), "fp32", SimpleNamespace(size=size))
    assert graphs.possible(where) == expected
