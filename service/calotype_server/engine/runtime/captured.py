"""CapturedCall: one call of the denoiser as a graph, with the memory that it reads and writes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from calotype_server.engine.runtime.buffers import StaticInputs, copied, only_tensors
from calotype_server.engine.runtime.collate import cut
from calotype_server.engine.runtime.compare import compare, tensors
from calotype_server.engine.runtime.outside import OutsideTensors
from calotype_server.engine.runtime.signature import Refused

if TYPE_CHECKING:
    import torch

    from calotype_server.engine.runtime.graph_backend import Graph, GraphBackend
    from calotype_server.engine.runtime.signature import Signature

__all__ = ["CapturedCall", "WarmCall", "WrongAnswer"]

_WARM_UPS = 2
"""Calls before the one that finds outside tensors. Choosing kernels and allocating workspaces must not be captured."""


class WrongAnswer(Exception):
    """A graph and the plain call answer differently; the text says by how much."""


class WarmCall:
    """A call that was computed several times where it is going to be captured.

    Args:
        module: The denoiser.
        signature: The call.
        backend: Captures it.

    Raises:
        Exception: The module failed, as it would without a graph.
    """

    def __init__(self, module: Any, signature: Signature, backend: GraphBackend) -> None:
        self._module = module
        self._backend = backend
        self._inputs = StaticInputs(signature, backend.device, backend.stage)
        with backend.warming_up():
            for _ in range(_WARM_UPS):
                self._compute()
            with OutsideTensors(backend.device) as outside:
                output = self._compute()
        self._outside = outside.tensors
        if outside.waits is not None:
            # Not left to the capture: an invalid one is hard to clean up after.
            raise Refused(f"It waits for the device, in {outside.waits}.")
        if not only_tensors(output):
            raise Refused("Its answer contains objects whose tensors cannot be found.")

    def capture(self, *, exact: bool) -> CapturedCall:
        """Captures the call, and compares a replay with the plain call.

        Args:
            exact: Whether every bit must be equal.

        Raises:
            Refused: The answers cannot be compared.
            WrongAnswer: They differ.
            Exception: The capture failed.
        """
        # The warm-up filled torch's cache with memory that a capture can neither use nor give back.
        self._backend.free_bytes()
        graph, output = self._backend.capture(self._compute)
        try:
            self._check(graph, output, exact)
        except BaseException:
            graph.reset()
            raise
        return CapturedCall(graph, self._inputs, output, self._outside)

    def _compute(self) -> Any:
        return self._module(**self._inputs.named)

    def _check(self, graph: Graph, output: Any, exact: bool) -> None:
        """Compares answers to other values than those of the capture, so that no captured value goes unnoticed."""
        self._inputs.disturb()
        expected = self._compute()
        graph.replay()
        if not all(bool(tensor.isfinite().all()) for tensor in tensors(expected)):
            raise Refused("Its answer contains NaN or infinity, so a graph cannot be checked.")
        error, tolerance = compare(output, expected)
        if not error <= (0 if exact else tolerance):
            raise WrongAnswer(f"Answers of a graph and of the plain call differ by {error:.1e}.")


class CapturedCall:
    """Computes calls with one key.

    Args:
        graph: The kernels.
        inputs: Memory that they read.
        output: Memory that they write.
        outside: Other tensors that they read; kept, because the graph does not own their memory.
    """

    def __init__(self, graph: Graph, inputs: StaticInputs, output: Any, outside: list[torch.Tensor]) -> None:
        self._graph = graph
        self._inputs = inputs
        self._output = output
        self._outside = outside

    def replay(self, signature: Signature, rows: int, captured_rows: int) -> Any:
        """Computes a call with the captured key.

        Args:
            signature: The call.
            rows: Rows of the answer to return.
            captured_rows: Rows that the graph computes.

        Returns:
            The answer; the next replay does not overwrite it.
        """
        self._inputs.write(signature)
        self._graph.replay()
        # Request threads and previews read an answer after the next replay has started.
        return copied(cut(self._output, 0, rows, captured_rows))

    def reset(self) -> None:
        """Frees the graph."""
        self._graph.reset()
        self._output = None
        self._outside.clear()
