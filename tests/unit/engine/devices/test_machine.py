"""The facts about a machine that decide how fast a model runs on it."""

import json
import os
from types import SimpleNamespace

import pytest
import torch

from calotype_server.engine import machine
from calotype_server.engine.machine import machine_facts

CPU = torch.device("cpu")


def test_facts_are_plain_values():
    """The facts can be stored as JSON, and name the CPU and the number of threads."""
    facts = machine_facts(CPU)
    assert json.loads(json.dumps(facts)) == facts
    assert facts["cpu"]
    assert facts["torch_threads"] == torch.get_num_threads()
    assert "gpu" not in facts


def test_the_affinity_counts(monkeypatch):
    """A process that may use three cores reports three."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 2, 5}, raising=False)
    assert machine_facts(CPU)["usable_cores"] == 3


def test_the_quota_of_a_container_counts(tmp_path, monkeypatch):
    """The CPU limit of the container is part of the facts."""
    quota = tmp_path / "cpu.max"
    quota.write_text("200000 100000\n")
    monkeypatch.setattr(machine, "_CPU_QUOTA", quota)
    assert machine_facts(CPU)["cpu_quota"] == "200000 100000"


def test_the_cpu_has_a_name_on_every_system(tmp_path, monkeypatch):
    """Without /proc/cpuinfo the platform module names the CPU."""
    monkeypatch.setattr(machine, "_CPU_INFO", tmp_path / "missing")
    assert machine_facts(CPU)["cpu"]


@pytest.mark.parametrize(
    ("device", "expected"), [("cuda:1", ["H200", 141, 132]), ("xpu:1", ["B580", 12, 160]), ("mps", ["mps", 48])]
)
def test_every_gpu_is_part_of_the_facts(device, expected, monkeypatch):
    """A plan that was measured on one GPU is not used on another: the facts name the selected one."""
    cards = {
        torch.device("cuda", 1): SimpleNamespace(name="H200", total_memory=141, multi_processor_count=132),
        torch.device("xpu", 1): SimpleNamespace(name="B580", total_memory=12, gpu_eu_count=160),
    }
    monkeypatch.setattr(torch.cuda, "get_device_properties", cards.__getitem__)
    monkeypatch.setattr(torch.xpu, "get_device_properties", cards.__getitem__)
    monkeypatch.setattr(torch.mps, "recommended_max_memory", lambda: 48)
    assert machine_facts(torch.device(device))["gpu"] == expected


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_gpu_counts():
    """On CUDA the facts name the GPU."""
    assert machine_facts(torch.device("cuda", 0))["gpu"][0] == torch.cuda.get_device_name(0)
