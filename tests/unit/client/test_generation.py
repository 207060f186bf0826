"""Following a generation with the sync client."""

import gc
import threading

import pytest

from calotype import (
    Cancelled,
    Client,
    ClientClosed,
    FailedPrecondition,
    GenerationConsumed,
    InternalError,
    InvalidRequest,
    NotFound,
    Notice,
    Phase,
    PreviewMethod,
    Previews,
)
from calotype.testing import FakeServer


@pytest.fixture
def held():
    """A server whose generations stand still at step 2."""
    with FakeServer(hold_at=2) as server:
        yield server


def until_step_2(generation):
    """Iterates to where the server holds, and leaves."""
    for progress in generation:
        if progress.step == 2:
            break


def at_step_2(generation, act):
    """Does something where the server holds, and stays."""
    for progress in generation:
        if progress.step == 2:
            act()


def test_loop_shows_every_phase_in_order():
    """A loop sees the queue, the steps with previews, and the end without one."""
    with FakeServer(steps=2, warnings=[Notice("PROMPT_TRUNCATED", "Cut.")]) as server, Client(server.address) as client:
        generation = client.generate("a red apple", seed=5)
        seen = list(generation)
    assert [(progress.phase.value, progress.step) for progress in seen] == [
        ("queued", 0),
        ("encoding_prompt", 0),
        ("denoising", 0),
        ("denoising", 1),
        ("denoising", 2),
        ("decoding", 2),
        ("succeeded", 2),
    ]
    assert [progress.sequence for progress in seen] == list(range(1, 8))
    assert [progress.preview is not None for progress in seen] == [False, False, False, True, True, False, False]
    assert seen[0].queue_position == 1
    assert seen[1].estimated_remaining == 2.0
    assert seen[3].preview.format == "jpeg"
    assert seen[3].preview_method is PreviewMethod.HEAD
    assert seen[2].preview_method is None
    assert not any(progress.previews_withdrawn for progress in seen)
    assert seen[3].image_step == 1
    assert seen[-1].timings.total == 2.0
    assert seen[-1].timings.queued is None
    assert seen[-1].warnings == (Notice("PROMPT_TRUNCATED", "Cut."),)
    assert (generation.id, generation.seed, generation.done) == (seen[0].generation_id, 5, True)
    assert generation.progress is seen[-1]


def test_result_needs_no_loop(tmp_path):
    """result() waits by itself, can be called again, and gives a picture that can be saved."""
    with FakeServer() as server, Client(server.address) as client:
        generation = client.generate("a red apple", width=24, height=8)
        image = generation.result()
    assert (image.format, image.width, image.height) == ("png", 24, 8)
    assert generation.result() is image
    image.save(tmp_path / "apple.png")
    assert image.to_pil().size == (24, 8)
    assert server.cancelled == []


def test_result_within_the_loop_ends_the_loop():
    """Taking the result in the middle leaves nothing more to iterate over, and cancels nothing."""
    with FakeServer() as server, Client(server.address) as client:
        generation, steps = client.generate("a red apple"), []
        for progress in generation:
            steps.append(progress.step)
            image = generation.result()
    assert steps == [0]
    assert generation.result() is image
    assert server.cancelled == []


def test_chunks_are_joined_and_shown_as_one():
    """A final image in many messages is one picture and one progress."""
    with FakeServer(chunk_bytes=100) as server, Client(server.address) as client:
        generation = client.generate("a red apple")
        phases = [progress.phase for progress in generation]
        assert phases.count(Phase.SUCCEEDED) == 1
        assert len(generation.result().data) > 1000
        assert generation.result().to_pil().size == (64, 64)


def test_break_cancels_on_the_server(held):
    """Leaving the loop early cancels, without any close."""
    with Client(held.address) as client:
        generation = client.generate("a red apple")
        until_step_2(generation)
        assert held.wait_cancelled()
        assert held.cancelled == [generation.id]
        with pytest.raises(Cancelled):
            generation.result()


def test_exception_in_the_loop_cancels_on_the_server(held):
    """An error of the caller's own cancels and passes through."""
    with Client(held.address) as client:
        with pytest.raises(ZeroDivisionError):
            at_step_2(client.generate("a red apple"), lambda: 1 / 0)
        assert held.wait_cancelled()


def test_leaving_a_with_block_cancels_on_the_server(held):
    """A with block is the deterministic way to leave, whoever still holds the iterator."""
    with Client(held.address) as client:
        with client.generate("a red apple") as generation:
            iterator = iter(generation)
            while next(iterator).step < 2:
                pass
        assert held.wait_cancelled()
        with pytest.raises(Cancelled):
            next(iterator)


def test_forgotten_generation_is_cancelled(held):
    """A generation that nobody holds any more stops working."""
    with Client(held.address) as client:
        generation = client.generate("a red apple")
        iterator = iter(generation)
        while next(iterator).step < 2:
            pass
        del iterator, generation
        gc.collect()
        assert held.wait_cancelled()


