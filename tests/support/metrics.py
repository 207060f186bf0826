"""What `/metrics` says, as numbers."""

from __future__ import annotations

from typing import TYPE_CHECKING

from prometheus_client.parser import text_string_to_metric_families

if TYPE_CHECKING:
    from calotype_server.observability.metrics import Metrics


class Scrape:
    """One reading of all metrics.

    Args:
        text: In Prometheus' text format.
    """

    def __init__(self, text: str) -> None:
        self.families = list(text_string_to_metric_families(text))
        self._samples = [sample for family in self.families for sample in family.samples]

    @classmethod
    def of(cls, metrics: Metrics) -> Scrape:
        """Reads without a socket."""
        return cls(metrics.render("")[0].decode())

    def value(self, name: str, **labels: str) -> float:
        """The sum of all samples of the name that have these labels; 0 when there is none."""
        return sum(
            sample.value for sample in self._samples if sample.name == name and labels.items() <= sample.labels.items()
        )

    def labels(self, name: str) -> list[dict[str, str]]:
        """The labels of each sample of a name."""
        return [sample.labels for sample in self._samples if sample.name == name]
