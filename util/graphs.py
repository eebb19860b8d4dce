"""A function of tensors as one CUDA graph: the GPU is given its kernels as a whole.

Launched one by one, the kernels of a small network take the CPU longer than the GPU needs for them.
"""

from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from typing import Any

import torch

from util.runtime import Runtime, say

WARM_UP = 3  # calls before one is recorded, in which what is made at a first step is made, and algorithms are chosen


def possible(runtime: Runtime) -> bool:
    """Whether steps can be CUDA graphs; of several processes they would wait for each other within a graph."""
    return runtime.device.type == "cuda" and runtime.processes.size == 1


class Graphed:
    """The function, called with the same results, and recorded once it was called with inputs of one form often enough.

    Inputs are tensors and other values in tuples, named tuples and mappings; their form is the tensors' shapes, strides
    and types, and the other values themselves. Inputs of another form than the recorded one, as of a short last batch,
    are given to the function itself. Its result lasts until the next call.

    The function's kernels are replayed, not its Python: it must not wait for the device, nor depend on anything in
    Python that changes, and what it changes (weights, sums) it must change in place. One that draws random numbers on
    the CPU, which would be the same at each replay, is found out. Where recording fails a line on stderr says so, once,
    and the function is called itself from then on.
    """

    def __init__(self, function: Callable[..., Any], name: str):
        self.function, self.name = function, name
        self.calls: Counter[Hashable] = Counter()  # of each form
        self.form: Hashable = None  # the recorded one
        self.stream = torch.cuda.Stream()
        self.failed = False

    def __call__(self, *inputs: Any) -> Any:
        if self.failed:
            return self.function(*inputs)
        leaves = [*_leaves(inputs)]
        form = tuple(map(_form, leaves))
        if self.form is None:
            self.calls[form] += 1
            if self.calls[form] > WARM_UP:
                self._record(inputs, leaves, form)
        if form == self.form:
            torch._foreach_copy_(self.inputs, [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)])
            self.graph.replay()
            return self.result
        return self._aside(inputs)

    def _aside(self, inputs: tuple) -> Any:
        """Call the function itself, on the stream that is recorded later, to which some of what it makes belongs."""
        here = torch.cuda.current_stream()
        self.stream.wait_stream(here)
        with torch.cuda.stream(self.stream):
            result = self.function(*inputs)
        here.wait_stream(self.stream)
        return result

    def _record(self, inputs: tuple, leaves: list, form: Hashable) -> None:
        own = [leaf.clone() if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]
        graph, random = torch.cuda.CUDAGraph(), torch.get_rng_state()
        try:
            with torch.cuda.graph(graph, stream=self.stream):
                self.result = self.function(*_rebuilt(inputs, iter(own)))
            if not torch.get_rng_state().equal(random):
                raise RuntimeError("it draws random numbers on the CPU")
        except Exception as error:  # whatever a network or a loss does that can't be recorded
            torch.set_rng_state(random)
            self.failed, self.result = True, None
            reason = str(error).strip().partition("\n")[0]
            say(f"{self.name} can't be a CUDA graph ({type(error).__name__}: {reason}); going on without one")
            return
        self.inputs = [leaf for leaf in own if isinstance(leaf, torch.Tensor)]
        self.graph, self.form = graph, form


def _leaves(value: Any) -> Iterator[Any]:
    """The tensors and other values in nested tuples and mappings, in order."""
    parts = _parts(value)
    if parts is None:
        yield value
    else:
        for part in parts:
            yield from _leaves(part)


def _parts(value: Any) -> Iterable[Any] | None:
    if isinstance(value, Mapping):
        return value.values()
    return value if isinstance(value, tuple) else None


def _rebuilt(value: Any, leaves: Iterator[Any]) -> Any:
    """The same nest with these leaves in place of its own."""
    if isinstance(value, Mapping):
        return {name: _rebuilt(part, leaves) for name, part in value.items()}
    if isinstance(value, tuple):
        parts = [_rebuilt(part, leaves) for part in value]
        return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
    return next(leaves)


def _form(leaf: Any) -> Hashable:
    if isinstance(leaf, torch.Tensor):
        return leaf.shape, leaf.stride(), leaf.dtype, leaf.device
    return leaf
