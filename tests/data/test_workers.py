"""Processes that load data: started once, pixels in shared memory, none left behind."""

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
from owlfuse.vision import Preprocessing

RUN = """
import sys, time
from types import SimpleNamespace
from owlfuse.data.datamodule import ChatData
from owlfuse.data.formats.llava import LLaVA
from owlfuse.vision import Preprocessing
folder, file, end = sys.argv[1:]
if __name__ == "__main__":
    data = ChatData(folder + "/tokenizer", {"shapes": LLaVA(file, image_root=folder)}, {}, global_batch_size=4, workers=2)
    data.bind(Preprocessing((16, 16), (0.5,) * 3, (0.5,) * 3, "bilinear"), 2)
    data.trainer = SimpleNamespace(world_size=1, global_rank=0, max_steps=10**6, global_step=0)
    batches = iter(data.train_dataloader())
    next(batches)
    print(*(worker.pid for worker in batches._workers), flush=True)
    if end == "error":
        raise RuntimeError("on purpose")
    for batch in batches:
        time.sleep(0.01)
"""


def alive(pid):
    """Whether a process runs; one that ended and waits for its parent does not."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.mark.skipif(not os.path.isdir("/proc"), reason="reads /proc")
@pytest.mark.parametrize("end", ["error", "bad sample", "Ctrl-C", "kill"])
def test_no_process_is_left_behind(shapes, tmp_path, end):
    file = shapes / "train.json"
    if end == "bad sample":
        import json

        records = json.loads(file.read_text())
        records[40]["image"] = "nowhere.png"
        file = tmp_path / "bad.json"
        file.write_text(json.dumps(records))
    command = [sys.executable, "-c", RUN, str(shapes), str(file), end]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)
    workers = [int(pid) for pid in process.stdout.readline().split()]
    try:
        assert len(workers) == 2, process.stderr.read()
        if end == "Ctrl-C":
            os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to all of them
        if end == "kill":
            process.kill()
        _, errors = process.communicate(timeout=30)
        assert process.returncode != 0
        expected = {"error": "on purpose", "bad sample": "no image nowhere.png", "Ctrl-C": "KeyboardInterrupt", "kill": ""}
        assert expected[end] in errors
        deadline = time.monotonic() + 15
        while (left := [pid for pid in workers if alive(pid)]) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert left == []
    finally:
        for pid in (process.pid, *workers):
            if alive(pid):
                os.kill(pid, signal.SIGKILL)


def test_workers_start_once_and_hand_pixels_over_in_shared_memory(shapes):
    data = ChatData(str(shapes / "tokenizer"), {"s": LLaVA(str(shapes / "train.json"))}, {}, global_batch_size=4, workers=2)
    data.bind(Preprocessing((16, 16), (0.5,) * 3, (0.5,) * 3, "bilinear"), 2)
    data.trainer = SimpleNamespace(world_size=1, global_rank=0, max_steps=6, global_step=0)
    loader = data.train_dataloader()
    seen = []
    for _ in range(2):
        batches = iter(loader)
        seen.append([worker.pid for worker in batches._workers])
        assert all(batch.pixel_values.is_shared() for batch in batches)
    assert seen[0] == seen[1]
    assert get_sharing_strategy() in ("file_descriptor", "file_system")
