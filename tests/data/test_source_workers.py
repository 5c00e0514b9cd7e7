"""Sources in DataLoader workers, forked and spawned, give what they give in the training
process."""

import json

import pytest
from torch.utils.data import DataLoader, Dataset

from owlfuse.data.formats.captions import Captions
from owlfuse.data.formats.llava import LLaVA


class Ids(Dataset):
    """A source's samples as their ids and texts."""

    def __init__(self, source):
        self.source = source

    def __len__(self):
        return len(self.source)

    def __getitem__(self, index):
        sample = self.source[index]
        return sample.id, str(sample.messages)


@pytest.mark.parametrize("opened", [True, False])
def test_forked_workers_share_an_open_file_without_disturbing_each_other(tmp_path, opened):
    records = [{"image": f"{i}.png", "caption": f"{i}" * (i % 50 + 1)} for i in range(400)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    source = Captions(str(tmp_path / "a.jsonl"))
    if opened:
        assert len(source) == 400
    loader = DataLoader(
        Ids(source), batch_size=5, num_workers=2, collate_fn=list, multiprocessing_context="fork"
    )
    again = Captions(str(tmp_path / "a.jsonl"))
    assert [item for batch in loader for item in batch] == [Ids(again)[i] for i in range(400)]


@pytest.mark.slow
def test_a_spawned_worker_opens_the_file_anew(tmp_path):
    chat = [{"from": "human", "value": "?"}, {"from": "gpt", "value": "!"}]
    (tmp_path / "a.jsonl").write_text(
        "".join(json.dumps({"id": i, "conversations": chat}) + "\n" for i in range(20))
    )
    source = LLaVA(str(tmp_path / "a.jsonl"))
    assert len(source) == 20
    loader = DataLoader(
        Ids(source), batch_size=20, num_workers=1, collate_fn=list, multiprocessing_context="spawn"
    )
    assert [identity for identity, _ in next(iter(loader))] == [f"a:{i}" for i in range(20)]
