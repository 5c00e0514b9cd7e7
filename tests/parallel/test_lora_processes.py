"""LoRA's options by two real processes follow the losses and the weights of one."""

import pytest
import test_parallel
from test_parallel import LORA, SPLIT, check, train_both

OF_LLM = "model.adapter.llm"
OPTIONS = {
    "dora": [
        f"{OF_LLM}.use_dora=true",
        "model.adapter.fusion.use_dora=true",
        f"{OF_LLM}.use_rslora=true",
        f"{OF_LLM}.modules_to_save=[norm]",
        f"{OF_LLM}.rank_pattern={{q_proj: 4}}",
    ],
    "pissa": [f"{OF_LLM}.init_lora_weights=pissa", "model.adapter.fusion.init_lora_weights=olora"],
}


@pytest.mark.slow
@pytest.mark.parametrize(("name", "splits"), [("dora", ["fsdp"]), ("pissa", ["fsdp", "tp"])])
def test_two_processes_follow_one(name, splits, tmp_path, monkeypatch):
    monkeypatch.setitem(
        test_parallel.CASES, name, ["experiment=shapes_owl2", *LORA, *OPTIONS[name]]
    )
    chosen = [(name, split, 1) for split in splits]
    train_both(tmp_path, chosen, SPLIT, 2)
    for case in chosen:
        check(tmp_path, tmp_path, *case)
