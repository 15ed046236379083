"""`diffusion data quarantine ...` on a dataset made of a flawed source."""

import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from diffusion.data import ingest
from diffusion.data.datasets import find, set_latest
from diffusion.data.lint import lint
from diffusion.data.mix import mix
from diffusion.store.storage import LocalFolder
from flows.cli import app
from flows.cli_quarantine import _file_name
from flows.site import Site
from tests.flawed_source import REASONS, RECIPE, fill


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The source, and a home with a dataset made of it."""
    source = fill(tmp_path_factory.mktemp("flawed") / "source")
    home = tmp_path_factory.mktemp("home")
    set_latest(LocalFolder(home / "store"), ingest.shard_dataset(source, RECIPE, home / "store").digest)
    return source, home


@pytest.fixture
def root(sharded: tuple[Path, Path], tmp_path: Path) -> LocalFolder:
    shutil.copytree(sharded[1], tmp_path / "home")
    return LocalFolder(tmp_path / "home" / "store")


@pytest.fixture
def quarantine(monkeypatch: pytest.MonkeyPatch, root: LocalFolder):
    """Runs `diffusion data quarantine ...` here; gives what was said, and a ValueError is the answer."""
    site = Site(home=root.folder.parent, gpu=False)
    for name in ("cli_data.guarded", "cli_quarantine.looking"):
        monkeypatch.setattr(f"flows.{name}", lambda work, debug, **given: work(site))

    def run(*arguments: str) -> str:
        done = CliRunner().invoke(app, ["data", "quarantine", *arguments])
        if done.exception is not None:
            raise done.exception
        return done.stdout

    return run


@pytest.mark.parametrize("command", ["list", "retry", "release"])
def test_every_command_has_help(command: str) -> None:
    done = CliRunner().invoke(app, ["data", "quarantine", command, "--help"])
    assert done.exit_code == 0
    assert "--home" in done.stdout


def test_every_file_is_listed_with_its_reason_and_its_original_copied(quarantine, sharded, tmp_path: Path) -> None:
    out = tmp_path / "out"
    told = quarantine("list", "latest", "--out", str(out))
    lines = [line for line in told.splitlines() if any(name in line for name in REASONS)]
    assert {
        name: kind
        for name, kind in REASONS.items()
        if any(f"  {kind} " in line and f" {name} " in line for line in lines)
    } == REASONS
    assert "1 duplicate, 1 empty, 1 not a picture, 1 too elongated, 2 too small, 1 truncated" in told
    originals = {path.name.partition("-")[2]: path.read_bytes() for path in out.iterdir()}
    expected = [name for name, kind in REASONS.items() if kind != "duplicate"]
    assert originals == {Path(name).name: (sharded[0] / name).read_bytes() for name in expected}
    with pytest.raises(ValueError, match="has files in it, and none is overwritten"):
        quarantine("list", "latest", "--out", str(out))
    assert quarantine("list", "latest", "--kind", "too small").count("dogs/tiny") == 2


def published_bytes(root: LocalFolder) -> dict[str, bytes]:
    names = (found.name for found in root.walk())
    return {name: root.read(name) for name in names if name.startswith(("shards/", "datasets/", "quarantine/"))}


def test_released_files_are_in_a_new_version_and_the_old_one_stays(quarantine, root: LocalFolder) -> None:
    old = find(root, "latest")
    before = published_bytes(root)
    told = quarantine("release", "latest", "dogs/tiny.png", "--kind", "too elongated")
    new = find(root, "latest")
    assert new.digest[:16] in told
    assert (new.manifest.parent, new.manifest.set_aside) == (
        old.digest,
        {"duplicate": 1, "empty": 1, "not a picture": 1, "too small": 1, "truncated": 1},
    )
    assert f"has 2 pictures more than {old.digest[:16]}" in told
    assert before.items() <= published_bytes(root).items()
    assert lint(new) == []
    assert "# Dataset" in root.read(f"datasets/{new.digest[:16]}/report.md").decode()


def test_what_passes_no_more_than_before_changes_nothing(quarantine, root: LocalFolder) -> None:
    old = find(root, "latest")
    assert "nothing passes that did not before" in quarantine("retry", "latest")
    assert find(root, "latest") == old


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ((), "name the files to release, or all of a kind"),
        (("cats/cut.png",), "truncated.*what is damaged cannot be released"),
        (("cats/twin.png",), "cats/twin.png is not needed: it is the same picture as .*, which the dataset holds"),
        (("cats/none.png",), "no file 'cats/none.png' was set aside"),
        (("--kind", "blurred"), "nothing was set aside as 'blurred'; there is duplicate, empty, "),
    ],
)
def test_what_cannot_be_released_is_refused(
    arguments: tuple[str, ...], says: str, quarantine, root: LocalFolder
) -> None:
    before = find(root, "latest")
    with pytest.raises(ValueError, match=says):
        quarantine("release", "latest", *arguments)
    assert find(root, "latest") == before


def test_an_unknown_reason_is_refused_in_a_list(quarantine) -> None:
    with pytest.raises(ValueError, match="nothing was set aside as 'blurred'; there is duplicate, empty, "):
        quarantine("list", "latest", "--kind", "blurred")


def test_a_mixture_sends_people_to_its_parts(quarantine, root: LocalFolder, tmp_path: Path) -> None:
    first = find(root, "latest")
    source = fill(tmp_path / "other")
    for path in sorted(source.rglob("*.png"))[:8]:
        path.unlink()
    second = find(root, ingest.shard_dataset(source, RECIPE, root).digest)
    mixed = mix(root, [(first, 1), (second, 1)])
    for command in ("list", "retry", "release"):
        with pytest.raises(ValueError, match=f"is a mixture.*{min(first.digest, second.digest)[:16]}, "):
            quarantine(command, mixed.digest)


@pytest.mark.parametrize("name", ["..", "a/..", "/etc/passwd", "a\\..\\b", "x" * 300, "é\n.png", ""])
def test_no_name_leads_to_another_folder(name: str) -> None:
    made = f"000000-{_file_name(name)}"
    assert Path(made).name == made
    assert len(made) < 100
    assert made.isascii()
    assert made.isprintable()
