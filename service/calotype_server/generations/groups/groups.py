"""Cancels all members of a group, also those that have not arrived yet."""

from __future__ import annotations

from typing import TYPE_CHECKING

from calotype_server import errors
from calotype_server.generations.groups.tombstones import Tombstones

if TYPE_CHECKING:
    from collections.abc import Iterable

    from calotype_server.auth.access import Caller
    from calotype_server.generations.index import GenerationIndex
    from calotype_server.types import DeliveryOptions

__all__ = ["Groups"]


class Groups:
    """The groups of the generations in an index. Lives in the event loop.

    The requests of a group and its cancel travel separately, so the cancel may arrive first. For that reason, the
    server remembers cancelled groups for a while and rejects new members. A restart forgets them.

    Args:
        index: Finds the members that run or are retained.
        tombstones: Remembers cancelled groups.
    """

    def __init__(self, index: GenerationIndex, tombstones: Tombstones | None = None) -> None:
        self._index = index
        self._tombstones = Tombstones() if tombstones is None else tombstones

    def cancel(self, group: str, caller: Caller) -> int:
        """Cancels all members that run, and rejects new ones from now on. Can be repeated.

        Callers reach only their own groups, and operators those of all callers.

        Returns:
            Number of generations that this call cancels.

        Raises:
            GroupNotFound: No member runs or is retained. Members that arrive later are rejected nevertheless.
        """
        members = [each for each in self._index.newest(caller) if each.delivery.group == group]
        for owner in {caller.id, *(each.delivery.caller for each in members)}:
            self._tombstones.add(owner, group)
        if not members:
            raise errors.GroupNotFound("There is no generation in this group.")
        return sum(each.abort(errors.Cancelled("The group was cancelled.")) for each in members)

    def require_open(self, deliveries: Iterable[DeliveryOptions]) -> None:
        """Checks that new generations may join their groups.

        Raises:
            GroupCancelled: One of the groups was cancelled a short time ago.
        """
        for delivery in deliveries:
            if delivery.group and self._tombstones.has(delivery.caller, delivery.group):
                raise errors.GroupCancelled("The group was cancelled.")
