"""Parses the output of `/metrics`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from prometheus_client.parser import text_string_to_metric_families

if TYPE_CHECKING:
    from calotype_server.observability.metrics import Metrics


class Scrape:
    """All metrics at one moment.

    Args:
        text: Metrics in Prometheus' text format.
    """

    def __init__(self, text: str) -> None:
        self.families = list(text_string_to_metric_families(text))
        self._samples = [sample for family in self.families for sample in family.samples]

    @classmethod
    def of(cls, metrics: Metrics) -> Scrape:
        """Scrapes without a socket."""
        return cls(metrics.render("")[0].decode())

    def value(self, name: str, **labels: str) -> float:
        """Returns the sum of all samples with this name and these labels; 0 when there are none."""
        return sum(
            sample.value for sample in self._samples if sample.name == name and labels.items() <= sample.labels.items()
        )

    def labels(self, name: str) -> list[dict[str, str]]:
        """Returns the labels of each sample with this name."""
        return [sample.labels for sample in self._samples if sample.name == name]
