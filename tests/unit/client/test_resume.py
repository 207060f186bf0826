"""The state machine that joins broken calls to one stream."""

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from calotype import (
    CalotypeError,
    Cancelled,
    DeadlineExceeded,
    InternalError,
    InvalidRequest,
    NotFound,
    Overloaded,
    Unavailable,
)
from calotype._assembler import Assembler
from calotype._constants import DISCONNECT_GRACE_SECONDS
from calotype._resume.continuity import Continuity
from calotype._resume.resumption import Resumption, make_resumable
from calotype._resume.retry_policy import RetryPolicy
from calotype._status import stream_incomplete
from calotype.v1 import calotype_pb2 as v1

LOST = Unavailable("Socket closed")
REFUSED = Unavailable("failed to connect to all addresses; last error: ...")
STEPS = 5


class Server:
    """What matters of a server: logs, ids that attach, and the loss of everything."""

    def __init__(self, name="g"):
        self.name, self.logs, self.attached, self.started = name, {}, {}, []
        self.ids = itertools.count(1)

    def void(self, request_id):
        """Ends the generation of a request for the server's own reasons."""
        log = self.logs[self.attached.pop(request_id)]
        code, reason = [(1, "ABANDONED"), (14, "DRAINING")][len(self.started) % 2]
        phase = v1.PHASE_CANCELLED if code == 1 else v1.PHASE_FAILED
        end = v1.Progress(
            generation_id=log[0].generation_id,
            phase=phase,
            seed=log[0].seed,
            sequence=log[-1].sequence,
            error=v1.Error(code=code, reason=reason),
        )
        log[:] = [end]

    def lose(self):
        """Forgets everything, as after a restart."""
        self.logs.clear()
        self.attached.clear()

    def call(self, request):
        """Gives the messages of a call."""
        if isinstance(request, v1.WatchRequest):
            if request.generation_id not in self.logs:
                raise NotFound("gone", reason="GENERATION_NOT_FOUND")
            # Tells the last known message again, as a server may whose replay is generous.
            log = self.logs[request.generation_id]
            return [message for message in log if message.sequence >= request.after_sequence]
        if request.request_id not in self.attached:
            number = next(self.ids)
            self.started.append(request.request_id)
            generation = f"{self.name}{number}"
            self.attached[request.request_id] = generation
            self.logs[generation] = list(self.log(generation, request.seed or 1000 + number))
        return self.logs[self.attached[request.request_id]]

    def log(self, generation, seed):
        """All messages of a generation, whose picture depends on the seed alone."""
        messages = [v1.Progress(phase=v1.PHASE_QUEUED), v1.Progress(phase=v1.PHASE_ENCODING_PROMPT)]
        for step in range(1, STEPS + 1):
            if generation == "g1":  # later ones count lower
                messages.append(v1.Progress(phase=v1.PHASE_DENOISING, step=step))
            messages.append(v1.Progress(phase=v1.PHASE_DENOISING, step=step, image=b"p", image_step=step, image_kind=1))
        messages.append(v1.Progress(phase=v1.PHASE_DECODING, step=STEPS))
        for sequence, message in enumerate(messages, 1):
            message.sequence = sequence
        parts = [b"picture of ", str(seed).encode(), b"."]
        messages += [
            v1.Progress(
                phase=v1.PHASE_SUCCEEDED,
                step=STEPS,
                sequence=len(messages) + 1,
                image=part,
                image_kind=2,
                chunk_index=index,
                chunk_count=len(parts),
            )
            for index, part in enumerate(parts)
        ]
        for message in messages:
            message.generation_id, message.seed = generation, seed
            yield message


