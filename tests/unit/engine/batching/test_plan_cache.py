"""Batching plans on disk: found by everything they depend on, and measured again if unusable."""

import dataclasses
import errno
import json
import math
import os
from pathlib import Path

import pytest
import torch

from calotype_server.engine import disk_cache
from calotype_server.engine.assembly import build_engine
from calotype_server.engine.batching import measure, plan, plan_cache
from calotype_server.engine.batching.measure import Threads
from calotype_server.engine.batching.plan import Plan, PlanOptions
from calotype_server.engine.batching.plan_cache import find_plan, load_plan, plan_facts, plan_path, save_plan
from calotype_server.engine.capabilities import Defaults, describe
from calotype_server.engine.machine import machine_facts
from calotype_server.engine.runtime.eager import EagerRuntime
from calotype_server.types import PreviewMethod
from support.engine import tiny
from support.engine.runtimes import AlteredRuntime

PLAN = Plan(8, 16, "", Threads(1, 2, 4))
OPTIONS = PlanOptions(max_active=None)
FACTS = {"format": 1, "weights": "abc"}


@pytest.fixture
def pipeline():
    """A pipeline that a test may change."""
    return tiny.build("sd15")


@pytest.fixture
def measured(monkeypatch):
    """Replaces the measurement, and returns the list of measured pipelines."""
    pipelines = []
    monkeypatch.setattr(plan_cache, "measure_plan", lambda pipeline, *_: pipelines.append(pipeline) or PLAN)
    return pipelines


def key(pipeline, options=OPTIONS, **changes):
    """Returns the file name of the plan of a pipeline whose description has these changes."""
    model = dataclasses.replace(describe("tiny", pipeline, Defaults()), **changes)
    return plan_path(Path("cache"), plan_facts(pipeline, model, options))


def find(pipeline, folder, options=OPTIONS, **others):
    """Returns the plan of a pipeline."""
    runtime = EagerRuntime(pipeline.unet)
    return find_plan(pipeline, describe("tiny", pipeline, Defaults()), options, runtime, cache_dir=folder, **others)


class TestFile:
    """A plan is written completely or not at all, and anything unusable counts as missing."""

    @pytest.mark.parametrize(
        "stored",
        [
            PLAN,
            Plan(2, 1, "Its rows depend on each other.", Threads(1, 1, math.inf)),
            Plan(1, 0, "The server was started with --max-active 1.", Threads(1, 8, math.inf)),
        ],
    )
    def test_a_saved_plan_is_loaded_unchanged(self, tmp_path, stored):
        """Every kind of plan is the same after a round trip, and no temporary file remains."""
        path = tmp_path / "new" / "plan.json"
        save_plan(path, FACTS, stored)
        assert load_plan(path, FACTS) == stored
        assert [file.name for file in path.parent.iterdir()] == ["plan.json"]

    def test_a_missing_file_is_not_logged(self, tmp_path, logs):
        """Without a file there is no plan, and nothing to warn about."""
        assert load_plan(tmp_path / "plan.json", FACTS) is None
        assert logs == []

    @pytest.mark.parametrize(
        "damage",
        [
            lambda _: "",
            lambda text: text[:-20],
            lambda _: "[]",
            lambda _: "\x00" * 50,
            lambda text: text.replace('"max_active": 8', '"max_active": 9'),
            lambda text: text.replace('"weights": "abc"', '"weights": "xyz"'),
        ],
        ids=["empty", "truncated", "not a plan", "zeros", "changed plan", "changed facts"],
    )
    def test_a_damaged_file_is_ignored_with_one_warning(self, tmp_path, logs, damage):
        """Damage gives no plan and one warning with the path; saving repairs the file."""
        path = tmp_path / "plan.json"
        save_plan(path, FACTS, PLAN)
        path.write_text(damage(path.read_text()))
        assert load_plan(path, FACTS) is None
        assert [(entry["log_level"], entry["path"]) for entry in logs] == [("warning", str(path))]
        save_plan(path, FACTS, PLAN)
        assert load_plan(path, FACTS) == PLAN

    @pytest.mark.parametrize(
        "change",
        [
            {"max_active": 0},
            {"max_active": True},
            {"max_rows": -1},
            {"max_rows": 2.5},
            {"reason": None},
            {"threads": {"few": 0, "many": 1, "from_rows": None}},
            {"threads": {"few": 1, "many": 1, "from_rows": 0}},
            {"threads": None},
        ],
    )
    def test_invalid_values_are_ignored(self, tmp_path, logs, change):
        """A file with a correct checksum and impossible values gives no plan and one warning."""
        path = tmp_path / "plan.json"
        save_plan(path, FACTS, PLAN)
        content = json.loads(path.read_text())
        content["plan"] |= change
        content["checksum"] = disk_cache.facts_hash([content["facts"], content["plan"]])
        path.write_text(json.dumps(content))
        assert load_plan(path, FACTS) is None
        assert [entry["log_level"] for entry in logs] == ["warning"]

    def test_a_file_for_other_facts_is_ignored(self, tmp_path, logs):
        """A file that was copied from another model or machine gives no plan and one warning."""
        path = tmp_path / "plan.json"
        save_plan(path, {**FACTS, "weights": "of another model"}, PLAN)
        assert load_plan(path, FACTS) is None
        assert [entry["log_level"] for entry in logs] == ["warning"]

    def test_an_unreadable_file_is_ignored(self, tmp_path, logs):
        """A folder in place of the file gives no plan and one warning."""
        path = tmp_path / "plan.json"
        path.mkdir()
        assert load_plan(path, FACTS) is None
        assert [entry["log_level"] for entry in logs] == ["warning"]

    def test_a_failed_write_leaves_no_file(self, tmp_path, logs, monkeypatch):
        """If the disk is full at the last moment, neither a plan nor a temporary file remains."""

        def fail(source, target):
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(os, "replace", fail)
        save_plan(tmp_path / "plan.json", FACTS, PLAN)
        assert [entry["log_level"] for entry in logs] == ["warning"]
        assert list(tmp_path.iterdir()) == []


