"""Agreement with captions: the cosines are those of transformers' CLIP, and the report has them with an interval."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

from diffusion.evaluation.extractors.features import extractor, identity_of
from diffusion.evaluation.extractors.resize import bicubic
from diffusion.evaluation.facts.agreement import cosines
from diffusion.evaluation.measure import evaluate
from diffusion.evaluation.report.report import load_report
from diffusion.store.joint_encoders import joint_encoder, joint_identity
from flows.preflight import check_drawing
from tests.evaluated_run import make_run
from tests.tokenizer import tokenizer_of
from tests.words import reading

pytestmark = pytest.mark.usefixtures("one_thread")
MEAN, STD = [0.5, 0.4, 0.3], [0.2, 0.3, 0.25]


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """A small random CLIP, as a site would provide it."""
    tokenizer = tokenizer_of("a", "red", "flag", "face", ":")
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = shape | {"vocab_size": 8, "max_position_embeddings": 12}
    text |= {"eos_token_id": 1, "pad_token_id": 0, "bos_token_id": 3}
    torch.manual_seed(0)
    config = transformers.CLIPConfig(
        text_config=text, vision_config=shape | {"image_size": 24, "patch_size": 8}, projection_dim=12
    )
    made = tmp_path / "clip"
    transformers.CLIPModel(config).save_pretrained(made)
    tokenizer.save_pretrained(made)
    facts = {"image_mean": MEAN, "image_std": STD}
    (made / "preprocessor_config.json").write_text(json.dumps(facts))
    monkeypatch.setenv("DIFFUSION_JOINT_CLIP", str(made))
    return made


@torch.no_grad()
def test_cosines_are_those_of_transformers(folder):
    generator = np.random.default_rng(0)
    drawn = [generator.integers(0, 256, (h, 24, 3), dtype=np.uint8) for h in (24, 40, 24)]
    real = [generator.integers(0, 256, (24, 24, 3), dtype=np.uint8) for _ in range(3)]
    captions = ["a red flag", "face", "a red red red red red red red red red red red red flag"]
    found = cosines(joint_encoder(), drawn, real, captions)
    model = transformers.CLIPModel.from_pretrained(folder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    ids = [tokenizer(caption, truncation=True, max_length=12, return_tensors="pt") for caption in captions]
    for column, (pictures, turn) in enumerate(((drawn, 0), (real, 0), (drawn, 1))):
        for i, picture in enumerate(pictures):
            x = bicubic(torch.from_numpy(picture)[None].permute(0, 3, 1, 2).float(), 24) / 255
            pixels = (x - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
            both = model(**ids[(i + turn) % 3], pixel_values=pixels)
            expected = both.logits_per_image[0, 0] / model.logit_scale.exp()
            assert found[i, column] == pytest.approx(float(expected), abs=1e-5)
    alike = cosines(joint_encoder(), drawn[:1], real[:1], captions[:1])
    assert np.isnan(alike).tolist() == [[False, False, True]]  # there is no other caption


@torch.no_grad()
def test_its_half_that_sees_is_an_extractor_of_the_embeddings_that_transformers_gives(folder):
    pictures = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (3, 40, 24, 3), dtype=np.uint8))
    extract = extractor("clip", resolution=24)
    x = bicubic(pictures.permute(0, 3, 1, 2).float(), 24) / 255
    pixels = (x - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    model = transformers.CLIPModel.from_pretrained(folder).eval()
    expected = model.visual_projection(model.vision_model(pixel_values=pixels).pooler_output)
    torch.testing.assert_close(extract(pictures), expected, rtol=1e-4, atol=1e-5)
    assert extract.identity == identity_of("clip", resolution=24, weights=folder)
    assert extract.identity.digest == joint_identity().digest
    with pytest.raises(
        ValueError, match=r"reads pictures of side 24, not 96: `--set evaluate\.extractor_resolution=24`"
    ):
        extractor("clip", resolution=96)


def test_a_report_holds_drawn_against_real_pictures_of_the_same_captions(emoji_folder, tiny_recipe, tmp_path, folder):
    recipe = tiny_recipe.model_copy(update={"train": reading(tiny_recipe.train, tokens=20, width=384)})
    run = make_run(emoji_folder, recipe, tmp_path / "store")
    plain = evaluate(run, recipe.evaluate, tmp_path / "store")
    assert load_report(plain.uri).agreement is None
    ref = evaluate(run, recipe.evaluate.model_copy(update={"joint": "clip"}), tmp_path / "store")
    found = load_report(ref.uri).agreement
    assert found.encoder == joint_identity()
    assert found.identity.samples == 16
    assert found.low < found.difference < found.high
    assert found.difference == pytest.approx(found.drawn - found.real, abs=1e-5)
    assert -1 < found.other < 1
    assert ref.metrics["caption_agreement"] == found.drawn
    assert "Agreement with captions" in Path(ref.uri, "report.md").read_text()


def test_a_folder_that_cannot_serve_is_told_about(folder, monkeypatch, tiny_recipe):
    (folder / "preprocessor_config.json").unlink()
    with pytest.raises(ValueError, match=r"preprocessor_config\.json cannot be read"):
        joint_encoder()
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "clip_text_model"}))
    line = tiny_recipe.model_copy(update={"evaluate": tiny_recipe.evaluate.model_copy(update={"joint": "clip"})})
    for look in (joint_identity, lambda: check_drawing(line)):  # before the line starts, too
        with pytest.raises(ValueError, match="not the whole of CLIP"):
            look()
    monkeypatch.delenv("DIFFUSION_JOINT_CLIP")
    for look in (joint_identity, lambda: check_drawing(line)):
        with pytest.raises(ValueError, match="set DIFFUSION_JOINT_CLIP to a folder"):
            look()
    check_drawing(tiny_recipe)  # which asks for none
    monkeypatch.setenv("DIFFUSION_JOINT_CLIP", str(folder / "none"))
    for look in (joint_identity, lambda: check_drawing(line)):
        with pytest.raises(ValueError, match=r"^DIFFUSION_JOINT_CLIP=.*none is no folder: set it to one with config"):
            look()


def test_an_extractor_that_cannot_serve_is_told_about_before_the_line_starts(tmp_path, monkeypatch, tiny_recipe):
    evaluate = tiny_recipe.evaluate.model_copy(update={"extractor": "dinov2"})
    line = tiny_recipe.model_copy(update={"evaluate": evaluate})
    monkeypatch.setenv("DIFFUSION_EXTRACTOR_DINOV2", str(tmp_path / "dinov2.pt"))
    with pytest.raises(ValueError, match="the extractor's weights cannot be read"):
        check_drawing(line)
