"""Attention maps of the answers on the contact sheet."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import torch
from torch import Tensor

from owlfuse.core.errors import DataError
from owlfuse.core.types import Sample
from owlfuse.data.datamodule import ChatData
from owlfuse.evaluation.explain.attention import (
    features_of,
    maps_of,
    picture_map,
    without_end,
)
from owlfuse.evaluation.generation import generate_greedy
from owlfuse.evaluation.metrics import Answer
from owlfuse.evaluation.reports import picture_of
from owlfuse.model.multimodal import MultimodalLM
from owlfuse.parallel.collectives import is_sharded
from owlfuse.parallel.ranks import Ranks

log = logging.getLogger(__name__)


def maps_of_answers(
    model: MultimodalLM,
    data: ChatData,
    answers: list[tuple[Answer, Sample]],
    max_new_tokens: int,
    ranks: Ranks,
) -> dict[int, Tensor]:
    """Returns the attention maps (h, w) of answers over their last pictures, by their places among
    `answers` (see `explain.attention_to_pictures`). None, and a warning, for a sharded model and
    for one that has no such map: an evaluation does not end by it. No map for a question with a
    video.
    """
    if is_sharded(model):
        if ranks.first:
            log.warning(
                "evaluation.explain: the model is shared out over ranks; evaluate the run by one "
                "process for the overlays"
            )
        return {}
    places = [place for place, (_, sample) in enumerate(answers) if not sample.videos]

    def map_of(place: int) -> Tensor | str:
        answer, sample = answers[place]
        try:
            return map_of_answer(model, data, sample, answer, max_new_tokens).cpu()
        except DataError as error:
            # a result, so that all ranks end here; what another rank fails of ends this one too
            return str(error)

    maps: dict[int, Tensor] = {}
    results: Iterator[Tensor | str] = ranks.deal(places, map_of)
    for place, result in zip(places, results, strict=True):
        if isinstance(result, str):
            if ranks.first:
                log.warning("evaluation.explain: the contact sheet has no overlays: %s", result)
            return {}
        maps[place] = result
    return maps


@torch.no_grad()
@torch.compiler.set_stance("force_eager")
def map_of_answer(
    model: MultimodalLM,
    data: ChatData,
    sample: Sample,
    answer: Answer,
    max_new_tokens: int,
) -> Tensor:
    """Returns the map of one answer, which is generated again by itself."""
    source = data.validation[answer.source]
    ends = data.encoder.answer_format.generation(data.tokenizer, model.llm)["eos_token_id"]
    batch = data.prompts([(sample, source)]).to(next(model.parameters()).device)
    # alone, without the padding of a batch, which the map would include
    ids = generate_greedy(model, batch, max_new_tokens, data.encoder)
    with features_of(model.vision) as features:
        visual = model.encode(batch)
    maps = maps_of(model, batch, visual, features[0], without_end(ids, ends))
    # the sheet shows the last picture of a question, whose views come last
    views = len(data.pictures(sample, source)[-1])
    return picture_map(maps[-views:], picture_of(answer).size, model.vision.preprocessing)
