"""`diffusion verify`: of a home with a file of every kind, each file is spoilt and removed in turn, and must be named."""

import json
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from diffusion.codec import CodecIdentity
from diffusion.data.latents import write_latents
from diffusion.data.manifest import load
from diffusion.data.precomputed import Computation, computation_of
from diffusion.data.sidecar import sidecar_bytes
from diffusion.evaluation.reference import ReferenceIdentity, remember
from diffusion.lineage.looks import Finding
from diffusion.lineage.looks_at_data import looks_at_data
from diffusion.lineage.looks_at_store import TOPS, looks_at_bundles, looks_at_runs, looks_at_store
from diffusion.lineage.verify import verify
from diffusion.recipe import Recipe
from diffusion.store import works
from diffusion.store.storage import LocalFolder
from flows.cli import app
from flows.site import Site
from tests.registered_run import EXTRACTOR, evaluated, sampling
from tests.traced_home import make_home
from tests.words import embed, words

CODEC = CodecIdentity(name="autoencoder-kl", digest="0" * 64, channels=4, factor=4, scaling=1.0, shift=0.0)
# for people alone; notes have facts for people as well
PLAIN = ("report.md", "report.json", "grid.png", "real.png", "loss.png", "pictures.png", "set-aside.png", "latest.json")


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory, emoji_folder: Path, tiny_recipe: Recipe) -> Path:
    """A store with a file of every kind."""
    home, source = tmp_path_factory.mktemp("verified"), tmp_path_factory.mktemp("source") / "emoji"
    shutil.copytree(emoji_folder, source)
    (source / "flags" / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n and no more")
    run, store = make_home(home, source, tiny_recipe), home / "store"
    evaluation = evaluated(store, run, sampling(3), 100.0)
    for number, ref in enumerate((run.dataset, run, evaluation)):
        works.remember(store, f"{number}" * 64, ref)
    entry, *others = load(run.dataset.uri).entries("train")
    captions = {text: embed(text).numpy() for text in ("a red flag", "lime", "")}
    by = computation_of(words())
    LocalFolder(store).put(by.place(entry.sha256), sidecar_bytes(by, entry.sha256, captions))
    by, values = Computation(encoder=CODEC, device="cpu"), np.random.default_rng(0).normal(size=(3, 2, 4, 8, 8))
    target = store / by.place(others[0].sha256)
    target.parent.mkdir()
    write_latents(target, by, others[0].sha256, values.astype("<f4"), pictures=3, shape=(2, 4, 8, 8))
    identity = ReferenceIdentity(
        dataset_digest=run.dataset.digest, pictures=5, extractor=EXTRACTOR, torch="2", device="cpu"
    )
    remember(store, identity, np.ones((5, 7), np.float32))
    return store


@pytest.fixture
def store(original: Path) -> Iterator[Path]:
    yield original
    assert look(original) == []  # each test puts back what it spoils


def look(store: Path) -> list[Finding]:
    looks = [*looks_at_store(store), *looks_at_data(LocalFolder(store), but=TOPS)]
    told: list[tuple[int, int]] = []
    findings = verify(looks, progress=lambda done, total: told.append((done, total)))
    assert told[-1][0] == told[-1][1] == sum(one.bytes for one in looks)
    assert told == sorted(told)
    return findings


def files(store: Path) -> list[Path]:
    return sorted(path for path in store.rglob("*") if path.is_file())


def names(finding: Finding, path: Path) -> bool:
    """Whether it is said of this file, or of the folder that is remade as a whole."""
    return finding.place in (str(path), str(path.parent)) or str(path) in finding.what


@contextmanager
def spoilt(path: Path, data: bytes | None) -> Iterator[None]:
    before = path.read_bytes()
    path.unlink()
    try:
        if data is not None:
            path.write_bytes(data)
        yield
    finally:
        path.write_bytes(before)


def test_there_is_a_file_of_every_kind(store: Path) -> None:
    kinds = {path.relative_to(store).parts[0] for path in files(store)}
    assert kinds >= {"datasets", "shards", "precomputed", "quarantine", "heads", "features", "works", "runs", "bundles"}
    assert {"evaluations", "quarantine"} <= kinds
    assert len(files(store)) > 30


def test_a_bit_that_is_turned_anywhere_is_found(store: Path) -> None:
    random = np.random.default_rng(0)
    spoilt_files = 0
    for path in files(store):
        top = path.relative_to(store).parts[0]
        notes = top in ("heads", "works", "quarantine")
        if notes or (path.name in PLAIN and not (path.name == "report.json" and top == "evaluations")):
            continue
        data = bytearray(path.read_bytes())
        data[int(random.integers(len(data)))] ^= 1 << int(random.integers(7))
        with spoilt(path, bytes(data)):
            found = look(store)
        assert any(finding.kind == "damaged" and names(finding, path) for finding in found), (path, found)
        for finding in found:  # the file and what to do are said once
            assert len(re.findall("delete|remove", finding.what, re.IGNORECASE)) <= 1, finding
            assert not finding.what.startswith(finding.place)
        spoilt_files += 1
    assert spoilt_files >= 25


def test_the_shards_of_a_damaged_dataset_are_not_said_to_be_nobodys(store: Path) -> None:
    (made,) = store.glob("datasets/*/manifest.json")
    shards = len([path for path in files(store) if "shards" in path.parts])
    with spoilt(made, made.read_bytes().replace(b'"bytes":', b'"bytes": ', 1)):
        found = look(store)
    (loose,) = [finding for finding in found if finding.kind == "unknown"]
    assert loose.place == str(store / "shards")
    assert loose.what.startswith(f"{shards} files that no dataset has, or a damaged one alone: keep them")
    damaged = {Path(finding.place).parent.name for finding in found if finding.kind == "damaged"}
    assert damaged == {made.parent.name, "heads"}


def test_an_average_without_a_sum_is_found(store: Path) -> None:
    (path,) = store.glob("runs/*/checkpoints/*/manifest.json")
    with spoilt(path, path.read_bytes().replace(b'":"ema-', b'":"Ema-', 1)):
        assert f"{path}" in [finding.place for finding in look(store) if "it names no sum of Ema-" in finding.what]


def test_a_note_that_leads_elsewhere_or_nowhere_is_found(store: Path) -> None:
    for path in [*(store / "heads").iterdir(), *(store / "works").iterdir()]:
        text = path.read_text()
        digest = json.loads(text)
        digest = digest.get("ref", digest)["digest"]
        for wrong in (
            text.replace(digest, "0" * 64),
            text[:-5],
            text.replace("/emoji", "/emoj1"),
            text.replace(str(store), f"{store}x"),
        ):
            if wrong != text:
                with spoilt(path, wrong.encode()):
                    assert any(finding.kind != "unknown" for finding in look(store)), (path, wrong)
        with spoilt(path, path.read_bytes()):
            moved = path.rename(path.with_name(f"{'f' * 16}.json"))
            assert [finding.kind for finding in look(store)] == ["damaged"]
            moved.rename(path)


def test_an_original_in_quarantine_that_was_changed_is_found(store: Path) -> None:
    (tar,) = store.glob("quarantine/*/*.tar")
    with spoilt(tar, tar.read_bytes().replace(b"and no more", b"and a bit m")):
        assert [finding.place for finding in look(store)] == [str(tar)]
    (reasons,) = store.glob("quarantine/*/reasons.jsonl")
    with spoilt(reasons, reasons.read_bytes()[:-4]):
        assert [finding.place for finding in look(store)] == [str(reasons)]


def test_what_is_cut_off_is_found(store: Path) -> None:
    for path in files(store):
        if path.suffix in (".tar", ".npy", ".safetensors") and "quarantine" not in path.parts:
            with spoilt(path, path.read_bytes()[:-1]):
                found = look(store)
            assert any(finding.kind == "damaged" and names(finding, path) for finding in found), path


def test_what_is_gone_is_found(store: Path) -> None:
    """Where something is left that names it: of what is computed when it is needed nothing is."""
    for path in files(store):
        top = path.relative_to(store).parts[0]
        named = top in ("shards", "runs", "bundles") or path.name == "manifest.json"
        if named or (top == "evaluations" and path.name == "report.json"):
            with spoilt(path, None):
                assert any(finding.kind != "unknown" and names(finding, path) for finding in look(store)), path


def test_what_nothing_names_is_said_to_be_that_and_no_damage(store: Path) -> None:
    strange = [
        store / "notes.txt",
        store / "shards" / "00" / f"{'0' * 64}.tar",
        bundle_in_first(store) / "pickle.bin",
        next(store.glob("runs/*/checkpoints/*")) / "extra.safetensors",
    ]
    for path in strange:
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"hello")
    aside = next(store.glob("runs/*/checkpoints/*"))
    aside = Path(shutil.copytree(aside, aside.with_name(f"{aside.name}.damaged-1")))
    found = look(store)
    assert {finding.kind for finding in found} == {"unknown"}
    assert {finding.place for finding in found} == {str(path) for path in (*strange, aside)}
    shutil.rmtree(aside)
    for path in strange:
        path.unlink()