def test_cancel_from_another_thread_ends_the_wait(held):
    """cancel() wakes a thread that waits for the result."""
    with Client(held.address) as client:
        generation, raised = client.generate("a red apple"), []

        def wait():
            try:
                generation.result()
            except Cancelled as error:
                raised.append(error)

        thread = threading.Thread(target=wait)
        thread.start()
        generation.cancel()
        thread.join()
        assert len(raised) == 1
        generation.cancel()


def test_cancel_by_id_from_another_client(held):
    """Client.cancel tells the phase it found, and the loop ends with Cancelled; a second call finds the end."""
    with Client(held.address) as client, Client(held.address) as other:
        generation, found = client.generate("a red apple"), []
        with pytest.raises(Cancelled) as caught:
            at_step_2(generation, lambda: found.append(other.cancel(generation.id)))
        assert found == [Phase.DENOISING]
        assert caught.value.reason == "CANCELLED"
        assert generation.progress.phase is Phase.CANCELLED
        assert other.cancel(generation.id) is Phase.CANCELLED
        with pytest.raises(NotFound):
            other.cancel("no such id")


def test_withdrawn_previews_end_in_an_error():
    """A loop is told to take the previews away, gets no more of them, and raises."""
    with FakeServer(withdraw_at=2) as server, Client(server.address) as client:
        seen = []
        with pytest.raises(FailedPrecondition) as caught:
            seen.extend(client.generate("a red apple"))
    assert caught.value.reason == "CONTENT_WITHHELD"
    assert [progress.previews_withdrawn for progress in seen] == [False] * 4 + [True] * 4
    assert [progress.preview is not None for progress in seen] == [False] * 3 + [True] + [False] * 4


def test_second_loop_is_a_mistake():
    """Iterating twice raises GenerationConsumed, after success and after a break."""
    with FakeServer() as server, Client(server.address) as client:
        generation = client.generate("a red apple")
        list(generation)
        with pytest.raises(GenerationConsumed):
            list(generation)
        generation = client.generate("a red apple")
        for _ in generation:
            break
        with pytest.raises(GenerationConsumed):
            list(generation)


def test_error_of_result_shows_no_wiring():
    """The traceback of an error has neither gRPC's error as its cause nor a longer tail with every call."""
    with FakeServer(error=InternalError("no"), fail_at=1) as server, Client(server.address) as client:
        generation = client.generate("a red apple")
        lengths = []
        for _ in range(3):
            with pytest.raises(InternalError) as caught:
                generation.result()
            lengths.append(len(caught.traceback))
            assert caught.value.__cause__ is None
            assert caught.value.__context__ is None
        assert lengths[0] == lengths[1] == lengths[2]


def test_model_is_described():
    """model() gives plain numbers and names."""
    with FakeServer() as server, Client(server.address) as client:
        model = client.model()
    assert (model.name, model.width, model.steps, model.guidance_scale) == ("fake", 64, 4, 5.0)
    assert model.schedulers == ("DDIMScheduler", "EulerDiscreteScheduler")
    assert model.preview_methods == (PreviewMethod.HEAD, PreviewMethod.FULL_VAE)
    assert model.previews == Previews(every_steps=1, min_interval=0, max_edge=256, quality=75, method="auto")
    assert (model.max_preview_edge, model.max_preview_quality) == (1024, 95)


def test_closed_client_refuses_to_work():
    """Use after close is a mistake that says so; closing again is not."""
    client = Client()
    client.close()
    client.close()
    for use in (client.model, client.__enter__, lambda: client.generate("x"), lambda: client.cancel("x")):
        with pytest.raises(ClientClosed):
            use()
    assert repr(client) == "<Client localhost:50051 closed>"


def test_closing_the_client_cancels_what_runs(held):
    """What a closed client still runs ends with Cancelled."""
    client = Client(held.address)
    generation = client.generate("a red apple")
    with pytest.raises(Cancelled, match="The client was closed"):
        at_step_2(generation, client.close)
    assert held.wait_cancelled()


def test_invalid_request_is_raised_where_it_is_made():
    """What cannot be sent is refused before anything is sent."""
    with FakeServer() as server, Client(server.address) as client:
        with pytest.raises(InvalidRequest):
            client.generate("a red apple", steps="four")
        assert server.requests == []


def test_representation_tells_where_it_stands():
    """A generation prints as a short line."""
    with FakeServer() as server, Client(server.address) as client:
        generation = client.generate("a red apple")
        assert repr(generation) == "<Generation ?: started>"
        assert (generation.id, generation.seed, generation.progress, generation.done) == (None, None, None, False)
        generation.result()
        assert repr(generation) == "<Generation fake-1: succeeded 4/4>"
