"""Any sequence of failures gives one continuous stream, with a model of servers."""

import itertools
import math

from hypothesis import given
from hypothesis import strategies as st

from calotype import CalotypeError, NotFound, Unavailable
from calotype._assembler import Assembler
from calotype._resume.backoff import RetryPolicy
from calotype._resume.policy import Resumption, make_resumable
from calotype._status import stream_incomplete
from calotype.v1 import calotype_pb2 as v1

LOST = Unavailable("Socket closed")
UNREACHABLE = Unavailable("failed to connect to all addresses; last error: ...")
STEPS = 5


class Server:
    """A model of a server: event logs, request ids, and the loss of both."""

    def __init__(self, name="g"):
        self.name, self.logs, self.attached, self.started = name, {}, {}, []
        self.ids = itertools.count(1)

    def supersede(self, request_id):
        """Ends the generation of a request for a reason of the server's own."""
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
        """Forgets everything, as in a restart."""
        self.logs.clear()
        self.attached.clear()

    def call(self, request):
        """Returns the messages of a call."""
        if isinstance(request, v1.WatchRequest):
            if request.generation_id not in self.logs:
                raise NotFound("gone", reason="GENERATION_NOT_FOUND")
            # Repeats the last known message, which servers may do.
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
        """Yields the messages of a generation. Its image depends on the seed alone."""
        messages = [v1.Progress(phase=v1.PHASE_QUEUED), v1.Progress(phase=v1.PHASE_ENCODING_PROMPT)]
        for step in range(1, STEPS + 1):
            if generation == "g1":  # later generations have fewer messages
                messages.append(v1.Progress(phase=v1.PHASE_DENOISING, step=step))
            kind = v1.IMAGE_KIND_PREDICTED
            preview = v1.Progress(phase=v1.PHASE_DENOISING, step=step, image=b"p", image_step=step, image_kind=kind)
            messages.append(preview)
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
                image_kind=v1.IMAGE_KIND_FINAL,
                chunk_index=index,
                chunk_count=len(parts),
            )
            for index, part in enumerate(parts)
        ]
        for message in messages:
            message.generation_id, message.seed = generation, seed
            yield message


@given(
    st.lists(
        st.tuples(st.integers(0, 18), st.sampled_from(["lost", "server lost", "no server", "replaced"])), max_size=12
    ),
    st.data(),
)
def test_any_failures_give_one_continuous_stream(failures, data):
    """After any failures: numbers never decrease, no preview repeats, one end with the image, one generation per id."""
    server, failures = Server(), iter(failures)
    request = v1.GenerateRequest(prompt="a red apple")
    make_resumable(request)
    resumption = Resumption(request, RetryPolicy(retries=100, random=lambda: 0.0, clock=lambda: 0.0))
    assembler, shown, lives, heard = Assembler(), [], 1, False
    while not assembler.ended:
        try:
            messages = server.call(resumption.request)
            after, how = next(failures, (math.inf, "lost"))
            if how == "no server" and heard:
                raise UNREACHABLE
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
            if how == "replaced" and request.request_id in server.attached:
                server.supersede(request.request_id)
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
def test_any_failures_of_several_servers_give_one_continuous_stream(failures, data):
    """The same holds with several servers that are lost, unreachable for a while, dead or draining."""
    servers, failures = [Server("g"), Server("h"), Server("i")], iter(failures)
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
            after, how = next(failures, (math.inf, "lost"))
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
