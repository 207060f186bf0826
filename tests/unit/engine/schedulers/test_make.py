"""The schedulers of requests are copies: each choice is made once for a model's own scheduler."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import diffusers
import pytest
import torch

from calotype_server.engine.schedulers.make import make_scheduler
from calotype_server.types import Sigmas, TimestepSpacing

CHOICES: list[tuple[Any, ...]] = [
    ("DPM2",),
    ("DPM2", Sigmas.KARRAS),
    ("KDPM2DiscreteScheduler",),
    ("KDPM2DiscreteScheduler", None, TimestepSpacing.TRAILING),
]


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Every KDPM2 that is made, which takes 0.2 s with 1000 timesteps."""
    found: list[Any] = []
    make = diffusers.KDPM2DiscreteScheduler.__init__

    def counted(self: Any, *args: Any, **options: Any) -> None:
        found.append(options)
        make(self, *args, **options)

    counted.__wrapped__ = make  # type: ignore[attr-defined]
    monkeypatch.setattr(diffusers.KDPM2DiscreteScheduler, "__init__", counted)
    return found


def pipeline_of(own: Any) -> Any:
    """Returns as much of a pipeline as is needed to make schedulers."""
    return SimpleNamespace(scheduler=own)


def levels(scheduler: Any) -> list[float]:
    """Returns the noise levels of four steps."""
    scheduler.set_timesteps(4)
    return scheduler.sigmas.tolist()


def test_a_choice_is_made_once_and_copied(made: list[Any]) -> None:
    """Requests with the same choice get copies of one scheduler; a step with one does not change the others."""
    pipeline = pipeline_of(diffusers.EulerDiscreteScheduler(num_train_timesteps=100))
    for choice in CHOICES:
        first, second = make_scheduler(pipeline, *choice), make_scheduler(pipeline, *choice)
        expected = levels(second)
        assert levels(first) == expected
        sample = torch.ones(1, 4, 2, 2)
        first.step(sample, first.timesteps[0], sample)
        assert (first.state_in_first_order, second.state_in_first_order) == (False, True)
        assert levels(make_scheduler(pipeline, *choice)) == expected
    assert len(made) == len(CHOICES)


def test_each_own_scheduler_has_its_choices(made: list[Any]) -> None:
    """A choice depends on the config of the model's own scheduler."""
    own = [diffusers.EulerDiscreteScheduler(num_train_timesteps=100, beta_end=end) for end in (0.01, 0.02)]
    assert levels(make_scheduler(pipeline_of(own[0]), "DPM2")) != levels(make_scheduler(pipeline_of(own[1]), "DPM2"))
    assert len(made) == 2
    assert [options["beta_end"] for options in made] == [0.01, 0.02]
