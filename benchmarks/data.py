"""Benchmark `data`: drawing positions, decoding pictures and the first batch, against what one
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
import pandas as pd
import torch
from PIL import Image
from torch.utils.data import BatchSampler, WeightedRandomSampler
from torchvision.transforms.functional import pil_to_tensor

from benchmarks.measure import write_report
from owlfuse.core.progress import track
from owlfuse.data.datamodule import ChatData
from owlfuse.data.formats.alpaca import Alpaca
from owlfuse.data.formats.base import Source
from owlfuse.data.formats.llava import LLaVA
from owlfuse.data.loading import BLOCK, GlobalBatchSampler, MixtureDataset
from owlfuse.data.media.images import MAX_PIXELS, open_image
from owlfuse.data.mixture.mixture import Mixture
from owlfuse.data.shapes.text import train_tokenizer

WEIGHTS = {"chats": 0.65, "text": 0.35}
ROWS = {"chats": 40_000, "text": 20_000}
PICTURES = 48
WIDTH, HEIGHT = 640, 480
MICRO = 32
"""Samples of a micro batch."""
DECODING_REPEATS = 4
"""Decodings are short: so many of them in each repeat."""
Runs = dict[str, Callable[[], int]]
"""By tool, what is measured: it returns how many of its things it did."""


def bench_data(
    out: Path, samples: int = 1_000_000, repeats: int = 5, rows: dict[str, int] = ROWS
) -> dict[str, Any]:
    """Prints the tables, and writes data.md and data.json into `out`.

    Args:
        samples: positions drawn in each repeat, at least 1.
        rows: samples of the two files.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        sources = write_files(folder, rows)
        drawing = drawers(folder, sources, samples)
        batching = batchers(sources, samples)
        decoding = decoders(folder)
        once = [*drawing.items(), *batching.items(), *list(decoding.items()) * DECODING_REPEATS]
        rounds = once * repeats
        rates: dict[str, float] = {}
        for tool, run in track(rounds, "measuring", len(rounds)):
            # The best of the repeats, see above.
            rates[tool] = max(rates.get(tool, 0), measure_rate(run))
        seconds = first_batch(folder, sources)
    drawing_rates = {tool: rates[tool] for tool in drawing}
    batching_rates = {tool: rates[tool] for tool in batching}
    decoding_rates = {tool: rates[tool] for tool in decoding}
    # Compared with the fastest, not with the one that is easiest to beat.
    fastest_peer = max(rate for tool, rate in drawing_rates.items() if tool != "owlfuse")
    result = {
        "samples": samples,
        "rows": rows,
        "positions_per_second": drawing_rates,
        "ratio_to_the_faster": rates["owlfuse"] / fastest_peer,
        "micro_batch_positions_per_second": batching_rates,
        "pictures_per_second_and_worker": decoding_rates,
        "ratio_to_PIL": rates["owlfuse, open_image"] / rates["PIL, open and convert"],
        "seconds_to_first_batch": seconds,
    }
    texts = [f"{value:.2f}" for value in seconds.values()]
    tables = {
        f"drawing positions of {sum(rows.values()):,} samples": rates_frame(drawing_rates, 1),
        f"positions to micro batches of {MICRO} (source, sample)": rates_frame(batching_rates, 1),
        f"decoding pictures of {WIDTH} x {HEIGHT}, one worker": rates_frame(decoding_rates, 2),
        "first batch, imports done": pd.DataFrame({"": list(seconds), "seconds": texts}),
    }
    return write_report(out, "data", result, tables)


def rates_frame(rates: dict[str, float], digits: int) -> pd.DataFrame:
    """Return how many a second each tool does, and how many times as many owlfuse does, which is
    the first."""
    owlfuse_rate = next(iter(rates.values()))
    return pd.DataFrame(
        {
            "": list(rates),
            "a second": [f"{rate:,.0f}" for rate in rates.values()],
            "owlfuse : it": [f"{owlfuse_rate / rate:.{digits}f}" for rate in rates.values()],
        }
    )


def measure_rate(run: Callable[[], int]) -> float:
    """Return how many a second, of what `run` returns."""
    began = time.perf_counter()
    count = run()
    return count / (time.perf_counter() - began)


