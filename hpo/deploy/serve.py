"""`hpo serve`: MLflow's scoring server with an exported model, and errors in one line."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hpo.deploy.exported import SIGNATURE, checked
from hpo.tracking.store import prepare_mlflow

if TYPE_CHECKING:
    from fastapi import FastAPI


def scoring_app(folder: Path) -> FastAPI:
    """MLflow's scoring server of the model in a folder, as an ASGI application.

    `POST /invocations` takes `{"inputs": ...}` as MLflow's does. What is wrong with a request is told in one line with
    status 400, without the request and without a traceback.
    """
    prepare_mlflow()
    import mlflow.pyfunc
    from fastapi import Request, Response
    from mlflow.pyfunc.scoring_server import init

    app: FastAPI = init(mlflow.pyfunc.load_model(str(folder)))
    signature = json.loads((folder / SIGNATURE).read_text(encoding="utf-8"))

    @app.middleware("http")
    async def explain(request: Request, call_next: Callable[[Request], Any]) -> Any:
        if request.url.path != "/invocations" or request.method != "POST":
            return await call_next(request)
        kind = request.headers.get("content-type", "").partition(";")[0].strip()
        if not kind:
            return _refused("the request needs the header Content-Type: application/json.")
        problem = problem_with(await request.body(), signature) if kind == "application/json" else None
        if problem:
            return _refused(problem)
        response: Any = await call_next(request)
        if response.status_code != 400:
            return response
        body = b"".join([chunk async for chunk in response.body_iterator])
        return _refused(in_one_line_of(body))

    def _refused(message: str) -> Response:
        content = json.dumps({"error_code": "BAD_REQUEST", "message": message})
        return Response(content=content, status_code=400, media_type="application/json")

    return app


def problem_with(body: bytes, signature: Mapping[str, Any]) -> str | None:
    """What is wrong with a request, before MLflow turns its numbers into those of the model's type; None if nothing."""
    try:
        request = json.loads(body)
    except ValueError as error:
        return f"the request is not JSON: {error}."
    if signature.get("preprocessing"):
        return None  # rows or texts, which MLflow reads as a data frame
    names = [each["name"] for each in signature["inputs"]]
    if not isinstance(request, dict) or "inputs" not in request:
        return 'the request must be {"inputs": ...}' + (f" with {', '.join(names)}." if len(names) > 1 else ".")
    inputs = request["inputs"] if len(names) > 1 else {names[0]: request["inputs"]}
    if not isinstance(inputs, dict):
        return f"the inputs must be an object with {', '.join(names)}."
    try:
        for each in signature["inputs"]:
            checked(each, inputs)
    except ValueError as error:
        return str(error)
    return None


def in_one_line_of(body: bytes) -> str:
    """What MLflow's answer says is wrong: the reason alone."""
    try:
        message = str(json.loads(body).get("message", ""))
    except ValueError:
        message = body.decode(errors="replace")
    return " ".join((message.partition("\nError: ")[2] or message).split())


def run(folder: Path, *, host: str, port: int) -> None:
    """Serve until Ctrl-C or SIGTERM."""
    import uvicorn

    uvicorn.run(scoring_app(folder), host=host, port=port, log_level="warning")
