"""`--accelerate`: what each accelerator needs, and the comparison with plain calls at load."""

import importlib.util
import shutil
import sys
import types

import pytest
import torch

from calotype_server.engine.runtime.fallback import FallbackRuntime
from calotype_server.engine.runtime.select import check_available, select_runtime
from calotype_server.errors import AcceleratorUnavailable
from support.engine.batching import Denoiser, sample
from support.engine.runtimes import AlteredRuntime

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
CALLS = [((sample(value), torch.tensor(number)), {}) for number, value in enumerate((1, 2, 3))]


class TestRequirements:
    """A missing device, package or compiler is an error at startup that names the remedy."""

    @pytest.mark.parametrize(
        ("accelerate", "device", "missing", "remedy"),
        [
            ("graphs", CPU, None, "--device"),
            ("openvino", CUDA, None, "--device cpu"),
            ("openvino", CPU, "openvino", "pip install 'calotype[openvino]'"),
            ("compile", CUDA, "triton", "pip install triton"),
            ("compile", CPU, "compiler", "C++ compiler"),
            ("compile", CUDA, "compiler", "C compiler"),
        ],
    )
    def test_missing_parts_are_reported(self, monkeypatch, accelerate, device, missing, remedy):
        """The message has the option and the remedy."""
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == missing else object())
        monkeypatch.setattr(shutil, "which", lambda name: None if missing == "compiler" else name)
        with pytest.raises(AcceleratorUnavailable) as error:
            check_available(accelerate, device)
        assert f"--accelerate {accelerate} needs" in str(error.value) or "computes on the CPU" in str(error.value)
        assert remedy in str(error.value)

    @pytest.mark.parametrize("device", [CPU, CUDA])
    @pytest.mark.parametrize("accelerate", ["auto", "none"])
    def test_auto_and_none_need_nothing(self, monkeypatch, accelerate, device):
        """The default starts on every machine."""
        monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
        monkeypatch.setattr(shutil, "which", lambda _: None)
        check_available(accelerate, device)


class TestComparison:
    """An accelerator is used only if it gives the model's answers."""

    @pytest.fixture
    def selected(self, monkeypatch, tmp_path):
        """Returns a function that selects a runtime whose answers are altered, and the runtime."""

        def select_altered(alter, exact_rows=0):
            made = []

            def make(module, **options):
                made.append(AlteredRuntime(module, alter=alter, **options))
                return made[0]

            # Its module comes from another package, and needs a GPU.
            module = types.SimpleNamespace(GraphsRuntime=make)
            monkeypatch.setitem(sys.modules, "calotype_server.engine.runtime.graphs", module)
            found = select_runtime("graphs", Denoiser(), CALLS, exact_rows=exact_rows, max_rows=8, cache_dir=tmp_path)
            return found, made[0]

        return select_altered

    def test_equal_answers_are_accepted(self, selected):
        """The runtime is compared alone and joined, with several numbers of rows, and then used."""
        found, runtime = selected(lambda answer, _: answer)
        assert isinstance(found.runtime, FallbackRuntime)
        assert (found.runtime.name, found.fallback) == ("graphs", "")
        assert set(runtime.rows) == {1, 2, 3, 4}

    @pytest.mark.parametrize(
        "alter",
        [
            lambda answer, _: (answer[0] * 1.01,),
            lambda answer, rows: (answer[0] * (1.01 if rows == 4 else 1),),
            lambda answer, _: (answer[0] * float("nan"),),
        ],
    )
    def test_other_answers_are_rejected(self, selected, logs, alter):
        """Wrong answers, even for one number of rows only, lead to plain calls, one warning and a reason."""
        found, runtime = selected(alter)
        assert found.runtime.name == "none"
        assert "differ" in found.fallback
        assert [line["log_level"] for line in logs] == ["warning"]
        assert runtime.freed

    def test_an_error_is_rejected(self, selected, logs):
        """An accelerator that raises leads to plain calls; the text of its error stays in the log."""
        found, _ = selected(lambda *_: 1 / 0)
        assert found.runtime.name == "none"
        assert found.fallback == "The accelerator graphs cannot compute this model."
        assert [line["log_level"] for line in logs] == ["warning"]

    def test_a_deterministic_server_needs_equal_bits(self, selected):
        """Answers whose last bits depend on other rows are rejected for a deterministic server only."""

        def alter(answer, _):
            return (answer[0] * (1 + 1e-6 * (answer[0][0, 0] > 4)),)

        assert selected(alter)[0].fallback == ""
        found, _ = selected(alter, exact_rows=4)
        assert found.runtime.name == "none"
        assert "last bits" in found.fallback

    def test_a_rejected_accelerator_that_cannot_clean_up(self, selected, monkeypatch):
        """The server starts all the same."""
        monkeypatch.setattr(AlteredRuntime, "clear", lambda _: 1 / 0)
        found, _ = selected(lambda answer, _: (answer[0] * 2,))
        assert found.runtime.name == "none"
