"""The parts of `make bench-gpu` that need no device: models, sections, report, targets, bundle."""

from __future__ import annotations

import itertools
import json
import math
import time
from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.gpu import __main__ as command_line
from benchmarks.gpu import bundle, models, runner, targets
from benchmarks.gpu.cases import CASES, MODELS, cases_of
from benchmarks.gpu.process import CommandFailed, HostDied
from benchmarks.gpu.report import DONE, FAILED, SKIPPED, Record, Report
from benchmarks.gpu.runner import Plan, Section
from benchmarks.gpu.session import Session, Skipped, interleaved, ratio

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

PUBLISHED = {
    "sd15": {"unet": 859_520_964, "vae": 83_653_863},
    "sdxl": {"unet": 2_567_463_684, "vae": 83_653_863},
    "flux": {"transformer": 11_901_408_320, "vae": 83_819_683},
    "qwen": {"transformer": 20_430_401_088, "vae": 126_892_531},
}
"""Numbers of parameters of the published models."""


@pytest.mark.parametrize("family", PUBLISHED)
def test_models_have_the_published_sizes(family: str) -> None:
    """Denoisers and VAEs have exactly the parameters of the published models; no weights are allocated for this."""
    built = models.modules(family, toy=False, device="meta", dtype=torch.bfloat16)
    sizes = {name: sum(each.numel() for each in built[name].parameters()) for name in PUBLISHED[family]}
    assert sizes == PUBLISHED[family]


def test_a_toy_is_small_and_generates_in_the_number_format_of_a_gpu() -> None:
    """A toy in bfloat16 generates a finite image on the CPU, and has fewer than a million parameters."""
    pipeline = models.build("flux", toy=True, device="cpu", dtype=torch.bfloat16)
    image = pipeline("a", num_inference_steps=1, width=64, height=64, output_type="pt")[0]
    assert torch.isfinite(image).all()
    assert sum(each.numel() for each in pipeline.transformer.parameters()) < 1_000_000
    assert {each.dtype for each in pipeline.transformer.parameters()} == {torch.bfloat16}


def test_every_family_has_cases() -> None:
    """Each model on the command line has a case in both sizes, and all but the bundled one a builder."""
    assert set(MODELS) == set(models.FAMILIES) | {"bundled"}
    assert all(cases_of(model, toy=toy) for model in MODELS for toy in (True, False))


class Script:
    """Sections that record their runs instead of measuring."""

    def __init__(self, names: list[str], **faults: BaseException) -> None:
        self.runs: list[str] = []
        self.faults = faults
        self.sections = {name: Section(name, self._measure(name), images=0, fixed=10) for name in names}

    def _measure(self, name: str) -> Callable[[Any], dict[str, Any]]:
        def measure(_: Any) -> dict[str, Any]:
            if fault := self.faults.pop(name, None):
                raise fault
            self.runs.append(name)
            return {f"{name}_seconds": 1.5}

        return measure


NAMES = [f"s{number}" for number in range(6)]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """The file of a report."""
    return tmp_path / "build" / "bench.json"


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch, path: Path) -> Callable[..., list[str]]:
    """A function that runs a script's sections without a process, and returns the lines that it prints."""
    monkeypatch.setattr(Session, "start", lambda *_: None)

    def run(script: Script, *, resume: bool = False, seconds: float = math.inf, **options: Any) -> list[str]:
        monkeypatch.setattr(runner, "SECTIONS", script.sections)
        chosen = {"cases": [CASES["sd15"]], "accelerates": [None], "schedules": [None], **options}
        plan = Plan(
            sections=list(script.sections),
            rounds=1,
            device=None,
            deadline=time.monotonic() + seconds,
            folder=path.parent,
            **chosen,
        )
        said: list[str] = []
        runner.run(plan, Report(path, {}, resume=resume), said.append)
        return said

    return run


def saved(path: Path) -> list[dict[str, Any]]:
    """Returns the records of a file."""
    return json.loads(path.read_text())["records"]


