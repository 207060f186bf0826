"""The tools of the sections: the process that has the device, its servers, and the case."""

from __future__ import annotations

import contextlib
import statistics
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from benchmarks.gpu import watching
from benchmarks.gpu.process import CommandFailed, HostDied, HostProcess

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from pathlib import Path

    from benchmarks.gpu.cases import Case

__all__ = ["Bench", "Session", "Skipped", "Variant", "interleaved", "ratio"]


class Skipped(Exception):
    """A section cannot be measured here; the message says why."""


@dataclass(frozen=True, slots=True)
class Variant:
    """Settings of the server that are compared.

    Attributes:
        accelerate: Value of `--accelerate`; None for the server's default.
        schedule: Value of `--schedule`; None for the server's default.
    """

    accelerate: str | None = None
    schedule: str | None = None

    @property
    def settings(self) -> dict[str, str]:
        """The fields of `Settings`."""
        fields = {"accelerate": self.accelerate, "schedule": self.schedule}
        return {name: value for name, value in fields.items() if value is not None}

    @property
    def title(self) -> str:
        """Text for the table; empty for the server's defaults."""
        return ", ".join(self.settings.values())


class Session:
    """One process with one pipeline. Starts it when it is first needed, and again after it died.

    Args:
        family: Model family.
        folder: For the log and the caches.
        toy: Whether the modules are tiny.
        device: Torch device, or None for the server's choice.
        dtype: Number format, or None for the server's choice.
    """

    def __init__(
        self, family: str, folder: Path, *, toy: bool, device: str | None = None, dtype: str | None = None
    ) -> None:
        self.family = family
        self._folder = folder
        self._options: dict[str, Any] = {"toy": toy, "device": device, "dtype": dtype}
        self._process: HostProcess | None = None
        self._servers: dict[str, dict[str, Any]] = {}
        self._failures: dict[str, Exception] = {}
        self.description: dict[str, Any] = {}

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the process."""
        if self._process is not None:
            self._process.close()
        self._process = None
        self._servers = {}

    def start(self, case: Case) -> None:
        """Builds the pipeline if there is none. If that fails, it is not tried again.

        Raises:
            Skipped: The device has too little memory for it.
            CommandFailed: It cannot be built.
            HostDied: The process died.
        """
        if self._process is not None:
            return
        with self._once("pipeline"):
            self._process = HostProcess(self.family, self._folder, **self._options)
            try:
                free = self("free_gib")
                if free is not None and free < case.gib:
                    raise Skipped(f"it needs {case.gib:g} GiB of device memory, and {free:.1f} GiB are free")
                self.description = self("build")
            except BaseException:
                self.close()
                raise

    @contextlib.contextmanager
    def _once(self, part: str) -> Iterator[None]:
        """Raises the error of an earlier block for the same part instead of entering: it would only fail again."""
        if part in self._failures:
            raise self._failures[part]
        try:
            yield
        except Exception as error:
            self._failures[part] = error
            raise

    def __call__(self, command: str, *arguments: Any, **options: Any) -> Any:
        """Executes a command of the process.

        Raises:
            CommandFailed: It raised.
            HostDied: The process died; the next `start` replaces it.
        """
        try:
            return self._process(command, *arguments, **options)
        except HostDied:
            self.close()
            raise

    def server(self, name: str, settings: dict[str, Any]) -> dict[str, Any]:
        """Starts a server unless it runs, and returns its description. If that fails, it is not tried again."""
        if name not in self._servers:
            model = "bundled" if self.family == "bundled" else f"random/{self.family}"
            with self._once(name):
                self._servers[name] = self("open_server", name, model, settings)
        return self._servers[name]

    def close_server(self, name: str) -> None:
        """Stops a server, if it runs."""
        if self._servers.pop(name, None) is not None:
            with contextlib.suppress(CommandFailed):
                self("close_server", name)


class Bench:
    """Measures one case with one variant.

    Args:
        session: The process.
        case: What to generate.
        variant: Settings of the server.
        rounds: Number of measurements, of which the median counts, after one to warm up.
        folder: For the logs and caches of further processes.
        device: Torch device, or None for the server's choice.
    """

    def __init__(
        self, session: Session, case: Case, variant: Variant, rounds: int, folder: Path, device: str | None = None
    ) -> None:
        self.session = session
        self.case = case
        self.variant = variant
        self.rounds = rounds
        self.folder = folder
        self.device = device
        self._step_seconds: float | None = None

    def run(self, section: Callable[[Bench], dict[str, Any]]) -> dict[str, Any]:
        """Returns the figures of a section."""
        self.session.start(self.case)
        return section(self)

    @property
    def step_seconds(self) -> float:
        """Seconds of a step of the bare call; measured again when the process is new."""
        if self._step_seconds is None:
            self.measure_step()
        return self._step_seconds

    def measure_step(self) -> dict[str, float]:
        """Measures calls with all and with few steps, in turn, and returns seconds of a call and of a step."""
        case = self.case
        times = interleaved(
            {
                "long": lambda: self.session("bare", case),
                "short": lambda: self.session("bare", case, steps=case.short_steps),
            },
            self.rounds,
        )
        long, short = statistics.median(times["long"]), statistics.median(times["short"])
        # On a noisy machine a toy's calls can take the same time.
        self._step_seconds = max(1e-6, (long - short) / (case.steps - case.short_steps))
        return {"bare_seconds": long, "step_seconds": self._step_seconds}

    def shared(self) -> str:
        """Returns the address of a server with the variant's settings."""
        return self.session.server(self.shared_name, self.variant.settings)["address"]

    @property
    def shared_name(self) -> str:
        """Name of that server in the process."""
        return f"shared {self.variant.title}"

    def fifo(self) -> str:
        """Returns the address of a server that runs one generation after another, with the same runtime."""
        settings = {"accelerate": self.variant.accelerate} if self.variant.accelerate else {}
        return self.session.server("fifo", {"max_active": 1, **settings})["address"]

    @contextlib.contextmanager
    def opened(self, name: str, **settings: Any) -> Iterator[dict[str, Any]]:
        """Runs a server with the variant's settings and these, and yields its description."""
        server = f"{name} {self.variant.title}"
        try:
            yield self.session.server(server, {**self.variant.settings, **settings})
        finally:
            self.session.close_server(server)

    def stream(self, address: str, **options: Any) -> watching.Seen:
        """Follows one generation of the case."""
        return watching.single(address, self.case, **options)


def interleaved(functions: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, list[Any]]:
    """Returns the results of each function, called in turn in every round; the first round warms up.

    A slow phase of the whole machine then affects all of them.
    """
    results: dict[str, list[Any]] = {name: [] for name in functions}
    for number in range(rounds + 1):
        for name, function in functions.items():
            result = function()
            if number:
                results[name].append(result)
    return results


def ratio(above: list[float], below: list[float]) -> float:
    """Returns the median of the ratios within each round."""
    return statistics.median(a / b for a, b in zip(above, below, strict=True))
