"""Makes what servers need and nobody makes for them: a bucket, and for each name a database with a user of that name.

    setup.py BUCKET NAME...

POSTGRES: address of the server, as its superuser; POSTGRES_PASSWORD_FILE: file with that user's password.
PASSWORD_OF_<NAME>: file with the password of NAME, which is set anew each time.  AWS_*: where the bucket is, and keys.
What is there stays: run it as often as you like.
"""

import os
import sys
from pathlib import Path

import boto3
import psycopg
from botocore.exceptions import ClientError
from psycopg import sql


def make_bucket(name: str) -> None:
    client = boto3.client("s3")
    try:
        client.head_bucket(Bucket=name)
    except ClientError as error:
        if error.response["ResponseMetadata"]["HTTPStatusCode"] != 404:
            raise SystemExit(
                f"bucket {name}: {error}. Are AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY right?"
            ) from None
        client.create_bucket(Bucket=name)
        print(f"made bucket {name}")


def make_database(server: psycopg.Connection, name: str, password: str) -> None:
    user = sql.Identifier(name)
    if server.execute("SELECT FROM pg_roles WHERE rolname = %s", [name]).fetchone() is None:
        server.execute(sql.SQL("CREATE ROLE {} LOGIN").format(user))
    server.execute(sql.SQL("ALTER ROLE {} PASSWORD {}").format(user, sql.Literal(password)))
    if server.execute("SELECT FROM pg_database WHERE datname = %s", [name]).fetchone() is None:
        server.execute(sql.SQL("CREATE DATABASE {} OWNER {}").format(user, user))
        print(f"made database {name}")
    server.execute(sql.SQL("REVOKE CONNECT ON DATABASE {} FROM PUBLIC").format(user))


def read(variable: str) -> str:
    """The secret in the file that this variable names."""
    return Path(os.environ[variable]).read_text().strip()


def main(bucket: str, *databases: str) -> None:
    make_bucket(bucket)
    with psycopg.connect(os.environ["POSTGRES"], password=read("POSTGRES_PASSWORD_FILE"), autocommit=True) as server:
        for name in databases:
            make_database(server, name, read(f"PASSWORD_OF_{name}"))


main(*sys.argv[1:])