@pytest.mark.parametrize("count", range(len(NAMES)))
def test_an_interrupted_run_keeps_its_sections_and_resumes(
    count: int, measured: Callable[..., list[str]], path: Path
) -> None:
    """An interruption in any section leaves all earlier ones in the file, and `--resume` measures only the rest."""
    script = Script(NAMES, **{NAMES[count]: KeyboardInterrupt()})
    with pytest.raises(KeyboardInterrupt):
        measured(script)
    assert [each["section"] for each in (saved(path) if count else [])] == NAMES[:count]
    said = measured(script, resume=True)
    assert script.runs == NAMES
    assert [each["section"] for each in saved(path)] == NAMES
    assert said[:count] == [f"kept: sd15 {name}" for name in NAMES[:count]]


def test_a_section_that_fails_does_not_stop_the_run(measured: Callable[..., list[str]], path: Path) -> None:
    """Errors, a dead process and an unmet need are recorded with their reason; `--resume` tries them again."""
    faults = {"s1": RuntimeError("broken"), "s2": HostDied("it ended"), "s3": Skipped("no CUDA")}
    script = Script(NAMES, **faults)
    measured(script)
    assert {each["section"]: (each["status"], each["reason"]) for each in saved(path)} == {
        **dict.fromkeys(NAMES, (DONE, "")),
        "s1": (FAILED, "RuntimeError: broken"),
        "s2": (FAILED, "HostDied: it ended"),
        "s3": (SKIPPED, "no CUDA"),
    }
    measured(script, resume=True)
    assert sorted(script.runs) == NAMES


def test_sections_that_do_not_fit_the_budget_are_skipped(measured: Callable[..., list[str]], path: Path) -> None:
    """A section that needs more time than is left is skipped, and says how much it needs."""
    script = Script(["s0"])
    measured(script, seconds=5)
    assert script.runs == []
    [record] = saved(path)
    assert record["status"] == SKIPPED
    assert record["reason"].startswith("it needs about 10 s, and ")


def test_runtimes_and_schedules_repeat_only_what_they_change(measured: Callable[..., list[str]], path: Path) -> None:
    """Each runtime repeats the accelerated sections, and each schedule those that depend on it."""
    script = Script([])
    for name, accelerated, scheduled in (("eager", False, False), ("stream", True, False), ("users", True, True)):
        script.sections[name] = Section(name, script._measure(name), 0, 0, accelerated=accelerated, scheduled=scheduled)
    measured(script, accelerates=["none", "graphs"], schedules=["first-look", "fifo"])
    assert [(each["variant"], each["section"]) for each in saved(path)] == [
        ("none, first-look", "eager"),
        ("none, first-look", "stream"),
        ("none, first-look", "users"),
        ("none, fifo", "users"),
        ("graphs, first-look", "stream"),
        ("graphs, first-look", "users"),
        ("graphs, fifo", "users"),
    ]


