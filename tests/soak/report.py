"""The end of both soak tests: they wait until the server has nothing to do, and report everything that they tried."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import httpx

from support.history import CHECKS, violations
from support.metrics import Scrape

if TYPE_CHECKING:
    from support.history import History

__all__ = ["report", "settle"]


_SHOWN = 40
"""Number of facts to print about a generation of a violation."""


async def settle(history: History, metrics_address: str, seconds: float) -> None:
    """Waits up to `seconds` until no generation runs or waits, and records the last numbers."""
    until = asyncio.get_running_loop().time() + seconds
    async with httpx.AsyncClient(trust_env=False) as client:
        while True:
            scrape = Scrape((await client.get(f"http://{metrics_address}/metrics")).text)
            active = int(scrape.value("calotype_active_generations"))
            waiting = int(scrape.value("calotype_queued_generations"))
            if not active + waiting or asyncio.get_running_loop().time() > until:
                history.settled(active=active, waiting=waiting)
                return
            await asyncio.sleep(0.2)


def report(history: History, title: str) -> list[str]:
    """Prints what was tried, and returns the violations."""
    found = [str(each) for each in violations(history)]
    print(f"\n{title}")
    for kind, count in sorted(history.tried.items()):
        print(f"  {count:6} {kind}")
    print(f"  {len(history.facts):6} facts, {len(CHECKS)} invariants, {len(found)} violations")
    for each in found:
        print(f"    {each}")
        for word in each.replace(",", "").split():
            for fact in [fact for fact in history.facts if getattr(fact, "generation", "") == word][-_SHOWN:]:
                print(f"      {fact}")
    return found
