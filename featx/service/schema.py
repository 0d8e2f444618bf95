"""The shapes of the service's answers and bodies, for its OpenAPI document."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from fastapi import Query
from pydantic import BaseModel, ConfigDict, Field

IMAGE_TYPES = (
    "image/jpeg", "image/png", "image/webp", "image/gif", "image/bmp", "image/tiff", "image/avif", "image/heic",
    "application/dicom",
)  # fmt: skip


Named = Annotated[str | None, Query(description="The name of the model; not needed where there is only one.")]
"""The query by which a request says which model it is for."""


class Neighbour(BaseModel):
    """An image of the store."""

    id: str
    label: str
    score: float
    row: int


class Refused(BaseModel):
    """An image that could not be used."""

    id: str
    reason: str
    message: str


class EvidenceMap(BaseModel):
    """The evidence of one layer in one view: rows of numbers, whose mean it ``adds`` to the score.

    ``box`` is the part of the upright photo that it lies on, (left, top, right, bottom) as shares of its sides.
    """

    layer: str
    view: str
    box: list[float]
    adds: float
    evidence: list[list[float]]


class Unmapped(BaseModel):
    """A layer that has no map, and what it adds to the score."""

    layer: str
    reason: str
    adds: float


class ClassEvidence(BaseModel):
    """The evidence for one class; ``overlay`` is a PNG as a data URL, as wide and high as the photo for its size."""

    model_config = ConfigDict(populate_by_name=True)

    name: str = Field(alias="class")
    score: float
    intercept: float
    maps: list[EvidenceMap]
    left_out: list[Unmapped]
    overlay: str


class Explanation(BaseModel):
    """Evidence for the label and the runner-up; without ``classes``, ``reason`` says why there is none."""

    reason: str | None
    classes: list[ClassEvidence]


class Prediction(BaseModel):
    """What the head says about one image."""

    id: str
    label: str
    score: float
    score_kind: Literal["probability", "margin"]
    abstain: bool
    reason: Literal["unsure", "unknown"] | None
    familiarity: float | None
    probabilities: dict[str, float]
    set: list[str] | None = None
    neighbours: list[Neighbour] | None = None
    explanation: Explanation | None = None
    answer: str | None = None


class PredictReply(BaseModel):
    """Of /predict."""

    predictions: list[Prediction]
    version: str
    refused: list[Refused]
    request_id: str


class Embedding(BaseModel):
    """The embedding of one image."""

    id: str
    embedding: list[float]


class EmbedReply(BaseModel):
    """Of /embed."""

    embeddings: list[Embedding]
    embedding_dim: int
    layer: str
    fingerprint: str
    refused: list[Refused]
    request_id: str


class Result(BaseModel):
    """What is most similar to one image."""

    query: str
    matches: list[Neighbour]


class SearchReply(BaseModel):
    """Of /search."""

    results: list[Result]
    refused: list[Refused]
    request_id: str


class CorrectionRecord(BaseModel):
    """What somebody says of a photo, and what the model had said."""

    n: int
    when: str
    by: str
    sha256: str
    file: str
    label: str
    said: str | None
    score: float | None
    version: str | None
    source: str | None = None
    withdrawn: bool = False


class Corrected(BaseModel):
    """Of a correction that is on the disk."""

    correction: CorrectionRecord
    new: bool
    request_id: str


class Vote(BaseModel):
    """What one person says of a photo."""

    by: str
    label: str
    when: str


class Disputed(BaseModel):
    """A photo that people disagree on, and the label that most of them give, if one has most."""

    image: str
    file: str
    label: str | None
    said: list[Vote]


class Limits(BaseModel):
    """A number with its 95 % interval."""

    mean: float
    low: float
    high: float


class Agreed(BaseModel):
    """How well two people agree: Cohen's kappa over the photos that both have labelled."""

    a: str
    b: str
    images: int
    agreed: int
    kappa: Limits


class FeedbackReply(BaseModel):
    """Of the corrections; ``next`` is what to ask ``after`` for more."""

    corrections: list[CorrectionRecord]
    total: int
    next: int | None
    images: int
    disagreements: list[Disputed]
    agreement: list[Agreed]


class Problem(BaseModel):
    """A word for programs and a sentence for people."""

    reason: str
    message: str


class ErrorReply(BaseModel):
    """Of every request that is not answered with a result."""

    error: Problem
    request_id: str
    refused: list[Refused] | None = None


class Ready(BaseModel):
    """Of /ready."""

    ready: bool
    reason: str


class Live(BaseModel):
    """Of /live."""

    live: bool


_ERRORS = {
    400: "The request cannot be read",
    401: "An API key is needed",
    403: "The service is not known under this name",
    404: "There is no such thing",
    408: "The body took too long to arrive",
    413: "The body is too large, or has too many images",
    415: "The content type is none of an image or a form",
    422: "No image could be used; the reason says why",
    429: "Too busy; Retry-After says when to try again",
    500: "A bug of featx",
    503: "Not able to compute now",
    504: "Not done before the deadline",
}


def errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Responses of a route that are not results."""
    return {status: {"model": ErrorReply, "description": _ERRORS[status]} for status in statuses}


def image_body(*, required: bool = True) -> dict[str, Any]:
    """The body of the routes that take images."""
    raw = {"schema": {"type": "string", "format": "binary"}}
    several = {"type": "array", "items": {"type": "string", "format": "binary"}, "minItems": 1}
    form = {"type": "object", "properties": {"images": several}, "required": ["images"]}
    content: dict[str, Any] = dict.fromkeys((*IMAGE_TYPES, "application/octet-stream"), raw)
    content["multipart/form-data"] = {"schema": form}
    described = "One image as it is, or a form with several (any field names)."
    return {"requestBody": {"required": required, "description": described, "content": content}}
