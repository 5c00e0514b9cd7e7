"""Which released family a model is of, and whether its parts are that family's."""

from __future__ import annotations

from owlfuse.connectors.abstractor import Abstractor
from owlfuse.connectors.linear import LinearConnector
from owlfuse.connectors.mlp import MLPConnector
from owlfuse.fusion.concat import Concat
from owlfuse.fusion.hyperattention import HyperAttention
from owlfuse.fusion.modality_adaptive import ModalityAdaptive
from owlfuse.model import MultimodalLM
from owlfuse.released.loading import Released
from owlfuse.released.names import Place, optional, places_of
from owlfuse.types import DataError
from owlfuse.vision import TimmBackbone

FUSIONS = {Concat: "owl1", ModalityAdaptive: "owl2", HyperAttention: "owl3"}
CONNECTORS = {"owl1": (Abstractor,), "owl2": (Abstractor,), "owl3": (LinearConnector, MLPConnector)}
LLMS = {"owl1": "llama", "owl2": "llama", "owl3": "qwen2"}
ELSE = "export it in owlfuse's own layout"


def family_in(model: MultimodalLM) -> str:
    """owl1, owl2 or owl3, by the model's fusion. Raises DataError for a fusion of none."""
    kind = type(model.fusion)
    if kind not in FUSIONS:
        raise DataError(f"fusion: {kind.__name__} is that of no released mPLUG-Owl; {ELSE}")
    return FUSIONS[kind]


def places_in(model: MultimodalLM) -> dict[str, Place]:
    """Where the released tensors stand in a model that came from a released folder.

    Raises:
        DataError: a part that the family does not have, or another than the folder had (the message begins with it), or a
            model that came from elsewhere.
    """
    released: Released | None = model.released
    family = family_in(model)
    check_fusion(model)
    if released is not None and released.family != family:
        raise DataError(f"fusion: {type(model.fusion).__name__} is {family}'s, and the model came from an {released.family}")
    for part, kinds in (("vision", (TimmBackbone,)), ("connector", CONNECTORS[family])):
        module = getattr(model, part)
        if not isinstance(module, kinds):
            names = " or ".join(kind.__name__ for kind in kinds)
            raise DataError(f"{part}: {type(module).__name__}, and {family} has {names}; {ELSE}")
    if model.llm.config.model_type != LLMS[family]:
        raise DataError(f"llm: {model.llm.config.model_type}, and {family} has {LLMS[family]}; {ELSE}")
    places = places_of(model, family)
    if released is None:
        raise DataError(f"no released {family} folder is known to write like (model.released is None): load one; or {ELSE}")
    check_shapes(released, places, optional(model, family))
    return places


def check_fusion(model: MultimodalLM) -> None:
    """Raises DataError for a form of hyperattention that was never released."""
    fusion = model.fusion
    if isinstance(fusion, HyperAttention) and (fusion.gate == "none" or fusion.norm != "shared" or not fusion.mi_rope):
        raise DataError(
            f"fusion: gate {fusion.gate}, norm {fusion.norm}, mi_rope {fusion.mi_rope}, and every released owl3 has a gate, "
            f"the shared norm and MI-RoPE; {ELSE}"
        )


def check_shapes(released: Released, places: dict[str, Place], may_lack: str | None) -> None:
    """Raises DataError where the model has other tensors than the folder that it came from."""
    for name, place in places.items():
        shape = released.shapes.get(name)
        if shape != place.shape and not (shape is None and name == may_lack):
            part, found = place.name.partition(".")[0], f"shape {shape}" if shape else "no such tensor"
            raise DataError(f"{part}: {name} has shape {place.shape}, and the released folder had {found}; load the model anew")
    if gone := sorted(set(released.shapes) - set(places) - set(released.kept)):
        part = "vision" if "vision_model." in gone[0] else "llm" if "layers." in gone[0] else "connector"
        part = "connector" if "abstractor." in gone[0] else part
        raise DataError(f"{part}: the released folder had {', '.join(gone)}, and the model does not; load the model anew")
