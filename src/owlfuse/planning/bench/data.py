"""`owlfuse bench data`: drawing positions, decoding pictures and the first batch, against what one
would use instead.

All read the same files, which are made for the purpose. Repeats are interleaved, so that a slow
minute of the machine does not fall on one of them; each number is the best of its repeats.
"""

from __future__ import annotations

import json
import random
import tempfile
import time
from bisect import bisect_right
from collections.abc import Callable
from itertools import accumulate
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import torch
from PIL import Image
from torch.utils.data import BatchSampler, WeightedRandomSampler
from torchvision.transforms.functional import pil_to_tensor

from owlfuse.core.progress import track
from owlfuse.data.datamodule import ChatData
from owlfuse.data.formats.alpaca import Alpaca
from owlfuse.data.formats.base import Source
from owlfuse.data.formats.llava import LLaVA
from owlfuse.data.loading import BLOCK, GlobalBatchSampler, MixtureDataset
from owlfuse.data.media.images import MAX_PIXELS, open_image
from owlfuse.data.mixture.mixture import Mixture
from owlfuse.data.shapes.text import train_tokenizer
from owlfuse.planning.bench.report import machine, print_table

WEIGHTS = {"chats": 0.65, "text": 0.35}
ROWS = {"chats": 40_000, "text": 20_000}
PICTURES, SIZE = 48, (640, 480)
MICRO = 32
"""Samples of a micro batch."""