@given(
    st.lists(st.tuples(st.integers(0, 18), st.sampled_from(["lost", "server lost", "no server", "void"])), max_size=12),
    st.data(),
)
def test_any_breakage_is_one_uninterrupted_stream(breakages, data):
    """Sequence and step never fall, no preview comes twice, one end with the picture, one generation for one id."""
    server, breakages = Server(), iter(breakages)
    request = v1.GenerateRequest(prompt="a red apple")
    make_resumable(request)
    resumption = Resumption(request, RetryPolicy(retries=100, random=lambda: 0.0, clock=lambda: 0.0))
    assembler, shown, lives, heard = Assembler(), [], 1, False
    while not assembler.ended:
        try:
            messages = server.call(resumption.request)
            after, how = next(breakages, (math.inf, "lost"))
            if how == "no server" and heard:
                raise REFUSED
            heard = True
            for number, message in enumerate(messages):
                if number >= after:
                    break
                # A slow reader gets fewer messages, but each chunk of the end.
                if message.phase < v1.PHASE_SUCCEEDED and data.draw(st.integers(0, 3)) == 0:
                    continue
                copy = v1.Progress()
                copy.CopyFrom(message)
                news = resumption.take(copy)
                progress = None if news is None else assembler.feed(news)
                if progress is not None:
                    shown.append(progress)
            if assembler.ended:
                break
            if after == math.inf:
                raise stream_incomplete()
            if how == "server lost":
                server.lose()
                lives += 1
            if how == "void" and request.request_id in server.attached:
                server.void(request.request_id)
                lives += 1
            raise LOST
        except CalotypeError as error:
            assert resumption.lost(error) == 0.0
            assembler.interrupt()

    sequences = [progress.sequence for progress in shown]
    previews = [progress.image_step for progress in shown if progress.preview]
    phases = [list(type(progress.phase)).index(progress.phase) for progress in shown]
    assert sequences == sorted(set(sequences))
    assert [progress.step for progress in shown] == sorted(progress.step for progress in shown)
    assert phases == sorted(phases)
    assert previews == sorted(set(previews))
    assert [progress.phase.ended for progress in shown] == [False] * (len(shown) - 1) + [True]
    assert len({progress.seed for progress in shown}) == 1
    assert assembler.outcome().data == f"picture of {shown[0].seed}.".encode()
    assert len(server.started) <= lives
    assert set(server.started) == {request.request_id}
    assert not resumption.unsettled


@given(
    st.lists(st.tuples(st.integers(0, 18), st.sampled_from(["lost", "away", "dead", "draining"])), max_size=12),
    st.data(),
)
def test_any_breakage_among_several_servers_is_one_uninterrupted_stream(breakages, data):
    """Each is lost, cut off for a while, dead or about to stop, in any order; what was begun twice is told once."""
    servers, breakages = [Server("g"), Server("h"), Server("i")], iter(breakages)
    request = v1.GenerateRequest(prompt="a red apple")
    make_resumable(request)
    policy = RetryPolicy(retries=100, random=lambda: 0.0, clock=lambda: 0.0, is_balanced=True)
    resumption, assembler, shown, away = Resumption(request, policy), Assembler(), [], None
    while not assembler.ended:
        try:
            asked = resumption.request
            reachable = [server for server in servers if server is not away]
            homes = [server for server in reachable if getattr(asked, "generation_id", None) in server.logs]
            server = homes[0] if homes else data.draw(st.sampled_from(reachable))
            after, how = next(breakages, (math.inf, "lost"))
            if how == "draining" and isinstance(asked, v1.GenerateRequest):
                raise Unavailable("The server is stopping.", reason="NOT_READY", retry_after=30.0)
            if isinstance(asked, v1.WatchRequest) and not homes:
                raise NotFound("elsewhere", reason="OTHER_REPLICA")
            for number, message in enumerate(server.call(asked)):
                if number >= after:
                    break
                copy = v1.Progress()
                copy.CopyFrom(message)
                news = resumption.take(copy)
                progress = None if news is None else assembler.feed(news)
                if progress is not None:
                    shown.append(progress)
            if assembler.ended:
                break
            away = server if how == "away" else None
            if how == "dead":
                server.lose()
            raise LOST
        except CalotypeError as error:
            assert resumption.lost(error) == 0.0
            assembler.interrupt()

    sequences = [progress.sequence for progress in shown]
    previews = [progress.image_step for progress in shown if progress.preview]
    assert sequences == sorted(set(sequences))
    assert [progress.step for progress in shown] == sorted(progress.step for progress in shown)
    assert previews == sorted(set(previews))
    assert [progress.phase.ended for progress in shown] == [False] * (len(shown) - 1) + [True]
    assert len({progress.seed for progress in shown}) == 1
    assert assembler.outcome().data == f"picture of {shown[0].seed}.".encode()