class TestKey:
    """A change of anything that a plan depends on leads to another file."""

    def test_the_same_model_has_the_same_key(self):
        """Two pipelines with the same weights share a plan."""
        assert key(tiny.build("sd15")) == key(tiny.build("sd15"))

    @pytest.mark.parametrize("place", [0, -1])
    def test_weights(self, pipeline, place):
        """A change at either end of a weight tensor changes the key."""
        before = key(pipeline)
        with torch.no_grad():
            pipeline.unet.conv_out.weight.view(-1)[place] += 1e-3
        assert key(pipeline) != before

    def test_config(self, pipeline):
        """A change of the denoiser's config changes the key."""
        before = key(pipeline)
        pipeline.unet.register_to_config(act_fn="gelu")
        assert key(pipeline) != before

    @pytest.mark.parametrize(
        "change",
        [
            {"device": "meta"},
            {"dtype": "bfloat16"},
            {"width": 128},
            {"height": 128},
            {"step_count": 9},
            {"guidance_scale": 1.0},
            {"scheduler": "EulerDiscreteScheduler"},
        ],
    )
    def test_description(self, pipeline, change):
        """Device, dtype and everything that shapes a default request change the key."""
        assert key(pipeline, **change) != key(pipeline)

    @pytest.mark.parametrize("change", [{"max_active": 4}, {"max_rows": 4}, {"threads": 3}, {"deterministic": True}])
    def test_options(self, pipeline, change):
        """Each of the operator's settings changes the key."""
        assert key(pipeline, dataclasses.replace(OPTIONS, **change)) != key(pipeline)

    @pytest.mark.parametrize("name", ["cpu", "cores", "usable_cores", "cpu_quota", "torch_threads", "gpu"])
    def test_machine(self, pipeline, monkeypatch, name):
        """Each fact about the machine changes the key."""
        before, facts = key(pipeline), machine_facts(torch.device("cpu"))
        monkeypatch.setattr(plan_cache, "machine_facts", lambda _: {**facts, name: "something else"})
        assert key(pipeline) != before

    @pytest.mark.parametrize("target", ["__version__", "torch.__version__", "diffusers.__version__", "_FORMAT"])
    def test_versions(self, pipeline, monkeypatch, target):
        """The versions of Calotype, torch and diffusers, and the file format, change the key."""
        before = key(pipeline)
        monkeypatch.setattr(f"calotype_server.engine.batching.plan_cache.{target}", "0.0.0")
        assert key(pipeline) != before

    def test_a_reason_to_run_alone(self, pipeline):
        """A denoiser with a cache between steps has another key than without."""
        before = key(pipeline)
        pipeline.unet.is_cache_enabled = True
        assert key(pipeline) != before

    def test_the_home_folder_is_expanded(self, tmp_path, monkeypatch):
        """`~` in the cache folder means the user's home."""
        monkeypatch.setenv("HOME", str(tmp_path))
        assert plan_path(Path("~/cache"), FACTS).is_relative_to(tmp_path / "cache")


