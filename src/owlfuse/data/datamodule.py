"""Sources, mixture, encoder and collator as Lightning's DataModule."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, Literal

import lightning
from torch.utils.data import DataLoader, Dataset

from owlfuse.core.errors import DataError
from owlfuse.core.types import Batch, Encoded, Sample
from owlfuse.data.chat.encoder import ChatEncoder
from owlfuse.data.chat.tokenizer import chat_tokenizer
from owlfuse.data.chat.truncation import OnLength, check_policies, policy_of
from owlfuse.data.collate import Collator
from owlfuse.data.formats.base import Source
from owlfuse.data.loading import GlobalBatchSampler, MixtureDataset, SourceDataset
from owlfuse.data.media.images import MAX_PIXELS
from owlfuse.data.media.pictures import Pictures, Preprocess
from owlfuse.data.media.video import VideoSampling
from owlfuse.data.mixture.lengths import Lengths, count_lengths
from owlfuse.data.mixture.mixture import make_mixture
from owlfuse.data.mixture.positions import StepPositions
from owlfuse.data.mixture.report import mixture_report, validation_report
from owlfuse.data.notes import NoteCounts, NotesLog
from owlfuse.data.packing import Padding, checked
from owlfuse.data.workers import DataWorkers, ignore_signals

LOOKED_AT = 16
"""Records of a source by which the line break behind its pictures is known."""


class ChatData(lightning.LightningDataModule):
    """Mixes sources into global batches that are the same for any number of ranks and workers.

    Args:
        tokenizer: a folder or a hub name.
        sources: what is trained on, by name.
        validation: what is evaluated, by name. Results of `a_b` stand beside those of `a` (see
            `evaluation`).
        global_batch_size: samples of one optimizer step, over all ranks and accumulation steps.
        micro_batch_size: samples that one rank takes at a time; by default the global batch over
            the ranks.
        workers: processes that load data; 0 loads in the training process.
        max_length: in tokens, of a sample.
        pack_to: the samples of a micro batch share rows of at most so many tokens in training;
            None: a row is one sample.
        on_length: what becomes of a longer sample, for all sources or by source (see
            `data.truncation`).
        chat_template: a template's name (see `data/chat/templates`) or a .jinja file, in the place
            of the tokenizer's own.
        max_pixels: of a picture; one with more is refused before it is decoded.
        seed: of the order in which samples are drawn, and of which pictures are tiled.
        validation_samples: how many samples of each validation source are looked at during
            training.
        prepare: called before anything is read; it writes data that are made on the spot.
        folder: where the data lie, for the other keys of a yaml to refer to.
        video: how frames of videos are chosen where a source does not say, the keys of a
            `VideoSampling`.
        weights_by: what the shares are of: samples, or supervised tokens. Those are counted once
            (see `mixture.lengths`), and a source's weight is divided by the mean of its samples.
        thinking: whether a question asks for a thought before the answer, where the chat template
            knows of thoughts; an answer is scored without it.
        temperature, at_end, weights_at: see `make_mixture`; `weights_at` counts in optimizer steps.
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
        if prepare is not None:
            prepare()
        for name, source in (*sources.items(), *validation.items()):
            source.name = name
        self.sources = sources
        self.validation = validation
        # in the order in which they were found
        self.validation_skipped: dict[tuple[str, str, str], None] = {}
        self.validation_truncated: dict[tuple[str, str, int], None] = {}
        self.notes = NotesLog()
        self.global_batch_size = global_batch_size
        self.micro_batch_size = micro_batch_size
        self.workers = workers
        self.data_workers = DataWorkers()
        self.max_length = max_length
        self.pack_to = checked(pack_to, max_length)
        self.max_pixels = max_pixels
        self.video = VideoSampling.of(video or {})
        self.seed = seed
        self.validation_samples = validation_samples
        if weights_by not in ("samples", "tokens"):
            raise ValueError(f"weights_by is {weights_by}, expected samples or tokens")
        self.weights_by = weights_by
        check_policies(on_length, [*sources, *validation])
        self.on_length = on_length
        self.tokenizer = chat_tokenizer(
            tokenizer, chat_template, break_behind_images(sources.values())
        )
        self.thinking = thinking
        self.step_positions = StepPositions.of(global_batch_size)
        self.counted: dict[str, Lengths] | None = None
        self.mix = partial(
            make_mixture,
            sources,
            seed,
            weights_at=weights_at,
            at_end=at_end,
            temperature=temperature,
        )
        if weights_by == "samples":
            self.mixture = self.mix(self.step_positions)

    def go_on(self, step: int, before: StepPositions) -> None:
        """Makes the mixture of a run that goes on at a step: the samples until there were drawn by
        global batches as they were then. Call it before `bind`."""
        self.step_positions = before.changed(step, self.global_batch_size)
        if self.weights_by == "samples":
            self.mixture = self.mix(self.step_positions)

    def bind(self, preprocess: Preprocess, tokens_per_image: int) -> None:
        """Takes what only the model knows: how pictures become pixels, and how many positions an
        image takes."""
        self.encoder = ChatEncoder(self.tokenizer, tokens_per_image, self.max_length, self.thinking)
        self.pictures = Pictures(preprocess, self.max_pixels, self.seed, self.video)
        self.counted = None
        if self.weights_by == "tokens":
            self.mixture = self.mix(self.step_positions, lengths=self.lengths())
        self.image_shape = (3, *preprocess.size)

    def lengths(self) -> dict[str, Lengths]:
        """Return the token counts of each source, from their cache or by encoding all samples."""
        if self.counted is None:
            self.counted = {
                name: count_lengths(source, self.encoder, on_length=policy_of(self.on_length, name))
                for name, source in self.sources.items()
            }
        return self.counted

    @property
    def vocab_size(self) -> int:
        """Ids that the tokenizer may give."""
        return len(self.tokenizer)

    def accumulation(self, ranks: int) -> int:
        """Micro batches per optimizer step and rank.

        Raises:
            ValueError: a global batch that the ranks and micro batches do not divide.
        """
        micro = self.micro_batch_size or max(1, self.global_batch_size // ranks)
        if self.global_batch_size % (micro * ranks):
            raise ValueError(
                f"global_batch_size is {self.global_batch_size}, which {ranks} ranks of "
                f"micro_batch_size {micro} do not divide"
            )
        return self.global_batch_size // (micro * ranks)

    def steps(self, asked: int) -> int:
        """Optimizer steps of a run: those asked for, or as many whole global batches as the
        schedule has. Raises DataError."""
        positions = self.mixture.available(self.step_positions.position(asked))
        steps = int(self.step_positions.step(positions))
        if steps == 0:
            raise DataError(
                f"the schedule has {positions} samples and then ends (at_end); a global batch "
                f"takes {self.global_batch_size}"
            )
        return steps

    def train_dataloader(self) -> DataLoader:
        """From the trainer's step on, so that a resumed run goes on where it was."""
        trainer = self.trainer
        assert trainer is not None
        # tensor ranks share their rows
        place = trainer.distributed_sampler_kwargs or {"rank": 0, "num_replicas": 1}
        sampler = GlobalBatchSampler(
            self.global_batch_size,
            self.accumulation(place["num_replicas"]),
            place["rank"],
            place["num_replicas"],
            steps=trainer.max_steps,
            first_step=trainer.global_step,
            first_position=self.step_positions.position(trainer.global_step),
        )
        dataset = MixtureDataset(self.mixture, self.sources, self.load)
        options: dict[str, Any] = {
            "num_workers": self.workers,
            "persistent_workers": self.workers > 0,
        }
        if self.workers:
            options["multiprocessing_context"] = self.data_workers.context
        return self.loader(dataset, self.pack_to, batch_sampler=sampler, **options)

    def val_dataloader(self) -> dict[str, DataLoader]:
        """Samples of each validation source, whole chats, the same at every step."""
        return {
            name: self.validation_loader(name, self.validation_samples) for name in self.validation
        }

    def validation_loader(
        self, name: str, limit: int | None = None, batch_size: int = 32
    ) -> DataLoader:
        """Whole chats of one validation source in their own order; with a limit, a seeded sample
        of them."""
        source = self.validation[name]
        indices: Sequence[int] = range(len(source))
        if limit is not None and limit < len(source):  # the first ones may all be of one kind
            indices = sorted(random.Random(0).sample(indices, limit))
        dataset = SourceDataset(source, indices, self.load)
        return self.loader(dataset, batch_size=batch_size)

    def loader(self, dataset: Dataset, pack_to: int | None = None, **options: Any) -> DataLoader:
        """A DataLoader of batches, a row to each sample unless they are packed."""
        collator = Collator(self.encoder.pad_id, self.image_shape, pack_to=pack_to)
        return DataLoader(dataset, collate_fn=collator, worker_init_fn=ignore_signals, **options)

    def load(self, sample: Sample, source: Source, prompt: bool = False) -> Encoded:
        """A sample of a source encoded, its pictures opened and preprocessed. Raises DataError."""
        views = self.pictures(sample, source)
        counts = [len(pixels) for pixels in views]
        if prompt:
            encoded = self.encoder.encode_prompt(sample, counts)
        else:
            encoded = self.encoder.encode(sample, counts, policy_of(self.on_length, sample.source))
        kept = [view for pixels in views for view in pixels][: len(encoded.image_positions)]
        encoded.pixel_values = kept
        encoded.notes = sample.notes
        return encoded

    def prompts(self, samples: list[tuple[Sample, Source]]) -> Batch:
        """Questions as one batch, padded on the left, for generation."""
        collator = Collator(self.encoder.pad_id, self.image_shape, side="left")
        return collator([self.load(sample, source, prompt=True) for sample, source in samples])

    def note_validation(self, batch: Batch) -> None:
        """Keeps what a batch of a validation source lacks or has been cut, each sample once
        however often it is looked at."""
        self.notes.add(batch.notes)
        self.validation_skipped |= dict.fromkeys(batch.skipped)
        self.validation_truncated |= dict.fromkeys(batch.truncated)

    def report(
        self,
        steps: int,
        skipped: Iterable[tuple[str, str, str]],
        truncated: dict[str, int] | None = None,
        notes: NoteCounts | None = None,
        padding: Padding | None = None,
    ) -> dict[str, Any]:
        """What `mixture.json` holds after `steps`: the sources, their hashes, weights and realised
        counts, skips, cuts and notes."""
        report = mixture_report(
            self.mixture,
            self.sources,
            self.step_positions,
            steps,
            skipped,
            truncated,
            notes,
            padding,
            self.counted,
        )
        return report | {"validation": self.validation_report()}

    def validation_report(self) -> dict[str, Any]:
        """Of the validation sources, what was left out or cut so far."""
        return validation_report(
            self.validation, self.validation_skipped, self.validation_truncated
        )


def break_behind_images(sources: Iterable[Source]) -> bool:
    """Whether texts go on a line of their own behind the pictures that a turn begins with: so do
    those of all the first records of the sources, as LLaVA's do. A text that begins with white
    space of another kind says nothing."""
    for source in sources:
        for index in range(min(LOOKED_AT, len(source))):
            try:
                messages = source[index].messages
            except DataError:  # told or counted when it is drawn
                continue
            for message in messages:
                kinds = [part["type"] for part in message["content"]]
                first = next((place for place, kind in enumerate(kinds) if kind == "text"), 0)
                if first and not message["content"][first]["text"][:1].isspace():
                    return False
    return True
