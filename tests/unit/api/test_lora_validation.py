"""The LoRAs of a request: valid ones, or every violation."""

from __future__ import annotations

from dataclasses import replace

import pytest

from calotype.v1 import calotype_pb2 as pb
from calotype_server.api.validation import validate
from calotype_server.errors import InvalidRequest
from calotype_server.types import Lora
from support.engine.fake_engine import MODEL
from support.service import LIMITS

MODEL = replace(MODEL, loras=("a", "b", *(f"n{number}" for number in range(8))))


def request(*loras: tuple[str, float | None]) -> pb.GenerateRequest:
    """Returns a request with LoRAs."""
    return pb.GenerateRequest(prompt="a cat", loras=[pb.Lora(name=name, scale=scale) for name, scale in loras])


def violations(*loras: tuple[str, float | None], model=MODEL) -> list[tuple[str, str]]:
    """Returns the fields that validation rejects, with their descriptions."""
    with pytest.raises(InvalidRequest) as caught:
        validate(request(*loras), model, LIMITS)
    return [(violation.field, violation.description) for violation in caught.value.violations]


def test_loras_are_taken_over() -> None:
    """The job has the LoRAs in the order of the request; the default of a scale is 1, and 0 stays 0."""
    job, _ = validate(request(("b", None), ("a", -10), ("n0", 0), ("n1", 10)), MODEL, LIMITS)
    assert job.loras == (Lora("b", 1.0), Lora("a", -10), Lora("n0", 0), Lora("n1", 10))
    assert validate(request(), MODEL, LIMITS)[0].loras == ()


def test_every_violation_is_named() -> None:
    """An unknown name lists the known ones; scales out of range and repeated names are named too."""
    found = violations(("x" * 100, 1), ("a", 10.5), ("a", 1), ("", float("nan")))
    assert [field for field, _ in found] == [
        "loras.0.name",
        "loras.1.scale",
        "loras.2.name",
        "loras.3.name",
        "loras.3.scale",
    ]
    assert "must be one of a, b, n0" in found[0][1]
    assert "x" * 81 not in found[0][1]
    assert "-10 to 10" in found[1][1]
    assert "twice" in found[2][1]


def test_number_of_loras() -> None:
    """A request has at most 8 LoRAs."""
    assert len(validate(request(*((f"n{number}", 1) for number in range(8))), MODEL, LIMITS)[0].loras) == 8
    assert violations(*((f"n{number}", 1) for number in range(8)), ("a", 1)) == [
        ("loras", "has 9 entries, the maximum is 8")
    ]


def test_a_server_without_loras() -> None:
    """The caller learns that the operator can load some."""
    ((field, description),) = violations(("a", 1), model=replace(MODEL, loras=()))
    assert field == "loras"
    assert "--lora" in description
