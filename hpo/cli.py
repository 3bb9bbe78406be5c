"""The command line. Only click is imported here; each command imports the rooms it needs."""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Callable
from contextlib import nullcontext, redirect_stdout, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from hpo import __version__
from hpo.click_options import InSections, take
from hpo.errors import OF_A_FULL_DISK, OF_THE_DISK, HpoError, UsageError, disk_refusal, visible
from hpo.machine import (
    escape_what_streams_lack,
    has_cpu_quota,
    hear_stop_signals,
    num_cores,
    open_closed_streams,
    require_readable_allocator_settings,
    require_supported_system,
)
from hpo.session.options import (
    MachineOptions,
    SearchOptions,
    SessionOptions,
    StoreOptions,
    StudyOptions,
    SubmitOptions,
    WorkerOptions,
)

if TYPE_CHECKING:
    from rich.console import Console

    from hpo.records import SearchOutcome

FAILED, INTERRUPTED = 1, 130
_RESUMABLE = {"search", "worker", "confirm", "refit"}
DATA_STREAM = "hpo.data_stream"


class InOrder(click.Group):
    """Lists the commands in the order people reach for them."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)


# No `trials`, and no executor: one training runs here.
_OF_A_TRAINING = [
    *("fixed", "epochs", "seed", "limit", "data_options", "space", "metric"),
    *("device", "gpus_per_trial", "precision", "compile", "deterministic", "data_dir", "home", "tracking_uri"),
]

_OF_ONE_EXPORT = ("format", "out", "compress", "force")


def _keep_stdout_for_data(context: click.Context, _option: click.Parameter, is_wanted: bool) -> bool:
    """Send what a task's own code prints to stderr, so that stdout has the data alone."""
    if is_wanted and DATA_STREAM not in context.meta:
        context.meta[DATA_STREAM] = sys.stdout
        context.with_resource(redirect_stdout(sys.stderr))
    return is_wanted


json_option = click.option(
    "--json", "as_json", is_flag=True, callback=_keep_stdout_for_data, help="Print the data as JSON."
)
home_option = take(StoreOptions, only=["home"])
storage_option = take(StoreOptions, only=["storage"])
tracking_option = take(StoreOptions, only=["tracking_uri"])


@click.group(cls=InOrder, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, "-V", "--version", prog_name="hpo")
def cli() -> None:
    """Search hyperparameters of PyTorch models, and record every run in MLflow.

    \b
    hpo search digits --trials 20     search; run it again to resume
    hpo best digits                   show the winner and its scores
    hpo ui                            serve curves, plots and checkpoints to the browser
    """


@cli.command(cls=InSections)
@click.argument("task")
@take(SearchOptions)
@json_option
def search(as_json: bool, **request: Any) -> None:
    """Search the hyperparameters of TASK.

    TASK is a name from `hpo tasks`, a FILE.py, or module:attribute.

    \b
    hpo search digits --trials 20
    hpo search cifar10 --trials 100 -p optimizer=sgd -p batch_size=256,512

    Run the same command again to resume a search; raise --trials to extend it.
    Options you leave out keep the study's values.
    """
    from hpo.session.search import run_search

    _run(run_search, as_json, **request)


@cli.command(cls=InSections)
@click.argument("task")
@take(SubmitOptions)
@json_option
def submit(as_json: bool, **request: Any) -> None:
    """Queue a study of TASK for several machines.

    TASK is a name from `hpo tasks`: only names and settings travel, never code.

    \b
    hpo submit digits --trials 100 --storage postgresql+psycopg://hpo@db/hpo --tracking-uri http://mlflow:5000
    """
    from hpo.session.search import submit_study
    from hpo.terminal.tables import print_submitted

    study = submit_study(**request)
    facts = {"study": study.name, "trials": study.num_trials, "missing": study.remaining(study.num_trials)}
    _print_json(facts) if as_json else print_submitted(_console(), facts)


