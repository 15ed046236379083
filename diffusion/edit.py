"""Editing a reference picture: noise it and draw again, or carry it up to noise under one condition and down under another.

What must stay is kept by `restore.null_space` around any of these: `Mask` for the pixels outside a mask, `low_pass` for
the coarse look.
"""

from collections.abc import Callable

from torch import Tensor

from diffusion.operators import BlockMean
from diffusion.restore import null_space
from diffusion.sampler import Conversation, Query

# (x, sigmas) -> x at the last of them; a stochastic one has its noise
Solver = Callable[[Tensor, Tensor], Conversation]
Around = Callable[[Conversation], Conversation]  # puts a condition, guidance or a mask around a conversation


def check_strength(strength: float) -> None:
    """Raises ValueError."""
    if not 0 < strength <= 1:
        raise ValueError(f"strength={strength}: give a share above 0 and up to 1; 1 forgets the reference entirely")


def levels_of(sigmas: Tensor, strength: float) -> Tensor:
    """The last levels of the grid, the share `strength` of its steps, at least one.  1 is all of them."""
    check_strength(strength)
    steps = len(sigmas) - 1
    return sigmas[steps - max(1, round(strength * steps)) :]


def sdedit(solver: Solver, reference: Tensor, noise: Tensor, sigmas: Tensor, *, strength: float) -> Conversation:
    """Noise the reference to the level of this strength and draw on from there.  [Meng et al. 2022, "SDEdit", Alg. 1]

    With all steps to go nothing of the reference is used: the same noise gives the picture that it gives without one.
    """
    levels = levels_of(sigmas, strength)
    x = noise * levels[0].to(noise)
    return (yield from solver(x if len(levels) == len(sigmas) else reference + x, levels))


def invert(solver: Solver, reference: Tensor, sigmas: Tensor) -> Conversation:
    """x at sigmas[0] from which the deterministic equation leads to the reference, taken to be x at the last level above 0.

    Samplers go down only.  Seen from z = x / sigma at the level tau = 1 / sigma, up is down: dx/dsigma = (x - D) / sigma
    becomes dz/dtau = (z - E) / tau with E = (x - D) / sigma in D's place, so each sampler inverts with its own order.
    `ddim` becomes DDIM inversion, x' = x + (sigma' - sigma) E.  [DDIM, Sec. 5.4]
    """
    taus = 1 / sigmas[:-1].flip(0)
    conversation = solver(reference * taus[0].to(reference), taus)
    query = next(conversation)
    while True:
        tau = query.sigma.view(-1, *(1,) * (reference.dim() - 1))
        x = query.x / tau
        denoised = yield Query(x, 1 / query.sigma, query.cond)
        try:
            query = conversation.send((x - denoised) * tau)
        except StopIteration as done:
            return done.value / taus[-1].to(reference)


def by_condition(solver: Solver, reference: Tensor, sigmas: Tensor, *, before: Around, after: Around) -> Conversation:
    """Up under the condition that fits the reference, down under the one wanted.  [Mokady et al. 2023, Sec. 3]

    before, after: such as lambda c: conditioned(c, {"label": old}) and lambda c: classifier_free(c, {"label": new}, ...).
    Guidance on the way up would lead to noise that no guided way down leads back from, so it belongs to `after`.  Fewer
    levels, as of `levels_of`, change less; with one above 0 the reference is where the way up would end.
    """
    x = reference if len(sigmas) == 2 else (yield from before(invert(solver, reference, sigmas)))
    return (yield from after(solver(x, sigmas)))


def low_pass(conversation: Conversation, reference: Tensor, *, factor: int, until: float) -> Conversation:
    """The means of factor x factor blocks stay the reference's while sigma >= until.  [Choi et al. 2021, "ILVR", Alg. 1]

    ILVR's low-pass filter, down and up again, is A+ A of the block mean, so this is `null_space` with the reference's own
    measurement.  until = 0 keeps the means exactly; stopping earlier lets the picture leave the blocks.
    """
    blocks = BlockMean(factor)
    return null_space(conversation, blocks, blocks.forward(reference), (until, float("inf")))
