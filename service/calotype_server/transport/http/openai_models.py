"""Requests and responses of the part of OpenAI's images API that Calotype implements.

Sources: https://platform.openai.com/docs/api-reference/images and the types of the official SDKs.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from calotype_server.limits import JPEG_QUALITY_MAX, LORAS_MAX
from calotype_server.transport.http.schema import RequestModel, Text

__all__ = [
    "FileFormat",
    "Image",
    "ImageEvent",
    "ImageWarning",
    "ImagesRequest",
    "ImagesResponse",
    "LoraChoice",
    "ModelEntry",
    "ModelList",
    "Quality",
    "Usage",
]

FileFormat = Literal["png", "jpeg", "webp"]
Quality = Literal["low", "medium", "high", "xhigh", "max"]


class LoraChoice(RequestModel):
    """A LoRA and its strength."""

    name: Annotated[Text, Field(description="One of the names in the model's `loras`.")] = ""
    scale: Annotated[float | None, Field(ge=-1e38, le=1e38, description="-10 to 10. Default: 1.")] = None


class ImagesRequest(RequestModel):
    """A request for images. Fields and values of OpenAI's API that Calotype does not support are rejected."""

    model_config = ConfigDict(json_schema_extra={"required": ["prompt"]})

    prompt: Annotated[Text, Field(description="What the image shows.")] = ""
    model: Annotated[Text | None, Field(description="The loaded model, as named by `GET /v1/models`.")] = None
    n: Annotated[int, Field(ge=1, le=10, description="Number of images; 1 with `stream`.")] = 1
    size: Annotated[
        str,
        Field(
            pattern=r"^(auto|[0-9]{1,5}x[0-9]{1,5})$",
            description="WIDTHxHEIGHT in pixels: a supported size, see `GET /v1/models`; auto: the default size.",
        ),
    ] = "auto"
    quality: Annotated[
        Literal["auto", "low", "medium", "high", "xhigh", "max", "standard", "hd"],
        Field(
            description="Number of steps, times the model's default: low 0.5; auto, medium and standard 1; high and hd "
            "2; xhigh 3; max 4. At most the server's maximum."
        ),
    ] = "auto"
    output_format: Annotated[FileFormat, Field(description="File format.")] = "png"
    output_compression: Annotated[
        int | None, Field(ge=0, le=100, description=f"Quality of JPEG (capped at {JPEG_QUALITY_MAX}) and WebP.")
    ] = None
    background: Annotated[
        Literal["auto", "opaque"], Field(description="Transparent backgrounds are not supported.")
    ] = "auto"
    moderation: Annotated[Literal["auto", "low"], Field(description="Has no effect: the model decides.")] = "auto"
    style: Annotated[Literal["vivid", "natural"] | None, Field(description="Has no effect.")] = None
    response_format: Annotated[
        Literal["b64_json", "url"],
        Field(
            description="url: the address of each image instead of its file. It works without a key, while the server "
            "retains the image. Not with `stream`."
        ),
    ] = "b64_json"
    stream: Annotated[bool, Field(description="Whether to respond with server-sent events.")] = False
    partial_images: Annotated[
        int | None,
        Field(ge=0, le=3, description="With `stream`: at most this many previews, spread evenly. Default: 0."),
    ] = None
    user: Annotated[Text | None, Field(max_length=512, description="Has no effect.")] = None
    safety_identifier: Annotated[Text | None, Field(max_length=512, description="Has no effect.")] = None
    negative_prompt: Annotated[Text | None, Field(description="Calotype only: what the image should not show.")] = None
    seed: Annotated[
        int | None,
        Field(
            ge=-(2**63),
            le=2**63 - 11,
            description="Calotype only: seed of the first image; each next image adds 1. Default, also for -1: random.",
        ),
    ] = None
    step_count: Annotated[
        int | None,
        Field(ge=-(2**31), le=2**31 - 1, description="Calotype only: denoising steps, instead of `quality`."),
    ] = None
    guidance_scale: Annotated[
        float | None, Field(ge=-1e38, le=1e38, description="Calotype only: strength of classifier-free guidance.")
    ] = None
    scheduler: Annotated[
        Text | None, Field(description="Calotype only: one of the model's schedulers, or a familiar name of one.")
    ] = None
    sigmas: Annotated[
        Literal["karras", "exponential", "beta"] | None,
        Field(description="Calotype only: noise levels of the steps, if the scheduler supports them."),
    ] = None
    spacing: Annotated[
        Literal["leading", "trailing", "linspace"] | None,
        Field(description="Calotype only: spacing of the timesteps, if the scheduler supports it."),
    ] = None
    prompt_syntax: Annotated[
        Literal["plain", "weighted"],
        Field(
            description="Calotype only. weighted: parts of the prompts can have weights, as in `(red:1.4)`, and long "
            "prompts are not truncated."
        ),
    ] = "plain"
    speed: Annotated[
        Literal["exact", "fast"],
        Field(description="Calotype only. fast: compute about half of the steps; the image is close to the exact one."),
    ] = "exact"
    loras: Annotated[
        tuple[LoraChoice, ...],
        Field(max_length=LORAS_MAX, description="Calotype only: LoRAs to apply, each at most once."),
    ] = ()


