"""The denoiser on OpenVINO: the model's answers, for every number of rows and every size."""

import importlib.util
import os
import sys
from typing import Any

import pytest
import torch

if importlib.util.find_spec("openvino") is None:  # not `importorskip`, which would import it before its guard
    pytest.skip("needs calotype[openvino]", allow_module_level=True)

from calotype_server.engine.capabilities import Defaults, describe
from calotype_server.engine.requests.sample_calls import sample_calls
from calotype_server.engine.runtime import openvino as openvino_module
from calotype_server.engine.runtime.check import answers, difference, is_deterministic, joinable
from calotype_server.engine.runtime.compare import compare
from calotype_server.engine.runtime.eager import EagerRuntime
from calotype_server.engine.runtime.openvino import OpenVinoRuntime
from calotype_server.engine.runtime.openvino_cache import load_traced, save_traced
from support.engine import tiny

pytestmark = pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A cache that all tests of this module share, so that the model is traced once."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def calls():
    """Arguments of calls of the tiny UNet."""
    pipeline = tiny.shared("sd15")
    return sample_calls(pipeline, describe("sd15", pipeline, Defaults(step_count=3)))


@pytest.fixture
def runtime(folder):
    """The tiny UNet on OpenVINO."""
    return OpenVinoRuntime(tiny.shared("sd15").unet, exact=False, cache_dir=folder)


def resized(runtime, call, edge):
    """Returns the same call for latents of another size."""
    latents = torch.randn(call.rows, 4, edge, edge, generator=torch.Generator().manual_seed(3))
    return runtime.collator.bind((latents, *call.args[1:]), call.kwargs, {})


def same(answer, expected):
    """Whether answers are equal up to rounding."""
    error, tolerance = compare(answer, expected)
    return error <= tolerance


@torch.no_grad()
def test_answers_equal_the_models(runtime, calls, monkeypatch):
    """Calls alone and joined get the model's answers, after the first one without the model."""
    eager = EagerRuntime(runtime.module)
    assert difference(runtime, eager, calls) is None
    group = joinable(eager, calls)[:2]
    expected = eager.run(group, 4)
    monkeypatch.setattr(OpenVinoRuntime, "_eager", lambda *_: pytest.fail("a plain call"))
    assert same(runtime.run(group, 4), expected)


@torch.no_grad()
def test_no_later_call_overwrites_an_answer(runtime, calls):
    """Answers are views for several requests, which read them while the next batch is computed."""
    first, *_, last = joinable(runtime, calls)
    answer = runtime.run([first], first.rows)[0]
    before = answer.clone()
    runtime.run([last], last.rows)
    assert torch.equal(answer, before)


@torch.no_grad()
def test_float_timesteps_use_the_same_trace(runtime, calls, monkeypatch):
    """Some schedulers have fractional timesteps, others whole ones."""
    (latents, timestep), kwargs = calls[0]
    whole, float_ = (runtime.collator.bind((latents, each), kwargs, {}) for each in (timestep, timestep.float()))
    runtime.run([whole], whole.rows)
    runtime.end_loading()
    monkeypatch.setattr(OpenVinoRuntime, "_eager", lambda *_: pytest.fail("a plain call"))
    assert torch.equal(runtime.run([whole], whole.rows)[0], runtime.run([float_], float_.rows)[0])


@torch.no_grad()
def test_sizes_that_a_trace_gets_wrong_run_eagerly(runtime, calls, logs):
    """Latents that the UNet cannot halve evenly need another branch: they get the model's answers, with one warning."""
    call = runtime.collator.bind(*calls[0], {})
    runtime.run([call], call.rows)
    runtime.end_loading()
    eager = EagerRuntime(runtime.module)
    for edge in (4, 7, 7):
        other = resized(runtime, call, edge)
        assert same(runtime.run([other], other.rows), eager.run([other], other.rows))
    assert [line["event"] for line in logs] == ["OpenVINO cannot compute this size, which runs eagerly"]


