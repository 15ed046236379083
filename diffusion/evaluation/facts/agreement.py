"""Whether drawn pictures show what their captions say, as an encoder of both sees it, beside what real pictures show.

The cosine between the embeddings of picture and caption, of which CLIPScore is 2.5 times the positive part.
[Hessel et al. 2021]
"""

import math
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from diffusion.evaluation.extractors.features import Extractor, ExtractorIdentity
from diffusion.evaluation.gathered import Gathered
from diffusion.evaluation.identity import SampleIdentity, sample_identity
from diffusion.evaluation.metrics.intervals import CONFIDENCE, digits, half_width
from diffusion.recipe import Frozen
from diffusion.store.joint_encoders import JointEncoder, JointIdentity

if TYPE_CHECKING:
    from diffusion.evaluation.report.report import Report


class Agreement(Frozen):
    """Mean cosines of pictures and captions, and the interval of drawn less real, pair by pair."""

    identity: SampleIdentity
    encoder: JointIdentity
    drawn: float  # with their own captions
    real: float  # training pictures with these captions, which are theirs
    other: float | None  # drawn pictures with another's caption: what chance gives
    difference: float  # drawn - real
    standard_error: float
    confidence: float
    low: float
    high: float

    def metrics(self) -> dict[str, float | None]:
        """Name -> value, for a tracker."""
        found = {"caption_agreement": self.drawn, "caption_agreement_real": self.real}
        return found | {"caption_agreement_low": self.low, "caption_agreement_high": self.high}


def cosines(encoder: JointEncoder, drawn: list[np.ndarray], real: list[np.ndarray], captions: list[str]) -> np.ndarray:
    """(N, 3) float64: of drawn pictures and of real ones with their captions, and of drawn ones with the next one's caption,
    NaN where that is the same.  drawn, real: pictures uint8 (H, W, 3), of any sizes."""
    said = encoder.captions(captions).double()
    shown = [_embedded(encoder, pictures).double() for pictures in (drawn, real)]
    pairs = (shown[0], said), (shown[1], said), (shown[0], said.roll(-1, 0))
    found = torch.stack([(pictures * words).sum(dim=1) for pictures, words in pairs], dim=1).numpy()
    same = [one == two for one, two in zip(captions, captions[1:] + captions[:1], strict=True)]
    found[same, 2] = np.nan
    return found


def _embedded(encoder: JointEncoder, pictures: list[np.ndarray]) -> Tensor:
    """(N, E) float32 of norm 1, whatever the pictures' sizes."""
    facts = encoder.identity
    extract = Extractor(
        ExtractorIdentity(name=facts.name, digest=facts.digest, resolution=facts.resolution),
        encoder.network,
        encoder.device,
    )
    shapes = [picture.shape for picture in pictures]
    places = [[i for i, shape in enumerate(shapes) if shape == one] for one in sorted(set(shapes))]
    parts = [extract(torch.from_numpy(np.stack([pictures[i] for i in some]))) for some in places]
    order = torch.tensor([i for some in places for i in some]).argsort()
    return torch.nn.functional.normalize(torch.cat(parts)[order], dim=1)


def agreement_of(gathered: Gathered) -> Agreement | None:
    """None where the recipe asks for no encoder, the model reads no captions, or it gave no pictures."""
    if gathered.agreement is None:
        return None
    own, real, other = gathered.agreement.numpy().T
    apart, n = own - real, len(own)
    error = float(apart.std(ddof=1)) / math.sqrt(n)
    half = half_width(error, n - 1)
    known = other[np.isfinite(other)]
    return Agreement(
        identity=sample_identity(gathered, "agreement/1", samples=n, reference_pictures=n),
        encoder=gathered.setup.joint,
        drawn=digits(float(own.mean())),
        real=digits(float(real.mean())),
        other=digits(float(known.mean())) if len(known) else None,
        difference=digits(float(apart.mean())),
        standard_error=digits(error),
        confidence=CONFIDENCE,
        low=digits(float(apart.mean()) - half),
        high=digits(float(apart.mean()) + half),
    )


def agreement_words(report: "Report") -> list[str]:
    """For people; nothing where it was not measured."""
    found = report.agreement
    if found is None:
        return []
    rows = [
        "| pictures with captions | mean cosine |",
        "|---|---|",
        f"| **drawn, with their own** | **{found.drawn:.4g}** |",
        f"| training pictures, with theirs, which are the same | {found.real:.4g} |",
        f"| drawn, with another's | {'-' if found.other is None else f'{found.other:.4g}'} |",
    ]
    notes = (
        f"Higher is better, in the embeddings of {found.encoder.name} at {found.encoder.resolution} px. Drawn less real is"
        f" {found.difference:.3g}, {found.confidence:.0%} interval {found.low:.3g} to {found.high:.3g} over"
        f" {found.identity.samples:,} pairs of equal captions. The last row is what a model that does not read them gets."
    )
    return ["## Agreement with captions", "\n".join(rows), notes]