class InputTokens(BaseModel):
    """Token counts of the input, always 0."""

    image_tokens: int = 0
    text_tokens: int = 0


class Usage(BaseModel):
    """Present because the SDKs expect it. Calotype counts no tokens, so all values are 0."""

    input_tokens: int = 0
    input_tokens_details: InputTokens = InputTokens()
    output_tokens: int = 0
    total_tokens: int = 0


class ImageWarning(BaseModel):
    """A problem that did not stop the generation, such as a truncated prompt."""

    reason: str = Field(description="Machine-readable, such as PROMPT_TRUNCATED.")
    message: str = Field(description="One sentence for people.")


class Image(BaseModel):
    """One image."""

    b64_json: str | None = Field(None, description="The image file, in base64; absent with `response_format=url`.")
    url: str | None = Field(None, description="Address of the image file, with `response_format=url`.")
    seed: int = Field(description="Calotype only: the seed used.")


class ImagesResponse(BaseModel):
    """The response without `stream`."""

    created: int = Field(description="Unix time in seconds.")
    data: list[Image]
    background: Literal["opaque"] = "opaque"
    output_format: FileFormat
    quality: Quality
    size: str = Field(description="WIDTHxHEIGHT in pixels.")
    usage: Usage = Usage()
    warnings: list[ImageWarning] = Field([], description="Calotype only: problems, each once.")


class ImageEvent(BaseModel):
    """The data of an event with `stream`: `image_generation.partial_image` or `image_generation.completed`."""

    type: Literal["image_generation.partial_image", "image_generation.completed"]
    b64_json: str
    created_at: int
    background: Literal["opaque"] = "opaque"
    output_format: FileFormat = Field(description="Of this image: partial images are JPEG.")
    quality: Quality
    size: str = Field(description="Size of the final image.")
    partial_image_index: int | None = Field(None, description="Of a partial image, from 0 to 2.")
    usage: Usage | None = Field(None, description="Of the completed image.")
    warnings: list[ImageWarning] | None = Field(None, description="Calotype only: of the completed image.")
    seed: int = Field(description="Calotype only: the seed used.")


class ModelEntry(BaseModel):
    """The loaded model."""

    id: str
    object: Literal["model"] = "model"
    created: int = Field(description="Unix time in seconds at which it was loaded.")
    owned_by: Literal["calotype"] = "calotype"
    sizes: list[str] = Field(description="Calotype only: sizes to offer; see `GET /v1/model`.")


class ModelList(BaseModel):
    """All loaded models: always one."""

    object: Literal["list"] = "list"
    data: list[ModelEntry]
