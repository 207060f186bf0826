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
    Timings,
)
from calotype.testing import FakeServer


@pytest.fixture
def held():
    """A server that holds generations at step 2."""
    with FakeServer(hold_at=2) as server:
        yield server


def until_step_2(generation):
    """Leaves the loop at the step where the server holds."""
    for progress in generation:
        if progress.step == 2:
            break


def at_step_2(generation, act):
    """Calls a function at the step where the server holds, and stays in the loop."""
    for progress in generation:
        if progress.step == 2:
            act()


def test_loop_yields_every_phase_in_order():
    """The loop yields the queue, each step with its preview, and the end without a preview."""
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
    assert seen[-1].timings == Timings(denoising=2.0, total=2.0, computed_steps=2)
    assert seen[-1].warnings == (Notice("PROMPT_TRUNCATED", "Cut."),)
    assert (generation.id, generation.seed, generation.done) == (seen[0].generation_id, 5, True)
    assert generation.progress is seen[-1]


def test_result_needs_no_loop(tmp_path):
    """result() waits without a loop, can be called again, and returns an image that can be saved."""
    with FakeServer() as server, Client(server.address) as client:
        generation = client.generate("a red apple", width=24, height=8)
        image = generation.result()
    assert (image.format, image.width, image.height) == ("png", 24, 8)
    assert generation.result() is image
    image.save(tmp_path / "apple.png")
    assert image.to_pil().size == (24, 8)
    assert server.cancelled == []


def test_result_inside_the_loop_ends_the_loop():
    """After result() inside the loop, the loop ends and nothing is cancelled."""
    with FakeServer() as server, Client(server.address) as client:
        generation, steps = client.generate("a red apple"), []
        for progress in generation:
            steps.append(progress.step)
            image = generation.result()
    assert steps == [0]
    assert generation.result() is image
    assert server.cancelled == []


def test_chunks_become_one_image():
    """A final image in several messages becomes one image and one progress."""
    with FakeServer(chunk_bytes=100) as server, Client(server.address) as client:
        generation = client.generate("a red apple")
        phases = [progress.phase for progress in generation]
        assert phases.count(Phase.SUCCEEDED) == 1
        assert len(generation.result().data) > 1000
        assert generation.result().to_pil().size == (64, 64)


def test_break_cancels_on_the_server(held):
    """Leaving the loop early cancels the generation."""
    with Client(held.address) as client:
        generation = client.generate("a red apple")
        until_step_2(generation)
        assert held.wait_cancelled()
        assert held.cancelled == [generation.id]
        with pytest.raises(Cancelled):
            generation.result()


def test_exception_in_the_loop_cancels_on_the_server(held):
    """An exception in the loop cancels the generation and propagates."""
    with Client(held.address) as client:
        with pytest.raises(ZeroDivisionError):
            at_step_2(client.generate("a red apple"), lambda: 1 / 0)
        assert held.wait_cancelled()


def test_leaving_a_with_block_cancels_on_the_server(held):
    """Leaving a with block cancels, even while another reference to the iterator exists."""
    with Client(held.address) as client:
        with client.generate("a red apple") as generation:
            iterator = iter(generation)
            while next(iterator).step < 2:
                pass
        assert held.wait_cancelled()
        with pytest.raises(Cancelled):
            next(iterator)


def test_generation_without_references_is_cancelled(held):
    """A generation without references is cancelled."""
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
    """Client.cancel returns the phase, and the loop raises Cancelled; a second cancel returns the end."""
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
    """The loop yields the withdrawal, no further previews, and then raises."""
    with FakeServer(withdraw_at=2) as server, Client(server.address) as client:
        seen = []
        with pytest.raises(FailedPrecondition) as caught:
            seen.extend(client.generate("a red apple"))
    assert caught.value.reason == "CONTENT_WITHHELD"
    assert [progress.previews_withdrawn for progress in seen] == [False] * 4 + [True] * 4
    assert [progress.preview is not None for progress in seen] == [False] * 3 + [True] + [False] * 4


def test_iterating_twice_raises():
    """A second loop raises GenerationConsumed, after success and after a break."""
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


def test_traceback_has_no_internals():
    """The traceback has no gRPC error as its cause, and does not grow with every call."""
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
    """model() returns plain numbers and names."""
    with FakeServer() as server, Client(server.address) as client:
        model = client.model()
    assert (model.name, model.width, model.steps, model.guidance_scale) == ("fake", 64, 4, 5.0)
    assert model.schedulers == ("DDIMScheduler", "EulerDiscreteScheduler")
    assert model.preview_methods == (PreviewMethod.HEAD, PreviewMethod.FULL_VAE)
    assert model.previews == Previews(every_steps=1, min_interval=0, max_edge=256, quality=75, method="auto")
    assert (model.max_preview_edge, model.max_preview_quality) == (1024, 95)


def test_closed_client_raises():
    """Every use of a closed client raises ClientClosed; closing it again does not."""
    client = Client()
    client.close()
    client.close()
    for use in (client.model, client.__enter__, lambda: client.generate("x"), lambda: client.cancel("x")):
        with pytest.raises(ClientClosed):
            use()
    assert repr(client) == "<Client localhost:50051 closed>"


def test_closing_the_client_cancels_its_generations(held):
    """A running generation of a closed client ends with Cancelled."""
    client = Client(held.address)
    generation = client.generate("a red apple")
    with pytest.raises(Cancelled, match="The client was closed"):
        at_step_2(generation, client.close)
    assert held.wait_cancelled()


def test_invalid_argument_raises_immediately():
    """An argument that a request cannot carry raises before anything is sent."""
    with FakeServer() as server, Client(server.address) as client:
        with pytest.raises(InvalidRequest):
            client.generate("a red apple", steps="four")  # type: ignore[arg-type]
        assert server.requests == []


def test_repr_is_short():
    """repr() of a generation is one short line."""
    with FakeServer() as server, Client(server.address) as client:
        generation = client.generate("a red apple")
        assert repr(generation) == "<Generation ?: started>"
        assert (generation.id, generation.seed, generation.progress, generation.done) == (None, None, None, False)
        generation.result()
        assert repr(generation) == "<Generation fake-1: succeeded 4/4>"
