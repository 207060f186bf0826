"""`make bench-gpu --toy`, from the command line to the file, on a CPU."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.gpu import targets
from benchmarks.gpu.report import DONE
from benchmarks.gpu.runner import SECTIONS

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

TESTS = Path(__file__).parents[1]
SD15 = [name for name, section in SECTIONS.items() if not section.bundled]


def command(output: Path, *arguments: str, device: str = "cpu") -> dict[str, Any]:
    """Returns the arguments of `subprocess` for a run."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")])}
    return {
        "args": [
            sys.executable,
            "-m",
            "benchmarks.gpu",
            "--toy",
            "--device",
            device,
            "--output",
            str(output),
            *arguments,
        ],
        "env": environment,
        "text": True,
        "stdout": subprocess.PIPE,
    }


def completed(output: Path, *arguments: str, device: str = "cpu") -> str:
    """Runs the benchmark to its end, which must be a success, and returns what it printed."""
    run = subprocess.run(**command(output, *arguments, device=device), check=False)
    assert run.returncode == 0, run.stdout
    return run.stdout


def records(output: Path) -> list[dict[str, Any]]:
    """Returns the records of the file."""
    return json.loads(output.read_text())["records"]


def test_every_section_measures_and_a_killed_run_resumes(tmp_path: Path) -> None:
    """After SIGKILL the file has the sections until then; `--resume` measures the rest, and all figures are finite."""
    output = tmp_path / "bench.json"
    with subprocess.Popen(**command(output, "--models", "sd15")) as process:
        for line in process.stdout:
            if line.startswith("done: sd15 none plan"):
                process.kill()
                break
        # The process with the device may still have the pipe.
        process.stdout.close()
    kept = [each["section"] for each in records(output)]
    assert kept[:3] == SD15[:3]
    printed = completed(output, "--models", "sd15", "--resume")
    assert [line for line in printed.splitlines() if line.startswith("kept")] == [
        f"kept: sd15 none {name}" for name in kept
    ]
    found = {each["section"]: each for each in records(output)}
    assert list(found) == SD15
    assert {name for name, each in found.items() if each["status"] == DONE} == set(SD15)
    figures = {name: value for each in found.values() for name, value in each["figures"].items()}
    assert all(math.isfinite(value) for value in figures.values() if isinstance(value, (int, float)))
    assert {name for target in targets.TARGETS for name in target.figures} <= set(figures)
    for title in (
        "bare pipeline call",
        "8 users: throughput / FIFO",
        "final image after the last step",
        "out of memory",
    ):
        assert title in printed
    assert (figures["accelerator"], figures["accelerator_fallback"]) == ("none", "")
    assert figures["fast_computed_steps"] < figures["fast_steps"]
    assert (figures["nan_reason"], figures["oom_reason"]) == ("NUMERICAL_FAILURE", "OUT_OF_MEMORY")
    assert figures["nan_next_succeeds"] == figures["oom_other_succeeds"] == figures["oom_next_succeeds"] == 1
    assert figures["same_again_levels"] == figures["same_head_levels"] == figures["same_full_vae_levels"] == 0


@pytest.mark.parametrize(
    ("models", "sections"), [("sdxl,flux,qwen", "bare,launch,streams,final,rows"), ("bundled", "devices")]
)
def test_all_families_can_be_measured(models: str, sections: str, tmp_path: Path) -> None:
    """Each family's pipeline works in every section that depends on its layout of latents; none fails."""
    output = tmp_path / "bench.json"
    completed(output, "--models", models, "--sections", sections)
    found = records(output)
    assert {each["status"] for each in found} == {DONE}
    assert {each["section"] for each in found} == set(sections.split(","))
    if models == "bundled":
        assert found[0]["figures"]["device_over_cpu_levels"] == 0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_sections_for_cuda_measure_a_device(tmp_path: Path) -> None:
    """On a GPU, launching, memory, faults and priorities are measured on the device; nothing fails."""
    output = tmp_path / "bench.json"
    sections = "bare,launch,plan,priority,memory,nan,out-of-memory"
    completed(output, "--models", "sd15", "--sections", sections, device="cuda")
    found = {each["section"]: each["figures"] for each in records(output)}
    assert found["launch"]["device_ms"] > 0
    assert 0 < found["memory"]["weights_gib"] <= found["memory"]["peak_1_gib"] <= found["memory"]["peak_8_gib"]
    assert found["out-of-memory"]["oom_other_succeeds"] == found["out-of-memory"]["oom_next_succeeds"] == 1
