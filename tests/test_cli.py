"""The command line: what bad input is told, what the commands print, and that help is quick."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from helpers.studies import SETTINGS

from hpo.cli import main
from hpo.search.storage import open_storage
from hpo.search.study import Study
from hpo.training.metrics import METRICS_OF_KIND

BROKEN_FILES = {
    "syntax.py": "objective = (",
    "raises.py": "raise RuntimeError('no licence')",
    "empty.py": "",
    "wrong_type.py": "objective = 3",
    "no_space.py": """
from hpo.models.networks import mlp as model
from hpo.objectives.digits import load
from hpo.objective import Objective
objective = Objective(name="mine", description="", load=load, model=model)
""",
    "dead_parameter.py": """
from hpo.models.networks import mlp as model
from hpo.objectives.digits import load
from hpo.objective import Objective
from hpo.parameters import Float
from hpo.space import Group, Space
space = Space(Group("g", learning_rate=Float(0.1, 1, default=0.1)))
objective = Objective(name="mine", description="", load=load, model=model, space=space)
""",
    "bad_range.py": """
from hpo.models.networks import mlp as model
from hpo.objectives.digits import load
from hpo.objective import Objective
from hpo.parameters import Float
from hpo.space import Group, Space
space = Space(Group("g", lr=Float(0, 1, default=0.1)))
objective = Objective(name="mine", description="", load=load, model=model, space=space)
""",
    "bad_model.py": """
from hpo.objectives.digits import load
from hpo.objective import Objective
from hpo.parameters import Float
from hpo.space import Group, Space
def model(spec):
    import torch
    return torch.nn.Linear(3, 4)
space = Space(Group("g", lr=Float(0.1, 1, default=0.1)))
objective = Objective(name="mine", description="", load=load, model=model, space=space)
""",
    "bad_metric.py": """
from hpo.models.networks import mlp as model
from hpo.objectives.digits import load
from hpo.objective import Objective
from hpo.parameters import Float
from hpo.space import Group, Space
space = Space(Group("g", lr=Float(0.1, 1, default=0.1)))
objective = Objective(name="mine", description="", load=load, model=model, space=space, metric="acuracy")
""",
    "epochs_searched.py": """
