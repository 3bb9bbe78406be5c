"""Make what is needed once: the bucket for the artifacts, and the workers' account in MLflow. Repeating it is harmless.

The environment has MLFLOW_TRACKING_URI with the admin's MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, the
WORKER_USERNAME and WORKER_PASSWORD to be, ARTIFACTS_BUCKET, and what boto3 reads to find the object store.
"""

import os

import boto3
from mlflow.exceptions import MlflowException
from mlflow.server import get_app_client


def make_bucket(name: str) -> None:
    store = boto3.client("s3")
    if name not in [bucket["Name"] for bucket in store.list_buckets()["Buckets"]]:
        store.create_bucket(Bucket=name)


def make_account(username: str, password: str) -> None:
    """The account, with this password even if it was there already."""
    accounts = get_app_client("basic-auth", tracking_uri=os.environ["MLFLOW_TRACKING_URI"])
    try:
        accounts.create_user(username, password)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
        accounts.update_user_password(username, password)


if __name__ == "__main__":
    make_bucket(os.environ["ARTIFACTS_BUCKET"])
    make_account(os.environ["WORKER_USERNAME"], os.environ["WORKER_PASSWORD"])
