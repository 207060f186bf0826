"""Suggestions for unknown fields."""

from __future__ import annotations

import pytest

from calotype.v1 import calotype_pb2 as pb
from calotype_server.api.field_names import SYNONYMS
from calotype_server.transport.http.openai_models import ImagesRequest
from calotype_server.transport.http.parsing import parse, parse_message, parse_query
from calotype_server.transport.http.schema import request_model


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("steps", "step_count"),
        ("num_inference_steps", "step_count"),
        ("numInferenceSteps", "step_count"),
        ("stepCount", "step_count"),
        ("cfg_scale", "guidance_scale"),
        ("guidanceScale", "guidance_scale"),
        ("sampler_name", "scheduler"),
        ("sampler", "scheduler"),
        ("width", "width_px"),
        ("height", "height_px"),
        ("negativePrompt", "negative_prompt"),
        ("negative_promt", "negative_prompt"),
        ("lora", "loras"),
        ("format", "output"),
        ("preview.maxEdge", "max_edge_px"),
    ],
)
def test_a_name_of_another_program_is_explained(given: str, meant: str) -> None:
    """The violation of an unknown field names the field that is probably meant, in bodies and in queries."""
    outer, _, inner = given.partition(".")
    body = {outer: {inner: 1}} if inner else {outer: 1}
    for parsed in (parse_message(pb.GenerateRequest, body), parse_query(pb.GenerateRequest, {given: "1"})):
        ((field, description),) = [(each.field, each.description) for each in parsed.violations]
        assert (field, description) == (given, f"is unknown; did you mean {meant}?")


@pytest.mark.parametrize(
    ("given", "meant"),
    [("width", "size"), ("num_images", "n"), ("steps", "step_count"), ("batch_size", "n"), ("cfg", "guidance_scale")],
)
def test_openais_fields_are_suggested_on_its_route(given: str, meant: str) -> None:
    """On OpenAI's route the suggestion is a field of that route."""
    (violation,) = parse(ImagesRequest, {given: 1}).violations
    assert violation.description == f"is unknown; did you mean {meant}?"


@pytest.mark.parametrize("given", ["strength", "num_images", "x" * 10_000, "\ud800", "preview.odd.odder", "loras.9.z"])
def test_other_fields_get_no_suggestion(given: str) -> None:
    """A name like no field of the request is only unknown."""
    parsed = parse_query(pb.GenerateRequest, {given: "1"})
    assert not any("did you mean" in each.description for each in parsed.violations)


def test_fields_within_lists_are_suggested() -> None:
    """The path to a field may lead through a list."""
    (violation,) = parse_message(pb.GenerateRequest, {"loras": [{"name": "a", "scales": 1}]}).violations
    assert violation.description == "is unknown; did you mean scale?"


def test_every_suggestion_exists() -> None:
    """Each synonym leads to a field of at least one route."""
    fields = {*request_model(pb.GenerateRequest).model_fields, *ImagesRequest.model_fields}
    assert {field for meant in SYNONYMS.values() for field in meant} <= fields