from hpo.models.networks import mlp as model
from hpo.objectives.digits import load
from hpo.objective import Objective
from hpo.parameters import Int
from hpo.space import Group, Space
space = Space(Group("budget", max_epochs=Int(1, 9, default=3)))
objective = Objective(name="mine", description="", load=load, model=model, space=space)
""",
}

MINE = """
import dataclasses
from hpo.models.networks import mlp as model
from hpo.objectives.digits import load
from hpo.objective import Objective
from hpo.parameters import Float
from hpo.space import Group, Space
space = Space(Group("g", lr=Float(0.1, 1, default=0.1)))
given = dict(name="mine", description="", load=load, model=model, space=space)
"""
BROKEN_FILES |= {
    "wrong_loss.py": MINE + 'objective = Objective(**given, loss="mse")',
    "flipped_vectors.py": MINE
    + "from hpo.objectives.diabetes import load\n"
    + 'objective = Objective(**given | {"load": load}, loss="mse", metric="r2", settings={"augment": "flip"})',
    "no_data.py": MINE
    + "def load(data_dir): raise FileNotFoundError('no data.csv')\nobjective = Objective(**given | {'load': load})",
    "no_dataset.py": MINE + "objective = Objective(**given | {'load': lambda data_dir: None})",
    "no_class.py": MINE
    + "def nine(data_dir): return dataclasses.replace(load(data_dir), classes=tuple('123456789'))\n"
    + "objective = Objective(**given | {'load': nine})",
    "float_targets.py": MINE
    + "from hpo import Split\n"
    + "def floats(data_dir):\n"
    + "    data = load(data_dir)\n"
    + "    return dataclasses.replace(data, train=Split(data.train.inputs, data.train.targets + 0.5))\n"
    + "objective = Objective(**given | {'load': floats})",
    "own_loss.py": MINE + "objective = Objective(**given, loss=max)",
    "own_test.py": MINE
    + "def plain(data_dir): return dataclasses.replace(load(data_dir), test=load(data_dir).train)\n"
    + "objective = Objective(**given | {'load': plain})",
    "twice.py": MINE
    + "def names(data_dir): return dataclasses.replace(load(data_dir), classes=tuple('0123456788'))\n"
    + "objective = Objective(**given | {'load': names})",
    "keywords.py": MINE
    + "def model(spec, **keywords): pass\n"
    + "objective = Objective(**given | {'model': model, 'space': Space(Group('g', width=Float(1, 2, default=1)))})",
    "no_examples.py": MINE
    + "from hpo import Split\n"
    + "def none(data_dir):\n"
    + "    data = load(data_dir)\n"
    + "    return dataclasses.replace(data, train=Split(data.train.inputs[:0], data.train.targets[:0]))\n"
    + "objective = Objective(**given | {'load': none})",
    "tokens.py": MINE
    + "from hpo import Split\n"
    + "def ids(data_dir):\n"
    + "    data = load(data_dir)\n"
    + "    return dataclasses.replace(data, train=Split(data.train.inputs.long(), data.train.targets))\n"
    + "objective = Objective(**given | {'load': ids})",
    "tuples.py": MINE
    + "def pair(spec):\n"
    + "    from torch import nn\n"
    + "    class Pair(nn.Linear):\n"
    + "        def forward(self, inputs): return inputs, inputs\n"
    + "    return Pair(64, 10)\n"
    + "objective = Objective(**given | {'model': pair, 'space': Space(Group('g', lr=Float(0.1, 1, default=0.1)))})",
    "quits.py": MINE
    + "import sys\n"
    + "def model(spec): sys.exit(0)\n"
    + "objective = Objective(**given | {'model': model, 'space': Space(Group('g', lr=Float(0.1, 1, default=0.1)))})",
    "exits.py": "import sys\nsys.exit('no licence')",
    "wrong_settings.py": MINE + "objective = Objective(**given, settings={'max_epochs': 'three'})",
}

# Arguments after `hpo`, and what the one line of the answer must say.
BAD_INPUT = [
    ("sarch digits", "No such command 'sarch'.*'search'"),
    ("search", "Missing argument 'TASK'"),
    ("search digits --trails 3", "No such option '--trails'.*--trials"),
    ("search digts", "no task 'digts'; did you mean 'digits'\\? Available: .*digits"),
    ("search digits --space digts", "no search space 'digts'; did you mean 'digits'\\?"),
    ("search digits --strategy priorty", "no strategy 'priorty'; did you mean 'priority'\\? Available: priority, tpe"),
    ("search digits --pruner sah", "no pruner 'sah'; did you mean 'sha'\\? Available: sha, model, median"),
    ("search quits.py", "the model of task 'mine' fails with the default configuration: SystemExit: 0"),
    ("search own_loss.py", "the loss of task 'mine' fails with the default configuration"),
    ("search own_test.py", "have a Split as test; it must be a SealedSplit"),
    ("search twice.py", "the class name '8' is given twice"),
    ("search keywords.py", "no .*keyword of the model 'width'.*\\*\\*keywords does not count"),
    ("search no_examples.py", "have no training examples"),
    ("search tokens.py", "the inputs are int64, which are ids \\(tokens, categories\\) and need an embedding"),
    ("search tuples.py", "returns a tuple; it must return one tensor"),
    ("search digits -p max_epochs=5", "max_epochs cannot be searched; give --epochs instead of -p max_epochs="),
    ("search digits --set seed=5", "seed has a command-line option of its own, --seed"),
    ("search digits --folds 2000", "--folds 2000 is not allowed: there are only 1437 examples"),
    ("search ./folder/task", "Or give a file of your own: FILE.py, or module:attribute"),
    (
        "search digits --limit 100",
        "larger than the 80 training examples; allow smaller ones only, as -p batch_size=32,64",
    ),
    ("search digits --first-rung 0", "--first-rung 0 is not allowed: it must be from 1 to the 20 epochs"),
    ("search digits --first-rung 3 --pruner median", "--first-rung 3 is for --pruner model or sha, not median"),
    ("search digits --workers 0", "--workers 0 is not allowed: it must be at least 1"),
    ("search digits --keep 0", "--keep 0 is not allowed: it must be at least 1"),
    ("search digits --executor dask", "no executor 'dask'.* Available: local, ray"),
    (
        "search digits --executor ray --gpus-per-trial -1",
        "--gpus-per-trial -1 is not allowed: it must be 0, a share of",
    ),
    ("search digits --gpus-per-trial 1.5", "--gpus-per-trial 1.5 is not allowed: .* or a whole number of GPUs"),
    ("search digits --device cpu --gpus-per-trial 2", "--gpus-per-trial 2 is for GPUs, and trials run on the CPU here"),
    (
        "search digits --executor ray --gpus-per-trial 2 --compile graph",
        "--compile graph cannot be combined with --gpus-per-trial 2; omit it",
    ),
    ("search digits --address head:6379", "--address head:6379 is for --executor ray; omit it"),
    ("search digits --executor ray --device cpu", "--device cpu is for workers of this machine; with Ray --gpus-per"),
    ("search digits --executor ray --address 127.0.0.1:1", "no Ray cluster at --address 127.0.0.1:1"),
    ("search digits --join", "several machines need one database: give --storage postgresql"),
    (
        "search digits --storage sqlite:///x.db",
        "is sqlite, whose locks .* do not work between machines",
    ),
    ("search digits --storage mysql://u:secret@h/d", "'mysql://u:\\*\\*\\*@h/d' is not PostgreSQL"),
    ("search digits --storage nonsense", "'nonsense' is not a database URL; give postgresql"),
    ("search digits --storage postgresql://u@127.0.0.1:1/d", "no PostgreSQL answers at postgresql://u@127.0.0.1:1/d"),
    ("submit digits", "several machines need one database: give --storage postgresql"),
    ("submit my_task.py --storage postgresql://u@127.0.0.1:1/d", "no registered task 'my_task.py'.*names, not files"),
    ("worker digits", "several machines need one database: give --storage postgresql"),
    ("gc digits", "there is no home .*start with"),
    ("gc digits --keep 0", "0 is not in the range x>=1"),
    ("search digits --device gpu", "no device 'gpu'.* Available: auto, cpu"),
    ("search digits --device cuda:99", "no device 'cuda:99'.* Available: auto, cpu"),
    ("search digits -p learning_rate=0.1", "no parameter 'learning_rate'; did you mean 'lr'\\?"),
    ("search digits -p wd=0.1", "no parameter 'wd'; did you mean 'weight_decay'\\?"),
    (
        "search digits --stop-at f1=0.9",
        "--stop-at must be accuracy=VALUE, because this study optimises accuracy, or none; not 'f1=0.9'",
    ),
    ("search digits --stop-at accuracy=high", "--stop-at must be accuracy=VALUE,.* not 'accuracy=high'"),
    ("search digits -p lr", "-p 'lr' is not NAME=VALUE, NAME=LOW:HIGH or NAME=A,B,C"),
    ("search digits -p lr=0.1:0.01", "lr \\(in 'step size'\\): low 0.1 is above high 0.01"),
    ("search digits -p lr=fast", "lr \\(in 'step size'\\): 'fast' is not a number; allowed is 0.0001:0.3"),
    ("search digits -p lr=7", "lr \\(in 'step size'\\): 7 is outside 0.0001:0.3"),
    ("search digits -p lr=0.1 -p lr=0.2", "lr is given twice"),
    ("search digits -p depth=1.5", "depth \\(in 'architecture and optimizer'\\): '1.5' is not a whole number"),
    ("search digits -p optimizer=lion", "'lion' is not one of sgd, adam, adamw"),
    ("search digits -p optimizer=adam -p momentum=0.9", "momentum .* is active only when optimizer is sgd"),
    ("search digits --try lr", "--try 'lr' is not NAME=VALUE,NAME=VALUE"),
    ("search digits --try learning_rate=0.1", "no parameter 'learning_rate'; did you mean 'lr'\\?"),
    ("search digits --try lr=7", "lr \\(in 'step size'\\): 7 is outside 0.0001:0.3 \\(--try lr=7\\)"),
    ("search digits --try lr=0.1,lr=0.2", "lr is given twice: --try lr=0.1 and --try lr=0.2"),
    ("search digits --try lr=0.1:0.2", "'0.1:0.2' is not a number; allowed is 0.0001:0.3"),
    ("search digits --try optimizer=adam,momentum=0.9", "momentum .* is active only when optimizer is sgd; set that"),
    ("search digits -p optimizer=adam --try optimizer=sgd", "'sgd' is not one of adam"),
    (
        "search digits --strategy grid --try lr=0.1",
        "--try lr=0.1 is not for --strategy grid, which runs only",
    ),
    ("search digits --warm-start nothing", "no study 'nothing'"),
    ("search digits --warm-start digits", "--warm-start digits is the study itself"),
    (
        "search digits --objective val/acuracy",
        "no objective 'val/acuracy'; did you mean 'val/accuracy'.*, latency",
    ),
    (
        "search digits --objective params",
        "--objective params cannot be the first: give --objective val/accuracy",
    ),
    ("search digits --folds 1", "--folds 1 is not allowed: it must be at least 2"),
    ("search diabetes --folds 400", "--folds 400 is not allowed: there are only 353 examples"),
    (
        "search digits --folds 5 --pruner sha",
        "--pruner sha stops trials between epochs; with --folds use wilcoxon or none",
    ),
    ("search digits --folds 5 --pruner model", "with --folds use wilcoxon or none"),
    ("search digits --folds 5 --first-rung 2", "--first-rung 2 is for --pruner model or sha, not wilcoxon"),
    ("search digits --pruner wilcoxon", "--pruner wilcoxon stops trials between folds; give --folds 5 with it"),
    ("search digits --metric acuracy", "no metric 'acuracy'; did you mean 'accuracy'"),
    ("search diabetes --metric f1", "no regression metric 'f1'. Available: loss, mse, rmse, mae, r2"),
    (
        "search digits --metric auroc --objective val/f1 --objective params",
        "--objective val/f1 needs --metric f1",
    ),
    ("search digits --metric f1 --objective val/accuracy", "--objective val/accuracy needs --metric accuracy: f1 is"),
    ("search digits --objective val/accuracy --objective params --objective params", "params is given twice"),
    (
        "search digits --objective val/accuracy --objective params --pruner sha",
        "--pruner sha compares trials by one objective; with several, omit it or use --pruner none",
    ),
    (
        "search digits --objective val/accuracy --objective params --strategy cmaes",
        "--strategy cmaes has one objective; with several use priority",
    ),
    ("search digits --trials 0", "--trials 0 is not allowed: it must be at least 1"),
    ("search digits --trials -5", "--trials -5 is not allowed: it must be at least 1"),
    ("search digits --trials many", "Invalid value for '--trials': 'many' is not a valid integer"),
    ("search digits --epochs 0", "--epochs 0 is not allowed: it must be at least 1"),
    ("search digits --limit 0", "--limit 0 is not allowed: it must be at least 1"),
    ("search digits --limit 100000", "limit=100000 is not allowed: it must be from 1 to the 1437 examples"),
    ("search digits --limit 12", "12 examples of 10 classes leave none of .* for training"),
    ("search digits --limit 100", "batch_size 128 is larger than the 80 training examples"),
    ("search digits --seed -1", "--seed -1 is not allowed: it must be at least 0"),
    ("search digits --seed one", "Invalid value for '--seed'"),
    ("search digits --timeout 0", "'0' is not a duration above 0, such as 90, 90s, 30m or 2h"),
    ("search digits --precision half", "no precision 'half'. Available: auto, fp32, bf16, fp16"),
    ("search digits --compile always", "no compile 'always'. Available: auto, off, step, graph"),
    ("search digits --compile graph --device cpu", "--compile graph needs a CUDA device, not cpu"),
    ("search digits --timeout soon", "'soon' is not a duration above 0"),
    ("search digits --timeout none", "'none' is not a duration above 0"),
    ("search digits --budget 0h", "'0h' is not a duration above 0, such as 90, 90s, 30m or 2h, or none"),
    ("search digits --stop-when-flat f1=0.1", "--stop-when-flat must be accuracy=VALUE, because this study optimises"),
    (
        "search digits --stop-when-flat accuracy=0",
        "--stop-when-flat accuracy=0 is not allowed: the gain must be above 0",
    ),
    (
        "search digits --stop-when-flat accuracy=0.1 --strategy tpe",
        "--stop-when-flat accuracy=0.1 needs a forecast, which is made for --strategy priority with one objective",
    ),
    ("search digits --extend", "--extend widens what -p names; give -p NAME=LOW:HIGH"),
    (
        "search digits --extend -p lr=0.01:1",
        "lr \\(in '.*'\\): 0.01:1 does not hold the range so far, .*\\(-p lr=0.01:1 --extend",
    ),
    ("search digits --extend -p lr=1", "'1' is not a range LOW:HIGH, each end a number"),
    ("search digits --extend -p rate=0:1", "no parameter 'rate'"),
    ("search digits --extend -p lr=0:1", "low 0 must be above 0 for log=True"),
    ("search digits --extend -p batch_size=big", "'big' is not of type int, as the other choices are"),
    ("search digits --extend -p lr=1e-6:9 --strategy grid", "--extend is not for --strategy grid"),
    ("search digits --trial-timeout 20x", "'20x' is not a duration above 0, such as 90, 90s, 30m or 2h, or none"),
    (
        "search digits --trial-timeout 2s --folds 3",
        "--trial-timeout 2 cannot be combined with --folds 3: the mean of",
    ),
    ("search digits --study ", "'' cannot name a study: use 1 to 64 letters"),
    ("search digits --objective val/accuracy --objective params --pruner sah", "no pruner 'sah'; did you mean 'sha'"),
    ("search digits --study ../escape", "'../escape' cannot name a study: use 1 to 64 letters"),
    ("search digits --study ..", "'..' cannot name a study"),
    ("search digits --study a/b", "'a/b' cannot name a study"),
    ("search digits --study " + "x" * 65, "cannot name a study: use 1 to 64 letters"),
    ("search digits --tracking-uri ftp://x", "tracking URI 'ftp://x' is not supported: use http://"),
    ("search digits --home syntax.py", "the home .*syntax.py cannot be written: .*--home or HPO_HOME"),
    ("search missing.py", "there is no file .*missing.py"),
    ("search syntax.py", "syntax.py cannot be imported: SyntaxError"),
    ("search raises.py", "raises.py cannot be imported: RuntimeError: no licence"),
    ("search empty.py", "empty.py must define `objective = Objective\\(...\\)`, but has nothing of that name"),
    ("search wrong_type.py", "wrong_type.py must define `objective = Objective\\(...\\)`, but has a int"),
    ("search no_such_module:objective", "no_such_module cannot be imported: ModuleNotFoundError"),
    ("search hpo.objectives.digits:nothing", "must define `nothing = Objective\\(...\\)`"),
    ("search no_space.py", "task 'mine' has no search space; add space= to its Objective, or select one with --space"),
    (
        "search dead_parameter.py",
        "no setting of the trainer or keyword of the model 'learning_rate'; did you mean 'lr'",
    ),
    ("search bad_range.py", "lr \\(in 'g'\\): lr=0 is not allowed: it must be above 0 and finite"),
    ("search bad_model.py", "the model of task 'mine' fails with the default configuration: RuntimeError: .*mat1"),
    ("search bad_metric.py", "no metric 'acuracy'; did you mean 'accuracy'\\?"),
    ("search wrong_loss.py", "loss 'mse' does not fit data with 10 classes; use cross_entropy"),
    ("search flipped_vectors.py", "augment='flip' is for images"),
    ("search no_data.py", "the data of task 'mine' cannot be loaded: FileNotFoundError: no data.csv"),
    ("search no_dataset.py", "load of task 'mine' must return a Dataset, but returned a NoneType"),
    ("search no_class.py", "the targets are from 0 to 9; 9 classes have the indices from 0"),
    ("search float_targets.py", "targets must be the classes' indices, int64 of shape \\(N,\\), not torch.float32"),
    ("search exits.py", "exits.py cannot be imported: SystemExit: no licence"),
    ("search wrong_settings.py", "max_epochs='three' is not allowed: it must be of type int"),
    ("search :", "':' is not module:attribute"),
    ("search digits --tracking-uri http://127.0.0.1:99999", "Port out of range"),
    ("search epochs_searched.py", "max_epochs \\(in 'budget'\\) cannot be searched; use its command-line option"),
    ("search fashion_mnist --data-dir data", "no FashionMNIST in .*data: looked for .* could not be downloaded"),
    ("space digts", "no task 'digts'; did you mean 'digits'\\?"),
    ("space dig\n\x1b[31mits", r"no task 'dig\\n\\x1b\[31mits'"),
    ("space digits -p d\N{LINE SEPARATOR}x=1", r"no parameter 'd\\u2028x'"),
    ("show digits --to\x1bp", r"No such option '?--to\\x1bp'?"),
    ("space digits -p lr=9", "lr \\(in 'step size'\\): 9 is outside 0.0001:0.3"),
    ("show nothing", "no study 'nothing'"),
    ("show nothing --top 0", "Invalid value for '--top'"),
    ("best nothing", "no study 'nothing'"),
    ("ui", "there is no home .*mlruns yet; start with `hpo search`"),
    ("ui nothing --port 99999", "Invalid value for '--port'"),
]


@dataclass(frozen=True)
class Answer:
    exit_code: int
    out: str
    err: str


@pytest.fixture
def hpo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[[str], Answer]:
    """Run a command line in an empty folder, with the home in it."""
    monkeypatch.chdir(tmp_path)

    def run(line: str) -> Answer:
        monkeypatch.setattr(sys, "argv", ["hpo", *line.split(" ")])
        with pytest.raises(SystemExit) as exited:
            main()
        captured = capsys.readouterr()
        return Answer(int(exited.value.code or 0), captured.out, captured.err)

    return run


@pytest.mark.parametrize(("line", "message"), BAD_INPUT, ids=[line[:60] for line, _ in BAD_INPUT])
def test_bad_input_is_reported_in_one_line_and_nothing_is_written(
    hpo: Callable[[str], Answer], tmp_path: Path, line: str, message: str
) -> None:
    for name, text in BROKEN_FILES.items():
        (tmp_path / name).write_text(text)
    (tmp_path / "data").mkdir()
    answer = hpo(line)
    assert re.search(message, answer.err), answer.err
    assert answer.err.startswith("Error: ")
    assert answer.err.count("\n") == 1
    assert answer.exit_code == 2
    assert {path.name for path in tmp_path.iterdir()} - {"__pycache__"} == {*BROKEN_FILES, "data"}


def test_a_damaged_store_is_reported_in_one_line_and_left_as_it_is(
    hpo: Callable[[str], Answer], tmp_path: Path
) -> None:
    for name in ("optuna.db", "mlflow.db"):
        home = tmp_path / name.removesuffix(".db")
        home.mkdir()
        (home / name).write_bytes(b"SQLite format 3\0 no more than that")
        answer = hpo(f"search digits --trials 1 --home {home}")
        assert re.search(f"Error: .*{name} is damaged", answer.err)
        assert answer.err.count("\n") == 1
        assert answer.exit_code == 2
        assert (home / name).read_bytes() == b"SQLite format 3\0 no more than that"


@pytest.mark.parametrize(
    ("name", "message"),
    [("digits.lock", "cannot lock .*digits.lock: Is a d"), ("digits.database", "cannot read .*: Is a")],
)
def test_a_folder_where_a_file_of_the_home_should_be_is_reported_in_one_line(
    hpo: Callable[[str], Answer], tmp_path: Path, name: str, message: str
) -> None:
    (tmp_path / "mlruns" / "locks" / name).mkdir(parents=True)
    answer = hpo("search digits --trials 1")
    assert re.search(f"^Error: {message}", answer.err), answer.err
    assert answer.err.count("\n") == 1
    assert answer.exit_code == 2


def test_a_file_that_cannot_be_written_is_reported_in_one_line(
    hpo: Callable[[str], Answer], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setattr("hpo.session.report.compare_studies", lambda *_, **__: (tmp_path / "file" / "page").touch())
    answer = hpo("compare digits")
    assert answer == Answer(1, "", f"Error: cannot use {tmp_path / 'file' / 'page'}: Not a directory\n")


@pytest.fixture
def searched(hpo: Callable[[str], Answer], home: Path, monkeypatch: pytest.MonkeyPatch) -> Answer:
    """A short study in the home, and what its search printed."""
    monkeypatch.setenv("HPO_HOME", str(home))
    return hpo("search digits --trials 3 --epochs 2 -p optimizer=adamw --pruner none --workers 1")


def test_a_search_prints_a_line_for_each_trial_and_then_the_winner(searched: Answer) -> None:
    assert searched.exit_code == 0
    trials = [line for line in searched.out.splitlines() if re.match(r"trial \d ", line)]
    assert len(trials) == 3
    assert re.fullmatch(
        r"trial 0 +complete +accuracy 0\.\d{4} at epoch \d +best accuracy 0\.\d{4} \(trial 0\), 1/3 trials, .* left",
        trials[0],
    )
    ending = searched.out.partition("Done: ")[2]
    for words in (
        "3 complete",
        "Best",
        "Configuration",
        "optimizer=adamw",
        "Validation",
        "was used once",
        "hpo ui digits",
        "hpo best digits",
    ):
        assert words in ending
    assert "\x1b" not in searched.out, "no colours where nobody sees them"
    assert searched.err == ""


def test_what_was_found_can_be_looked_at(searched: Answer, hpo: Callable[[str], Answer]) -> None:
    assert "3/3" in hpo("studies").out
    shown = hpo("show digits").out
    assert "strategy priority, pruner none, 2 epochs, seed 0" in shown
    assert shown.count("optimizer=adamw") == 3
    assert hpo("show digits --top 1").out.count("optimizer=adamw") == 1
    best = hpo("best digits").out
    assert "Validation" in best
    assert 'hpo.load_best("digits")' in best
    assert "Deploy it: hpo export digits writes" in best
    assert not re.search(r" $", best, re.MULTILINE)


def test_json_is_json_and_says_the_same(searched: Answer, hpo: Callable[[str], Answer]) -> None:
    (study,) = json.loads(hpo("studies --json").out)
    facts = json.loads(hpo("show digits --json").out)
    winner = json.loads(hpo("best digits --json").out)["winner"]
    assert study["best"] == winner["validation"] == max(trial["value"] for trial in facts["trials"])
    assert facts["counts"]["complete"] == 3
    assert facts["trials"][winner["trial"]]["values"].items() >= winner["configuration"].items()
    assert winner["test"].keys() == set(METRICS_OF_KIND["classification"])
    assert sum(map(sum, winner["confusion"]["counts"])) == 360
    outcome = hpo("search digits --json")
    assert json.loads(outcome.out)["winner"] == winner
    assert "resuming study 'digits': 3/3 trials" in outcome.err


def test_what_a_task_prints_does_not_mix_with_json(hpo: Callable[[str], Answer], tmp_path: Path) -> None:
    (tmp_path / "noisy.py").write_text(
        "print('at import')\nfrom hpo.objectives.digits import objective as digits\n"
        "import dataclasses\ndef load(data_dir):\n    print('in load')\n    return digits.load(data_dir)\n"
        "objective = dataclasses.replace(digits, name='noisy', load=load)\n"
    )
    answer = hpo("train noisy.py --space digits --epochs 1 --limit 600 --json")
    assert json.loads(answer.out)["task"]
    assert "at import" in answer.err
    assert "in load" in answer.err


def test_the_winner_of_a_study_without_results_is_no_success(hpo: Callable[[str], Answer], tmp_path: Path) -> None:
    Study.open(open_storage(tmp_path / "mlruns"), "empty", SETTINGS)
    answer = hpo("best empty")
    assert answer.exit_code == 1
    assert "Study 'empty' has no trial with a result (no trial yet)" in answer.out
    assert json.loads(hpo("best empty --json").out)["winner"] is None


def test_the_tasks_and_their_spaces_can_be_looked_at(hpo: Callable[[str], Answer]) -> None:
    assert {row["task"] for row in json.loads(hpo("tasks --json").out)} >= {
        "digits",
        "fashion_mnist",
        "cifar10",
        "diabetes",
    }
    shown = hpo("space digits -p optimizer=sgd").out
    groups = [shown.index(title) for title in ("1. step size", "2. architecture and optimizer", "3. regularization")]
    assert groups == sorted(groups)
    assert "0.0001:0.3 (log)" in shown
    assert list(json.loads(hpo("space digits --json").out)) == [
        "step size",
        "architecture and optimizer",
        "regularization",
    ]


def test_nothing_to_look_at_is_said_and_makes_no_home(hpo: Callable[[str], Answer], tmp_path: Path) -> None:
    assert "There is no study yet" in hpo("studies").out
    assert json.loads(hpo("studies --json").out) == []
    assert list(tmp_path.iterdir()) == []


def test_a_broken_plugin_is_reported_once_and_the_others_work(
    hpo: Callable[[str], Answer], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "broken_plugin.py").write_text("raise RuntimeError('half installed')")
    package = tmp_path / "broken_plugin-1.0.dist-info"
    package.mkdir()
    (package / "METADATA").write_text("Name: broken-plugin\nVersion: 1.0\n")
    (package / "entry_points.txt").write_text("[hpo.objectives]\nbroken = broken_plugin\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    answer = hpo("tasks")
    assert answer.exit_code == 0
    assert "digits" in answer.out
    assert caplog.messages == [
        "plugin 'broken' (broken_plugin) is broken: RuntimeError: half installed (broken_plugin.py:1)"
    ]


def test_a_task_that_cannot_be_used_is_listed_as_broken(
    hpo: Callable[[str], Answer], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "half_a_package").mkdir()
    (tmp_path / "half_a_package" / "__init__.py").write_text("")
    (tmp_path / "half_a_package" / "half.py").write_text(BROKEN_FILES["dead_parameter.py"])
    package = tmp_path / "half_a_package-1.0.dist-info"
    package.mkdir()
    (package / "METADATA").write_text("Name: half-a-package\nVersion: 1.0\n")
    (package / "entry_points.txt").write_text("[hpo.objectives]\nhalf = half_a_package\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    rows = {row["task"]: row for row in json.loads(hpo("tasks --json").out)}
    assert "learning_rate" in rows["half"]["broken"]
    assert "broken" not in rows["digits"]


@pytest.mark.parametrize("arguments", [["--help"], ["search", "-h"], ["--version"], ["ui", "--help"]], ids=" ".join)
def test_help_imports_none_of_the_heavy_packages(arguments: list[str]) -> None:
    code = (
        "import sys\n"
        "from hpo.cli import cli\n"
        f"cli.main({arguments!r}, standalone_mode=False)\n"
        "heavy = {'torch', 'mlflow', 'optuna', 'numpy', 'rich', 'sklearn'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
