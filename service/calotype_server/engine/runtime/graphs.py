"""GraphsRuntime: replays CUDA graphs of the denoiser, which takes its launches from Python out of every step."""

from __future__ import annotations

import math
import traceback
from collections import OrderedDict
from typing import TYPE_CHECKING, Any

import structlog

from calotype_server.engine.memory import is_out_of_memory
from calotype_server.engine.runtime.captured import CapturedCall, WarmCall, WrongAnswer
from calotype_server.engine.runtime.eager import EagerRuntime
from calotype_server.engine.runtime.graph_backend import CudaBackend
from calotype_server.engine.runtime.launch import Launch, measure_launch, worth_capturing
from calotype_server.engine.runtime.signature import Refused, sign, why_not_module

if TYPE_CHECKING:
    from collections.abc import Hashable, Sequence

    import torch

    from calotype_server.engine.runtime.collate import Call, Collator
    from calotype_server.engine.runtime.graph_backend import GraphBackend
    from calotype_server.engine.runtime.signature import Signature

__all__ = ["GraphsRuntime", "row_buckets"]

_log = structlog.get_logger(__name__)

_MAX_GRAPHS = 24
"""Two to four image sizes in all numbers of rows."""
_SHARE_OF_FREE_MEMORY = 0.25
_SIGHTINGS = 2
_SIGHTINGS_AFTER_OUT_OF_MEMORY = 100
"""As many batches as the batcher waits before it allows more rows again."""
_MAX_ERRORS = 2
_MAX_KEYS = 256


def row_buckets(max_rows: int) -> list[int]:
    """Returns the numbers of rows that get their own graphs: 1, 2, 4, 6, 8, 12, 16, 24, ... and `max_rows`."""
    powers = [2**power for power in range(max_rows.bit_length())]
    between = [3 * power for power in powers if power > 1]
    return sorted({*(each for each in powers + between if each < max_rows), max_rows})


