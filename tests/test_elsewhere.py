"""Weights past MLflow: what stands for a bundle leads to its bytes, or to an error that names the file."""

import json
from pathlib import Path

import pytest

from diffusion.store.bundle import load_bundle, verify_bundle
from diffusion.store.bundle_spec import read_facts
from diffusion.store.elsewhere import POINTER_NAME, bring_bundle, bundle_uri, point, send_bundle
from tests.published import content
from tests.random_bundle import published_model


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return Path(published_model(tmp_path / "store").uri)


@pytest.fixture
def pointed(bundle: Path, tmp_path: Path) -> Path:
    """What stands for it."""
    spec, digest = verify_bundle(bundle)
    return point(tmp_path / "pointed", bundle, send_bundle(str(tmp_path / "place"), bundle, spec, digest))


def there(pointed: Path) -> Path:
    return Path(json.loads((pointed / POINTER_NAME).read_text())["uri"])


def test_what_stands_for_a_bundle_brings_its_bytes(bundle, pointed, tmp_path):
    spec, digest = verify_bundle(bundle)
    assert set(content(pointed)) == {"bundle.json", POINTER_NAME}
    assert read_facts(pointed, digest)[0] == spec
    assert there(pointed) == Path(bundle_uri(str(tmp_path / "place"), digest))
    assert content(there(pointed)) == content(bundle)
    brought = bring_bundle(pointed, tmp_path / "brought")
    assert content(brought) == content(bundle)
    assert load_bundle(brought, digest=digest).digest == digest


def test_a_bundle_that_is_whole_stays_where_it_is(bundle, tmp_path):
    assert bring_bundle(bundle, tmp_path / "no") == bundle
    assert not (tmp_path / "no").exists()


def test_what_is_there_is_not_sent_again_and_what_is_cut_is(bundle, pointed, tmp_path):
    spec, digest = verify_bundle(bundle)
    weights = there(pointed) / "weights.safetensors"
    before = weights.stat().st_ino, weights.stat().st_mtime_ns
    send_bundle(str(tmp_path / "place"), bundle, spec, digest)
    assert (weights.stat().st_ino, weights.stat().st_mtime_ns) == before
    whole = weights.read_bytes()
    weights.unlink()
    weights.write_bytes(whole[:-1])
    send_bundle(str(tmp_path / "place"), bundle, spec, digest)
    assert weights.read_bytes() == whole


def test_weights_that_are_missing_or_changed_are_refused(pointed, tmp_path):
    weights = there(pointed) / "weights.safetensors"
    data = weights.read_bytes()
    weights.unlink()
    with pytest.raises(ValueError, match=r"weights\.safetensors is not there.*copy the file there again"):
        bring_bundle(pointed, tmp_path / "a")
    weights.write_bytes(data[:-1] + b"\x7f")
    with pytest.raises(ValueError, match=r"weights\.safetensors: sha256 .*the registered model says"):
        bring_bundle(pointed, tmp_path / "b")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"files": {"weights.safetensors": "0" * 64}}, "of other weights"),
        ({"files": {"../../weights": "0" * 64}}, "of other weights"),
        ({"format": 2}, "format"),
        ({"more": 1}, "more"),
    ],
)
def test_a_pointer_that_was_changed_is_refused(pointed, tmp_path, change, message):
    path = pointed / POINTER_NAME
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError, match=message):
        bring_bundle(pointed, tmp_path / "brought")
    assert not (tmp_path / "brought").exists()
