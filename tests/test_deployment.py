"""A team's deployment: its files are valid, hold no secret, and what can be run without containers is run."""

from __future__ import annotations

import configparser
import os
import re
import signal
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import kubernetes_validate
import psycopg
import pytest
import yaml
from helpers.postgres import PASSWORD, Postgres, running_postgres

ROOT = Path(__file__).parent.parent
COMPOSE = (ROOT / "compose.yaml").read_text()
SERVICES: dict[str, Any] = yaml.safe_load(COMPOSE)["services"]
SCRIPTS = [ROOT / "deploy" / "postgres.sh", ROOT / "examples" / "slurm" / "workers.sh"]
KUBERNETES = ROOT / "examples" / "kubernetes" / "workers.yaml"
SECRET_NAME = re.compile(r"PASSWORD|SECRET|TOKEN|ACCESS_KEY$")


# --- compose.yaml -----------------------------------------------------------------------------------------------------


def test_compose_yaml_follows_the_compose_specification() -> None:
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec", "compose.yaml"]
    checked = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stdout


def test_every_name_in_compose_yaml_leads_somewhere() -> None:
    whole = yaml.safe_load(COMPOSE)
    for name, service in SERVICES.items():
        assert set(service.get("depends_on", {})) <= set(SERVICES), name
        assert {config["source"] for config in service.get("configs", [])} <= set(whole["configs"]), name
        assert set(service.get("networks", [])) <= {*whole["networks"], "default"}, name
        for volume in service.get("volumes", []):
            source = volume.split(":")[0]
            assert (ROOT / source).is_file() if source.startswith("./") else source in whole["volumes"], volume
        if "build" in service:
            dockerfile = (ROOT / service["build"]["dockerfile"]).read_text()
            assert f" AS {service['build']['target']}\n" in dockerfile


def test_nothing_starts_without_its_secrets_and_none_has_a_default() -> None:
    for name, service in SERVICES.items():
        for variable, value in service.get("environment", {}).items():
            if SECRET_NAME.search(variable):
                assert re.fullmatch(r"\$\{\w+:\?[^}]+\}", value), (name, variable)
    assert set(re.findall(r"\$\{(\w+):-", COMPOSE)) == {"HPO_BIND", "HPO_STUDY", "MLFLOW_ALLOWED_HOSTS"}
    assert re.findall(r"\$\{\w+(?!:[?-])\W", COMPOSE) == [], "every variable is required, or has a default"
    assert re.findall(r"://[^/\s@]+:[^/\s@]+@", COMPOSE) == [], "no password in an address"


def test_the_docs_name_every_secret() -> None:
    guide = (ROOT / "docs" / "deployment.md").read_text()
    required = set(re.findall(r"\$\{(\w+):\?", COMPOSE))
    assert [name for name in sorted(required) if name not in guide] == []


def test_ports_are_bound_to_this_machine_unless_told_otherwise() -> None:
    published = {name: service["ports"] for name, service in SERVICES.items() if "ports" in service}
    assert published == {
        "postgres": ["${HPO_BIND:-127.0.0.1}:5432:5432"],
        "mlflow": ["${HPO_BIND:-127.0.0.1}:5000:5000"],
    }


def test_workers_have_no_key_of_the_object_store_and_no_way_to_it() -> None:
    worker = SERVICES["worker"]
    assert not [variable for variable in worker["environment"] if variable.startswith("AWS_")]
    assert "networks" not in worker
    assert SERVICES["s3"]["networks"] == ["artifacts"]


def test_services_are_watched_and_their_images_are_pinned() -> None:
    for name, service in SERVICES.items():
        assert service["restart"], name
        assert "healthcheck" in service or name in ("setup", "worker"), name
        assert "build" in service or re.search(r":\d+\.\d+", service["image"]), name
    bases = re.findall(r"^FROM (\S+)", (ROOT / "deploy" / "Dockerfile").read_text(), re.MULTILINE)
    assert [base for base in bases if base != "base" and not re.search(r":\d+\.\d+\.\d+", base)] == []


def test_the_image_has_the_mlflow_that_hpo_is_pinned_to() -> None:
    pins = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["uv"]["constraint-dependencies"]
    (pinned,) = (pin.partition("==")[2] for pin in pins if pin.startswith("mlflow=="))
    assert f"mlflow[auth]=={pinned}" in (ROOT / "deploy" / "Dockerfile").read_text()
    assert {SERVICES[name]["image"] for name in ("mlflow", "setup")} == {f"hpo-mlflow:{pinned}"}


def test_the_accounts_have_no_password_in_a_file() -> None:
    accounts = configparser.ConfigParser()
    accounts.read(ROOT / "deploy" / "basic_auth.ini")
    assert set(accounts["mlflow"]) == {"default_permission", "database_uri", "authorization_function"}
    assert "@postgres/mlflow" in accounts["mlflow"]["database_uri"]


# --- PostgreSQL -------------------------------------------------------------------------------------------------------


def test_each_role_opens_its_own_database_only() -> None:
    passwords = {"studies": "a'b\"c$d\\", "mlflow": "another one"}
    with running_postgres() as server:
        environment = {
            **os.environ,
            "PATH": f"{server._binaries}{os.pathsep}{os.environ['PATH']}",
            "PGHOST": "127.0.0.1",
            "PGPORT": str(server.port),
            "PGPASSWORD": PASSWORD,
            "POSTGRES_USER": "hpo",
            **{f"{role.upper()}_DB_PASSWORD": password for role, password in passwords.items()},
        }
        subprocess.run(["sh", ROOT / "deploy" / "postgres.sh"], env=environment, check=True)
        opened = {
            (role, database)
            for role in passwords
            for database in ("studies", "mlflow", "postgres", "template1")
            if opens(server, role, passwords[role], database)
        }
        assert opened == {("studies", "studies"), ("mlflow", "mlflow")}
        assert not opens(server, "studies", passwords["mlflow"], "studies")