def write_files(folder: Path, rows: dict[str, int]) -> dict[str, Source]:
    """Writes a LLaVA and an Alpaca file, pictures that look like photographs to a decoder, and a
    tokenizer."""
    generator = torch.Generator().manual_seed(0)
    # Smooth noise: JPEG compresses it as it does photographs.
    for number in range(PICTURES):
        coarse = torch.rand(1, 3, HEIGHT // 8, WIDTH // 8, generator=generator)
        smooth = torch.nn.functional.interpolate(coarse, (HEIGHT, WIDTH), mode="bicubic")[0]
        pixels = (smooth.permute(1, 2, 0).clamp(0, 1) * 255).byte().numpy()
        Image.fromarray(pixels).save(folder / f"{number}.jpg", quality=90)

    rng = random.Random(0)
    words = [f"word{number}" for number in range(50)]
    texts = [" ".join(rng.choices(words, k=12)) for _ in range(64)]
    chats = []
    for number in range(rows["chats"]):
        # 63 and 64 have no factor in common, so that questions meet many answers
        turns = [
            {"from": "human", "value": f"<image>\n{texts[number % 64]}"},
            {"from": "gpt", "value": texts[number % 63]},
        ]
        image = f"{number % PICTURES}.jpg"
        chats.append({"id": str(number), "image": image, "conversations": turns})
    instructions = []
    for number in range(rows["text"]):
        question, answer = texts[number % 64], texts[number % 61]
        instructions.append({"instruction": question, "input": "", "output": answer})
    (folder / "chats.json").write_text(json.dumps(chats))
    (folder / "text.json").write_text(json.dumps(instructions))
    # The texts repeat after 64: more of them would teach it nothing.
    tokenizer = train_tokenizer(chats[:64], instructions[:64])
    tokenizer.save_pretrained(folder / "tokenizer")
    return {
        "chats": LLaVA(folder / "chats.json", weight=WEIGHTS["chats"]),
        "text": Alpaca(folder / "text.json", weight=WEIGHTS["text"]),
    }


def sizes_of(sources: dict[str, Source]) -> dict[str, int]:
    """Return the samples of each source."""
    return {name: len(source) for name, source in sources.items()}


def weighted_sampler(sizes: dict[str, int], samples: int) -> WeightedRandomSampler:
    """Return torch's sampler of the mixture, over the samples of all sources in a row."""
    # One weight for each sample, as torch wants them: a list as long as the data.
    weights = []
    for name, size in sizes.items():
        weights += [WEIGHTS[name] / size] * size
    return WeightedRandomSampler(weights, samples)


def drawers(folder: Path, sources: dict[str, Source], samples: int) -> Runs:
    """Return what draws which sample comes next, files read: each from the making of its schedule
    to the last index. Ours in the blocks that `MixtureDataset` draws for training."""
    sizes = sizes_of(sources)
    cache = str(folder / "cache")
    # Read before the clock starts, as ours are.
    tables = []
    for source in sources.values():
        tables.append(datasets.Dataset.from_json(str(source.file), cache_dir=cache))

    def owlfuse() -> int:
        mixture = Mixture(sizes, WEIGHTS, seed=0)
        for start in range(0, samples, BLOCK):
            # Drawn and thrown away: what is measured is the drawing.
            mixture.positions(start, min(start + BLOCK, samples))
        return samples

    def interleave() -> int:
        weights = list(WEIGHTS.values())
        return len(datasets.interleave_datasets(tables, probabilities=weights, seed=0))

    def weighted() -> int:
        return sum(1 for _ in weighted_sampler(sizes, samples))

    return {
        "owlfuse": owlfuse,
        "datasets.interleave_datasets": interleave,
        "torch WeightedRandomSampler": weighted,
    }


def batchers(sources: dict[str, Source], samples: int) -> Runs:
    """Return what gives a DataLoader's workers the samples of each micro batch, by source and
    number: in Python, one by one."""
    sizes = sizes_of(sources)
    names = list(sizes)
    starts = [0, *accumulate(sizes.values())][:-1]

    def owlfuse() -> int:
        mixture = Mixture(sizes, WEIGHTS, seed=0)
        # `load` is never called
        dataset = MixtureDataset(mixture, sources, ChatData.load)  # type: ignore[arg-type]
        batches = GlobalBatchSampler(MICRO, 1, 0, 1, steps=samples // MICRO)
        return sum(len(dataset.draws(positions)) for positions in batches)

    def weighted() -> int:
        count = 0
        for batch in BatchSampler(weighted_sampler(sizes, samples), MICRO, drop_last=True):
            # A DataLoader's ConcatDataset looks each sample up like this.
            draws = []
            for index in batch:
                source = bisect_right(starts, index) - 1
                draws.append((names[source], index - starts[source]))
            count += len(draws)
        return count

    return {
        "owlfuse, sampler and dataset": owlfuse,
        "torch BatchSampler and ConcatDataset's lookup": weighted,
    }


def decoders(folder: Path) -> Runs:
    """Return what opens every picture once, as RGB."""
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
    resize = "crop"

    def __call__(self, picture: Image.Image) -> torch.Tensor:
        """Return pixels (3, 224, 224) in float32."""
        return pil_to_tensor(picture.crop((0, 0, 224, 224))).float()


def first_batch(folder: Path, sources: dict[str, Source]) -> dict[str, float]:
    """Return the seconds from the data node to the first batch of 32, files read again, by the
    number of workers."""
    seconds = {}
    for workers in (0, 1, 2):
        began = time.perf_counter()
        unread = {}
        for name, source in sources.items():
            unread[name] = type(source)(source.file, weight=source.weight)
        data = ChatData(str(folder / "tokenizer"), unread, {}, workers=workers)
        data.bind(Crop(), 1)
        # All that the data ask of a trainer: there is no model to train.
        trainer: Any = SimpleNamespace(
            distributed_sampler_kwargs=None, max_steps=1000, global_step=0
        )
        data.trainer = trainer
        batches = iter(data.train_dataloader())
        next(batches)
        seconds[f"{workers} workers"] = time.perf_counter() - began
        del batches  # ends the workers
    return seconds
