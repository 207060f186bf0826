"""Repetition of broken calls: waits, limits, and continuous sequence numbers."""

import pytest
from google.protobuf.duration_pb2 import Duration

from calotype import (
    Cancelled,
    DeadlineExceeded,
    InternalError,
    InvalidRequest,
    NotFound,
    Overloaded,
    Unavailable,
)
from calotype._constants import DISCONNECT_GRACE_SECONDS
from calotype._resume.backoff import RetryPolicy
from calotype._resume.continuity import Continuity
from calotype._resume.policy import Resumption, make_resumable
from calotype.v1 import calotype_pb2 as v1

LOST = Unavailable("Socket closed")
UNREACHABLE = Unavailable("failed to connect to all addresses; last error: ...")


def test_watched_generation_is_searched_once():
    """With several servers, all are searched once for a watched generation; with one server, it is not found."""
    elsewhere = NotFound("elsewhere", reason="OTHER_REPLICA")
    several = Resumption(v1.WatchRequest(generation_id="g"), RetryPolicy(is_balanced=True))
    assert several.lost(elsewhere) == 0.0
    assert several.lost(elsewhere) is elsewhere
    assert Resumption(v1.WatchRequest(generation_id="g"), RetryPolicy()).lost(elsewhere) is elsewhere


def started(**arguments):
    """A generation that has shown step 2."""
    resumption = Resumption(v1.GenerateRequest(request_id="r"), RetryPolicy(random=lambda: 1.0, **arguments), None)
    resumption.take(progress(sequence=7, step=2, image=b"p", image_kind=1, image_step=2))
    return resumption


def progress(**fields):
    """A message of the generation "g"."""
    return v1.Progress(**{"generation_id": "g", "phase": v1.PHASE_DENOISING, "seed": 5, **fields})


def test_waits_grow_to_a_cap_and_are_random():
    """Waits are random, below a bound that doubles up to a maximum."""
    policy = RetryPolicy(base=1, cap=5, random=lambda: 1.0)
    assert [policy.wait(attempt) for attempt in (1, 2, 3, 4, 1000)] == [1, 2, 4, 5, 5]
    assert RetryPolicy(random=lambda: 0.0).wait(3) == 0
    assert 0 <= RetryPolicy().wait(3) <= 1


def test_watch_continues_after_the_last_sequence():
    """The next call watches the generation from the last known sequence; a partial end does not count as known."""
    resumption = started()
    resumption.take(progress(phase=v1.PHASE_SUCCEEDED, sequence=8, image=b"part", chunk_count=2))
    resumption.lost(LOST)
    assert resumption.request == v1.WatchRequest(generation_id="g", after_sequence=7)


def test_lost_generation_is_requested_again_with_its_seed():
    """After NOT_FOUND, the same request is sent immediately with the seed in use."""
    resumption = started()
    resumption.lost(LOST)
    assert resumption.lost(NotFound("gone")) == 0.0
    assert resumption.request == v1.GenerateRequest(request_id="r", seed=5)
    assert resumption.generation_id is None


def test_a_generation_that_replaces_another_is_cancelled_when_the_caller_leaves():
    """After the end that a stopping server caused, the next generation still has to be cancelled."""
    resumption = started()
    error = v1.Error(code=14, reason="DRAINING", message="The server is stopping.")
    assert resumption.take(progress(sequence=8, phase=v1.PHASE_FAILED, error=error)) is None
    assert resumption.lost(LOST) == 0.25
    assert resumption.unsettled


def test_watched_generation_is_not_requested_again():
    """A lost generation that is only watched is not requested again; the preview options stay."""
    request = v1.WatchRequest(generation_id="g", after_sequence=3, preview=v1.PreviewOptions(quality=50))
    resumption = Resumption(request, RetryPolicy(random=lambda: 0.0))
    resumption.take(progress(sequence=4))
    resumption.lost(LOST)
    assert resumption.request == v1.WatchRequest(generation_id="g", after_sequence=4, preview=request.preview)
    assert isinstance(resumption.lost(NotFound("gone")), NotFound)


def test_gives_up_after_attempts_without_news():
    """After the last attempt without news, the last error is returned; news resets the count."""
    resumption = started(retries=2)
    for sequence in (8, 9, 10):
        assert resumption.lost(LOST) == 0.25
        assert resumption.lost(UNREACHABLE) == 0.5
        assert resumption.take(progress(sequence=7, step=2)) is None
        assert resumption.lost(UNREACHABLE) is UNREACHABLE
        assert resumption.take(progress(sequence=sequence, step=3)) is not None


def test_wait_includes_the_servers_delay_and_ends_at_the_deadline():
    """retry_after is added to the wait, and an attempt comes before the deadline."""
    now = [100.0]
    policy = RetryPolicy(random=lambda: 0.5, clock=lambda: now[0])
    resumption = Resumption(v1.GenerateRequest(), policy, 10.0)
    resumption.take(progress(sequence=1))
    assert resumption.lost(Unavailable("loading", reason="NOT_READY", retry_after=3)) == 3.125
    assert resumption.lost(Overloaded("full", reason="QUEUE_FULL", retry_after=3)) == 3.125
    now[0] = 108.0
    assert resumption.time_left == 2.0
    assert resumption.lost(Unavailable("loading", retry_after=3)) == 1.0
    now[0] = 111.0
    assert resumption.time_left == 0.0
    error = resumption.lost(DeadlineExceeded("too late"))
    assert isinstance(error, DeadlineExceeded)
    assert "loading" in str(error)
    assert resumption.unsettled
    # When the link is down, the call fails before gRPC notices the passed deadline.
    assert isinstance(resumption.lost(UNREACHABLE), DeadlineExceeded)


