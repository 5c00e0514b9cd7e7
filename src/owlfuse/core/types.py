"""The types that pass between the parts: samples, batches, visual tokens.

It imports torch only in methods of tensors: who only reads samples neither waits for it nor holds
its 500 MB.

N images in the batch, P patches, Q visual tokens per image, B rows, I the most images of a row, T
text positions, D LLM width, R supervised positions, K visual positions.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeAlias

if TYPE_CHECKING:
    import torch
    from torch import Tensor

# An object of JSON: a record of a data file, a turn, a tool.
JsonObject: TypeAlias = dict[str, Any]
# A message of a `Sample`, or as chat templates take it.
Message: TypeAlias = dict[str, Any]
# A part of a message's content.
Part: TypeAlias = dict[str, Any]
# A picture or a video: a path below the image root, or its encoded bytes.
Media: TypeAlias = str | bytes

# The number of `Batch.supervised` is a multiple of this: few shapes, and sizes that suit matrix
# units.
SUPERVISED_BLOCK = 64


class Note(NamedTuple):
    """An unused key of a sample's record, or an assumption about it: logged once a source, and no
    error."""

    kind: Literal["unused", "assumed"]
    text: str
    """`a turn's 'markdown'`, for instance, or a sentence."""


def without_keys(node: JsonObject, keys: Collection[str]) -> JsonObject:
    """Return an object without some of its keys."""
    return {key: value for key, value in node.items() if key not in keys}


@dataclass
class Sample:
    """One chat. `messages` are `{"role": str, "content": [part, ...]}`, a part being `{"type":
    "text", "text": str}`, `{"type": "image"}` or `{"type": "video"}`; the k-th image part shows the
    k-th of `images`: a path below the source's image root, or the encoded bytes of a picture; and
    the k-th video part the k-th of `videos` likewise.

    A message also has, only where the data have them, `reasoning_content` (the thought before an
    answer), `tool_calls`, `tool_call_id`, `name`, and `supervised: False` for an answer that is not
    learned from. `tools` are the functions that the assistant may call, as chat templates take
    them. A text may hold `<image>` or `<video>` as a word."""

    id: str
    source: str
    messages: list[Message]
    images: list[Media] = field(default_factory=list)
    metadata: JsonObject = field(default_factory=dict)
    videos: list[Media] = field(default_factory=list)
    tools: list[Any] | None = None
    notes: list[Note] = field(default_factory=list)
    chat: str = ""
    """Of a question that was taken from a chat by itself: the id of the chat."""


@dataclass
class Encoded:
    """One chat as the model sees it: T token ids and labels (-100: not supervised), images as
    pixels (3, H, W), and the index of each image's first placeholder. A tiled picture's views and a
    video's frames are an image each."""

    id: str
    source: str
    input_ids: Tensor
    labels: Tensor
    placeholder: Tensor
    pixel_values: list[Tensor]
    image_positions: list[int]
    turns_removed: int = 0
    """Questions with their answers that were removed from the end, where the policy for the length
    is `truncate_turns`."""
    notes: list[Note] = field(default_factory=list)
    """Notes about its record."""


