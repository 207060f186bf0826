"""A request's view of the shared pipeline: a shallow copy with its own scheduler.

Pipelines are not thread-safe because schedulers keep state. The modules with the weights are shared.
"""

from __future__ import annotations

import copy
from typing import Any

__all__ = ["request_view"]


def request_view(pipeline: Any, scheduler: Any, **replaced: Any) -> Any:
    """Returns a copy of `pipeline` that shares its modules, except for the given ones.

    Args:
        pipeline: The shared pipeline; not changed.
        scheduler: The request's own scheduler.
        replaced: Components to use instead of the pipeline's, such as `unet=`.
    """
    view = copy.copy(pipeline)
    # Assigning attributes would call `register_to_config` and write into the shared config.
    view.__dict__.update(replaced, scheduler=scheduler, _progress_bar_config={"disable": True})
    return view
