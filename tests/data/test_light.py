"""What reading samples does not import."""

import json
import subprocess
import sys

import pytest

CODE = """
import sys
from pathlib import Path
from owlfuse.data.formats.{module} import {name}
source = {name}(Path(sys.argv[1]))
assert source[len(source) - 1].messages[1]["content"][0]["text"] == "Yes."
print([name for name in ("torch", "transformers", "lightning") if name in sys.modules])
"""
CHAT = {"conversations": [{"from": "human", "value": "Is it?"}, {"from": "gpt", "value": "Yes."}]}
TASK = {"instruction": "Is it?", "output": "Yes."}
TURNS = {
    "messages": [{"role": "user", "content": "Is it?"}, {"role": "assistant", "content": "Yes."}]
}


@pytest.mark.parametrize(
    ("module", "name", "row"),
    [("llava", "LLaVA", CHAT), ("messages", "Messages", TURNS), ("alpaca", "Alpaca", TASK)],
)
def test_a_source_is_opened_and_read_without_torch_and_its_half_gigabyte(
    tmp_path, module, name, row
):
    file = tmp_path / "chats.jsonl"
    file.write_text(f"{json.dumps(row)}\n" * 3)
    code = CODE.format(module=module, name=name)
    result = subprocess.run(
        [sys.executable, "-c", code, str(file)], capture_output=True, text=True, check=True
    )
    assert result.stdout.split() == ["[]"]
