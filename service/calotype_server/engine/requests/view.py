"""A request's view of the shared pipeline: a shallow copy with its own scheduler.

Pipelines are not thread-safe because schedulers, guiders and similar parts keep state. The modules with the weights are
shared; everything else is the request's own.
"""

from __future__ import annotations

import copy
from typing import Any

from calotype_server.engine.requests.own_state import own_state

__all__ = ["request_view"]


def request_view(pipeline: Any, scheduler: Any, **replaced: Any) -> Any:
    """Returns a copy of `pipeline` that shares its modules, except for the given ones, and nothing that keeps state.

    Args:
        pipeline: The shared pipeline; not changed.
        scheduler: The request's own scheduler.
        replaced: Components to use instead of the pipeline's, such as `unet=`.
    """
    view = copy.copy(pipeline)
    own = own_state(pipeline, view, except_for=frozenset({"scheduler", *replaced}))
    # Assigning attributes would call `register_to_config` and write into the shared config.
    view.__dict__.update(own, **replaced, scheduler=scheduler, _progress_bar_config={"disable": True})
    return view