class GraphsRuntime:
    """Computes a call by a graph, if there is one for its key, and otherwise as `EagerRuntime`; see `DenoiserRuntime`.

    Until `end_loading`, every key gets a graph, later a key that is seen the second time. All graphs are dropped when
    memory runs out, and the least recently used one when there are too many. A call that no graph can compute runs
    eagerly, and the reason is logged once. After two failed captures or replays, or one wrong answer, all calls do.
    With `exact`, an answer is wrong if a single bit differs: whether a call has a graph depends on other requests.

    After a change of the module, such as a LoRA, `.to()`, another number format or attention processor, call
    `invalidate`: graphs would continue to compute with the old weights.

    Args:
        module: The denoiser.
        exact: Join only rows that need no padding, and compute no other number of rows than asked for.
        max_rows: Most rows that are usual, from 1. Calls with more rows run eagerly.
        backend: Captures graphs. None: CUDA, on the module's device.
        budget_bytes: Most device memory for graphs. None: a quarter of the memory that is free at the start.

    Raises:
        ValueError: The module is not on a CUDA device, and there is no other backend.
    """

    name = "graphs"

    def __init__(
        self,
        module: Any,
        *,
        exact: bool,
        max_rows: int,
        backend: GraphBackend | None = None,
        budget_bytes: int | None = None,
    ) -> None:
        self._eager = EagerRuntime(module, exact=exact)
        self._exact = exact
        self._buckets = [max_rows] if exact else row_buckets(max_rows)
        self._backend = backend or CudaBackend(_cuda_device(module))
        self._budget = budget_bytes
        self._used = 0
        self._loading = True
        self._launch: Launch | None = None
        self._graphs: OrderedDict[Hashable, CapturedCall] = OrderedDict()
        self._sightings = _Sightings()
        self._memory_ran_out = False
        self._errors = 0
        self._off = False
        self._stale = False
        self._logged: set[str] = set()

    @property
    def module(self) -> Any:
        """The denoiser."""
        return self._eager.module

    @property
    def collator(self) -> Collator:
        """Joins and splits its calls."""
        return self._eager.collator

    @property
    def graph_count(self) -> int:
        """Number of graphs that are ready."""
        return len(self._graphs)

    def invalidate(self) -> None:
        """Drops all graphs before the next call, because the module has changed. Any thread may call it."""
        self._stale = True

    def start(self) -> None:
        """Prepares the calling thread, and examines the module.

        Raises:
            torch.AcceleratorError: The device failed.
        """
        self._backend.start()
        if self._budget is None:
            self._budget = int(_SHARE_OF_FREE_MEMORY * self._backend.free_bytes())
        self._examine()

    def end_loading(self) -> None:
        """From now on, a size must recur to get a graph: a capture takes as long as a few calls."""
        self._loading = False
        _log.info("graphs", graphs=len(self._graphs), megabytes=self._used // 2**20)

    def run(self, calls: Sequence[Call], padded_rows: int) -> Any:
        """Replays a graph if there is one, or captures one, or calls the denoiser."""
        if self._stale:
            self._renew()
        rows = padded_rows if self._exact else next((each for each in self._buckets if each >= padded_rows), None)
        signature = None if self._off or rows is None else self._sign(calls, rows)
        if rows is not None and signature is not None:
            graph = self._graphs.get(signature.key)
            if graph is None and self._sightings.of(signature.key) + 1 >= self._needed:
                self._examine_launch(calls, padded_rows)
                graph = self._capture(signature)
            if graph is not None:
                self._graphs.move_to_end(signature.key)
                answer = self._replay(graph, signature, padded_rows, rows)
                if answer is not None:
                    return answer
        output = self._eager.run(calls, padded_rows)
        if signature is not None:
            # Counted only now: a call that fails by itself never reaches a capture.
            self._sightings.add(signature.key)
        return output

    def clear(self) -> None:
        """Drops all graphs, and forgets which sizes were seen."""
        self._drop_all()
        self._sightings = _Sightings()
        self._memory_ran_out = False

    def free_memory(self) -> bool:
        """Drops all graphs. Later, only sizes that recur often get one, because memory is scarce."""
        count = len(self._graphs)
        self._drop_all()
        if count:
            self._memory_ran_out = True
            _log.warning("memory ran out: all graphs are dropped", graphs=count)
        return count > 0

    @property
    def _needed(self) -> int:
        """How often a key must be seen before it gets a graph."""
        if self._memory_ran_out:
            return _SIGHTINGS_AFTER_OUT_OF_MEMORY
        return 1 if self._loading else _SIGHTINGS

    def _sign(self, calls: Sequence[Call], rows: int) -> Signature | None:
        """Returns the signature of a joined call; None if no graph can compute it."""
        try:
            named = self.collator.gather(calls, rows)
            if named is None:
                raise Refused("Its first argument is not a batch.")
            return sign(self.module, named)
        except Refused as refused:
            self._log_once(str(refused))
            return None

    def _replay(self, graph: CapturedCall, signature: Signature, rows: int, captured_rows: int) -> Any:
        """Returns the answer of a graph; None if the graph failed, but the device works.

        Raises:
            Exception: Memory ran out.
            torch.AcceleratorError: The device failed.
        """
        try:
            return graph.replay(signature, rows, captured_rows)
        except Exception as error:
            # The traceback's frames keep tensors alive.
            traceback.clear_frames(error.__traceback__)
            if is_out_of_memory(error):
                raise
            self._backend.synchronize()
            self._drop(signature.key)
            self._count_error(signature, error)
            return None

    def _capture(self, signature: Signature) -> CapturedCall | None:
        """Returns a new graph; None if there can be none now.

        Raises:
            Exception: The denoiser failed by itself.
            torch.AcceleratorError: The device failed.
        """
        warm = None
        try:
            before = self._backend.free_bytes()
            while len(self._graphs) >= _MAX_GRAPHS:
                self._drop(next(iter(self._graphs)))
            warm = WarmCall(self.module, signature, self._backend)
            graph = warm.capture(exact=self._exact)
            grown = before - self._backend.free_bytes()
        except Exception as error:
            warmed, warm = warm is not None, None
            traceback.clear_frames(error.__traceback__)
            self._backend.synchronize()
            if not self._graphs:
                self._backend.release()
            if not self._note_failure(signature, error, warmed=warmed):
                raise
            return None
        self._graphs[signature.key] = graph
        self._used += grown
        if self._budget is not None and self._used > self._budget:
            # The shared memory only shrinks when the last graph is dropped.
            self._drop_all()
            self._sightings.forbid(signature.key)
            self._log_once("Graphs of calls of this size need more memory than they may use.")
            return None
        return graph

    def _note_failure(self, signature: Signature, failure: Exception, *, warmed: bool) -> bool:
        """Records why there is no graph. Returns False if the denoiser failed by itself."""
        if is_out_of_memory(failure):
            self._sightings.forbid(signature.key)
            self.free_memory()
            self._log_once("Memory ran out while a graph was captured.")
        elif isinstance(failure, Refused):
            self._sightings.forbid(signature.key)
            self._log_once(str(failure))
        elif warmed:
            self._count_error(signature, failure)
        else:
            return False
        return True

    def _count_error(self, signature: Signature, failure: Exception) -> None:
        self._sightings.forbid(signature.key)
        self._errors += 1
        if self._errors >= _MAX_ERRORS or isinstance(failure, WrongAnswer):
            self._off = True
            self._drop_all()
        _log.warning("a graph failed", error=f"{type(failure).__name__}: {failure}", graphs_off=self._off)

    def _drop(self, key: Hashable) -> None:
        graph = self._graphs.pop(key, None)
        if graph is None:
            return
        self._backend.synchronize()
        graph.reset()
        if not self._graphs:
            self._backend.release()
            self._used = 0

    def _drop_all(self) -> None:
        for key in list(self._graphs):
            self._drop(key)

    def _renew(self) -> None:
        self._stale = False
        self.clear()
        self._errors = 0
        self._examine()

    def _examine(self) -> None:
        """Looks for reasons in the module itself."""
        reason = why_not_module(self.module, self._backend.device)
        self._off = reason is not None
        if reason is not None:
            self._log_once(reason)

    def _examine_launch(self, calls: Sequence[Call], rows: int) -> None:
        """Measures the first call while the model loads, and logs whether graphs gain little."""
        if not self._loading or self._launch is not None:
            return
        self._launch = measure_launch(lambda: self._eager.run(calls, rows), self._backend.synchronize)
        if not worth_capturing(*self._launch):
            share = round(self._launch.launch_seconds / self._launch.step_seconds, 2)
            _log.info("graphs gain little, because launching takes a small share of a step", share=share)

    def _log_once(self, reason: str) -> None:
        if reason not in self._logged:
            self._logged.add(reason)
            _log.warning("no graph for some calls", reason=reason)


class _Sightings:
    """Counts how often the newest keys were computed without a graph."""

    def __init__(self) -> None:
        self._counts: OrderedDict[Hashable, float] = OrderedDict()

    def of(self, key: Hashable) -> float:
        return self._counts.get(key, 0)

    def add(self, key: Hashable) -> None:
        self._set(key, self.of(key) + 1)

    def forbid(self, key: Hashable) -> None:
        """Makes the key count as never seen."""
        self._set(key, -math.inf)

    def _set(self, key: Hashable, count: float) -> None:
        self._counts[key] = count
        self._counts.move_to_end(key)
        while len(self._counts) > _MAX_KEYS:
            self._counts.popitem(last=False)


def _cuda_device(module: Any) -> torch.device:
    device: torch.device = next(module.parameters()).device
    if device.type != "cuda":
        raise ValueError(f"CUDA graphs need a CUDA device, not {device}.")
    return device