@torch.no_grad()
def test_unknown_arguments_run_eagerly_after_loading(runtime, calls, monkeypatch):
    """A structure that did not occur at load is not traced while requests wait."""
    call = runtime.collator.bind(*calls[0], {})
    runtime.run([call], call.rows)
    runtime.end_loading()
    monkeypatch.setattr(openvino_module, "_trace", lambda *_: pytest.fail("traced"))
    other = runtime.collator.bind(call.args, {**call.kwargs, "return_dict": True}, digests={})
    assert torch.is_tensor(runtime.run([other], other.rows).sample)


@torch.no_grad()
def test_a_deterministic_server_gets_equal_bits(folder, calls):
    """With batches of one size, an answer does not depend on the other rows."""
    runtime = OpenVinoRuntime(tiny.shared("sd15").unet, exact=True, cache_dir=folder)
    assert is_deterministic(runtime, joinable(runtime, calls), 8)


@pytest.mark.slow
@torch.no_grad()
def test_the_second_start_does_not_trace(folder, calls, monkeypatch):
    """The traced model is on disk; a damaged file is traced again."""
    module = tiny.shared("sd15").unet
    first = OpenVinoRuntime(module, exact=False, cache_dir=folder)
    args, kwargs = calls[0]
    call = first.collator.bind(args, kwargs, {})
    expected = first.run([call], call.rows)
    traced = []
    trace = openvino_module._trace
    monkeypatch.setattr(openvino_module, "_trace", lambda *given: traced.append(1) or trace(*given))
    assert same(OpenVinoRuntime(module, exact=False, cache_dir=folder).run([call], call.rows), expected)
    assert not traced
    for file in (folder / "openvino").glob("*/model.bin"):
        file.write_bytes(bytes(file.stat().st_size))
    again = OpenVinoRuntime(module, exact=False, cache_dir=folder)
    assert same(again.run([call], call.rows), expected)
    assert traced


@torch.no_grad()
def test_freed_models_are_compiled_again(runtime, calls):
    """`free_memory` drops the compiled models once; the next call works as before."""
    group = joinable(runtime, calls)
    before = answers(runtime, group)
    assert runtime.free_memory()
    assert not runtime.free_memory()
    assert all(same(a, b) for a, b in zip(answers(runtime, group), before, strict=True))


@pytest.mark.slow
@torch.no_grad()
def test_the_number_of_models_for_one_shape_is_bounded(runtime, calls):
    """Weights are copied for each; without room, the model for all shapes is used."""
    runtime._fixed_models = 1
    group = joinable(runtime, calls)
    for count in (1, 2, 4):
        runtime.run(group[:1] * count, group[0].rows * count)
    (structure,) = runtime._structures.values()
    assert sorted(shapes is None for _, shapes in structure._compiled) == [False, True]


def test_other_number_formats_are_rejected(tmp_path):
    """OpenVINO would compute in float32 what the model computes in another format."""
    with pytest.raises(ValueError, match="float32"):
        OpenVinoRuntime(torch.nn.Linear(2, 2).bfloat16(), exact=False, cache_dir=tmp_path)


def test_openvino_reports_nothing():
    """The package by which OpenVINO reports its use is never imported."""
    assert sys.modules["openvino_telemetry"] is None


def test_cached_models_that_nothing_uses_are_removed(tmp_path):
    """A new model replaces those of old versions, and what a killed process left; used ones stay."""
    openvino: Any = vars(openvino_module)["openvino"]  # imported behind its guard
    number = openvino.opset13.parameter([1], dtype=openvino.Type.f32)
    model = openvino.Model([openvino.opset13.relu(number)], [number], "model")
    paths = [tmp_path / "openvino" / name for name in ("old", "used", "new")]
    for path in paths[:2]:
        save_traced(path, model)
    (tmp_path / "openvino" / "tmp123").mkdir()
    for each in (tmp_path / "openvino").iterdir():
        os.utime(each, (0, 0))
    assert load_traced(openvino.Core(), paths[1]) is not None
    save_traced(paths[2], model)
    assert sorted((tmp_path / "openvino").iterdir()) == sorted(paths[1:])
