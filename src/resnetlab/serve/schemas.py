"""The shapes of requests and answers, for /openapi.json (JSON Schema)."""

from typing import Any

Schema = dict[str, Any]

_TEXT, _BINARY = {"type": "string"}, {"type": "string", "format": "binary"}
_PROBABILITY = {"type": "number", "minimum": 0, "maximum": 1}


def _object(**properties: Schema) -> Schema:
    return {"type": "object", "properties": properties}


def _list(items: Schema) -> Schema:
    return {"type": "array", "items": items}


_PLACE: Schema = {"class": _TEXT, "probability": _PROBABILITY}
ERROR = _object(error=_object(code=_TEXT, message=_TEXT))
ANSWER = _object(
    model=_TEXT,
    images=_list(_object(file=_TEXT, **_PLACE, top=_list(_object(**_PLACE)))),
    broken=_list(_object(file=_TEXT, code=_TEXT, message=_TEXT)),
)
EXPLANATION = _object(
    file=_TEXT,
    **_PLACE,
    method=_TEXT,
    stage={"type": ["string", "null"], "description": "Of methods that look at feature maps."},
    width={"type": "integer"},
    height={"type": "integer"},
    box={**_list({"type": "number"}), "description": "What the network read: left, top, right, bottom, as shares."},
    anywhere={"type": "boolean", "description": "Whether anything speaks for the class."},
    heat_png={"type": "string", "description": "A data: URL; as transparent as the heat is low."},
    overlay_png={"type": "string", "description": "A data: URL: the heat over what the network read."},
)
BODY: Schema = {
    "requestBody": {
        "required": True,
        "content": {
            "image/*": {"schema": _BINARY},
            "application/octet-stream": {"schema": _BINARY},
            "multipart/form-data": {"schema": _object(images=_list(_BINARY))},
        },
    }
}
_ERRORS = {
    400: "The request is malformed.",
    413: "The request, an image or their number is too large.",
    415: "It is not an image in a format that is read.",
    422: "The image is damaged, or a parameter is wrong.",
    429: "Too many requests at a time; Retry-After says when to try again.",
    503: "The queue is full, or the server stops; Retry-After says when to try again.",
    504: "No answer in time.",
}


def answers(schema: Schema, **others: Schema) -> dict[int | str, Schema]:
    """Return the answers of a route: 200 with a schema, other content types, and every error."""
    content = {"application/json": {"schema": schema}, **{kind: {"schema": s} for kind, s in others.items()}}
    result: dict[int | str, Schema] = {200: {"description": "Done.", "content": content}}
    for status, text in _ERRORS.items():
        result[status] = {"description": text, "content": {"application/json": {"schema": ERROR}}}
    return result
