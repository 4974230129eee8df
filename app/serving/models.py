"""GET /v1/models: what is served here, under which names."""

from app.errors import ModelNotFound
from app.serving.answer import JsonObject
from app.serving.context import ServingContext


def list_models(context: ServingContext) -> JsonObject:
    return {"object": "list", "data": [_card(context, name) for name in context.model_names]}


def get_model(context: ServingContext, name: str) -> JsonObject:
    """Return one model's card. Raises ModelNotFound."""
    if name not in context.model_names:
        raise ModelNotFound(f"The model '{name[:100]}' does not exist.", param="model")
    return _card(context, name)


def _card(context: ServingContext, name: str) -> JsonObject:
    return {
        "id": name,
        "object": "model",
        "created": context.created,
        "owned_by": "arriero",
        "root": context.model_names[0],
        "max_model_len": context.max_model_len,
        "precision": context.precision,
    }
