"""Names, documentation and values of the metrics."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from calotype_server import errors
from calotype_server.observability.events import (
    AcceleratorActive,
    BatchDone,
    CallEnded,
    CallRefused,
    CancelCompleted,
    FirstPreview,
    GenerationEnded,
    ImageEncoded,
    LeftQueue,
    MessageSent,
    Observation,
    PhaseSpan,
    PreviewFailed,
    PreviewPublished,
    PreviewRendered,
    PreviewsDropped,
    StepDone,
    to_all,
)
from calotype_server.observability.metrics import Metrics, ServerMetrics
from calotype_server.types import EncodedImage, Failed, Job, PreviewMethod, Succeeded, Timings
from support.metrics import Scrape

README = Path(__file__).parents[3] / "service" / "README.md"
JOB = Job("unmistakable", None, 16, 16, 3, 3.0, 0, "DDIMScheduler")
SPANS = (PhaseSpan("queue", 1.0, 3.0), PhaseSpan("encode_prompt", 3.0, 3.5), PhaseSpan("denoise", 3.5, 8.5))


def ended(end) -> GenerationEnded:
    """A generation whose last phase was denoising."""
    return GenerationEnded("id", JOB, end, SPANS, 3, 2.0)


SUCCESS = Succeeded(EncodedImage("png", 16, 16, b"data"), Timings())

EACH = [
    (StepDone(0.5), "calotype_step_seconds_sum", 0.5),
    (BatchDone(4, 0.25), "calotype_batch_rows_sum", 4),
    (BatchDone(4, 0.25), "calotype_batch_seconds_sum", 0.25),
    (PreviewRendered(PreviewMethod.HEAD, 0.125), "calotype_preview_seconds_sum", 0.125),
    (PreviewPublished(PreviewMethod.HEAD, True), "calotype_previews_total", 1),
    (PreviewsDropped("unread", 3), "calotype_previews_dropped_total", 3),
    (PreviewFailed(), "calotype_errors_total", 1),
    (ImageEncoded("final", "png", 0.5), "calotype_encode_seconds_sum", 0.5),
    (LeftQueue(2.0), "calotype_queue_wait_seconds_sum", 2),
    (FirstPreview(2.0), "calotype_first_preview_seconds_sum", 2),
    (CancelCompleted(2.0), "calotype_cancel_seconds_sum", 2),
    (ended(SUCCESS), "calotype_phase_seconds_sum", 7.5),
    (ended(SUCCESS), "calotype_generations_ended_total", 1),
    (MessageSent("native", 100), "calotype_messages_sent_total", 1),
    (MessageSent("native", 100), "calotype_sent_bytes_total", 100),
    (CallRefused("QUEUE_FULL"), "calotype_refused_total", 1),
    (CallEnded("native", "Generate", "OK"), "calotype_calls_total", 1),
]


@pytest.mark.parametrize(("observation", "name", "value"), EACH)
def test_each_observation_is_counted(observation: Observation, name: str, value: float) -> None:
    """Each observation updates its metric, once per observation."""
    metrics = ServerMetrics("1")
    assert Scrape.of(metrics).value(name) == 0
    for times in (1, 2):
        metrics.observe(observation)
        assert Scrape.of(metrics).value(name) == times * value


def test_the_cases_cover_every_observation() -> None:
    """Every kind of observation has a case above, or is not counted."""
    assert {type(observation) for observation, _, _ in EACH} == set(Observation.__args__) - {AcceleratorActive}


def test_the_newest_accelerator_is_shown() -> None:
    """There is one series, with the accelerator that is in use now."""
    metrics = ServerMetrics("1")
    for name in ("openvino", "none"):
        metrics.observe(AcceleratorActive(name))
    lines = metrics.render("")[0].decode().splitlines()
    assert [line for line in lines if line.startswith("calotype_accelerator_info")] == [
        'calotype_accelerator_info{name="none"} 1.0'
    ]


@pytest.mark.parametrize(
    ("end", "labels", "error_phases"),
    [
        (SUCCESS, {"outcome": "succeeded", "reason": ""}, []),
        (
            Succeeded(SUCCESS.image, Timings(), finished_early=True),
            {"outcome": "succeeded", "reason": "FINISHED_EARLY"},
            [],
        ),
        (Failed(errors.Abandoned("a"), Timings()), {"outcome": "cancelled", "reason": "ABANDONED"}, []),
        (
            Failed(errors.OutOfMemory("o"), Timings()),
            {"outcome": "failed", "reason": "OUT_OF_MEMORY"},
            [{"phase": "denoise"}],
        ),
    ],
)
def test_an_end_is_counted_by_its_outcome_and_where_it_failed(end, labels, error_phases) -> None:
    """A cancel is no error; a failure is counted for the phase in which it happened."""
    metrics = ServerMetrics("1")
    metrics.observe(ended(end))
    scrape = Scrape.of(metrics)
    assert scrape.labels("calotype_generations_ended_total") == [labels]
    assert scrape.labels("calotype_errors_total") == error_phases
    assert scrape.value("calotype_phase_seconds_sum", phase="denoise") == 5.0
    assert "unmistakable" not in metrics.render("")[0].decode()


def test_a_bridge_has_no_metrics_of_generations() -> None:
    """A bridge runs no generations, and gauges that are always 0 would mislead."""
    names = {each.name for each in Metrics("1").catalogue}
    assert "calotype_sent_bytes_total" in names
    assert not any("generation" in name for name in names)


def test_names_follow_the_conventions_of_prometheus() -> None:
    """Names have the prefix, base units and `_total` for counters, and help texts are sentences."""
    for each in ServerMetrics("1").catalogue:
        assert re.fullmatch("calotype_[a-z]+(_[a-z]+)*", each.name)
        assert (each.kind == "counter") == each.name.endswith("_total")
        assert each.kind != "histogram" or each.name.endswith(("_seconds", "_rows"))
        assert each.text.endswith(".")


def test_the_documentation_lists_every_metric() -> None:
    """The table in service/README.md matches the code, line by line."""
    rows = [
        f"| `{each.name}` | {each.kind} | {', '.join(f'`{label}`' for label in each.labels)} | {each.text} |"
        for each in ServerMetrics("1").catalogue
    ]
    written = [line for line in README.read_text().splitlines() if line.startswith("| `calotype_")]
    assert written == rows, "The table should be:\n" + "\n".join(rows)


def test_gauges_are_read_at_each_scrape() -> None:
    """A gauge shows the current value of its function."""
    metrics, queued = ServerMetrics("1"), [3]
    metrics.bind_gauges(queued=lambda: queued[0])
    assert Scrape.of(metrics).value("calotype_queued_generations") == 3
    queued[0] = 5
    assert Scrape.of(metrics).value("calotype_queued_generations") == 5


def test_two_servers_in_one_process_count_for_themselves() -> None:
    """Each server has its own registry."""
    one, other = ServerMetrics("1"), ServerMetrics("1")
    to_all(one.observe)(StepDone(1.0))
    assert Scrape.of(one).value("calotype_step_seconds_count") == 1
    assert Scrape.of(other).value("calotype_step_seconds_count") == 0


def test_the_process_has_metrics() -> None:
    """Memory, open files and threads of the process are exposed."""
    scrape = Scrape.of(Metrics("1"))
    for name in ("process_resident_memory_bytes", "process_open_fds", "calotype_threads"):
        assert scrape.value(name) > 0
    assert scrape.labels("calotype_build_info") == [{"version": "1"}]
