"""A runtime with graphs on the CPU, and short calls of it."""

from __future__ import annotations

import torch

from calotype_server.engine.runtime.graphs import GraphsRuntime
from support.engine.batching import Denoiser, answer_to, sample
from support.engine.graph_backend import RecordingBackend

__all__ = ["Runtime", "events"]


class Runtime(GraphsRuntime):
    """A started runtime on the stand-in for CUDA, with short calls."""

    def __init__(self, module=None, *, start=True, loading=False, **options):
        self.backend = options.setdefault("backend", RecordingBackend())
        super().__init__(module or Denoiser(), **{"exact": False, "max_rows": 8, **options})
        if start:
            self.start()
        if not loading:
            self.end_loading()

    @torch.no_grad()
    def call(self, value=1, timestep=0.0, rows=1, width=4, **arguments):
        """Returns the answer to one request, as the batcher would ask for it."""
        call = self.collator.bind((sample(value, rows, width),), {"timestep": torch.tensor(timestep), **arguments}, {})
        return self.collator.split(self.run([call], rows), [call], rows)[0][0]

    def right(self, value=1, timestep=0.0, rows=1, width=4):
        """Whether the answer is that of the denoiser."""
        return torch.equal(self.call(value, timestep, rows, width), answer_to(value, timestep, rows, width))


def events(logs, level="warning"):
    """Returns the names of the log entries of a level."""
    return [entry["event"] for entry in logs if entry["log_level"] == level]
