"""GET /openapi.json and /docs: the API's own description, for programs and for people."""

from collections.abc import Mapping

from fastapi import APIRouter, Request
from fastapi.openapi.docs import get_swagger_ui_html
from starlette.responses import HTMLResponse, JSONResponse


def document_routes(document: Mapping[str, object]) -> APIRouter:
    """Return the routes; the page loads its viewer from FastAPI's usual place on the web."""
    router = APIRouter(redirect_slashes=False)
    content = dict(document)

    @router.get("/openapi.json")
    async def openapi(request: Request) -> JSONResponse:
        root = request.scope.get("root_path", "")
        return JSONResponse(content | ({"servers": [{"url": root}]} if root else {}))

    @router.get("/docs")
    async def docs(request: Request) -> HTMLResponse:
        root = request.scope.get("root_path", "")
        return get_swagger_ui_html(openapi_url=f"{root}/openapi.json", title="arriero")

    return router
