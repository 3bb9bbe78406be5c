"""`hpo serve`: the best model of a study behind MLflow's scoring server."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from hpo import __version__
from hpo.deploy.exported import SIGNATURE, described
from hpo.deploy.mlflow_format import EXAMPLE
from hpo.session.export import Chosen, choose, export_best
from hpo.tracking.server import find_free_port, is_loopback, require_free_port
from hpo.training.trained import TrialDescription

_DEFAULT_PORT = 5001


def serve_best(
    study: str,
    *,
    host: str = "127.0.0.1",
    port: int | None = None,
    trial: int | None = None,
    say: Callable[[str], None] = print,
    **machine_options: Any,
) -> None:
    """Serve the best model of a study, or of another `trial`, until Ctrl-C.

    By default it listens on the first free port from 5001. It is served as its export of format mlflow, which is made
    unless it is in the home. Raises what `export_best` raises, and UsageError if the port is taken.
    """
    from hpo.deploy.serve import run, scoring_app

    if port is None:
        port = find_free_port(host, _DEFAULT_PORT, say)
    require_free_port(host, port)
    folder = _exported(study, trial, say, machine_options)
    if not is_loopback(host):
        say(f"Warning: whoever can reach {host}:{port} can use the model; the server asks for no password.")
    app = scoring_app(folder)
    signature = json.loads((folder / SIGNATURE).read_text(encoding="utf-8"))
    address = f"http://{host}:{port}/invocations"
    say(f"Model of trial {signature['trial']} at {address}, which takes {_described(signature)}.")
    say(f"Try it: curl -H 'Content-Type: application/json' {address} -d @{shlex.quote(str(folder / EXAMPLE))}")
    say("Stop it with Ctrl-C.")
    run(app, host=host, port=port)


def _described(signature: Mapping[str, Any]) -> str:
    """What the model takes, for people: rows, texts or arrays."""
    if preprocessing := signature.get("preprocessing"):
        return "texts" if preprocessing["kind"] == "text" else "rows of the table"
    return ", ".join(f"{each['name']}: {each['dtype']} {described(each['shape'])}" for each in signature["inputs"])


def _exported(study: str, trial: int | None, say: Callable[[str], None], options: dict[str, Any]) -> Path:
    """The folder with the export, made if it is missing or another model's."""
    chosen = choose(study, trial=trial, **options)
    folder = chosen.request.machine.home.study(study).exported("mlflow")
    if not _is_of(folder, chosen):
        say("Exporting the model, which takes half a minute ...")
        export_best(study, format="mlflow", trial=trial, force=True, **options)
    return folder


def _is_of(folder: Path, chosen: Chosen) -> bool:
    try:
        signature = json.loads((folder / SIGNATURE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    weights = TrialDescription.read(chosen.folder).weights_sha256
    return (signature.get("weights_sha256"), signature.get("hpo")) == (weights, __version__)