def bench_data(
    out: Path, samples: int = 1_000_000, repeats: int = 5, rows: dict[str, int] = ROWS
) -> dict[str, Any]:
    """Prints the tables and writes data.json into `out`.

    Args:
        samples: positions drawn in each repeat, at least 1.
        rows: samples of the two files.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        sources = write_files(folder, rows)
        drawing, batching = drawers(folder, sources, samples), batchers(sources, samples)
        decoding = decoders(folder)
        found: dict[str, float] = {}
        # short, and close to each other
        once = [*drawing.items(), *batching.items()] + [*decoding.items()] * 4
        rounds = once * repeats
        for tool, run in track(rounds, "measuring", len(rounds)):
            found[tool] = max(found.get(tool, 0), pace(run))
        first = first_batch(folder, sources)
    drawn, batched, decoded = (
        {tool: found[tool] for tool in group} for group in (drawing, batching, decoding)
    )
    result = {
        "machine": machine(),
        "samples": samples,
        "rows": rows,
        "positions_per_second": drawn,
        "ratio_to_the_faster": drawn["owlfuse"]
        / max(value for tool, value in drawn.items() if tool != "owlfuse"),
        "micro_batch_positions_per_second": batched,
        "pictures_per_second_and_worker": decoded,
        "ratio_to_PIL": decoded["owlfuse, open_image"] / decoded["PIL, open and convert"],
        "seconds_to_first_batch": first,
    }
    out.mkdir(parents=True, exist_ok=True)
    (out / "data.json").write_text(json.dumps(result, indent=2) + "\n")
    print_paces(f"drawing positions of {sum(rows.values()):,} samples ({machine()})", drawn, 1)
    print_paces(f"positions to micro batches of {MICRO} (source, sample)", batched, 1)
    print_paces(f"decoding pictures of {SIZE[0]} x {SIZE[1]}, one worker", decoded, 2)
    print_table(
        "first batch, imports done",
        ["", "seconds"],
        [[tool, f"{value:.2f}"] for tool, value in first.items()],
    )
    print(f"data.json is in {out}")
    return result


def print_paces(title: str, paces: dict[str, float], digits: int) -> None:
    """How many a second each tool does, and how many times as many ours does, which is the
    first."""
    ours = next(iter(paces.values()))
    rows = [[tool, f"{value:,.0f}", f"{ours / value:.{digits}f}"] for tool, value in paces.items()]
    print_table(title, ["", "a second", "owlfuse : it"], rows)


def pace(run: Callable[[], int]) -> float:
    """How many a second, of what `run` says it did."""
    began = time.perf_counter()
    done = run()
    return done / (time.perf_counter() - began)


def write_files(folder: Path, rows: dict[str, int]) -> dict[str, Source]:
    """A LLaVA and an Alpaca file, pictures that look like photographs to a decoder, and a
    tokenizer."""
    rng = random.Random(0)
    noise = torch.Generator().manual_seed(0)
    for number in range(PICTURES):
        rough = torch.rand(1, 3, SIZE[1] // 8, SIZE[0] // 8, generator=noise)
        smooth = torch.nn.functional.interpolate(rough, SIZE[::-1], mode="bicubic")[0].permute(
            1, 2, 0
        )
        Image.fromarray((smooth.clamp(0, 1) * 255).byte().numpy()).save(
            folder / f"{number}.jpg", quality=90
        )
    words = [f"word{number}" for number in range(50)]
    texts = [" ".join(rng.choices(words, k=12)) for _ in range(64)]
    chats = [
        {
            "id": str(number),
            "image": f"{number % PICTURES}.jpg",
            "conversations": [
                {"from": "human", "value": f"<image>\n{texts[number % 64]}"},
                {"from": "gpt", "value": texts[number % 63]},
            ],
        }
        for number in range(rows["chats"])
    ]
    text = [
        {"instruction": texts[number % 64], "input": "", "output": texts[number % 61]}
        for number in range(rows["text"])
    ]
    (folder / "chats.json").write_text(json.dumps(chats))
    (folder / "text.json").write_text(json.dumps(text))
    train_tokenizer(chats[:64], text[:64]).save_pretrained(folder / "tokenizer")
    files = str(folder / "chats.json"), str(folder / "text.json")
    return {
        "chats": LLaVA(Path(files[0]), weight=WEIGHTS["chats"]),
        "text": Alpaca(Path(files[1]), weight=WEIGHTS["text"]),
    }


def drawers(folder: Path, sources: dict[str, Source], samples: int) -> dict[str, Callable[[], int]]:
    """What draws which sample comes next, files read: each from the making of its schedule to the
    last index. Ours in the blocks that `MixtureDataset` draws for training."""
    sizes = {name: len(source) for name, source in sources.items()}
    read = [
        datasets.Dataset.from_json(str(source.file), cache_dir=str(folder / "cache"))
        for source in sources.values()
    ]

    def owlfuse() -> int:
        mixture = Mixture(sizes, WEIGHTS, seed=0)
        for start in range(0, samples, BLOCK):
            mixture.positions(start, min(start + BLOCK, samples))
        return samples

    def interleave() -> int:
        return len(datasets.interleave_datasets(read, probabilities=list(WEIGHTS.values()), seed=0))

    def weighted() -> int:
        each = [WEIGHTS[name] / size for name, size in sizes.items() for _ in range(size)]
        return sum(1 for _ in WeightedRandomSampler(each, samples))

    return {
        "owlfuse": owlfuse,
        "datasets.interleave_datasets": interleave,
        "torch WeightedRandomSampler": weighted,
    }


def batchers(sources: dict[str, Source], samples: int) -> dict[str, Callable[[], int]]:
    """What gives a DataLoader's workers the samples of each micro batch, by source and number:
    in Python, one by one."""
    sizes = {name: len(source) for name, source in sources.items()}
    names, starts = list(sizes), [0, *accumulate(sizes.values())][:-1]

    def owlfuse() -> int:
        mixture = Mixture(sizes, WEIGHTS, seed=0)
        # `load` is never called
        dataset = MixtureDataset(mixture, sources, ChatData.load)  # type: ignore[arg-type]
        batches = GlobalBatchSampler(MICRO, 1, 0, 1, steps=samples // MICRO)
        return sum(len(dataset.draws(positions)) for positions in batches)

    def weighted() -> int:
        each = [WEIGHTS[name] / size for name, size in sizes.items() for _ in range(size)]
        batches = BatchSampler(WeightedRandomSampler(each, samples), MICRO, drop_last=True)
        found = (
            [(names[k := bisect_right(starts, i) - 1], i - starts[k]) for i in batch]
            for batch in batches
        )
        return sum(map(len, found))

    return {
        "owlfuse, sampler and dataset": owlfuse,
        "torch BatchSampler and ConcatDataset's lookup": weighted,
    }


def decoders(folder: Path) -> dict[str, Callable[[], int]]:
    """What opens every picture once, as RGB."""
    names = [f"{number}.jpg" for number in range(PICTURES)]

    def owlfuse() -> int:
        for name in names:
            open_image(folder, name, name, MAX_PIXELS)
        return len(names)

    def pil() -> int:
        for name in names:
            Image.open(folder / name).convert("RGB")
        return len(names)

    return {"owlfuse, open_image": owlfuse, "PIL, open and convert": pil}


class Crop:
    """Pixels of a picture's corner: as little preprocessing as there can be."""

    size = (224, 224)

    def __call__(self, picture: Image.Image) -> torch.Tensor:
        """(3, 224, 224) float32."""
        return pil_to_tensor(picture.crop((0, 0, 224, 224))).float()


def first_batch(folder: Path, sources: dict[str, Source]) -> dict[str, float]:
    """Seconds from the data node to the first batch of 32, files read anew, by the number of
    workers."""
    found = {}
    for workers in (0, 1, 2):
        began = time.perf_counter()
        again = {
            name: type(source)(source.file, weight=source.weight)
            for name, source in sources.items()
        }
        data = ChatData(str(folder / "tokenizer"), again, {}, workers=workers)
        data.bind(Crop(), 1)
        trainer: Any = SimpleNamespace(
            distributed_sampler_kwargs=None, max_steps=1000, global_step=0
        )
        data.trainer = trainer
        batches = iter(data.train_dataloader())
        next(batches)
        found[f"{workers} workers"] = time.perf_counter() - began
        del batches
    return found