def test_what_is_watched_is_looked_for_once():
    """Where the first of several servers does not have it, all are asked; with one server, or none, it is not found."""
    elsewhere = NotFound("elsewhere", reason="OTHER_REPLICA")
    several = Resumption(v1.WatchRequest(generation_id="g"), RetryPolicy(is_balanced=True))
    assert several.lost(elsewhere) == 0.0
    assert several.lost(elsewhere) is elsewhere
    assert Resumption(v1.WatchRequest(generation_id="g"), RetryPolicy()).lost(elsewhere) is elsewhere


def started(**arguments):
    """A machine whose generation has shown step 2."""
    resumption = Resumption(v1.GenerateRequest(request_id="r"), RetryPolicy(random=lambda: 1.0, **arguments), None)
    resumption.take(progress(sequence=7, step=2, image=b"p", image_kind=1, image_step=2))
    return resumption


def progress(**fields):
    """A message of the generation "g"."""
    return v1.Progress(**{"generation_id": "g", "phase": v1.PHASE_DENOISING, "seed": 5, **fields})


def test_waits_grow_to_a_cap_and_are_random():
    """Full jitter: anything from nothing to a bound that doubles."""
    policy = RetryPolicy(base=1, cap=5, random=lambda: 1.0)
    assert [policy.wait(attempt) for attempt in (1, 2, 3, 4, 1000)] == [1, 2, 4, 5, 5]
    assert RetryPolicy(random=lambda: 0.0).wait(3) == 0
    assert 0 <= RetryPolicy().wait(3) <= 1


def test_watch_goes_on_after_the_last_sequence():
    """The next call names the generation and what is known; an end of which a part came is not known."""
    resumption = started()
    resumption.take(progress(phase=v1.PHASE_SUCCEEDED, sequence=8, image=b"part", chunk_count=2))
    resumption.lost(LOST)
    assert resumption.request == v1.WatchRequest(generation_id="g", after_sequence=7)


def test_lost_generation_is_made_again_with_its_seed():
    """NOT_FOUND leads to the same request with the seed that was drawn, at once."""
    resumption = started()
    resumption.lost(LOST)
    assert resumption.lost(NotFound("gone")) == 0.0
    assert resumption.request == v1.GenerateRequest(request_id="r", seed=5)
    assert resumption.generation_id is None


def test_watched_generation_is_not_made_again():
    """Who only watches has nothing to ask for; the previews asked for stay."""
    request = v1.WatchRequest(generation_id="g", after_sequence=3, preview=v1.PreviewOptions(quality=50))
    resumption = Resumption(request, RetryPolicy(random=lambda: 0.0))
    resumption.take(progress(sequence=4))
    resumption.lost(LOST)
    assert resumption.request == v1.WatchRequest(generation_id="g", after_sequence=4, preview=request.preview)
    assert isinstance(resumption.lost(NotFound("gone")), NotFound)


def test_gives_up_after_attempts_without_news():
    """The last reason is told; news starts the count again."""
    resumption = started(retries=2)
    for sequence in (8, 9, 10):
        assert resumption.lost(LOST) == 0.25
        assert resumption.lost(REFUSED) == 0.5
        assert resumption.take(progress(sequence=7, step=2)) is None
        assert resumption.lost(REFUSED) is REFUSED
        assert resumption.take(progress(sequence=sequence, step=3)) is not None


def test_waits_no_shorter_than_the_server_says_and_no_longer_than_the_deadline():
    """retry_after is a lower bound, the deadline an upper one."""
    now = [100.0]
    policy = RetryPolicy(random=lambda: 0.5, clock=lambda: now[0])
    resumption = Resumption(v1.GenerateRequest(), policy, 10.0)
    resumption.take(progress(sequence=1))
    assert resumption.lost(Unavailable("loading", reason="NOT_READY", retry_after=3)) == 3.125
    assert resumption.lost(Overloaded("full", reason="QUEUE_FULL", retry_after=3)) == 3.25
    now[0] = 108.0
    assert resumption.lost(Unavailable("loading", retry_after=3)) == resumption.time_left == 2.0
    now[0] = 111.0
    assert resumption.time_left == 0.0
    error = resumption.lost(DeadlineExceeded("too late"))
    assert isinstance(error, DeadlineExceeded)
    assert "loading" in str(error)
    assert resumption.unsettled
    # A link that is down fails sooner than a deadline that has passed.
    assert isinstance(resumption.lost(REFUSED), DeadlineExceeded)


