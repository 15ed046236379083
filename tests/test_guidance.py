import pytest
import torch

from diffusion.guidance import Guidance, autoguided, by_model, classifier_free, conditioned
from diffusion.sampler import Query, ddim, heun, run
from diffusion.schedule import karras_sigmas

LABELS = {"label": torch.tensor([0, 1])}
NULL = {"label": torch.tensor([2, 2])}
SIGMAS = karras_sigmas(6, sigma_min=0.02, sigma_max=20.0)


def denoise(x, sigma, label):
    """A delta at a place that the label names."""
    return torch.tensor([-0.5, 0.5, 0.1])[label].view(-1, 1, 1, 1).expand_as(x)


def start():
    return torch.ones(2, 1, 2, 2) * 20


def test_conditioned_passes_the_condition_on():
    out = run(conditioned(heun(start(), SIGMAS), LABELS), denoise)
    torch.testing.assert_close(out[:, 0, 0, 0], torch.tensor([-0.5, 0.5]))


def test_guidance_extrapolates_from_the_null_answer():
    out = run(classifier_free(heun(start(), SIGMAS), LABELS, NULL, 3.0), denoise)
    torch.testing.assert_close(out[:, 0, 0, 0], 0.1 + 3 * (torch.tensor([-0.5, 0.5]) - 0.1))


def test_scale_one_is_no_guidance_and_costs_nothing():
    rows = []

    def counted(x, sigma, label):
        rows.append(len(x))
        return denoise(x, sigma, label)

    guided = run(classifier_free(ddim(start(), SIGMAS), LABELS, NULL, 1.0), counted)
    assert set(rows) == {2}
    assert torch.equal(guided, run(conditioned(ddim(start(), SIGMAS), LABELS), denoise))


@pytest.mark.parametrize("interval", [(0.0, 0.0), (0.5, 5.0)])
def test_outside_the_interval_only_the_conditional_answer_is_asked(interval):
    asked = []

    def counted(x, sigma, label):
        asked.append((float(sigma[0]), len(x)))
        return denoise(x, sigma, label)

    run(classifier_free(ddim(start(), SIGMAS), LABELS, NULL, 2.0, interval), counted)
    assert all(rows == (4 if interval[0] <= sigma <= interval[1] else 2) for sigma, rows in asked)


def test_conditions_of_the_inner_conversation_are_kept():
    def asking():
        answer = yield Query(torch.ones(2, 1, 2, 2), torch.ones(2), {"image": torch.tensor([3, 4])})
        return answer

    def denoise(x, sigma, image, label):
        seen.append((image.tolist(), label.tolist()))
        return x

    seen = []
    run(conditioned(asking(), LABELS), denoise)
    run(classifier_free(asking(), LABELS, NULL, 2.0), denoise)
    run(classifier_free(asking(), LABELS, NULL, 1.0), denoise)
    assert seen == [([3, 4], [0, 1]), ([3, 4, 3, 4], [0, 1, 2, 2]), ([3, 4], [0, 1])]


def test_conditions_of_other_names_are_refused():
    with pytest.raises(ValueError, match="same names"):
        run(classifier_free(ddim(start(), SIGMAS), LABELS, {}, 2.0), denoise)


def worse(x, sigma, label):
    return denoise(x, sigma, label) / 2


def test_autoguidance_extrapolates_from_the_worse_model():
    """Both under the picture's own label: D_worse + 3 (D - D_worse), D_worse = D / 2."""
    out = run(autoguided(heun(start(), SIGMAS), LABELS, 3.0), by_model(denoise, worse))
    torch.testing.assert_close(out[:, 0, 0, 0], 2 * torch.tensor([-0.5, 0.5]))


def test_autoguidance_is_the_same_by_two_separate_networks():
    """An independent version: the sampler's own queries, answered by the two models one after the other."""

    def both(x, sigma):
        strong, weak = (model(x, sigma, **LABELS) for model in (denoise, worse))
        return weak + 1.7 * (strong - weak) if 0.5 <= sigma[0] <= 5 else strong

    guided = run(autoguided(heun(start(), SIGMAS), LABELS, 1.7, (0.5, 5.0)), by_model(denoise, worse))
    assert torch.equal(guided, run(heun(start(), SIGMAS), both))