def test_a_crash_while_saving_leaves_the_previous_file(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file is replaced only after the new content is on disk."""
    report = Report(path, {})
    report.add(Record("sd15", "", "s0", DONE))
    with monkeypatch.context() as patched:
        patched.setattr("os.fsync", lambda _: (_ for _ in ()).throw(OSError(28, "full")))
        with pytest.raises(OSError, match="full"):
            report.add(Record("sd15", "", "s1", DONE))
    assert [each["section"] for each in saved(path)] == ["s0"]


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_the_file_is_valid_json_whatever_was_measured(value: float, path: Path) -> None:
    """NaN and infinity, which JSON does not have, become null."""
    Report(path, {}).add(Record("sd15", "", "s0", DONE, figures={"a": value, "b": 1 / 3}))
    assert saved(path)[0]["figures"] == {"a": None, "b": 0.333333}


def test_a_file_with_other_options_is_not_resumed(path: Path) -> None:
    """Figures of a toy never end up in the table of real models."""
    Report(path, {"toy": True}).add(Record("sd15", "", "s0", DONE))
    with pytest.raises(ValueError, match="other options"):
        Report(path, {"toy": False}, resume=True)


FIGURES = st.floats(0, 1e6) | st.integers(0, 10**6) | st.text("abc", min_size=1)
NAMES_OF_FIGURES = sorted({name for target in targets.TARGETS for name in (*target.figures, target.divided_by)} - {""})


@settings(max_examples=30)
@given(st.dictionaries(st.sampled_from(NAMES_OF_FIGURES), FIGURES), st.sampled_from(sorted(CASES)))
def test_any_figures_can_be_judged_and_printed(
    tmp_path_factory: pytest.TempPathFactory, figures: dict[str, Any], case: str
) -> None:
    """Whatever a run measured, there is a table, and each limit is met, missed or not measured."""
    report = Report(tmp_path_factory.mktemp("report") / "bench.json", {})
    figures = {name: value for name, value in figures.items() if value != 0}
    report.add(Record(case, "", "s0", DONE, figures=figures))
    assert case in report.table()
    judged = targets.judge(report)
    assert {row[4] for row in judged} <= {targets.MET, targets.MISSED, targets.NOT_MEASURED}
    assert len(judged) == sum(len(target.limits()) for target in targets.TARGETS)


def test_targets_are_met_or_missed(path: Path) -> None:
    """A figure at its limit meets it, one beyond misses it, and a variant has its own judgement."""
    report = Report(path, {})
    report.add(Record("sd15", "", "s", DONE, figures={"head_over_bare": 0.61, "users8_throughput_over_fifo": 2.5}))
    report.add(
        Record("sd15", "graphs", "s", DONE, figures={"head_over_bare": 0.6, "auto_previews": 10, "preview_steps": 21})
    )
    judged = {row[:2]: row[2:] for row in targets.judge(report)}
    stream = "stream with a preview at every step / bare eager call"
    assert judged[stream, "sd15"] == ("<= 0.6", "0.61", targets.MISSED)
    assert judged[stream, "sd15 (graphs)"] == ("<= 0.6", "0.6", targets.MET)
    assert judged[stream, "sdxl"] == ("<= 0.95", "", targets.NOT_MEASURED)
    assert judged["8 users: throughput / FIFO with the same runtime", "sd15"] == (">= 2.5", "2.5", targets.MET)
    assert judged["AUTO: share of the steps with a preview", "sd15 (graphs)"] == (">= 1", "0.476", targets.MISSED)
    assert "missed" in targets.table(report)


class Process:
    """Stands in for the process with the device; counts its commands."""

    def __init__(self, **answers: Any) -> None:
        self.answers = {"build": {"device": "none"}, "free_gib": None} | answers
        self.commands: list[str] = []
        self.closed = 0

    def __call__(self, command: str, *_: Any, **__: Any) -> Any:
        self.commands.append(command)
        answer = self.answers[command]
        if isinstance(answer, Exception):
            raise answer
        return answer

    def close(self) -> None:
        self.closed += 1


def session_with(process: Process, monkeypatch: pytest.MonkeyPatch, path: Path) -> Session:
    """Returns a session whose process is a stand-in."""
    monkeypatch.setattr("benchmarks.gpu.session.HostProcess", lambda *_, **__: process)
    return Session("flux", path.parent, toy=False)


@pytest.mark.parametrize(
    ("answers", "error"),
    [({"free_gib": 20.0}, Skipped), ({"build": CommandFailed("no")}, CommandFailed), ({"build": HostDied()}, HostDied)],
)
def test_a_model_that_cannot_be_built_is_tried_once(
    answers: dict[str, Any], error: type[Exception], monkeypatch: pytest.MonkeyPatch, path: Path
) -> None:
    """All sections of a model that does not fit end with the same reason, without building it again."""
    process = Process(**answers)
    session = session_with(process, monkeypatch, path)
    for _ in range(3):
        with pytest.raises(error):
            session.start(CASES["flux"])
    assert process.commands.count("free_gib") == 1
    assert process.closed


def test_a_server_that_does_not_start_is_tried_once(monkeypatch: pytest.MonkeyPatch, path: Path) -> None:
    """A runtime that is not available costs one attempt, and the pipeline stays for other servers."""
    process = Process(open_server=CommandFailed("no graphs"))
    session = session_with(process, monkeypatch, path)
    session.start(CASES["flux"])
    for _ in range(3):
        with pytest.raises(CommandFailed):
            session.server("shared", {})
    assert process.commands == ["free_gib", "build", "open_server"]
    assert not process.closed


def test_a_process_that_died_is_replaced(monkeypatch: pytest.MonkeyPatch, path: Path) -> None:
    """After the process died, the next section builds the pipeline and opens the server again."""
    process = Process(open_server={"address": "a"}, bare=HostDied())
    session = session_with(process, monkeypatch, path)
    for _ in range(2):
        session.start(CASES["flux"])
        assert session.server("shared", {})["address"] == "a"
        with pytest.raises(HostDied):
            session("bare")
    assert process.commands == 2 * ["free_gib", "build", "open_server", "bare"]


def test_ratios_compare_measurements_of_the_same_round() -> None:
    """The first round only warms up, and a machine that becomes slower does not change a ratio."""
    slower = itertools.count(1)
    times = interleaved({"a": lambda: 2.0 * next(slower), "b": lambda: 1.0 * next(slower)}, 3)
    assert times == {"a": [6.0, 10.0, 14.0], "b": [4.0, 6.0, 8.0]}
    assert ratio([2, 4, 80], [1, 2, 40]) == 2


def test_runtimes_and_schedules_are_those_of_the_server() -> None:
    """The command line accepts the values of the server's settings; without one, the server's default is measured."""
    assert command_line.chosen("none,graphs", "accelerate") == ["none", "graphs"]
    assert command_line.chosen("fifo", "schedule") == ["fifo"]
    assert command_line.chosen("", "schedule") == [None]
    with pytest.raises(ValueError, match="no plain, only first-look, fair, fifo"):
        command_line.chosen("plain", "schedule")


@pytest.mark.parametrize("arguments", [["--models", "sd16"], ["--sections", "stream"]])
def test_unknown_names_are_rejected(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """A misspelt model or section ends the program before it loads anything, with a message."""
    with pytest.raises(SystemExit):
        command_line.parse(arguments)
    assert f"{arguments[0]}: unknown: {arguments[1]}" in capsys.readouterr().err


def test_the_bundle_has_everything_that_the_server_needs_except_torch() -> None:
    """Packages that only torch needs stay out, and so does everything that the other machine has."""
    packages = bundle.closure(bundle.ROOTS, python="3.12", without={"torch", "pillow"})
    assert {"diffusers", "grpcio", "pydantic-core", "structlog", "tokenizers", "uvicorn"} <= set(packages)
    assert not {"torch", "sympy", "triton", "pillow", "pytest"} & set(packages)


@pytest.mark.parametrize(("limit", "code"), [("1", 1), ("3", 0)])
def test_the_size_of_the_bundle_is_checked(
    limit: str, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wheels of an earlier bundle are removed, and a bundle above the limit fails."""
    (tmp_path / "old-1-py3-none-any.whl").write_bytes(bytes(2**20))
    asked: dict[str, str] = {}

    def download(packages: dict[str, str], python: str, target: Path) -> None:
        asked.update(packages)
        (target / "new-1-py3-none-any.whl").write_bytes(bytes(2 * 2**20))

    monkeypatch.setattr(bundle, "download", download)
    assert bundle.main(["--target", str(tmp_path), "--max-mib", limit, "--have", "numpy"]) == code
    assert [file.name for file in tmp_path.iterdir()] == ["new-1-py3-none-any.whl"]
    assert "diffusers" in asked
    assert not {"calotype", "calotype-bundled-model", "numpy", "torch"} & set(asked)
