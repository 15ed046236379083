"""Which version of MLflow the tables of a database are of, without MLflow, which takes seconds to import."""

import importlib.util
import re
from pathlib import Path

_REVISION = re.compile(r'^(revision|down_revision)\b[^=\n]*=\s*["\'](\w+)["\']', re.MULTILINE)


class Unreachable(Exception):
    """The database does not answer; says why in a line."""


def schema_of(uri: str) -> str | None:
    """The revision of the tables in a database, by SQLAlchemy's address; None where MLflow never made any.

    Raises Unreachable.
    """
    from sqlalchemy import create_engine, inspect, text
    from sqlalchemy.exc import SQLAlchemyError

    try:
        engine = create_engine(uri)
        try:
            with engine.connect() as connection:
                if not inspect(connection).has_table("alembic_version"):
                    return None
                return connection.execute(text("SELECT version_num FROM alembic_version")).scalar()
        finally:
            engine.dispose()
    except (SQLAlchemyError, ImportError) as error:  # ImportError: of the database's driver
        cause = getattr(error, "orig", None) or error
        raise Unreachable(" ".join(str(cause).split())[:200]) from None


def newest_schema() -> str:
    """The revision that the installed MLflow works with: the one that no other comes after."""
    package = Path(importlib.util.find_spec("mlflow").origin).parent
    revisions, passed = set(), set()
    for file in (package / "store" / "db_migrations" / "versions").glob("*.py"):
        for kind, revision in _REVISION.findall(file.read_text("utf-8")):
            (revisions if kind == "revision" else passed).add(revision)
    (newest,) = revisions - passed
    return newest