def test_autoguidance_needs_no_other_condition():
    def unconditional(x, sigma):
        return torch.full_like(x, 0.4)

    def none(x, sigma):
        return torch.zeros_like(x)

    out = run(autoguided(ddim(start(), SIGMAS), {}, 2.0), by_model(unconditional, none))
    torch.testing.assert_close(out, torch.full_like(out, 0.8))


def test_rows_of_many_conversations_reach_their_models_in_one_gathered_query():
    """As a driver of many gathers them: by concatenation, whatever model each row is addressed to."""
    calls = []

    def counted(factor):
        def answer(x, sigma, label):
            calls.append((factor, len(x), label.tolist()))
            return x * factor

        return answer

    queries = [next(autoguided(ddim(start() * k, SIGMAS), LABELS, 2.0)) for k in (1, 2)]
    gathered = [torch.cat([query[i] for query in queries]) for i in (0, 1)]
    cond = {name: torch.cat([query.cond[name] for query in queries]) for name in queries[0].cond}
    answers = by_model(counted(1.0), counted(-1.0))(*gathered, **cond)
    assert calls == [(1.0, 4, [0, 1, 0, 1]), (-1.0, 4, [0, 1, 0, 1])]
    sign = torch.tensor([1, 1, -1, -1] * 2).view(-1, 1, 1, 1)
    assert torch.equal(answers, gathered[0] * sign)


def test_a_model_that_is_not_there_is_refused():
    with pytest.raises(ValueError, match="there are 1"):
        run(autoguided(ddim(start(), SIGMAS), LABELS, 2.0), by_model(denoise))


@pytest.mark.parametrize("share", [0.0, 0.7, 1.0])
def test_rescaling_gives_the_guided_answer_the_contrast_of_the_wanted_one(share):
    """Of each picture, mixed in the share asked for.  [Lin et al. 2024, Sec. 3.4]"""
    generator = torch.Generator().manual_seed(0)
    wanted, unwanted = torch.randn(2, 5, 3, 8, 8, generator=generator, dtype=torch.float64)
    plain = Guidance(4.0).combine(wanted, unwanted)
    got = Guidance(4.0, rescale=share).combine(wanted, unwanted)
    for k in range(5):
        rescaled = plain[k] * wanted[k].std() / plain[k].std()
        torch.testing.assert_close(got[k], share * rescaled + (1 - share) * plain[k])
    assert plain.std() > 3 * wanted.std()


@pytest.mark.parametrize("guide", ["classifier_free", "autoguided"])
def test_both_guidances_rescale(guide):
    """The last answer is the picture: its contrast is the wanted answer's."""
    picture = torch.linspace(-1, 1, 16).view(1, 1, 4, 4)

    def strong(x, sigma, label):
        return picture * torch.tensor([0.5, 0.25, 0.1])[label].view(-1, 1, 1, 1)

    def weak(x, sigma, label):
        return strong(x, sigma, label) / 3

    x = torch.ones(2, 1, 4, 4) * 20
    if guide == "classifier_free":
        out = run(classifier_free(ddim(x, SIGMAS), LABELS, NULL, 5.0, rescale=1.0), strong)
    else:
        out = run(autoguided(ddim(x, SIGMAS), LABELS, 5.0, rescale=1.0), by_model(strong, weak))
    torch.testing.assert_close(out, strong(None, None, LABELS["label"]))


def test_rescaling_leaves_pictures_without_contrast_alone():
    flat = torch.ones(2, 1, 2, 2)
    assert torch.equal(Guidance(3.0, rescale=1.0).combine(flat, 0 * flat), 3 * flat)


@pytest.mark.parametrize(
    "setting", [{"rescale": -0.1}, {"rescale": 1.1}, {"interval": (2.0, 1.0)}, {"interval": (-1.0, 1.0)}]
)
def test_settings_out_of_range_are_refused(setting):
    with pytest.raises(ValueError, match=next(iter(setting))):
        run(classifier_free(ddim(start(), SIGMAS), LABELS, NULL, 2.0, **setting), denoise)
