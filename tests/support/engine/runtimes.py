"""Runtimes that compute wrongly, or fail."""

from calotype_server.engine.runtime.eager import EagerRuntime

__all__ = ["AlteredRuntime"]


class AlteredRuntime(EagerRuntime):
    """Calls the denoiser and changes its answers.

    Args:
        module: The denoiser.
        alter: Receives the answer and the padded rows, and returns another answer or raises.
    """

    name = "graphs"

    def __init__(self, module, *, alter=lambda answer, _: answer, exact=False, **_):
        super().__init__(module, exact=exact)
        self.alter = alter
        self.rows = []
        """Rows of each call."""
        self.loading = True
        self.freed = 0

    def end_loading(self):
        self.loading = False

    def run(self, calls, padded_rows):
        self.rows.append(padded_rows)
        return self.alter(super().run(calls, padded_rows), padded_rows)

    def clear(self):
        self.freed += 1