@pytest.mark.parametrize(
    "error",
    [
        UNREACHABLE,
        Unavailable("no disk", reason="STATE_UNAVAILABLE", retry_after=1),
        Overloaded("full", reason="QUEUE_FULL", retry_after=1),
        InvalidRequest("no"),
    ],
)
def test_first_contact_is_not_retried(error):
    """Before first contact, every error is returned immediately and leaves nothing to cancel."""
    resumption = Resumption(v1.GenerateRequest(), RetryPolicy())
    assert resumption.lost(error) is error
    assert not resumption.unsettled


def test_lost_first_message_is_requested_again():
    """A call that a server may have received is repeated unchanged, also while the server cannot be reached."""
    request = v1.GenerateRequest(prompt="x", request_id="r")
    resumption = Resumption(request, RetryPolicy(random=lambda: 0.0))
    assert resumption.lost(LOST) == 0.0
    assert resumption.lost(UNREACHABLE) == 0.0
    assert resumption.request == request


@pytest.mark.parametrize("error", [InternalError("no"), Cancelled("no"), Overloaded("no"), NotFound("no")])
def test_other_errors_are_not_retried(error):
    """Only lost connections and errors with a retry delay are retried."""
    assert started().lost(error) is error


def test_zero_retries_means_none():
    """Without retries, the first loss is the end."""
    assert started(retries=0).lost(LOST) is LOST


def test_withdrawn_previews_stay_withdrawn():
    """Withdrawn previews stay withdrawn when the generation is requested again."""
    continuity = Continuity()
    continuity.join(progress(sequence=9, step=4, previews_withdrawn=True, previews_dropped=3))
    continuity.cut()
    assert continuity.join(progress(generation_id="h", sequence=1, step=3, image=b"p", image_step=3)) is None
    news = continuity.join(
        progress(generation_id="h", sequence=2, step=5, image=b"p", image_step=5, previews_dropped=1)
    )
    assert (news.previews_withdrawn, news.sequence, news.previews_dropped) == (True, 11, 4)


def test_queue_positions_are_news():
    """A new generation's queue positions are news, unless the caller has seen a later phase."""
    continuity = Continuity()
    continuity.join(progress(phase=v1.PHASE_QUEUED, sequence=1, queue_position=1))
    continuity.cut()
    again = progress(generation_id="h", phase=v1.PHASE_QUEUED, sequence=1, queue_position=4)
    assert continuity.join(again).queue_position == 4


def test_end_of_a_new_log_of_the_same_generation_comes_last():
    """An end whose number is lower than the last one shown gets a higher number; its chunks share it."""
    continuity = Continuity()
    continuity.join(progress(sequence=17, step=4))
    continuity.cut()
    assert continuity.join(progress(sequence=9, step=5)) is None
    parts = [
        progress(phase=v1.PHASE_SUCCEEDED, sequence=16, step=5, chunk_index=number, chunk_count=2)
        for number in range(2)
    ]
    assert [continuity.join(part).sequence for part in parts] == [18, 18]


def test_end_never_shows_a_lower_step():
    """When a new generation fails early, the step does not decrease."""
    continuity = Continuity()
    continuity.join(progress(sequence=9, step=4))
    continuity.cut()
    assert continuity.join(progress(generation_id="h", phase=v1.PHASE_FAILED, sequence=3, step=1)).step == 4


def test_make_resumable_keeps_chosen_values():
    """make_resumable sets only the fields that the caller left unset."""
    plain, chosen = v1.GenerateRequest(), v1.GenerateRequest(request_id="mine")
    kept = v1.GenerateRequest(on_disconnect=v1.DISCONNECT_POLICY_KEEP)
    chosen.disconnect_grace.SetInParent()
    for request in (plain, chosen, kept):
        make_resumable(request)
    assert plain.disconnect_grace.seconds == DISCONNECT_GRACE_SECONDS
    assert (chosen.request_id, chosen.disconnect_grace.seconds) == ("mine", 0)
    assert not kept.HasField("disconnect_grace")
    assert len({plain.request_id, kept.request_id, ""}) == 3


@pytest.mark.parametrize(
    ("request_", "leaving_cancels", "lingers"),
    [
        (v1.GenerateRequest(), True, False),
        (v1.GenerateRequest(disconnect_grace=Duration(nanos=1)), True, True),
        (v1.GenerateRequest(on_disconnect=v1.DISCONNECT_POLICY_KEEP), False, True),
        (v1.WatchRequest(generation_id="g"), False, True),
    ],
)
def test_leaving_cancels_own_generations(request_, leaving_cancels, lingers):
    """Leaving cancels a generation that this client started and does not keep."""
    resumption = Resumption(request_, RetryPolicy())
    assert (resumption.leaving_cancels, resumption.lingers) == (leaving_cancels, lingers)