@dataclass
class Batch:
    """Rows of equal length. Images are in the order of their rows, and within a row in the order of
    its placeholders.

    A batch without images holds one blank image, for which `image_mask` is False and which no row
    points to.
    """

    input_ids: Tensor
    """(B, T) token ids."""
    attention_mask: Tensor
    """(B, T) 1 where a token is, 0 at padding, on either side."""
    labels: Tensor
    """(B, T) the ids again, -100 where they are not supervised."""
    placeholder: Tensor
    """(B, T) bool, True at each position that an image takes."""
    pixel_values: Tensor
    """(N, 3, H, W) normalised pixels, N at least 1."""
    image_mask: Tensor
    """(N,) bool, False for the blank image of a batch without images."""
    image_index: Tensor
    """(B, I) which of the N images a row's images are, -1 for none."""
    image_positions: Tensor
    """(B, I) index in the row of each image's first placeholder, T for none."""
    segment_ids: Tensor | None = None
    """(B, T) k at the tokens of a row's k-th sample, from 1, and 0 at padding, which is on the
    right then. None: a row is one sample. Samples of a row see nothing of each other, images
    included."""
    ids: list[str] = field(default_factory=list)
    """Ids of the samples, in the order of their rows and within a row in the order of its samples;
    `sources` and `lengths` likewise."""
    sources: list[str] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)
    """The tokens of each sample.

    Plain numbers, so that no tensor is read to know how much is padding.
    """
    skipped: list[tuple[str, str, str]] = field(default_factory=list)
    """(source, sample, reason) of the samples that this batch lacks, where the policy is to
    skip."""
    truncated: list[tuple[str, str, int]] = field(default_factory=list)
    """(source, sample, turns removed) of the samples that were cut to `max_length`."""
    notes: list[tuple[str, str, Note, int]] = field(default_factory=list)
    """(source, first sample, note, number of samples) of each note about the records."""

    has_images: bool = True
    """False for the batch with a blank image.

    A plain bool, so that no tensor is read to know it.
    """
    supervised: Tensor | None = None
    """(R,) positions b * T + t of the tokens whose next one is supervised, filled up to a multiple
    of `SUPERVISED_BLOCK` with the last position of all, which has no next token. Computed on the
    CPU, so that logits are computed there alone. None: unknown."""
    visual_count: int | None = None
    """K, how many positions images take in all rows. A plain number: shapes depend on it, and no
    tensor is read to know it. None: unknown."""

    @classmethod
    def of(
        cls,
        input_ids: Tensor,
        placeholder: Tensor,
        image_positions: Tensor,
        *,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        image_index: Tensor | None = None,
        has_images: bool | None = None,
        **fields: Any,
    ) -> Batch:
        """Returns a batch of rows whose images begin at `image_positions` (see `image_starts`).

        Args:
            pixel_values: none by default, for a batch whose visual tokens are computed already.
            attention_mask: all ones by default.
            labels: by default nothing is supervised.
            image_index: by default images are numbered in the order of their rows.
            has_images: needed on the meta device; by default whether any row has an image.
            fields: the other fields of a batch.
        """
        import torch

        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        if labels is None:
            labels = torch.full_like(input_ids, -100)
        if pixel_values is None:
            pixel_values = torch.zeros(0, 3, 0, 0, device=input_ids.device)
        length = attention_mask.shape[1]
        if image_index is None:
            image_index = number_images(image_positions, length)
        if has_images is None:
            has_images = bool((image_positions < length).any())
        return cls(
            input_ids=input_ids,
            attention_mask=attention_mask,
            labels=labels,
            placeholder=placeholder,
            pixel_values=pixel_values,
            image_mask=torch.full((len(pixel_values),), has_images, device=pixel_values.device),
            image_index=image_index,
            image_positions=image_positions,
            has_images=has_images,
            **fields,
        )

    def targets(self) -> Tensor:
        """Return for each position the label of the next token of its row, -100 at the last of a
        row, (B * T,)."""
        from torch.nn.functional import pad

        # The label of a token is predicted at the position before it.
        return pad(self.labels[:, 1:], (0, 1), value=-100).flatten()

    def with_places(self) -> Batch:
        """Return the same batch with `supervised` and `visual_count`, of tensors on the CPU."""
        from torch.nn.functional import pad

        supervised = (self.targets() != -100).nonzero().flatten()
        missing = -len(supervised) % SUPERVISED_BLOCK
        supervised = pad(supervised, (0, missing), value=self.labels.numel() - 1)
        return replace(self, supervised=supervised, visual_count=int(self.placeholder.sum()))

    def positions(self) -> Tensor:
        """Return the position of each token in its sample, from 0, (B, T). Padding has 0, or on the
        right of a row that is one sample the position of its last token."""
        import torch

        if self.segment_ids is None:
            return (self.attention_mask.cumsum(1) - 1).clamp_min(0)
        rows, length = self.segment_ids.shape
        position_in_row = torch.arange(length, device=self.segment_ids.device).expand(rows, length)
        before_first = self.segment_ids.new_full((rows, 1), -1)
        # A sample begins where the segment changes; -1 makes the first position one.
        begins = self.segment_ids.diff(dim=1, prepend=before_first) != 0
        first = torch.where(begins, position_in_row, 0).cummax(1).values
        return (position_in_row - first) * self.attention_mask

    def to(self, device: torch.device | str) -> Batch:
        """Return the same batch with its tensors on `device`."""
        from torch import Tensor

        fields = dict(vars(self))
        for name, value in fields.items():
            if isinstance(value, Tensor):
                fields[name] = value.to(device, non_blocking=True)
        return Batch(**fields)


def image_starts(starts_by_row: Sequence[Sequence[int]], length: int) -> Tensor:
    """Returns (B, I) where the images of each row begin, padded with `length`: T for none."""
    import torch

    most = max(1, *(len(starts) for starts in starts_by_row))
    positions = torch.full((len(starts_by_row), most), length)
    for row, starts in zip(positions, starts_by_row, strict=True):
        row[: len(starts)] = torch.tensor(starts, dtype=torch.long)
    return positions


def number_images(image_positions: Tensor, length: int) -> Tensor:
    """Returns (B, I) the images' numbers in the order of their rows, -1 for none: where a position
    is `length`."""
    is_image = image_positions < length
    numbers = is_image.flatten().cumsum(0).view_as(image_positions) - 1
    return numbers.masked_fill(~is_image, -1)


@dataclass
class VisualTokens:
    """The connector's output for the images, and their positions in the rows."""

    tokens: Tensor
    """(N, Q, D); zero for a blank image."""
    image_index: Tensor
    """(B, I) as in `Batch`."""
    image_positions: Tensor
    """(B, I) as in `Batch`."""
    levels: Tensor | None = None
    """(L, N, Q, D) of the backbone's extra levels, from the shallowest on; None: it has none."""
    kv_cache: dict[int, tuple[Tensor, Tensor]] | None = None
    """In generation: the visual keys and values of each layer, computed once.

    None: nothing is cached.
    """


@dataclass(frozen=True)
class Skipped:
    """A sample left out by its source's policy."""

    source: str
    sample: str
    reason: str


IMAGE = "<image>"


# The types of message parts that stand for pictures.
VISUAL = ("image", "video")
