"""One worker of an evaluation: loads the model, does tasks, returns arrays.  Knows nothing of the other workers."""

import time
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from diffusion.codec import drawn
from diffusion.data import manifest
from diffusion.data.images import to_model, to_uint8
from diffusion.data.pictures.buckets import Size
from diffusion.data.pictures.buckets import shown as size_shown
from diffusion.data.reader import ShardReader
from diffusion.evaluation.extractors.features import Extractor, extractor
from diffusion.evaluation.facts.agreement import cosines
from diffusion.evaluation.facts.bound import held_out_bound
from diffusion.evaluation.facts.held_out import held_out_loss
from diffusion.evaluation.gathered import Result, Setup
from diffusion.evaluation.metrics.memorization import THUMBNAIL, shrink, small_copy
from diffusion.evaluation.plan import Draw, Task, evenly
from diffusion.evaluation.restoration import SHOWN, case_of, fidelity, restored
from diffusion.guidance import Cond
from diffusion.serving.engine import Engine
from diffusion.serving.job import together
from diffusion.serving.ladder import NotReproducible
from diffusion.serving.request import GenerateRequest, ResolvedRequest, prompt_of, resolve
from diffusion.serving.ticket import DrawingFailed
from diffusion.store.bundle import load_bundle
from diffusion.store.joint_encoders import JointEncoder, joint_encoder
from diffusion.threads import one_thread


