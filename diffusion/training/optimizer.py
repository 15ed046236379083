"""The optimizers of a run, as one."""

import torch
from torch import Tensor, nn

from diffusion.recipe import TrainRecipe
from diffusion.unet import Conv, UNet


class Optimizers:
    """Several optimizers that share the parameters of a network between them: one state, one list of groups, one step."""

    def __init__(self, parts: list[torch.optim.Optimizer]) -> None:
        self.parts = parts
        self.state = parts[0].state
        for part in parts[1:]:
            part.state = self.state  # a parameter belongs to one part, so they can share the dictionary
        self.param_groups = [group for part in parts for group in part.param_groups]

    def zero_grad(self) -> None:
        for part in self.parts:
            part.zero_grad(set_to_none=True)

    @torch.no_grad()
    def step(self, *, skip: Tensor | None = None) -> None:
        """Update the parameters.  skip: () bool on the device; where it is true no parameter changes, without a wait."""
        for part in self.parts:
            if skip is None:
                part.step()
            elif part.defaults.get("fused"):
                part.found_inf = skip.float()
                part.step()
            else:
                weights = [p for group in part.param_groups for p in group["params"]]
                before = [p.clone() for p in weights]
                part.step()
                for weight, old in zip(weights, before, strict=True):
                    torch.where(skip, old, weight, out=weight)


def optimizer_of(recipe: TrainRecipe, net: nn.Module) -> Optimizers:
    """AdamW, or Muon for the convolutions between the U-Net's stem and head and AdamW for all else.

    Muon orthogonalizes the momentum of each weight matrix; its step is scaled to the size of AdamW's, so that one learning
    rate serves both.  [Muon; Liu et al. 2025, Sec. 2.2]
    """
    matrices = hidden_matrices(net) if recipe.optimizer == "muon" else []
    taken = {id(parameter) for parameter in matrices}
    adamw = torch.optim.AdamW(
        [parameter for parameter in net.parameters() if id(parameter) not in taken],
        lr=recipe.lr,
        betas=(0.9, recipe.beta2),
        weight_decay=recipe.weight_decay,
        fused=True,
    )
    if not matrices:
        return Optimizers([adamw])
    muon = torch.optim.Muon(
        matrices, lr=recipe.lr, weight_decay=recipe.weight_decay, momentum=0.95, adjust_lr_fn="match_rms_adamw"
    )
    return Optimizers([adamw, muon])


def hidden_matrices(net: nn.Module) -> list[nn.Parameter]:
    """Weights of the convolutions inside the U-Nets of `net`."""
    return [
        conv.weight
        for unet in net.modules()
        if isinstance(unet, UNet)
        for conv in unet.modules()
        if isinstance(conv, Conv) and conv is not unet.stem and conv is not unet.head
    ]
