"""What happens with requests for sizes that the model does not draw well."""

from __future__ import annotations

from enum import StrEnum

__all__ = ["OtherSizes"]


class OtherSizes(StrEnum):
    """What happens with a request for a size that the model does not support.

    Attributes:
        REJECT: It is an error that names the nearest supported sizes.
        SCALE: The model draws the nearest supported size, and the server scales the image.
        DRAW: The model draws it anyway. Only pipelines that draw nothing but their own sizes still reject it.
    """

    REJECT = "reject"
    SCALE = "scale"
    DRAW = "draw"
