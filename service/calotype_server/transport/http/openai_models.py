"""What OpenAI's images API takes and gives, as far as there is a meaning for it here.

https://platform.openai.com/docs/api-reference/images and the types of the official SDKs.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from calotype_server.transport.http.schema import Given, Text

__all__ = ["Image", "ImageEvent", "ImagesRequest", "ImagesResponse", "ModelEntry", "ModelList", "Usage"]


class ImagesRequest(Given):
    """A request for images. What OpenAI's API knows and is not here is refused, as is what Calotype cannot do."""

    model_config = ConfigDict(json_schema_extra={"required": ["prompt"]})

    prompt: Annotated[Text, Field(description="What the picture shows.")] = ""
    model: Annotated[Text | None, Field(description="The loaded one, as `GET /v1/models` names it.")] = None
    n: Annotated[int, Field(ge=1, le=10, description="Number of images; 1 with `stream`.")] = 1
    size: Annotated[
        str,
        Field(pattern=r"^(auto|[0-9]{1,5}x[0-9]{1,5})$", description="WIDTHxHEIGHT in pixels; auto: the model's own."),
    ] = "auto"
    quality: Annotated[
        Literal["auto", "low", "medium", "high", "standard", "hd"],
        Field(description="low: half of the default steps; high, hd: twice as many; the others: the default."),
    ] = "auto"
    output_format: Annotated[Literal["png", "jpeg", "webp"], Field(description="File format.")] = "png"
    output_compression: Annotated[
        int | None, Field(ge=0, le=100, description="Quality of JPEG (at most 95 is used) and WebP.")
    ] = None
    background: Annotated[Literal["auto", "opaque"], Field(description="There are no transparent ones.")] = "auto"
    moderation: Annotated[Literal["auto", "low"], Field(description="Changes nothing: the model decides.")] = "auto"
    response_format: Annotated[Literal["b64_json"], Field(description="URLs are not offered here.")] = "b64_json"
    stream: Annotated[bool, Field(description="Whether to answer with server-sent events.")] = False
    partial_images: Annotated[
        int | None, Field(ge=0, le=3, description="With `stream`: previews at most, evenly over the steps. Default: 0.")
    ] = None
    user: Annotated[Text | None, Field(max_length=512, description="Changes nothing.")] = None
    safety_identifier: Annotated[Text | None, Field(max_length=512, description="Changes nothing.")] = None
    negative_prompt: Annotated[Text | None, Field(description="Calotype's: what the picture should not show.")] = None
    seed: Annotated[
        int | None,
        Field(
            ge=-(2**63), le=2**63 - 11, description="Calotype's: seed of the first image, rising from one to the next."
        ),
    ] = None
    step_count: Annotated[
        int | None, Field(ge=-(2**31), le=2**31 - 1, description="Calotype's: denoising steps, in place of `quality`.")
    ] = None
    guidance_scale: Annotated[
        float | None, Field(ge=-1e38, le=1e38, description="Calotype's: strength of classifier-free guidance.")
    ] = None
    scheduler: Annotated[Text | None, Field(description="Calotype's: one of the model's schedulers.")] = None


class InputTokens(BaseModel):
    """Always 0."""

    image_tokens: int = 0
    text_tokens: int = 0


class Usage(BaseModel):
    """There for the SDKs, which expect it; nothing is counted in tokens here, so all are 0."""

    input_tokens: int = 0
    input_tokens_details: InputTokens = InputTokens()
    output_tokens: int = 0
    total_tokens: int = 0


class Image(BaseModel):
    """One image."""

    b64_json: str = Field(description="The file, in base64.")
    seed: int = Field(description="Calotype's: the seed in use.")


class ImagesResponse(BaseModel):
    """The answer without `stream`."""

    created: int = Field(description="When, in seconds of Unix time.")
    data: list[Image]
    background: Literal["opaque"] = "opaque"
    output_format: Literal["png", "jpeg", "webp"]
    quality: Literal["low", "medium", "high"]
    size: str = Field(description="WIDTHxHEIGHT in pixels.")
    usage: Usage = Usage()


class ImageEvent(BaseModel):
    """The data of an event with `stream`: `image_generation.partial_image` or `image_generation.completed`."""

    type: Literal["image_generation.partial_image", "image_generation.completed"]
    b64_json: str
    created_at: int
    background: Literal["opaque"] = "opaque"
    output_format: Literal["png", "jpeg", "webp"] = Field(description="Of this file: partial images are JPEG.")
    quality: Literal["low", "medium", "high"]
    size: str = Field(description="Of the final image.")
    partial_image_index: int | None = Field(None, description="Of a partial image: 0, 1, 2.")
    usage: Usage | None = Field(None, description="Of the completed one.")
    seed: int = Field(description="Calotype's: the seed in use.")


class ModelEntry(BaseModel):
    """The loaded model."""

    id: str
    object: Literal["model"] = "model"
    created: int = Field(description="When it was loaded, in seconds of Unix time.")
    owned_by: Literal["calotype"] = "calotype"


class ModelList(BaseModel):
    """All models that are loaded: one."""

    object: Literal["list"] = "list"
    data: list[ModelEntry]
