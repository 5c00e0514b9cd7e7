"""Sources, mixture, encoder and collator as Lightning's DataModule."""

from __future__ import annotations

import itertools
import logging
import random
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, Literal

import lightning
from torch.utils.data import DataLoader, Dataset

from owlfuse.core.errors import DataError
from owlfuse.core.types import Batch, Encoded, Message, Sample
from owlfuse.data.chat.encoder import ChatEncoder
from owlfuse.data.chat.tokenizer import chat_tokenizer
from owlfuse.data.chat.truncation import OnLength, check_policies, policy_of
from owlfuse.data.collate import Collator
from owlfuse.data.formats.base import Source
from owlfuse.data.loading import (
    GlobalBatchSampler,
    MixtureDataset,
    SourceDataset,
    batches_of_rank,
    load_or_skip,
)
from owlfuse.data.media.images import MAX_PIXELS, check_max_pixels
from owlfuse.data.media.pictures import Pictures, Preprocess
from owlfuse.data.media.tiles import check_tiled
from owlfuse.data.media.video import VideoSampling
from owlfuse.data.mixture.lengths import Lengths, count_lengths
from owlfuse.data.mixture.mixture import make_mixture
from owlfuse.data.mixture.positions import StepPositions
from owlfuse.data.mixture.report import mixture_report, validation_report
from owlfuse.data.notes import BatchRemarks, NoteCounts, NotesLog
from owlfuse.data.packing import Padding, check_pack_to
from owlfuse.data.workers import DataWorkers, ignore_signals

log = logging.getLogger(__name__)

# Records of a source that show whether texts begin on a new line behind pictures.
FIRST_RECORDS = 16
VALIDATION_BATCH = 32
"""Most samples of a batch of a validation."""


