"""Processes that load data: started once, pixels in shared memory, none left behind."""

import json
import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
from torch.multiprocessing import get_sharing_strategy

from owlfuse.data.datamodule import ChatData
from owlfuse.data.formats.llava import LLaVA
from owlfuse.model.vision.backbone import Preprocessing

RUN = """
import os, signal, sys, time
from types import SimpleNamespace
from owlfuse.data.datamodule import ChatData
from owlfuse.data.formats.llava import LLaVA
from owlfuse.model.vision.backbone import Preprocessing
folder, bad, out, *ends = sys.argv[1:]

def train(end):
    source = LLaVA(bad if end == "sample" else folder + "/train.json", image_root=folder)
    data = ChatData(folder + "/tokenizer", {"shapes": source}, {}, global_batch_size=4, workers=2)
    data.bind(Preprocessing((16, 16), (0.5,) * 3, (0.5,) * 3, "bilinear"), 2)
    data.trainer = SimpleNamespace(distributed_sampler_kwargs=None, max_steps=10**6, global_step=0)
    batches = iter(data.train_dataloader())
    next(batches)
    print(*(worker.pid for worker in batches._workers), flush=True)
    if end == "error":
        raise RuntimeError("on purpose")
    for batch in batches:
        time.sleep(0.01)

pids = {}
for end in ends:  # the imports take seconds, so that the programs are forks of one that has made them
    pids[end] = os.fork()
    if not pids[end]:
        os.setsid()
        signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell's background jobs ignore
        os.dup2(os.open(f"{out}/{end}.out", os.O_WRONLY | os.O_CREAT), 1)
        os.dup2(os.open(f"{out}/{end}.err", os.O_WRONLY | os.O_CREAT), 2)
        train(end)
        sys.exit()
print(*pids.values(), flush=True)
print(*(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids.values()), flush=True)
"""


def alive(pid):
    """Whether a process runs; one that ended and waits for its parent does not."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def wait_for(found, seconds):
    """What `found()` gives once it is true, or at last."""
    deadline = time.monotonic() + seconds
    while not (value := found()) and time.monotonic() < deadline:
        time.sleep(0.05)
    return value


@pytest.mark.slow
@pytest.mark.skipif(not os.path.isdir("/proc"), reason="reads /proc")
def test_no_process_is_left_behind(shapes, tmp_path):
    records = json.loads((shapes / "train.json").read_text())
    records[40]["image"] = "nowhere.png"
    (tmp_path / "bad.json").write_text(json.dumps(records))
    expected = {
        "error": "on purpose",
        "sample": "no image nowhere.png",
        "Ctrl-C": "KeyboardInterrupt",
        "kill": "",
    }
    command = [
        sys.executable,
        "-c",
        RUN,
        str(shapes),
        str(tmp_path / "bad.json"),
        str(tmp_path),
        *expected,
    ]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    programs = dict(zip(expected, map(int, process.stdout.readline().split())))
    assert len(programs) == 4
    workers = {}
    try:
        for end in programs:
            started = wait_for(
                lambda file=tmp_path / f"{end}.out": file.exists() and file.read_text().split(), 60
            )
            workers[end] = [int(pid) for pid in started or []]
            assert len(workers[end]) == 2, (tmp_path / f"{end}.err").read_text()
        os.killpg(programs["Ctrl-C"], signal.SIGINT)  # as a terminal does: to all processes
        os.kill(programs["kill"], signal.SIGKILL)
        codes, _ = process.communicate(timeout=300)
        assert [code != "0" for code in codes.split()] == [True] * 4
        for end, message in expected.items():
            assert message in (tmp_path / f"{end}.err").read_text()
            assert wait_for(lambda end=end: not any(alive(pid) for pid in workers[end]), 15), end
    finally:
        for pid in (
            process.pid,
            *programs.values(),
            *(pid for pids in workers.values() for pid in pids),
        ):
            if alive(pid):
                os.kill(pid, signal.SIGKILL)


def test_workers_start_once_and_hand_pixels_over_in_shared_memory(shapes):
    data = ChatData(
        str(shapes / "tokenizer"),
        {"s": LLaVA(str(shapes / "train.json"))},
        {},
        global_batch_size=4,
        workers=2,
    )
    data.bind(Preprocessing((16, 16), (0.5,) * 3, (0.5,) * 3, "bilinear"), 2)
    data.trainer = SimpleNamespace(distributed_sampler_kwargs=None, max_steps=6, global_step=0)
    loader = data.train_dataloader()
    seen = []
    for _ in range(2):
        batches = iter(loader)
        seen.append([worker.pid for worker in batches._workers])
        assert all(batch.pixel_values.is_shared() for batch in batches)
    assert seen[0] == seen[1]
    assert get_sharing_strategy() in ("file_descriptor", "file_system")


def test_what_workers_do_not_use_is_told_once_whichever_of_them_reads_it(shapes, caplog):
    chat = [{"from": "human", "value": "What?", "markdown": "x"}, {"from": "gpt", "value": "red"}]
    image = json.loads((shapes / "train.json").read_text())[0]["image"]
    records = [{"image": image, "topic": f"t{n}", "conversations": chat} for n in range(16)]
    (shapes / "noted.json").write_text(json.dumps(records))
    source = LLaVA(str(shapes / "noted.json"), image_root=str(shapes))
    data = ChatData(
        str(shapes / "tokenizer"), {"noted": source}, {}, global_batch_size=4, workers=2
    )
    data.bind(Preprocessing((8, 8), (0.5,) * 3, (0.5,) * 3, "bilinear"), 2)
    data.trainer = SimpleNamespace(distributed_sampler_kwargs=None, max_steps=8, global_step=0)
    notes = [note for batch in data.train_dataloader() for note in batch.notes]
    data.notes.add(notes)
    assumed, unused = sorted(record.getMessage() for record in caplog.records)
    assert assumed.startswith(
        "source noted: a picture that no mark shows is put first in the first question (first in "
        "sample"
    )
    assert unused.startswith(
        "source noted: not used: a turn's 'markdown', a record's 'topic' (first in sample noted:"
    )
    row = data.report(8, [], notes=data.notes.counts)["sources"]["noted"]
    put_first = "a picture that no mark shows is put first in the first question"
    expected = {put_first, "not used: a turn's 'markdown'", "not used: a record's 'topic'"}
    assert row["notes"] == dict.fromkeys(expected, 32)  # each of the samples that were drawn