def opens(server: Postgres, role: str, password: str, database: str) -> bool:
    address: dict[str, Any] = {"host": "127.0.0.1", "port": server.port, "dbname": database}
    try:
        with psycopg.connect(**address, user=role, password=password) as connection:
            connection.execute("CREATE TABLE mine ()")
    except psycopg.OperationalError:  # what a refused connection raises, and a refused statement does not
        return False
    return True


# --- SLURM ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.name)
def test_a_script_passes_the_shells_checks(script: Path) -> None:
    assert os.access(script, os.X_OK)
    subprocess.run(["bash", "-n", script], check=True)
    shellcheck = Path(sys.executable).with_name("shellcheck")
    checked = subprocess.run([shellcheck, script], capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stdout


WORKER = """#!/bin/sh
# Stands for `hpo worker`, of which only the reaction to SIGTERM matters here.
trap 'echo stopped >> "$LOG"; exit 130' TERM
echo "started $*" >> "$LOG"
[ -n "${ENDS-}" ] && exit "$ENDS"
while :; do sleep 0.05; done
"""
SCONTROL = '#!/bin/sh\necho "scontrol $*" >> "$LOG"\n'


@pytest.fixture
def slurm(tmp_path: Path) -> dict[str, str]:
    """The environment of a job, with commands that write down how they are called."""
    commands = tmp_path / "bin"
    commands.mkdir()
    for name, text in (("hpo", WORKER), ("scontrol", SCONTROL)):
        (commands / name).write_text(text)
        (commands / name).chmod(0o755)
    (tmp_path / "env").write_text("export HPO_STORAGE=from-the-file\n")
    (tmp_path / "log").touch()
    return {
        **os.environ,
        "PATH": f"{commands}{os.pathsep}{os.environ['PATH']}",
        "LOG": str(tmp_path / "log"),
        "HPO_ENV": str(tmp_path / "env"),
        "SCRATCH": "/scratch",
        "STUDY": "digits",
        "SLURM_ARRAY_JOB_ID": "7",
        "SLURM_ARRAY_TASK_ID": "3",
    }


STARTED = "started worker digits --workers 1 --home /scratch/hpo/digits/3"


def test_a_job_whose_time_is_up_stops_its_worker_and_is_queued_again(slurm: dict[str, str]) -> None:
    log = Path(slurm["LOG"])
    with subprocess.Popen(["bash", SCRIPTS[1]], env=slurm) as job:
        while not log.read_text():
            assert job.poll() is None
        job.send_signal(signal.SIGUSR1)
    assert log.read_text().splitlines() == [STARTED, "stopped", "scontrol requeue 7_3"]
    assert job.returncode == 0


@pytest.mark.parametrize("code", [0, 1, 2])
def test_a_job_ends_as_its_worker_does(code: int, slurm: dict[str, str]) -> None:
    finished = subprocess.run(["bash", SCRIPTS[1]], env={**slurm, "ENDS": str(code)}, check=False)
    assert finished.returncode == code
    assert Path(slurm["LOG"]).read_text().splitlines() == [STARTED]


def test_a_job_without_a_study_says_what_is_missing(slurm: dict[str, str]) -> None:
    del slurm["STUDY"]
    finished = subprocess.run(["bash", SCRIPTS[1]], env=slurm, capture_output=True, text=True, check=False)
    assert finished.returncode != 0
    assert "name the study: STUDY=digits sbatch" in finished.stderr


def test_the_job_asks_slurm_for_the_signal_that_it_waits_for() -> None:
    directives = re.findall(r"^#SBATCH (\S+)", SCRIPTS[1].read_text(), re.MULTILINE)
    assert {"--signal=B:USR1@120", "--requeue"} <= set(directives)


# --- Kubernetes -------------------------------------------------------------------------------------------------------

MANIFESTS = list(yaml.safe_load_all(KUBERNETES.read_text()))


@pytest.mark.parametrize("manifest", MANIFESTS, ids=lambda manifest: manifest["kind"])
def test_a_manifest_follows_the_schema_of_kubernetes(manifest: dict[str, Any]) -> None:
    kubernetes_validate.validate(manifest, kubernetes_validate.latest_version(), strict=True)


def test_pods_take_secrets_from_the_secret_and_have_time_to_end() -> None:
    (pod,) = (manifest["spec"]["template"]["spec"] for manifest in MANIFESTS if manifest["kind"] == "Job")
    (container,) = pod["containers"]
    assert pod["terminationGracePeriodSeconds"] >= 60
    assert pod["automountServiceAccountToken"] is False
    assert [variable for variable in container["env"] if "value" in variable] == []
    guide = (ROOT / "docs" / "deployment.md").read_text()
    keys = [v["valueFrom"]["secretKeyRef"]["key"] for v in container["env"] if "secretKeyRef" in v["valueFrom"]]
    assert [key for key in keys if f"--from-literal={key}=" not in guide and f"--from-file={key}" not in guide] == []
    mounted = {mount["name"] for mount in container["volumeMounts"]}
    assert mounted == {volume["name"] for volume in pod["volumes"]}