class ChatData(lightning.LightningDataModule):
    """Mixes sources into global batches that are the same for any number of ranks and workers.

    Args:
        tokenizer: a folder or a hub name.
        sources: the sources of training, by name.
        validation: the sources of evaluation, by name. Results of `a_b` are shown beside those of
            `a` (see `evaluation`).
        global_batch_size: samples of one optimizer step, over all ranks and accumulation steps.
        micro_batch_size: samples that one rank takes at a time; by default the global batch over
            the ranks.
        workers: processes that load data; 0 loads in the training process.
        max_length: in tokens, of a sample.
        pack_to: the samples of a micro batch share rows of at most so many tokens in training;
            None: a row is one sample.
        on_length: the policy for a longer sample, for all sources or by source (see
            `data.chat.truncation`).
        chat_template: a template's name (see `data/chat/templates`) or a .jinja file, which
            replaces the tokenizer's own.
        max_pixels: of a picture; one with more is refused before it is decoded.
        seed: of the order in which samples are drawn, and of which pictures are tiled.
        validation_samples: how many samples of each validation source are evaluated during
            training.
        prepare: called before anything is read; it writes generated data.
        folder: of the data, for the other keys of a yaml to refer to.
        video: how frames of videos are chosen for sources without a setting of their own, the keys
            of a `VideoSampling`.
        weights_by: whether shares are of samples or of supervised tokens. Tokens are counted once
            (see `mixture.lengths`), and a source's weight is divided by the mean of its samples.
        thinking: whether the model is asked for a thought before the answer, where the chat
            template knows of thoughts; an answer is scored without it.
        temperature, at_end, weights_at: see `make_mixture`; `weights_at` counts in optimizer steps.

    Raises:
        ValueError: a number that cannot be.
    """

    def __init__(
        self,
        tokenizer: str,
        sources: dict[str, Source],
        validation: dict[str, Source],
        global_batch_size: int = 32,
        micro_batch_size: int | None = None,
        workers: int = 1,
        max_length: int = 2048,
        max_pixels: int = MAX_PIXELS,
        validation_samples: int = 128,
        seed: int = 0,
        prepare: Callable[[], None] | None = None,
        folder: str | None = None,
        pack_to: int | None = None,
        on_length: OnLength | dict[str, OnLength] = "error",
        chat_template: str | None = None,
        video: VideoSampling | dict[str, Any] | None = None,
        weights_by: Literal["samples", "tokens"] = "samples",
        temperature: float | None = None,
        at_end: str | dict[str, str] = "repeat",
        weights_at: dict[int, dict[str, float]] | None = None,
        thinking: bool = False,
    ) -> None:
        super().__init__()
        check_least(
            1,
            global_batch_size=global_batch_size,
            micro_batch_size=micro_batch_size,
            max_length=max_length,
        )
        check_least(0, workers=workers, validation_samples=validation_samples)
        self.max_pixels = check_max_pixels(max_pixels, "data.max_pixels")
        # Before any source opens its file.
        if prepare is not None:
            prepare()
        for name, source in (*sources.items(), *validation.items()):
            source.name = name
        self.sources = sources
        self.validation = validation
        # dictionaries in the place of sets, for their order
        self.validation_skipped: dict[tuple[str, str, str], None] = {}
        self.validation_truncated: dict[tuple[str, str, int], None] = {}
        self.notes = NotesLog()
        self.global_batch_size = global_batch_size
        self.micro_batch_size = micro_batch_size
        self.workers = workers
        self.data_workers = DataWorkers()
        self.max_length = max_length
        self.pack_to = check_pack_to(pack_to, max_length)
        self.video = VideoSampling.of(video or {})
        self.seed = seed
        self.validation_samples = validation_samples
        if weights_by not in ("samples", "tokens"):
            raise ValueError(f"weights_by is {weights_by}, expected samples or tokens")
        self.weights_by = weights_by
        check_policies(on_length, [*sources, *validation])
        for name in validation:
            other = name.removesuffix("_blank")
            if other != name and other in validation:
                raise DataError(
                    f"validation source {name}: its metrics would have the names of those of "
                    f"{other} with blank pictures; choose another name"
                )
        self.on_length = on_length
        self.tokenizer = chat_tokenizer(
            tokenizer, chat_template, break_behind_images(sources.values())
        )
        self.thinking = thinking
        self.step_positions = StepPositions.of(global_batch_size)
        self.token_counts: dict[str, Lengths] | None = None
        self.make_mixture = partial(
            make_mixture,
            sources,
            seed,
            weights_at=weights_at,
            at_end=at_end,
            temperature=temperature,
        )
        # Shares of tokens need the encoder, which `bind` makes.
        if weights_by == "samples":
            self.mixture = self.make_mixture(self.step_positions)

    def go_on(self, step: int, before: StepPositions) -> None:
        """Make the mixture of a run that goes on at a step, whose global batches were of other
        sizes until there. Call it before `bind`."""
        self.step_positions = before.changed(step, self.global_batch_size)
        if self.weights_by == "samples":
            self.mixture = self.make_mixture(self.step_positions)

    def bind(self, preprocess: Preprocess, tokens_per_image: int) -> None:
        """Set what only the model knows: how pictures become pixels, and how many positions an
        image takes.

        Raises:
            ConfigError: a source has tiles, and pictures are not stretched.
        """
        # Here the tiles of the data and the resizing of the model first meet.
        for source in (*self.sources.values(), *self.validation.values()):
            if source.tile:
                check_tiled(preprocess.resize)
        self.encoder = ChatEncoder(self.tokenizer, tokens_per_image, self.max_length, self.thinking)
        self.pictures = Pictures(preprocess, self.max_pixels, self.seed, self.video)
        # The positions of an image, and so all lengths, are another model's.
        self.token_counts = None
        if self.weights_by == "tokens":
            self.mixture = self.make_mixture(self.step_positions, lengths=self.lengths())
        self.image_shape = (3, *preprocess.size)

    def lengths(self) -> dict[str, Lengths]:
        """Return the token counts of each source, from their cache or by encoding all samples."""
        if self.token_counts is None:
            counts = {}
            for name, source in self.sources.items():
                policy = policy_of(self.on_length, name)
                counts[name] = count_lengths(source, self.encoder, self.pictures, on_length=policy)
            self.token_counts = counts
        return self.token_counts

    @property
    def vocab_size(self) -> int:
        """The number of the tokenizer's ids."""
        return len(self.tokenizer)

    def accumulation(self, ranks: int) -> int:
        """Return the micro batches per optimizer step and rank.

        Raises:
            ValueError: a global batch that the ranks and micro batches do not divide.
        """
        # At least 1: too small a global batch is refused below, with the numbers that say why.
        micro = self.micro_batch_size or max(1, self.global_batch_size // ranks)
        if self.global_batch_size % (micro * ranks):
            raise ValueError(
                f"global_batch_size is {self.global_batch_size}, which {ranks} ranks of "
                f"micro_batch_size {micro} do not divide"
            )
        return self.global_batch_size // (micro * ranks)

    def steps(self, max_steps: int) -> int:
        """Return the optimizer steps of a run: `max_steps`, or as many whole global batches as the
        schedule has. Raises DataError."""
        positions = self.mixture.available(self.step_positions.position(max_steps))
        # Rounded down, since no incomplete global batch is taken.
        steps = int(self.step_positions.step(positions))
        if steps == 0:
            raise DataError(
                f"the schedule has {positions} samples and then ends (at_end); a global batch "
                f"takes {self.global_batch_size}"
            )
        return steps

    def train_dataloader(self) -> DataLoader:
        """Return the batches from the trainer's step on, so that a resumed run goes on where it
        was."""
        trainer = self.trainer
        assert trainer is not None
        # Lightning's, and not torch's: ranks of one tensor-parallel group share their rows.
        ranks = trainer.distributed_sampler_kwargs or {"rank": 0, "num_replicas": 1}
        sampler = GlobalBatchSampler(
            self.global_batch_size,
            self.accumulation(ranks["num_replicas"]),
            ranks["rank"],
            ranks["num_replicas"],
            steps=trainer.max_steps,
            first_step=trainer.global_step,
            first_position=self.step_positions.position(trainer.global_step),
        )
        dataset = MixtureDataset(self.mixture, self.sources, self.load)
        return self.loader(
            dataset,
            self.pack_to,
            batch_sampler=sampler,
            num_workers=self.workers,
            # A run is one epoch, but validation would start the workers again.
            persistent_workers=self.workers > 0,
            multiprocessing_context=self.data_workers.context if self.workers else None,
        )

    def val_dataloader(self) -> dict[str, DataLoader]:
        """Return a loader for each validation source, of this rank's batches of the same samples at
        every step."""
        trainer = self.trainer
        assert trainer is not None
        # Lightning's, as in `train_dataloader`.
        ranks = trainer.distributed_sampler_kwargs or {"rank": 0, "num_replicas": 1}
        loaders = {}
        for name in self.validation:
            loaders[name] = self.validation_loader(
                name,
                self.validation_samples,
                # as little memory as training takes
                min(VALIDATION_BATCH, self.micro_batch_size or VALIDATION_BATCH),
                rank=ranks["rank"],
                ranks=ranks["num_replicas"],
            )
        return loaders

    def validation_loader(
        self,
        name: str,
        limit: int | None = None,
        batch_size: int = VALIDATION_BATCH,
        rank: int = 0,
        ranks: int = 1,
    ) -> DataLoader:
        """Return a loader of one validation source in its own order; with a limit, of a seeded
        sample of it. Of several ranks it has those batches that are this rank's."""
        source = self.validation[name]
        indices: Sequence[int] = range(len(source))
        # A random sample, since the first ones may all be of one kind.
        if limit is not None and limit < len(source):
            # By a fixed seed, so that runs of other seeds are compared on the same samples.
            indices = sorted(random.Random(0).sample(indices, limit))
        dataset = SourceDataset(source, indices, self.load)
        # Whole batches are dealt out, so that each has the rows that it has in one process.
        batches = batches_of_rank(len(indices), batch_size, rank, ranks)
        return self.loader(dataset, batch_sampler=batches)

    def validation_batch(self, name: str, indices: Sequence[int]) -> Batch:
        """Return the samples of one validation source at some indices, a row each. Raises
        DataError."""
        source = self.validation[name]
        items = [load_or_skip(self.load, source, index) for index in indices]
        return self.collator()(items)

    def loader(self, dataset: Dataset, pack_to: int | None = None, **options: Any) -> DataLoader:
        """Return a DataLoader of batches, a row to each sample unless they are packed."""
        collate = self.collator(pack_to=pack_to)
        return DataLoader(dataset, collate_fn=collate, worker_init_fn=ignore_signals, **options)

    def collator(self, **options: Any) -> Collator:
        """Return what makes a batch of samples, with some options of a Collator."""
        return Collator(self.encoder.pad_id, self.image_shape, **options)

    def load(self, sample: Sample, source: Source, prompt: bool = False) -> Encoded:
        """Return a sample of a source encoded, its pictures opened and preprocessed. Raises
        DataError."""
        # First, since only pictures and videos say how many views a placeholder stands for.
        views = self.pictures(sample, source)
        counts = [len(pixels) for pixels in views]
        if prompt:
            encoded = self.encoder.encode_prompt(sample, counts)
        else:
            policy = policy_of(self.on_length, sample.source)
            encoded = self.encoder.encode(sample, counts, policy)
        pixel_values = list(itertools.chain(*views))
        # Truncation may have removed the last pictures.
        encoded.pixel_values = pixel_values[: len(encoded.image_positions)]
        encoded.notes = sample.notes
        return encoded

    def prompts(self, samples: list[tuple[Sample, Source]]) -> Batch:
        """Return questions as one batch, padded on the left, for generation."""
        # Generation appends on the right, where all rows must end.
        questions = [self.load(sample, source, prompt=True) for sample, source in samples]
        return self.collator(padding_side="left")(questions)

    def note_validation(self, remarks: BatchRemarks, logs: bool = True) -> None:
        """Remember the skips, cuts and notes of a validation batch, each sample once however often
        it is evaluated.

        Args:
            logs: False on a rank that has them of another, which logs them.
        """
        if logs:
            self.notes.add(remarks.notes)
            for source, sample, reason in remarks.skipped:
                if (source, sample, reason) not in self.validation_skipped:
                    log.warning("skipped %s of validation source %s: %s", sample, source, reason)
        self.validation_skipped |= dict.fromkeys(remarks.skipped)
        self.validation_truncated |= dict.fromkeys(remarks.truncated)

    def report(
        self,
        steps: int,
        skipped: Iterable[tuple[str, str, str]],
        truncated: dict[str, int] | None = None,
        notes: NoteCounts | None = None,
        padding: Padding | None = None,
    ) -> dict[str, Any]:
        """Return the content of `mixture.json` after `steps`: the sources, their hashes, weights
        and realised counts, skips, cuts and notes."""
        report = mixture_report(
            self.mixture,
            self.sources,
            self.step_positions,
            steps,
            skipped,
            truncated,
            notes,
            padding,
            self.token_counts,
        )
        return report | {"validation": self.validation_report()}

    def validation_report(self) -> dict[str, Any]:
        """Return the skips and cuts of the validation sources so far."""
        return validation_report(
            self.validation, self.validation_skipped, self.validation_truncated
        )


def check_least(least: int, **numbers: int | None) -> None:
    """Raise ValueError for a number that is less than the least, naming its key."""
    for key, number in numbers.items():
        if number is not None and number < least:
            raise ValueError(f"data.{key} is {number}, expected at least {least}")


def break_behind_images(sources: Iterable[Source]) -> bool:
    """Whether texts begin on a new line behind the pictures that a turn begins with, as in LLaVA's
    data: in all the first records of the sources. A text that begins with other white space does
    not count."""
    for source in sources:
        for index in range(min(FIRST_RECORDS, len(source))):
            try:
                messages = source[index].messages
            except DataError:  # reported when it is drawn
                continue
            if any(begins_in_line(message) for message in messages):
                return False
    return True


def begins_in_line(message: Message) -> bool:
    """Whether the first text of a message continues the line of the pictures before it."""
    for number, part in enumerate(message["content"]):
        if part["type"] == "text":
            return number > 0 and not part["text"][:1].isspace()
    return False
