"""Known vulnerabilities of what requirements.lock pins, from the OSV database (osv.dev), by pip-audit.

    python infra/requirements/audit.py               # as `make audit` does

pip-audit lies in an environment of its own, .audit, each of its files held to its sha256 (audit.txt): who audits is no part
of what is audited.  Exit code 0: nothing is known; 1: something is; 3: the database cannot be reached, so nothing was asked.
What is known and does not concern us stands in `AS_IS` with the reason.
"""

import hashlib
import shutil
import subprocess
import sys
import urllib.error
import urllib.request
import venv
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
PLACE = ROOT / ".audit"
PINS = HERE / "audit.txt"
OSV = "https://api.osv.dev/v1/query"
PATIENCE_S = 5.0
AS_IS: dict[str, str] = {}  # advisory -> why it does not concern us


def silent(url: str) -> str | None:
    """Why nothing answers there; None where something does."""
    question = urllib.request.Request(
        url, b'{"package": {"purl": "pkg:pypi/pip@1.0"}}', {"Content-Type": "application/json"}
    )
    try:
        with urllib.request.urlopen(question, timeout=PATIENCE_S):
            return None
    except urllib.error.HTTPError as error:
        return f"status {error.code}"
    except OSError as error:
        return str(getattr(error, "reason", error))


def environment() -> Path:
    """Python of the environment with pip-audit, made where it is not, or is of other pins."""
    python, mark = PLACE / "bin" / "python", PLACE / ".pins"
    wanted = hashlib.sha256(PINS.read_bytes()).hexdigest()
    if not mark.is_file() or mark.read_text() != wanted:
        shutil.rmtree(PLACE, ignore_errors=True)
        venv.create(PLACE, with_pip=True)
        pip = [
            python,
            "-m",
            "pip",
            "install",
            "--quiet",
            "--disable-pip-version-check",
            "--require-hashes",
            "--no-deps",
        ]
        subprocess.run([*pip, "--only-binary=:all:", "-r", PINS], check=True)
        mark.write_text(wanted)
    return python


def audit(lock: Path, url: str = OSV) -> int:
    """Says what is known of the pins in `lock`.  Returns the exit code."""
    if why := silent(url):
        print(f"audit: the database of advisories at {url} does not answer ({why}), so nothing was looked up")
        return 3
    try:
        python = environment()
    except (subprocess.CalledProcessError, OSError) as error:
        print(f"audit: pip-audit cannot be installed ({error}), so nothing was looked up")
        return 3
    command = [python, "-m", "pip_audit", "--requirement", lock, "--no-deps", "--disable-pip", "--progress-spinner=off"]
    command += ["--vulnerability-service=osv", f"--osv-url={url}", "--desc=off", "--cache-dir", PLACE / "cache"]
    return subprocess.run([*command, *(word for known in AS_IS for word in ("--ignore-vuln", known))]).returncode


if __name__ == "__main__":
    sys.exit(audit(ROOT / "requirements.lock"))