@cli.command(cls=InSections)
@click.argument("study")
@take(WorkerOptions)
@json_option
def worker(as_json: bool, **request: Any) -> None:
    """Run trials of a queued STUDY on this machine.

    Exits when the study is complete. Ctrl-C, SIGTERM or a closed terminal leaves early; other workers take over its
    trials.

    \b
    hpo worker digits --storage postgresql+psycopg://hpo@db/hpo --tracking-uri http://mlflow:5000
    """
    from hpo.session.search import join_search

    _run(join_search, as_json, **request)


def _run(search: Callable[..., SearchOutcome], as_json: bool, **request: Any) -> None:
    from hpo.terminal.progress import search_progress
    from hpo.terminal.tables import print_outcome

    console = _console(stderr=as_json)
    with search_progress(console) as progress:
        outcome = search(observer=progress, **request)
    if as_json:
        _print_json(outcome.to_dict())
    else:
        print_outcome(console, outcome)
    if outcome.interrupted:
        sys.exit(INTERRUPTED)
    if outcome.all_diverged or outcome.all_too_costly:
        sys.exit(FAILED)


@cli.command()
@json_option
def tasks(as_json: bool) -> None:
    """List the tasks that can be searched.

    \b
    hpo tasks
    """
    from hpo.terminal.facts import task_rows
    from hpo.terminal.tables import print_tasks

    rows = task_rows()
    _print_json(rows) if as_json else print_tasks(_console(), rows)


@cli.command()
@click.argument("task")
@click.option("-p", "overrides", multiple=True, metavar="NAME=VALUES", help="Narrow a parameter, as in hpo search.")
@click.option("--space", metavar="NAME|FILE", help="Show this space instead of the task's own.")
@json_option
def space(task: str, overrides: tuple[str, ...], space: str | None, as_json: bool) -> None:
    """Show the search space of TASK, in tuning priority.

    \b
    hpo space cifar10 -p optimizer=sgd
    """
    from hpo.plugins import load_task
    from hpo.terminal.tables import print_space

    found = load_task(task, space)
    narrowed = found.narrow(overrides).space
    _print_json(narrowed.to_dict()) if as_json else print_space(_console(), narrowed, found.space.closed_groups)


@cli.command()
@click.argument("task")
@click.option("-p", "overrides", multiple=True, metavar="NAME=VALUES", help="Check other values: lr=0.1. Repeatable.")
@take(SearchOptions, only=["fixed"])
@click.option("--space", metavar="NAME|FILE", help="Check this space instead of the task's own.")
@click.option("--limit", type=int, metavar="N", help="Use only N training examples. [default: all]")
@click.option("--device", default="auto", show_default=True, metavar="NAME", help="auto, cpu, cuda or cuda:N.")
@take(StudyOptions, only=["data_options"])
@take(MachineOptions, only=["data_dir"])
@home_option
@tracking_option
@json_option
def check(as_json: bool, **request: Any) -> None:
    """Check the data and the network of TASK before you search.

    Each line says ok, warning or wrong, and what to do. The exit code is 1 if anything is wrong.
    The network is that of the default configuration. This takes seconds, or minutes for large networks on a CPU.

    \b
    hpo check digits
    """
    from hpo.checks.checklist import run_check
    from hpo.records import to_plain
    from hpo.terminal.tables import print_checklist, print_verdict

    console = _console(stderr=as_json)
    checklist = run_check(tell=lambda verdict: None if as_json else print_verdict(console, verdict), **request)
    _print_json(to_plain(checklist.to_dict())) if as_json else print_checklist(console, checklist)
    if checklist.is_wrong:
        sys.exit(FAILED)


@cli.command()
@home_option
@storage_option
@json_option
def studies(home: Path | None, storage: str | None, as_json: bool) -> None:
    """List the studies, and who is searching them.

    \b
    hpo studies
    """
    from hpo.terminal.facts import study_rows
    from hpo.terminal.tables import print_studies

    rows = study_rows(home, storage)
    _print_json(rows) if as_json else print_studies(_console(), rows)