class TestFindPlan:
    """The first start measures, later starts load."""

    def test_the_second_start_measures_nothing(self, pipeline, tmp_path, measured, logs):
        """The plan of the first start is returned again, and the log says which one was measured."""
        assert find(pipeline, tmp_path) == find(tiny.build("sd15"), tmp_path) == PLAN
        assert measured == [pipeline]
        assert [entry["event"] for entry in logs] == ["batching plan measured", "batching plan loaded"]
        assert {entry["log_level"] for entry in logs} == {"info"}

    def test_measure_again_replaces_the_plan(self, pipeline, tmp_path, measured, monkeypatch):
        """With the flag the cached plan is ignored, and later starts load the new one."""
        find(pipeline, tmp_path)
        new = dataclasses.replace(PLAN, max_rows=4)
        monkeypatch.setattr(plan_cache, "measure_plan", lambda *_: new)
        assert find(pipeline, tmp_path) == PLAN
        assert find(pipeline, tmp_path, measure_again=True) == new
        assert find(pipeline, tmp_path) == new

    def test_a_provisional_plan_is_not_stored(self, pipeline, tmp_path, monkeypatch):
        """A plan that an error decided is measured again at the next start."""
        monkeypatch.setattr(plan_cache, "measure_plan", lambda *_: dataclasses.replace(PLAN, provisional=True))
        find(pipeline, tmp_path)
        assert list(tmp_path.rglob("*.json")) == []

    def test_a_plan_of_an_accelerator_that_failed_meanwhile_is_not_stored(self, pipeline, tmp_path, monkeypatch):
        """Plain calls were measured, and the next start may use the accelerator again."""
        runtime = AlteredRuntime(pipeline.unet)

        def measure(*_):
            runtime.name = "none"
            return PLAN

        monkeypatch.setattr(plan_cache, "measure_plan", measure)
        model = describe("tiny", pipeline, Defaults())
        assert find_plan(pipeline, model, OPTIONS, runtime, cache_dir=tmp_path) == PLAN
        assert list(tmp_path.rglob("*.json")) == []

    def test_a_folder_that_cannot_be_written_is_no_error(self, pipeline, tmp_path, measured, logs):
        """Without a usable folder every start measures, with one warning each."""
        obstacle = tmp_path / "file"
        obstacle.write_text("not a folder")
        assert find(pipeline, obstacle) == find(pipeline, obstacle) == PLAN
        assert len(measured) == 2
        assert [entry["log_level"] for entry in logs] == ["info", "warning"] * 2

    def test_a_read_only_folder_is_still_read(self, pipeline, tmp_path, measured, monkeypatch, logs):
        """A plan in a read-only folder is loaded, and the folder is not written to."""
        find(pipeline, tmp_path)
        monkeypatch.setattr(disk_cache, "write_atomically", lambda *_, **__: 1 / 0)
        assert find(pipeline, tmp_path) == PLAN
        assert len(measured) == 1

    def test_weights_without_fingerprint_are_measured(self, pipeline, tmp_path, measured, monkeypatch, logs):
        """If the weights cannot be identified, every start measures, with one warning."""
        monkeypatch.setattr(plan_cache, "weights_fingerprint", lambda _: 1 / 0)
        assert find(pipeline, tmp_path) == PLAN
        assert [entry["log_level"] for entry in logs] == ["warning"]

    def test_nothing_is_stored_if_nothing_is_measured(self, pipeline, tmp_path):
        """`--max-active 1` with a given number of threads needs no measurement, and so no file."""
        plan = find(pipeline, tmp_path, PlanOptions(max_active=1, threads=1))
        assert (plan.max_active, plan.max_rows) == (1, 1)
        assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("options", [{}, {"deterministic": True}, {"max_active": 1}])
def test_the_second_engine_calls_no_measurement(tmp_path, monkeypatch, options):
    """The second engine on the same model calls no measuring function, and has the same plan."""
    before = torch.get_num_threads()

    def start():
        torch.set_num_threads(2)
        options_ = {"max_active": None, **options}
        engine = build_engine(
            "tiny",
            tiny.build("sd15"),
            defaults=Defaults(),
            cache_dir=tmp_path,
            preview_methods={PreviewMethod.FULL_VAE},
            **options_,
        )
        engine.close()
        return engine.model, engine._parts.threads

    try:
        first = start()
        for module, name in ((measure, "_seconds"), (measure, "_fastest"), (plan, "verify"), (plan, "sample_calls")):
            monkeypatch.setattr(module, name, lambda *_, **__: pytest.fail("measured again"))
        monkeypatch.setattr(plan, "knee", lambda *_, **__: pytest.fail("measured again"))
        assert start() == first
    finally:
        torch.set_num_threads(before)
