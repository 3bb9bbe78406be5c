"""`hpo serve`: MLflow's scoring server with an exported model, and errors in one line."""

from __future__ import annotations

import asyncio
import io
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hpo.deploy.exported import SIGNATURE, checked
from hpo.tracking.store import prepare_mlflow

if TYPE_CHECKING:
    from fastapi import FastAPI
    from mlflow.pyfunc import PyFuncModel

_KINDS = ("application/json", "application/vnd.apache.parquet")
"""How rows and texts are sent, and arrays as JSON alone. MLflow reads CSV only where each column has a type."""


def scoring_app(folder: Path) -> FastAPI:
    """MLflow's scoring server of the model in a folder, as an ASGI application.

    `POST /invocations` takes `{"inputs": ...}` as MLflow's does, and answers as it does. Arrays are read here: MLflow
    copies them number by number, which takes most of its time. What is wrong with a request is told in one line with
    status 400, without the request and without a traceback.
    """
    prepare_mlflow()
    import mlflow.pyfunc
    from fastapi import Request, Response
    from mlflow.pyfunc.scoring_server import init

    model = mlflow.pyfunc.load_model(str(folder))
    app: FastAPI = init(model)
    signature = json.loads((folder / SIGNATURE).read_text(encoding="utf-8"))
    takes_arrays = not signature.get("preprocessing")
    kinds = _KINDS[:1] if takes_arrays else _KINDS

    @app.middleware("http")  # type: ignore[untyped-decorator]
    async def answer(request: Request, call_next: Callable[[Request], Any]) -> Any:
        if request.url.path != "/invocations" or request.method != "POST":
            return await call_next(request)
        kind = request.headers.get("content-type", "").partition(";")[0].strip()
        if kind not in kinds:
            return _refused(f"the request needs the header Content-Type: {' or '.join(kinds)}.")
        if takes_arrays:
            try:
                content = await asyncio.to_thread(predictions, model, signature, await request.body())
            except ValueError as error:
                return _refused(str(error))
            return Response(content=content, media_type="application/json")
        response: Any = await call_next(request)
        if response.status_code != 400:
            return response
        body = b"".join([chunk async for chunk in response.body_iterator])
        return _refused(in_one_line_of(body))

    def _refused(message: str) -> Response:
        content = json.dumps({"error_code": "BAD_REQUEST", "message": message})
        return Response(content=content, status_code=400, media_type="application/json")

    return app


def predictions(model: PyFuncModel, signature: Mapping[str, Any], body: bytes) -> str:
    """MLflow's answer to a request with arrays. Raises ValueError, in one line, for what the model does not take."""
    from mlflow.exceptions import MlflowException
    from mlflow.pyfunc.scoring_server import predictions_to_json

    inputs, params = read_request(body, signature)
    try:
        found = model.predict(inputs, params=params)
    except MlflowException as error:
        raise ValueError(" ".join(error.message.split())) from error
    answer = io.StringIO()
    predictions_to_json(found, answer)  # type: ignore[no-untyped-call]
    return answer.getvalue()


def read_request(body: bytes, signature: Mapping[str, Any]) -> tuple[Any, Any]:
    """The inputs of a request, an array or several by name, and its `params`. Raises ValueError for what is wrong."""
    try:
        request = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"the request is not JSON: {error}.") from error
    names = [each["name"] for each in signature["inputs"]]
    if not isinstance(request, dict) or "inputs" not in request:
        raise ValueError('the request must be {"inputs": ...}' + (f" with {', '.join(names)}." if names[1:] else "."))
    inputs = request["inputs"] if len(names) > 1 else {names[0]: request["inputs"]}
    if not isinstance(inputs, dict):
        raise ValueError(f"the inputs must be an object with {', '.join(names)}.")
    arrays = {each["name"]: checked(each, inputs) for each in signature["inputs"]}
    return (arrays if len(names) > 1 else arrays[names[0]]), request.get("params")


def in_one_line_of(body: bytes) -> str:
    """What MLflow's answer says is wrong: the reason alone."""
    try:
        message = str(json.loads(body).get("message", ""))
    except ValueError:
        message = body.decode(errors="replace")
    return " ".join((message.partition("\nError: ")[2] or message).split())


def run(app: FastAPI, *, host: str, port: int) -> None:
    """Serve until Ctrl-C or SIGTERM."""
    import uvicorn

    uvicorn.run(app, host=host, port=port, log_level="warning")
