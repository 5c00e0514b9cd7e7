"""The decode benchmark: what it measures, not how fast this machine is."""

import json

import torch

from benchmarks import decode
from benchmarks.__main__ import main


def test_it_leaves_a_table_a_plot_and_numbers_for_every_fusion(tmp_path, capsys):
    assert (
        main(
            [
                "decode",
                "--images",
                "1,2",
                "--tokens",
                "2",
                "--repeats",
                "1",
                "--out",
                str(tmp_path),
            ]
        )
        == 0
    )
    printed = capsys.readouterr().out
    result = json.loads((tmp_path / "decode.json").read_text())
    assert (tmp_path / "decode.png").stat().st_size > 1000
    for fusion in ("concat", "modality_adaptive", "hyperattention"):
        assert fusion in printed
        assert set(result["milliseconds"][fusion]) == {"1", "2"}
        assert all(value > 0 for value in result["milliseconds"][fusion].values())


def test_a_step_of_hyperattention_reads_the_images_in_four_layers_and_of_concat_in_all(monkeypatch):
    """Why it grows slower: the keys that one decoding step attends to, counted."""
    sizes = []
    attend = torch.nn.functional.scaled_dot_product_attention

    def count(query, key, *args, **kwargs):
        if query.shape[1] * query.shape[2] == decode.LLM["num_attention_heads"]:  # one token
            sizes.append(key.shape[2])
        return attend(query, key, *args, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", count)
    read = {}
    for name, fusion in decode.FUSIONS.items():
        model, read[name] = decode.make_model(fusion), []
        for images in (1, 5):
            sizes.clear()
            decode.milliseconds(model, images, 1)
            read[name].append(sum(sizes))
    grown = {name: many - few for name, (few, many) in read.items()}
    assert grown["concat"] == grown["modality_adaptive"] == 4 * 64 * 8
    # the placeholders of four more images in each of eight layers
    assert grown["hyperattention"] == 4 * 64 * 4 + 4 * 8
