"""`--accelerate` from the engine's point of view: which runtime a model gets, and what is reported."""

import dataclasses
import sys
import types

import pytest

from calotype_server.engine.assembly import build_engine
from calotype_server.engine.capabilities import Defaults
from calotype_server.engine.runtime import graphs
from calotype_server.observability.events import AcceleratorActive
from support.engine import tiny
from support.engine.graph_backend import RecordingBackend
from support.engine.runtimes import AlteredRuntime
from support.runs import JOB, STEPS, Run


@pytest.fixture
def open_engine(tmp_path, monkeypatch):
    """Builds engines with a double of the CUDA graphs runtime; returns the engine, the double and observations."""
    opened = []

    def open_one(pipeline=None, alter=lambda answer, _: answer, accelerate="graphs", **options):
        made, observed = [], []

        def make(module, **given):
            made.append(AlteredRuntime(module, alter=alter, **given))
            return made[0]

        module = types.SimpleNamespace(GraphsRuntime=make)
        monkeypatch.setitem(sys.modules, "calotype_server.engine.runtime.graphs", module)
        engine = build_engine(
            "tiny",
            pipeline or tiny.build("sd15"),
            defaults=Defaults(),
            cache_dir=tmp_path,
            accelerate=accelerate,
            observe=observed.append,
            **{"max_active": 4, "max_rows": 6, "threads": 1, **options},
        )
        opened.append(engine)
        return engine, made, [each.name for each in observed if isinstance(each, AcceleratorActive)], observed

    yield open_one
    for engine in opened:
        engine.close()


@pytest.mark.parametrize("accelerate", ["auto", "none"])
def test_the_default_is_plain_calls(open_engine, accelerate):
    """Without a choice of the operator no accelerator is even created."""
    engine, made, active, _ = open_engine(accelerate=accelerate)
    assert (engine.model.accelerator, engine.model.accelerator_fallback, active) == ("none", "", ["none"])
    assert not made


def test_every_number_of_rows_is_prepared_before_the_server_is_ready(open_engine):
    """The accelerator computes all row counts of default requests at load, and then learns that loading has ended."""
    engine, (runtime,), active, _ = open_engine()
    assert (engine.model.accelerator, engine.model.accelerator_fallback, active) == ("graphs", "", ["graphs"])
    assert {2, 4, 6} <= set(runtime.rows)
    assert not runtime.loading
    del runtime.rows[:]
    Run(engine)(JOB)
    assert runtime.rows


def test_a_wrong_accelerator_is_reported(open_engine):
    """The model has the reason for which plain calls are used."""
    engine, _, active, _ = open_engine(alter=lambda answer, _: (answer[0] * 2,))
    assert (engine.model.accelerator, active) == ("none", ["none"])
    assert "differ" in engine.model.accelerator_fallback


def test_a_lone_generation_uses_the_accelerator(open_engine):
    """With `--max-active 1` too, the accelerator computes every call."""
    engine, (runtime,), _, _ = open_engine(max_active=1)
    assert (engine.model.accelerator, engine.model.accelerator_fallback) == ("graphs", "")
    del runtime.rows[:]
    Run(engine)(JOB)
    assert runtime.rows == [2] * STEPS


def test_a_model_that_keeps_state_gets_no_accelerator(open_engine):
    """A pipeline that must call its denoiser itself uses plain calls, and the reason is reported."""
    pipeline = tiny.build("sd15")
    pipeline.unet.is_cache_enabled = True
    engine, made, _, _ = open_engine(pipeline=pipeline)
    assert engine.model.accelerator == "none"
    assert "cache" in engine.model.accelerator_fallback
    assert not made


def test_a_failure_while_running_is_reported(open_engine):
    """The image is finished with plain calls; the model and the metrics report the change."""
    failing = []

    def alter(answer, _):
        if failing:
            raise RuntimeError
        return answer

    engine, _, _, observed = open_engine(alter=alter)
    expected = Run(engine)(JOB)
    failing.append(1)
    assert Run(engine)(JOB) == expected
    assert (engine.model.accelerator, engine.model.accelerator_fallback) == ("none", "The accelerator graphs failed.")
    assert [each.name for each in observed if isinstance(each, AcceleratorActive)] == ["graphs", "none"]


def test_a_deterministic_server_prepares_one_number_of_rows(open_engine):
    """Every batch of a deterministic server has the same number of rows."""
    engine, (runtime,), _, _ = open_engine(deterministic=True)
    del runtime.rows[:]
    Run(engine)(JOB)
    assert set(runtime.rows) == {6}


@pytest.mark.parametrize("deterministic", [False, True])
def test_graphs_are_captured_while_the_model_loads(tmp_path, monkeypatch, deterministic):
    """When the server is ready, every number of rows of default requests has its graph, and requests replay them."""
    backend = RecordingBackend()
    monkeypatch.setattr(graphs, "CudaBackend", lambda _: backend)
    monkeypatch.setattr(graphs, "_cuda_device", lambda _: None)
    pictures = {}
    for accelerate in ("none", "graphs"):
        engine = build_engine(
            "tiny",
            tiny.build("sd15"),
            defaults=Defaults(),
            cache_dir=tmp_path,
            accelerate=accelerate,
            max_active=4,
            max_rows=6,
            threads=1,
            deterministic=deterministic,
        )
        assert (engine.model.accelerator, engine.model.accelerator_fallback) == (accelerate, "")
        captured = backend.counts["capture"]
        job = dataclasses.replace(JOB, width=engine.model.width, height=engine.model.height)
        pictures[accelerate] = Run(engine)(job)
        assert backend.counts["capture"] == captured
        engine.close()
    assert len(backend.graphs) == (1 if deterministic else 3)
    assert backend.counts["replay"] >= STEPS
    assert pictures["graphs"] == pictures["none"]