@cli.command()
@click.argument("task")
@click.option("-p", "overrides", multiple=True, metavar="NAME=VALUE", help="Set a parameter: lr=0.1. Repeatable.")
@take(SearchOptions, only=_OF_A_TRAINING)
@json_option
def train(as_json: bool, **request: Any) -> None:
    """Train TASK once, with the default configuration or with yours.

    It is logged as a run of its own; there is no study, and the test split is not used.

    \b
    hpo train digits -p lr=0.01 -p depth=2
    """
    from hpo.session.training import train_once
    from hpo.terminal.tables import print_epoch, print_training

    console = _console(stderr=as_json)
    training = train_once(tell=lambda result: print_epoch(console, result), **request)
    _print_json(training.to_dict()) if as_json else print_training(console, training)
    if training.diverged:
        sys.exit(FAILED)


@cli.command()
@click.argument("study")
@click.option("--trial", type=click.IntRange(min=0), required=True, metavar="N", help="Number of the trial.")
@click.option("--seed", type=click.IntRange(min=0), metavar="S", help="Another seed. [default: the study's]")
@take(SearchOptions, only=["device", "deterministic", "data_dir", "home", "storage", "tracking_uri"])
@json_option
def rerun(as_json: bool, **request: Any) -> None:
    """Run a trial of STUDY again and compare the results.

    With the same seed, versions and machine they should be equal in every bit. Otherwise the difference is shown with
    its 95% interval. The study does not change.

    \b
    hpo rerun digits --trial 0 --seed 1
    """
    from hpo.session.rerun import rerun_trial
    from hpo.terminal.tables import print_epoch, print_rerun

    console = _console(stderr=as_json)
    found = rerun_trial(tell=lambda result: print_epoch(console, result), **request)
    _print_json(found.to_dict()) if as_json else print_rerun(console, found)


@cli.command()
@click.argument("study")
@click.option(
    "--plan",
    "confirm",
    default="quick",
    show_default=True,
    metavar="PLAN",
    help="quick (the best 3 configurations with 3 seeds), full (5 with 5), or 4x10.",
)
@take(SessionOptions)
@json_option
def confirm(as_json: bool, **request: Any) -> None:
    """Train the best configurations of STUDY again with new seeds.

    The configuration with the best mean becomes the winner. One that falls behind is dropped. If the winner changes,
    the test split is used once more, and every report says how often it was used.

    \b
    hpo confirm digits
    """
    from hpo.session.search import resume_study

    _run(resume_study, as_json, **request)


@cli.command()
@click.argument("study")
@take(SessionOptions)
@json_option
def refit(as_json: bool, **request: Any) -> None:
    """Train the winner of STUDY on all but the test examples.

    It is trained for the epochs that the search found, and tested once. With --folds a search does that by itself.

    \b
    hpo refit digits
    """
    from hpo.session.search import resume_study

    _run(resume_study, as_json, refit=True, **request)


@cli.command()
@click.argument("study")
@click.option("--top", type=click.IntRange(min=1), help="Show only the best N trials. [default: all, in order]")
@click.option("--watch", is_flag=True, help="Show it again every 5 seconds while it is searched.")
@click.option("--csv", "as_csv", is_flag=True, help="Print the trials as CSV, a column for each parameter.")
@home_option
@storage_option
@json_option
def show(
    study: str,
    top: int | None,
    watch: bool,
    as_csv: bool,
    home: Path | None,
    storage: str | None,
    as_json: bool,
) -> None:
    """Show the trials and findings of STUDY.

    \b
    hpo show digits --top 10
    """
    from hpo.terminal.facts import study_facts, trials_as_csv
    from hpo.terminal.tables import print_study, watch_study

    if watch + as_json + as_csv > 1:
        raise UsageError("--watch, --csv and --json cannot be combined: use one of them.")
    if watch:
        watch_study(_console(), lambda: study_facts(study, home, storage, top))
        return
    facts = study_facts(study, home, storage, top)
    if as_csv:
        click.echo(trials_as_csv(facts), nl=False)
        return
    _print_json(facts) if as_json else print_study(_console(), facts)


