#!/bin/sh
# PostgreSQL's image runs this once, on an empty volume. The studies and MLflow get a role and a database each; neither
# role can open the other's database, so that a worker's password opens the studies only.
set -eu

psql --no-psqlrc --quiet --set ON_ERROR_STOP=1 --username "$POSTGRES_USER" --dbname postgres <<'SQL'
\getenv studies_password STUDIES_DB_PASSWORD
\getenv mlflow_password MLFLOW_DB_PASSWORD
CREATE ROLE studies LOGIN PASSWORD :'studies_password';
CREATE ROLE mlflow LOGIN PASSWORD :'mlflow_password';
CREATE DATABASE studies OWNER studies;
CREATE DATABASE mlflow OWNER mlflow;
REVOKE ALL ON DATABASE studies, mlflow, postgres, template1 FROM PUBLIC;
SQL
