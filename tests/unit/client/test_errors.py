"""Statuses and error messages are converted to typed exceptions."""

import pickle

import grpc
import pytest
from google.protobuf.any_pb2 import Any
from google.rpc.status_pb2 import Status

import calotype
from calotype import CalotypeError, Client, InvalidRequest, Overloaded, StreamIncomplete, Violation
from calotype._errors import BY_CODE
from calotype._status import from_error_message, from_status
from calotype.testing import FakeServer
from calotype.v1 import calotype_pb2 as v1

CODES = [code for code in grpc.StatusCode if code is not grpc.StatusCode.OK]


def test_each_code_has_its_class():
    """Each of the 16 codes has its own public class with that code."""
    assert set(BY_CODE) == {code.value[0] for code in CODES}
    assert len(set(BY_CODE.values())) == 16
    for code in CODES:
        kind = BY_CODE[code.value[0]]
        assert kind.code == code.name
        assert getattr(calotype, kind.__name__) is kind


@pytest.mark.parametrize("code", CODES, ids=lambda code: code.name)
def test_status_of_a_call_becomes_its_class(code):
    """A rejected call raises the class of its code with the server's message."""
    kind = BY_CODE[code.value[0]]
    with (
        FakeServer(error=kind("because", reason="BECAUSE", retry_after=1.5, metadata={"key": "value"})) as server,
        Client(server.address) as client,
        pytest.raises(kind) as caught,
    ):
        client.generate("a red apple").result()
    error = caught.value
    assert type(error) is kind
    assert (str(error), error.code, error.reason) == ("because", code.name, "BECAUSE")
    assert (error.retry_after, error.metadata) == (1.5, {"key": "value"})
    assert error.__cause__ is None


@pytest.mark.parametrize("code", CODES, ids=lambda code: code.name)
def test_last_message_becomes_its_class(code):
    """A generation that fails later raises the class of the code in its last message."""
    kind = BY_CODE[code.value[0]]
    with (
        FakeServer(error=kind("because", reason="BECAUSE", retry_after=2), fail_at=2) as server,
        Client(server.address, retries=0) as client,
    ):
        generation, steps = client.generate("a red apple"), []
        with pytest.raises(kind) as caught:
            steps.extend(progress.step for progress in generation)
        assert steps == [0, 0, 0, 1, 2]
        assert (caught.value.reason, caught.value.retry_after) == ("BECAUSE", 2)
        with pytest.raises(kind):
            generation.result()


def test_violations_have_the_names_of_arguments():
    """BadRequest details become violations with the names of arguments."""
    error = InvalidRequest("Two things are wrong.", violations=[("width_px", "too wide"), ("step_count", "too many")])
    with (
        FakeServer(error=error) as server,
        Client(server.address) as client,
        pytest.raises(InvalidRequest) as caught,
    ):
        client.generate("a red apple").result()
    assert caught.value.violations == (("width", "too wide"), ("steps", "too many"))
    assert caught.value.violations[0] == Violation("width", "too wide")
    assert str(caught.value) == "Two things are wrong.\n  width: too wide\n  steps: too many"


@pytest.mark.parametrize(
    ("field", "argument"),
    [
        ("preview", "previews"),
        ("preview.every_steps", "previews.every_steps"),
        ("preview.min_interval", "previews.min_interval"),
        ("preview.max_edge_px", "previews.max_edge"),
        ("preview.quality", "previews.quality"),
        ("preview.method", "previews.method"),
        ("output.format", "output.format"),
        ("output.quality", "output.quality"),
        ("something_new.of_a_newer_server", "something_new.of_a_newer_server"),
    ],
)
def test_violation_of_an_option_is_named_as_its_argument(field, argument):
    """The path of a field becomes the path of an argument."""
    with (
        FakeServer(error=InvalidRequest("no", violations=[(field, "wrong")])) as server,
        Client(server.address) as client,
        pytest.raises(InvalidRequest) as caught,
    ):
        client.generate("a red apple").result()
    assert caught.value.violations == ((argument, "wrong"),)


def test_damaged_details_do_not_hide_the_error():
    """When the rich status cannot be parsed, the plain status is used."""
    error = from_status(grpc.StatusCode.RESOURCE_EXHAUSTED, "full", [("grpc-status-details-bin", b"\xff\xff")])
    assert isinstance(error, Overloaded)
    assert (str(error), error.reason, error.retry_after) == ("full", "", None)


def test_unknown_code_becomes_the_default():
    """An error message with an unknown code becomes the default class."""
    error = from_error_message(v1.Error(code=0, message="odd"), calotype.InternalError)
    assert type(error) is calotype.InternalError


def test_error_without_message_prints_its_reason_or_code():
    """An error without a message prints its reason or its code."""
    assert str(Overloaded(reason="QUEUE_FULL")) == "QUEUE_FULL"
    assert str(Overloaded()) == "RESOURCE_EXHAUSTED"


def test_incomplete_stream_is_an_unknown_error():
    """StreamIncomplete can be caught as UnknownError and as CalotypeError."""
    assert issubclass(StreamIncomplete, calotype.UnknownError)
    assert issubclass(StreamIncomplete, CalotypeError)


def test_errors_survive_pickling():
    """Pickling preserves the details of an error."""
    error = pickle.loads(pickle.dumps(InvalidRequest("no", reason="R", violations=[("steps", "too many")])))
    assert (error.message, error.reason, error.violations) == ("no", "R", (("steps", "too many"),))


def test_call_reset_by_a_proxy_counts_as_lost() -> None:
    """A call that a proxy resets counts as lost, although gRPC reports CANCELLED."""
    reset = "Stream removed (RST_STREAM (Received RST_STREAM with error code 8))"
    assert isinstance(from_status(grpc.StatusCode.CANCELLED, reset, ()), calotype.Unavailable)


def test_a_call_that_reaches_a_stopping_server_counts_as_lost() -> None:
    """GRPC cancels it without details; a generation that was cancelled on purpose has them."""
    assert isinstance(from_status(grpc.StatusCode.CANCELLED, "CANCELLED", ()), calotype.Unavailable)
    details = Status(code=1, message="The generation was cancelled.", details=[Any()]).SerializeToString()
    metadata = (("grpc-status-details-bin", details),)
    assert isinstance(from_status(grpc.StatusCode.CANCELLED, "CANCELLED", metadata), calotype.Cancelled)
    assert isinstance(
        from_status(grpc.StatusCode.CANCELLED, "Locally cancelled by application!", ()), calotype.Cancelled
    )