@cli.command()
@click.argument("study")
@click.option("--yaml", "as_yaml", is_flag=True, help="Print the winner's configuration as YAML.")
@click.option("--as-options", is_flag=True, help="Print it as options: -p lr=0.1 -p depth=2.")
@home_option
@storage_option
@json_option
def best(study: str, as_yaml: bool, as_options: bool, home: Path | None, storage: str | None, as_json: bool) -> None:
    """Show the winner of STUDY and how to load it.

    \b
    hpo best digits
    """
    from hpo.terminal.facts import best_facts, winner_as_options, winner_as_yaml
    from hpo.terminal.tables import print_best

    if as_yaml + as_options + as_json > 1:
        raise UsageError("--yaml, --as-options and --json cannot be combined: use one of them.")
    facts = best_facts(study, home, storage)
    if as_yaml or as_options:
        click.echo(winner_as_yaml(facts) if as_yaml else winner_as_options(facts))
        return
    _print_json(facts) if as_json else print_best(_console(), facts)
    if facts["winner"] is None:
        sys.exit(FAILED)


@cli.command()
@click.argument("study")
@click.option(
    "--format",
    default="pt2",
    show_default=True,
    metavar="NAME",
    help="pt2, onnx, mlflow, safetensors, or one of your own as module:factory.",
)
@click.option("--out", type=click.Path(path_type=Path), metavar="DIR", help="Folder to write. [default: in the home]")
@click.option("--trial", type=click.IntRange(min=0), metavar="N", help="Export another trial. [default: the winner]")
@click.option("--compress", metavar="HOW", help="With onnx: fp16 halves the weights, int8 quantizes.")
@click.option("--compare", is_flag=True, help="Write nothing; print score, size and latency of each format.")
@click.option("--force", is_flag=True, help="Replace an earlier export in the folder.")
@take(SearchOptions, only=["data_dir", "home", "storage", "tracking_uri"])
@json_option
def export(compare: bool, as_json: bool, **request: Any) -> None:
    """Write the winner of STUDY in a format that is used without hpo.

    Preprocessing, class names and signature go with it. The export is run on validation examples in a process without
    hpo, and must equal the checkpoint.

    \b
    hpo export digits --format pt2
    """
    from hpo.terminal.tables import print_export, print_formats

    console, tell = _console(stderr=as_json), _console(stderr=True).print
    if compare:
        from hpo.session.formats import compare_formats

        shared = {name: given for name, given in request.items() if name not in _OF_ONE_EXPORT}
        found = compare_formats(tell=tell, **shared)
        _print_json(found.to_dict()) if as_json else print_formats(console, found)
        return
    from hpo.session.export import export_best

    done = export_best(tell=tell, **request)
    _print_json(done.to_dict()) if as_json else print_export(console, done)


@cli.command()
@click.argument("study")
@click.option(
    "--promote",
    default="if-better",
    show_default=True,
    metavar="WHEN",
    help="Make it the champion: always, if-better or never.",
)
@click.option("--name", metavar="NAME", help="Name of the registered model. [default: hpo-TASK]")
@click.option("--trial", type=click.IntRange(min=0), metavar="N", help="Register another trial. [default: the winner]")
@take(SearchOptions, only=["data_dir", "home", "storage", "tracking_uri"])
@json_option
def register(as_json: bool, **request: Any) -> None:
    """Register the winner of STUDY in MLflow's model registry.

    It is logged as a model of its run and becomes a version of hpo-TASK. The alias `champion` goes to it if its test
    score is better than the champion's. Whoever loads it needs MLflow and PyTorch, but not hpo.

    \b
    hpo register digits
    """
    from hpo.session.register import register_best
    from hpo.terminal.tables import print_registration

    registered = register_best(tell=_console(stderr=True).print, **request)
    _print_json(registered.to_dict()) if as_json else print_registration(_console(), registered)


