"""How shards are got at where a run is, apart from what is read."""

from diffusion.data.damage import MAX_DAMAGED
from diffusion.recipe import Frozen
from diffusion.store.cache import ShardCache


class Reading(Frozen):
    """How one installation reads datasets.  Changes no number, unless pictures are damaged."""

    copies: str | None = None  # folder for local copies of shards that are not in a local folder; none: no copies
    copies_mib: int = 20 * 1024
    ahead_mib: int = 512  # fetched before it is needed
    max_damaged: float = MAX_DAMAGED  # share of the training pictures that may be, before a run stops

    @property
    def cache(self) -> ShardCache | None:
        return ShardCache(self.copies, self.copies_mib * 2**20) if self.copies else None