class Worker:
    """Does tasks.  Draws with the engine that serves, so with the bytes that are served."""

    def __init__(self, setup: Setup) -> None:
        self.setup = setup
        self.bundle = load_bundle(setup.bundle_uri, setup.device, digest=setup.bundle_digest)
        self._engine: Engine | None = None
        self._extractor: Extractor | None = None
        self._joint: JointEncoder | None = None
        self._readers: dict[tuple[str, bool], ShardReader] = {}

    def __call__(self, task: Task) -> Result:
        """loss: {"loss", "zero"} float64 (N,) and {"label"}.  bound: see `held_out_bound`.  restore: see
        `restoration.fidelity`, and of the shown ones {"picture-0", ...}: given, restored, true.  real: {"features"} float32
        (N, D), {"small"} uint8 (N, SIDE, SIDE, 3).  draw: {"features"} and {"thumbnails"} uint8 (N, THUMBNAIL, THUMBNAIL, 3)
        of the measured pictures, and {"picture-0", ...} uint8 (H, W, 3), the shown ones."""
        with one_thread():
            if task.kind == "loss":
                return Result(task.number, self._loss(task.level))
            if task.kind == "bound":
                return Result(task.number, self._bound(task.indices))
            if task.kind == "real":
                return Result(task.number, self._real(task.split, np.array(task.indices)))
            try:
                return self._drawn(task) if task.kind == "draw" else Result(task.number, self._restored(task))
            except (DrawingFailed, NotReproducible) as error:
                return Result(task.number, {}, str(error))

    def _reader(self, split: manifest.Split, *, latents: bool = False) -> ShardReader:
        """latents: as the model is given them, where it draws these, and not as one looks at them."""
        if (split, latents) not in self._readers:
            setup = self.setup
            # damage is an error here: a metric is of the very pictures of its reference
            self._readers[split, latents] = ShardReader(
                setup.dataset_uri,
                split,
                digest=setup.dataset_digest,
                cache_mib=0,
                shards=setup.reading.cache,
                codec=self.bundle.codec if latents else None,
            )
        return self._readers[split, latents]

    def _loss(self, level: int) -> dict[str, np.ndarray]:
        recipe, device = self.setup.recipe, self.setup.device
        groups = (
            (
                picture,
                held_out_loss(self.bundle.denoiser, x0, cond, picture, level=level, recipe=recipe, device=device)
                | {"label": cond["label"].numpy()},
            )
            for picture, x0, cond in self._held_out(recipe.loss_pictures)
        )
        return _in_order(groups)

    def _bound(self, indices: Sequence[int]) -> dict[str, np.ndarray]:
        recipe, device = self.setup.recipe, self.setup.device
        total, groups = min(len(self._reader("holdout", latents=True)), recipe.loss_pictures), []
        for picture, x0, cond in self._held_out(recipe.loss_pictures, indices):
            operands = (self.bundle.denoiser, x0, cond, picture)
            groups.append((picture, held_out_bound(*operands, pictures=total, recipe=recipe, device=device)))
        return _in_order(groups)

    def _held_out(self, count: int, indices: Sequence[int] | None = None) -> Iterator[tuple[Tensor, Tensor, Cond]]:
        """The held-out pictures that are measured, those of one size at a time: their numbers (N,), the pictures as the
        network sees them, (N, C, H, W), and the condition of each.  count: how many are measured, evenly spaced.  indices:
        of which numbers; None for all."""
        reader = self._reader("holdout", latents=True)
        chosen = np.array(evenly(len(reader), count))
        own = np.arange(len(chosen)) if indices is None else np.array(indices)
        for places in reader.by_size(chosen[own]):
            pictures, numbers = reader.gather(chosen[own[places]]), torch.from_numpy(own[places])
            cond = {"label": torch.from_numpy(pictures.label)}
            if self.bundle.encoder is not None:
                cond |= self.bundle.encoder(pictures.texts)._asdict()
            if reader.latents is None:
                x0 = to_model(torch.from_numpy(pictures.images))
            else:
                reader.latents.complete(pictures.images, pictures.latents, pictures.known)
                x0 = drawn(torch.from_numpy(pictures.latents), seed=self.setup.recipe.seed, index=numbers)
            yield numbers, x0, cond

    def _restored(self, task: Task) -> dict[str, np.ndarray]:
        """Pictures of the held-out split, measured and restored."""
        recipe, groups, shown = self.setup.recipe, [], {}
        for picture, x0, cond in self._held_out(recipe.restoration_pictures, task.indices):
            case = case_of(task.case, tuple(x0.shape[2:]))
            made = restored(self._drawing(), case, x0, cond, picture, seed=recipe.seed)
            groups.append((picture, fidelity(case, made, x0, self._features)))
            views = [to_uint8(view.nan_to_num().cpu()).numpy() for view in (made["given"], made["restored"], x0)]
            shown |= {number: [view[row] for view in views] for row, number in enumerate(picture.tolist())}
        flat = [view for number in sorted(shown) if number < SHOWN for view in shown[number]]
        return _in_order(groups) | {f"picture-{i}": view for i, view in enumerate(flat)}

    def _real(self, split: manifest.Split, pictures: np.ndarray) -> dict[str, np.ndarray]:
        """Pictures of a split as they are compared with drawn ones."""
        reader = self._reader(split)
        groups = ((places, reader.gather(pictures[places]).images) for places in reader.by_size(pictures))
        return _in_order(
            (places, {"features": self._features(images), "small": small_copy(torch.from_numpy(images)).numpy()})
            for places, images in groups
        )

    def _drawn(self, task: Task) -> Result:
        how = task.setting.model_dump(exclude={"ema"}) if task.setting else {}
        requests = [
            GenerateRequest(
                label=self.bundle.spec.classes[draw.label],
                prompt=self._prompt(draw),
                size=self._size(draw),
                seed=draw.seed,
                **how,
            )
            for draw in task.draws
        ]
        engine, started = self._drawing(), time.perf_counter()
        pictures = self._alike(engine, [resolve(request, self.bundle.spec) for request in requests])
        seconds = time.perf_counter() - started
        drawn = list(zip(task.draws, pictures, strict=True))
        groups: dict[tuple[int, ...], list[int]] = {}  # shape -> places among the measured
        measured = [picture for draw, picture in drawn if draw.measured]
        for place, picture in enumerate(measured):
            groups.setdefault(picture.shape, []).append(place)
        arrays = _in_order(
            (places, self.measured(np.stack([measured[i] for i in places]))) for places in groups.values()
        )
        arrays |= self._agreement([(draw, picture) for draw, picture in drawn if draw.measured])
        shown = (picture for draw, picture in drawn if draw.shown)
        named = {f"picture-{i}": picture for i, picture in enumerate(shown)}
        return Result(task.number, arrays | named, seconds=seconds)

    def _alike(self, engine: Engine, requests: list[ResolvedRequest]) -> list[np.ndarray]:
        """One picture of each request, those of one size drawn together."""
        groups: dict[Size | None, list[int]] = {}
        for place, request in enumerate(requests):
            groups.setdefault(request.size, []).append(place)
        jobs = [together([requests[i] for i in places], self.bundle, engine.device) for places in groups.values()]
        drawn = [ticket.future.result() for ticket in engine.draw(jobs)]
        order = [i for places in groups.values() for i in places]
        return [picture for _, picture in sorted(zip(order, chain(*drawn), strict=True), key=lambda pair: pair[0])]

    def measured(self, pictures: np.ndarray) -> dict[str, np.ndarray]:
        """What is known of drawn pictures of one size, uint8 (N, H, W, 3)."""
        return {
            "features": self._features(pictures),
            "thumbnails": shrink(torch.from_numpy(pictures), THUMBNAIL).numpy(),
        }

    def _agreement(self, drawn: list[tuple[Draw, np.ndarray]]) -> dict[str, np.ndarray]:
        """{"agreement"} of drawn pictures with their captions, where that is asked for and the model reads captions."""
        wanted = self.setup.joint
        if wanted is None or self.bundle.encoder is None or not drawn:
            return {}
        if self._joint is None:
            self._joint = joint_encoder(self.setup.device)
            if self._joint.identity != wanted:
                raise ValueError(
                    f"{wanted} where the evaluation was started, {self._joint.identity} here: give all the same"
                )
        real = [self._reader("train").read(draw.like) for draw, _ in drawn]
        captions = [one.caption for one in real]
        pictures = [picture for _, picture in drawn], [one.image for one in real]
        return {"agreement": cosines(self._joint, *pictures, captions)}

    def _drawing(self) -> Engine:
        if self._engine is None:
            self._engine = Engine(self.bundle, slots=self.setup.recipe.batch_size)
        return self._engine

    def _prompt(self, draw: Draw) -> str | None:
        if draw.like is None or self.bundle.encoder is None:
            return None
        return prompt_of(self._reader("train").read(draw.like).caption)

    def _size(self, draw: Draw) -> str | None:
        if draw.like is None or not self.bundle.spec.sizes:
            return None
        reader = self._reader("train")
        return size_shown(reader.sizes[int(reader.shards_of(np.array(draw.like)))])

    def _features(self, pictures: np.ndarray) -> np.ndarray:
        """Features of pictures of one size, uint8 (N, H, W, 3)."""
        if self._extractor is None:
            wanted, weights = self.setup.extractor, self.setup.weights
            path = Path(weights) if weights else None
            self._extractor = extractor(
                wanted.name, resolution=wanted.resolution, weights=path, device=self.setup.device
            )
            if self._extractor.identity != wanted:
                raise ValueError(
                    f"{weights}: sha256 {self._extractor.identity.digest[:12]} here, {wanted.digest[:12]} where the"
                    f" evaluation was started: give all machines the same file"
                )
        return self._extractor(torch.from_numpy(np.ascontiguousarray(pictures))).numpy()


def _in_order(groups: Iterable[tuple[Sequence[int] | Tensor, dict[str, np.ndarray]]]) -> dict[str, np.ndarray]:
    """What was computed of each group of pictures, put together in the order of their numbers; {} of none."""
    numbers, parts = [], []
    for own, arrays in groups:
        numbers.append(np.asarray(own))
        parts.append(arrays)
    order = np.concatenate([np.empty(0, np.int64), *numbers]).argsort()
    return {name: np.concatenate([part[name] for part in parts])[order] for name in (parts[0] if parts else ())}