@cli.command()
@click.argument("study")
@click.argument("files", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option(
    "--csv",
    "as_csv",
    is_flag=True,
    callback=_keep_stdout_for_data,
    help="Print CSV, a column for the probability of each class.",
)
@click.option("--trial", type=click.IntRange(min=0), metavar="N", help="Use another trial. [default: the winner]")
@click.option("--batch-size", type=click.IntRange(min=1), default=64, show_default=True, help="Examples per batch.")
@click.option("--device", default="cpu", show_default=True, metavar="NAME", help="cpu, cuda or cuda:N.")
@take(StoreOptions)
@json_option
def predict(as_csv: bool, as_json: bool, **request: Any) -> None:
    """Predict FILES with the winner of STUDY.

    FILES are photos, folders of photos, tables (.csv, .tsv, .parquet), NumPy's .npy and .npz, .txt for texts, and
    .jsonl with an example in each line, as the task has its examples.

    \b
    hpo predict digits examples/deploy/digits.jsonl
    """
    from hpo.session.predict import as_csv as written_as_csv
    from hpo.session.predict import predict as predict_all
    from hpo.terminal.progress import counting
    from hpo.terminal.tables import print_predictions

    if as_csv and as_json:
        raise UsageError("--csv and --json cannot be combined: use one of them.")
    with counting(_console(stderr=True), "examples") as tell:
        found = predict_all(tell=tell, **request)
    if as_csv:
        click.echo(written_as_csv(found), nl=False, file=click.get_current_context().meta[DATA_STREAM])
    elif as_json:
        _print_json([each.to_dict() for each in found])
    else:
        print_predictions(_console(), found)


@cli.command()
@click.argument("study")
@click.option(
    "--port", type=click.IntRange(1, 65535), help="Port to listen on. [default: 5001, or the next that is free]"
)
@click.option("--host", default="127.0.0.1", show_default=True, metavar="ADDRESS", help="Address to listen on.")
@click.option("--trial", type=click.IntRange(min=0), metavar="N", help="Serve another trial. [default: the winner]")
@take(SearchOptions, only=["data_dir", "home", "storage", "tracking_uri"])
def serve(**request: Any) -> None:
    """Serve the winner of STUDY with MLflow's scoring server.

    POST raw inputs as JSON to /invocations; the answer has class names and probabilities. Press Ctrl-C to stop it.

    \b
    hpo serve digits
    """
    from hpo.session.serve import serve_best

    serve_best(say=click.echo, **request)


@cli.command()
@click.argument("study")
@click.option(
    "--keep",
    type=click.IntRange(min=1),
    default=5,
    show_default=True,
    metavar="K",
    help="Number of best trials whose weights to keep.",
)
@click.option("--dry-run", is_flag=True, help="Show what would be removed without removing it.")
@home_option
@storage_option
@tracking_option
@json_option
def gc(as_json: bool, **request: Any) -> None:
    """Delete weights of STUDY that are no longer needed.

    Keeps the best trials. Also deletes files left by crashed searches. Parameters, curves and plots stay, and so do
    the checkpoints of trials that can continue.

    \b
    hpo gc digits --keep 3 --dry-run
    """
    from hpo.session.clean import clean_study
    from hpo.terminal.tables import print_cleaned

    facts = clean_study(**request)
    _print_json(facts) if as_json else print_cleaned(_console(), facts)


@cli.command()
@click.argument("study")
@click.option(
    "--out", type=click.Path(path_type=Path), metavar="FILE", help="File to write. [default: STUDY.html here]"
)
@click.option("--live", is_flag=True, help="Write it again every 10 seconds while the study is searched.")
@home_option
@storage_option
def report(study: str, out: Path | None, live: bool, home: Path | None, storage: str | None) -> None:
    """Write a report of STUDY: one HTML file that needs no network.

    Figures can be zoomed and brushed; what is selected in one is selected in all.

    \b
    hpo report digits
    """
    from hpo.session.report import write_report

    file, tell = out or Path(f"{study}.html"), _console(stderr=True).print
    with suppress(KeyboardInterrupt) if live else nullcontext():  # which is how a live one ends
        write_report(study, file, home=home, storage=storage, live=live, tell=tell)
    click.echo(file)


@cli.command()
@click.argument("studies", nargs=-1, required=True, metavar="STUDY STUDY...")
@click.option("--out", type=click.Path(path_type=Path), metavar="FILE", help="Also write a page with curves.")
@home_option
@storage_option
@json_option
def compare(studies: tuple[str, ...], out: Path | None, home: Path | None, storage: str | None, as_json: bool) -> None:
    """Show the scores of several studies side by side.

    The page of --out also has the best value by epochs spent, and the best configurations.

    \b
    hpo compare digits digits-tpe
    """
    from hpo.session.report import compare_studies, describe_differences
    from hpo.terminal.tables import print_studies

    rows = compare_studies(studies, out, home=home, storage=storage)
    if as_json:
        _print_json(rows)
        return
    print_studies(_console(), rows)
    if note := describe_differences(rows):
        _console().print(note)


@cli.command()
@click.argument("study", required=False)
@click.option(
    "--port", type=click.IntRange(1, 65535), help="Port to listen on. [default: 5000, or the next that is free]"
)
@click.option("--host", default="127.0.0.1", show_default=True, metavar="ADDRESS", help="Address to listen on.")
@home_option
@tracking_option
def ui(study: str | None, port: int | None, host: str, home: Path | None, tracking_uri: str | None) -> None:
    """Serve the MLflow UI and print its address, or that of STUDY.

    Press Ctrl-C to stop it. If the runs are on an MLflow server, only the address is printed.

    \b
    hpo ui digits
    """
    from hpo.home import Home
    from hpo.tracking.server import serve
    from hpo.tracking.store import open_store

    store = open_store(Home.find(home).require().path, tracking_uri)
    with suppress(KeyboardInterrupt):  # which is how it ends
        serve(store, study=study, host=host, port=port, say=click.echo)


def main() -> None:
    """Run the command line: every expected failure is one line on stderr and an exit code, without a traceback."""
    hear_stop_signals()
    logging.basicConfig(format="%(message)s")
    logging.getLogger("hpo").setLevel(logging.INFO)
    open_closed_streams()
    escape_what_streams_lack()
    os.environ["MPLBACKEND"] = "agg"  # figures are files here, and matplotlib cannot be imported with an unknown name
    try:
        require_supported_system()
        require_readable_allocator_settings()
        if has_cpu_quota():  # else torch's threads, one per core of the host, would wait for each other
            os.environ.setdefault("OMP_NUM_THREADS", str(num_cores()))
        sys.exit(cli.main(standalone_mode=False))
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message())
        sys.exit(2)
    except click.ClickException as error:
        _fail(error.format_message(), error.exit_code)
    except HpoError as error:
        _fail(str(error), error.exit_code)
    except OSError as error:
        if error.errno not in (OF_A_FULL_DISK if error.filename is None else OF_THE_DISK):
            raise
        _fail(disk_refusal(error, "stdout, the home, or temporary files (TMPDIR)"), FAILED)
    except (click.Abort, KeyboardInterrupt):
        hint = "; run the same command again to resume" if _RESUMABLE.intersection(sys.argv[1:2]) else ""
        _fail(f"interrupted{hint}", INTERRUPTED)


def _fail(message: str, exit_code: int) -> None:
    click.echo(f"Error: {visible(' '.join(message.split()))}", err=True)  # click lists choices in lines of their own
    sys.exit(exit_code)


def _console(stderr: bool = False) -> Console:
    from hpo.terminal.console import new_console

    return new_console(stderr=stderr)


def _print_json(data: Any) -> None:
    click.echo(json.dumps(data, indent=2), file=click.get_current_context().meta[DATA_STREAM])