def bundle_in_first(store: Path) -> Path:
    return sorted((store / "bundles").iterdir())[0]


def test_a_bundle_or_report_under_anothers_name_is_found(store: Path) -> None:
    for folder in (bundle_in_first(store), next((store / "evaluations").iterdir())):
        other = folder.with_name("0" * 16)
        folder.rename(other)
        found = look(store)
        assert any(f.kind == "damaged" and "folder's name" in f.what for f in found)
        other.rename(folder)


def test_a_report_that_a_note_of_work_names_as_well_is_told_of_once(store: Path) -> None:
    (path,) = store.glob("evaluations/*/report.json")
    assert str(path.parent) in "".join(note.read_text() for note in (store / "works").iterdir())
    with spoilt(path, path.read_bytes()[:-1]):
        assert [(finding.kind, finding.place) for finding in look(store)] == [("damaged", str(path))]


@pytest.mark.parametrize(("top", "looks"), [("runs", looks_at_runs), ("bundles", looks_at_bundles)])
def test_what_a_site_keeps_elsewhere_is_looked_at(top: str, looks, store: Path, tmp_path: Path) -> None:
    shutil.copytree(store / top, tmp_path / top)
    root = LocalFolder(tmp_path)

    def found() -> list[Finding]:
        return verify(list(looks(root)), progress=lambda done, total: None)

    assert found() == []
    weights = next(tmp_path.rglob("weights.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-1])
    assert [finding.place for finding in found()] == [str(weights)]


def test_the_command_says_it_and_changes_nothing(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "flows.cli_lineage.looking", lambda work, debug, **given: work(Site(home=store.parent, gpu=False))
    )
    before = {path: path.stat().st_mtime_ns for path in store.parent.rglob("*")}
    done = CliRunner().invoke(app, ["verify"])
    assert done.exit_code == 0, done.output
    assert f"files and folders of {store}" in done.output
    assert "all as they were written" in done.output
    assert done.output.count("MiB (100 %)") == 1, done.output
    weights = bundle_in_first(store) / "weights.safetensors"
    with spoilt(weights, b"no weights"):
        done = CliRunner().invoke(app, ["verify"])
    assert done.exit_code == 1
    assert f"damaged    {weights}: sha256" in done.output
    assert "1 damaged, 0 missing, 0 unknown" in done.output
    after = {path: path.stat().st_mtime_ns for path in store.parent.rglob("*")}
    assert {path for path in before if before[path] != after[path]} <= {weights, weights.parent}
    assert before.keys() == after.keys()
    monkeypatch.setattr("flows.cli_lineage.looking", lambda work, debug, **given: work(Site(home=store / "no")))
    assert "is no folder" in str(CliRunner().invoke(app, ["verify"]).exception)
