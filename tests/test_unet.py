import pytest
import torch
import torch.nn.functional as F

from diffusion.denoiser import Denoiser
from diffusion.training.optimizer import hidden_matrices
from diffusion.unet import UNet, attend, heads_of

SMALL = {"channels": 16, "multipliers": (1, 2), "blocks": (1, 1), "attention": (4,), "classes": 3}


def awake(**changes):
    """A small U-Net whose zero-initialized layers are not zero, so that everything in it matters."""
    net = UNet(**SMALL | {"resolution": 16, "stem": 2} | changes).eval()
    generator = torch.Generator().manual_seed(1)
    for parameter in net.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1, generator=generator)
    return net


def answer(net, x, c_noise=0.3, label=1, **conditions):
    with torch.no_grad():
        return net(x, torch.full((len(x),), c_noise), torch.full((len(x),), label), **conditions)


CONDITIONED = {"text_width": 8, "image_channels": 4}


def conditions(rows, tokens=3, seed=0):
    """Texts, the last row's one token short, and pictures beside 16 x 16 ones."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.ones(rows, tokens, dtype=torch.bool)
    mask[-1, -1] = False
    return {
        "text": torch.randn(rows, tokens, 8, generator=generator),
        "text_mask": mask,
        "image": torch.randn(rows, 4, 16, 16, generator=generator),
    }


@pytest.mark.parametrize("stem", [1, 2, 4])
@pytest.mark.parametrize("resolution", [16, 32])
def test_the_picture_keeps_its_shape(stem, resolution):
    x = torch.randn(2, 3, resolution, resolution)
    assert answer(awake(stem=stem, resolution=resolution), x).shape == x.shape


def test_it_starts_at_zero():
    net = UNet(**SMALL, resolution=16, stem=2)
    assert not answer(net, torch.randn(2, 3, 16, 16)).any()


def test_noise_level_label_and_picture_all_matter():
    net, x = awake(), torch.randn(2, 3, 16, 16)
    base = answer(net, x)
    for other in (answer(net, x, c_noise=-0.4), answer(net, x, label=3), answer(net, x + 0.1)):
        assert (other - base).abs().max() > 1e-3


def test_pictures_of_a_batch_do_not_see_each_other():
    net, x = awake(), torch.randn(4, 3, 16, 16)
    torch.testing.assert_close(answer(net, x)[:1], answer(net, x[:1]), rtol=1e-4, atol=1e-5)


def test_the_receptive_field_is_the_whole_picture():
    x = torch.zeros(1, 3, 16, 16)
    far = x.clone()
    far[..., 0, 0] = 1
    net = awake()
    assert (answer(net, far) - answer(net, x))[..., -1, -1].abs().max() > 0


def test_weights_are_a_function_of_the_seed_and_leave_the_global_generator_alone():
    torch.manual_seed(3)
    before = torch.get_rng_state()
    one, same, other = (UNet(**SMALL, resolution=16, stem=2, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), same.parameters(), strict=True))
    assert any(not torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize("multipliers", [(2, 1), (3, 3)])
def test_the_first_level_may_be_wider_than_the_stem(multipliers):
    x = torch.randn(1, 3, 16, 16)
    assert answer(awake(multipliers=multipliers), x).shape == x.shape


@pytest.mark.parametrize("channels", range(16, 513, 16))
def test_heads_divide_the_channels(channels):
    assert channels % heads_of(channels) == 0
    assert channels // heads_of(channels) >= min(channels, 32)
    assert heads_of(channels) == channels // 32 or channels % 32


def test_attention_is_torchs():
    q, k, v = (torch.randn(2, 3, n, 8, generator=torch.Generator().manual_seed(n)) for n in (5, 4, 4))
    allowed = torch.tensor([[True, False, True, True], [False, False, True, False]])
    for mask in (None, allowed):
        wide = None if mask is None else mask[:, None, None].expand(2, 3, 5, 4)
        expected = F.scaled_dot_product_attention(q, k, v, attn_mask=wide).transpose(1, 2).flatten(2)
        torch.testing.assert_close(attend(q, k, v, mask), expected)


@pytest.mark.parametrize("changes", [{"text_width": 8}, {"image_channels": 4}, CONDITIONED], ids=lambda c: "+".join(c))
def test_a_condition_changes_no_weight_and_at_first_no_answer(changes):
    """Bit for bit: what a run without it learned is where a run with it can start."""
    bare, conditioned = awake(), UNet(**SMALL, resolution=16, stem=2, **changes).eval()
    fresh = dict(UNet(**SMALL, resolution=16, stem=2).named_parameters())
    own = dict(conditioned.named_parameters())
    assert list(fresh) == [name for name in own if name in fresh]
    assert all(torch.equal(own[name], parameter) for name, parameter in fresh.items())
    missing, unexpected = conditioned.load_state_dict(bare.state_dict(), strict=False)
    assert missing
    assert not unexpected
    x, given = torch.randn(2, 3, 16, 16), conditions(2)
    if "text_width" not in changes:
        del given["text"], given["text_mask"]
    if "image_channels" not in changes:
        del given["image"]
    assert torch.equal(answer(conditioned, x, **given), answer(bare, x))
    assert torch.equal(answer(conditioned, x), answer(bare, x))


def test_every_token_and_every_channel_beside_matter():
    net, x, given = awake(**CONDITIONED), torch.randn(2, 3, 16, 16), conditions(2)
    base = answer(net, x, **given)
    for i in range(3):
        text = given["text"].clone()
        text[0, i] += torch.randn(8, generator=torch.Generator().manual_seed(i))
        assert (answer(net, x, **given | {"text": text}) - base)[0].abs().max() > 1e-4
    for i in range(4):
        image = given["image"].clone()
        image[:, i] += 1
        assert (answer(net, x, **given | {"image": image}) - base).abs().amax(dim=(1, 2, 3)).min() > 1e-3


def test_what_the_mask_hides_is_not_read():
    net, x, given = awake(**CONDITIONED), torch.randn(2, 3, 16, 16), conditions(2)
    hidden = given["text"].clone()
    hidden[1, 2] = 100.0
    assert torch.equal(answer(net, x, **given | {"text": hidden}), answer(net, x, **given))
    longer = F.pad(given["text"], (0, 0, 0, 5)), F.pad(given["text_mask"], (0, 5))
    padded = answer(net, x, text=longer[0], text_mask=longer[1], image=given["image"])
    torch.testing.assert_close(padded, answer(net, x, **given), rtol=1e-4, atol=1e-5)


def test_no_token_is_the_null_text_and_the_null_text_is_learned():
    net, x = awake(**CONDITIONED), torch.randn(2, 3, 16, 16)
    given = conditions(2) | {"text_mask": torch.tensor([[True, True, True], [False, False, False]])}
    del given["image"]
    some, none = answer(net, x, **given), answer(net, x)
    torch.testing.assert_close(some[1], none[1], rtol=1e-4, atol=1e-5)
    assert (some[0] - none[0]).abs().max() > 1e-3
    with torch.no_grad():
        net.null_text.add_(torch.randn(8, generator=torch.Generator().manual_seed(2)))
    assert torch.equal(answer(net, x, **given)[0], some[0])
    assert (answer(net, x) - none).abs().amax(dim=(1, 2, 3)).min() > 1e-3


def test_no_picture_beside_is_one_of_zeros():
    net, x = awake(**CONDITIONED), torch.randn(2, 3, 16, 16)
    assert torch.equal(answer(net, x), answer(net, x, image=torch.zeros(2, 4, 16, 16)))


def test_the_scale_of_the_token_embeddings_does_not_matter():
    net, x, given = awake(**CONDITIONED), torch.randn(2, 3, 16, 16), conditions(2)
    scaled = answer(net, x, **given | {"text": 30 * given["text"]})
    torch.testing.assert_close(scaled, answer(net, x, **given), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("given", [conditions(2), {}], ids=["conditions", "none"])
def test_every_parameter_has_a_gradient_with_conditions_and_without(given):
    """Data parallelism waits for all of them."""
    net = awake(**CONDITIONED)
    net(torch.randn(2, 3, 16, 16), torch.zeros(2), torch.tensor([0, 3]), **given).square().mean().backward()
    assert [name for name, p in net.named_parameters() if p.grad is None] == []


def test_the_denoiser_hands_conditions_on():
    denoise = Denoiser(awake(**CONDITIONED), sigma_data=0.5, precision="fp32")
    x, sigma, given = torch.randn(2, 3, 16, 16), torch.ones(2), conditions(2)
    with torch.no_grad():
        base = denoise(x, sigma, **given)
        for name in ("text", "image"):
            assert (denoise(x, sigma, **given | {name: -given[name]}) - base).abs().max() > 1e-3


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_recomputing_changes_no_bit(precision):
    """Of the answer and of every gradient, with dropout drawn twice and used once."""
    results = []
    for recompute in (False, True):
        net = awake(**CONDITIONED, dropout=0.3, blocks=(2, 1)).train()
        net.recompute = recompute
        calls = []
        net.down[0].blocks[1].register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        torch.manual_seed(4)
        x = torch.randn(2, 3, 16, 16)
        out = Denoiser(net, sigma_data=0.5, precision=precision)(
            x, torch.ones(2), torch.tensor([0, 3]), **conditions(2)
        )
        out.square().mean().backward()
        results.append((len(calls), [out.detach(), *(p.grad for p in net.parameters())]))
    (once, kept), (twice, recomputed) = results
    assert (once, twice) == (1, 2)
    assert all(torch.equal(a, b) for a, b in zip(kept, recomputed, strict=True))


def test_muon_takes_what_lies_between_and_not_what_reads_the_conditions():
    net = UNet(**SMALL, resolution=16, stem=2, **CONDITIONED)
    taken = {id(matrix) for matrix in hidden_matrices(net)}
    names = {name for name, p in net.named_parameters() if id(p) in taken}
    bare = UNet(**SMALL, resolution=16, stem=2)
    added = names - {name for name, _ in bare.named_parameters()}
    assert {name.split(".", 2)[2].split(".", 2)[2] for name in added} == {"q.weight", "out.weight"}
    assert len(names) - len(added) == len(hidden_matrices(bare))
    assert not any("image_stem" in name or ".kv." in name for name in names)


@pytest.mark.parametrize(
    ("changes", "given", "words"),
    [
        ({}, {"text": torch.zeros(2, 3, 8)}, "build it with `text_width`"),
        ({}, {"image": torch.zeros(2, 4, 16, 16)}, "build it with `image_channels`"),
        (CONDITIONED, {"text": torch.zeros(2, 3, 9)}, r"must be \(2, tokens, 8\)"),
        (CONDITIONED, {"text": torch.zeros(1, 3, 8)}, r"must be \(2, tokens, 8\)"),
        (CONDITIONED, {"text_mask": torch.ones(2, 3, dtype=torch.bool)}, "without text"),
        (CONDITIONED, {"text": torch.zeros(2, 3, 8), "text_mask": torch.ones(2, 3)}, "must be bool"),
        (CONDITIONED, {"text": torch.zeros(2, 3, 8), "text_mask": torch.ones(2, 4, dtype=torch.bool)}, "must be bool"),
        (CONDITIONED, {"image": torch.zeros(2, 4, 8, 8)}, r"must be \(2, 4, 16, 16\)"),
    ],
)
def test_conditions_that_do_not_fit_are_refused(changes, given, words):
    with pytest.raises(ValueError, match=words):
        answer(awake(**changes), torch.zeros(2, 3, 16, 16), **given)