@pytest.mark.parametrize(
    "error",
    [
        REFUSED,
        Unavailable("draining", reason="NOT_READY", retry_after=1),
        Overloaded("full", reason="QUEUE_FULL", retry_after=1),
        InvalidRequest("no"),
    ],
)
def test_first_contact_is_not_retried(error):
    """A server that is not there, or that refuses, is told at once, and leaves nothing to cancel."""
    resumption = Resumption(v1.GenerateRequest(), RetryPolicy())
    assert resumption.lost(error) is error
    assert not resumption.unsettled


def test_lost_first_message_is_asked_for_again():
    """A call that may have been heard is repeated as it was; from then on a missing server is waited for."""
    request = v1.GenerateRequest(prompt="x", request_id="r")
    resumption = Resumption(request, RetryPolicy(random=lambda: 0.0))
    assert resumption.lost(LOST) == 0.0
    assert resumption.lost(REFUSED) == 0.0
    assert resumption.request == request


@pytest.mark.parametrize("error", [InternalError("no"), Cancelled("no"), Overloaded("no"), NotFound("no")])
def test_other_ends_are_ends(error):
    """Only a lost connection, or an answer that says when to come back, is worth another attempt."""
    assert started().lost(error) is error


def test_no_retries_means_none():
    """A client without retries ends with the first loss."""
    assert started(retries=0).lost(LOST) is LOST


def test_what_was_withdrawn_stays_withdrawn():
    """Previews that were taken away do not come back with a generation that begins anew."""
    seam = Continuity()
    seam.join(progress(sequence=9, step=4, previews_withdrawn=True, previews_dropped=3))
    seam.cut()
    assert seam.join(progress(generation_id="h", sequence=1, step=3, image=b"p", image_step=3)) is None
    news = seam.join(progress(generation_id="h", sequence=2, step=5, image=b"p", image_step=5, previews_dropped=1))
    assert (news.previews_withdrawn, news.sequence, news.previews_dropped) == (True, 11, 4)


def test_places_in_the_queue_are_news():
    """A generation that begins anew in the queue says where, as long as it was not further."""
    seam = Continuity()
    seam.join(progress(phase=v1.PHASE_QUEUED, sequence=1, queue_position=1))
    seam.cut()
    again = progress(generation_id="h", phase=v1.PHASE_QUEUED, sequence=1, queue_position=4)
    assert seam.join(again).queue_position == 4


def test_end_of_a_log_that_begins_anew_under_the_same_id_comes_last():
    """A server that has kept the id but not the log may end with a lower number than was shown; chunks share theirs."""
    seam = Continuity()
    seam.join(progress(sequence=17, step=4))
    seam.cut()
    assert seam.join(progress(sequence=9, step=5)) is None
    parts = [
        progress(phase=v1.PHASE_SUCCEEDED, sequence=16, step=5, chunk_index=number, chunk_count=2)
        for number in range(2)
    ]
    assert [seam.join(part).sequence for part in parts] == [18, 18]


def test_end_never_shows_a_lower_step():
    """A generation that begins anew and fails early does not take steps back."""
    seam = Continuity()
    seam.join(progress(sequence=9, step=4))
    seam.cut()
    assert seam.join(progress(generation_id="h", phase=v1.PHASE_FAILED, sequence=3, step=1)).step == 4


def test_defaults_leave_choices_alone():
    """A grace and an id are filled in only where nothing was chosen."""
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
        (v1.GenerateRequest(disconnect_grace={"nanos": 1}), True, True),
        (v1.GenerateRequest(on_disconnect=v1.DISCONNECT_POLICY_KEEP), False, True),
        (v1.WatchRequest(generation_id="g"), False, True),
    ],
)
def test_what_leaving_means(request_, leaving_cancels, lingers):
    """Leaving cancels what was started here and is not to be kept; the server may not see it by itself."""
    resumption = Resumption(request_, RetryPolicy())
    assert (resumption.leaving_cancels, resumption.lingers) == (leaving_cancels, lingers)
