"""What a user meets first: each mishap ends in one line that says what was found, what was
expected and what to do."""

import json
import os
import re
import resource
import runpy
import shutil
import socket
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from helpers import REPO, SHAPE_COUNTS, SHORT_ANSWERS, SMALL_RUN
from owlfuse import __main__, __version__
from owlfuse.core import files, hub_access
from owlfuse.core.errors import DataError, disk_error_reason, disk_errors_as_data_errors
from owlfuse.core.files import atomic_directory
from owlfuse.data.shapes.write import write_shapes

TRAIN = [
    "train",
    "experiment=shapes_owl3",
    *SMALL_RUN,
    "trainer.max_steps=2",
    "trainer.val_check_interval=2",
    "name=x",
]
CORES = len(os.sched_getaffinity(0))
no_gpu = pytest.mark.skipif(
    torch.cuda.is_available() or torch.backends.mps.is_available(), reason="there is a GPU"
)


@pytest.fixture(scope="module", autouse=True)
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("work")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(path)
        write_shapes("data/shapes", **SHAPE_COUNTS)
        Path("a_file").touch()
        yield path


def told(words, capsys):
    """Exit code and the one line of a command in this process."""
    code = __main__.main([str(word) for word in words])
    lines = [
        line for line in capsys.readouterr().err.splitlines() if line.startswith("owlfuse: error: ")
    ]
    assert len(lines) == 1
    return code, lines[0].removeprefix("owlfuse: error: ")


STEPS = "expected a whole number of optimizer steps"
MISHAPS = {
    "max_steps below 0": (["trainer.max_steps=-5"], f"trainer.max_steps is -5, {STEPS} from 1 on"),
    "no steps": (["trainer.max_steps=0"], f"trainer.max_steps is 0, {STEPS} from 1 on"),
    "endless": (["trainer.max_steps=-1"], f"trainer.max_steps is -1, {STEPS} from 1 on"),
    "no interval": (
        ["trainer.val_check_interval=0"],
        f"trainer.val_check_interval is 0, {STEPS} between two validations",
    ),
    "negative interval": (
        ["trainer.val_check_interval=-3"],
        f"trainer.val_check_interval is -3, {STEPS} between",
    ),
    "a share as interval": (
        ["trainer.val_check_interval=0.5"],
        f"trainer.val_check_interval is 0.5, {STEPS} between",
    ),
    "null as interval": (
        ["trainer.val_check_interval=null"],
        f"trainer.val_check_interval is null, {STEPS} between",
    ),
    "epochs that end early": (
        ["+trainer.limit_train_batches=100"],
        "trainer.limit_train_batches is 100, expected none",
    ),
    "no batches": (
        ["+trainer.limit_train_batches=0"],
        "trainer.limit_train_batches is 0, expected none",
    ),
    "a single batch": (
        ["+trainer.limit_train_batches=1"],
        "trainer.limit_train_batches is 1, expected none",
    ),
    "the same batches": (
        ["+trainer.overfit_batches=1"],
        "trainer.overfit_batches is 1, expected none: it would train the same samples",
    ),
    "no logging": (["trainer.log_every_n_steps=0"], f"trainer.log_every_n_steps is 0, {STEPS}"),
    "gradients turned around": (
        ["trainer.gradient_clip_val=-1"],
        "gradient_clip_val is -1, expected a norm of at least 0",
    ),
    "precision misspelt": (
        ["trainer.precision=bf16-mixt"],
        "trainer.precision: 'bf16-mixt' is not one of",
    ),
    "strategy misspelt": (
        ["trainer.strategy=ddpp"],
        "command line: trainer: You selected an invalid strategy name",
    ),
    "accelerator misspelt": (
        ["trainer.accelerator=gpuu"],
        "trainer.accelerator is gpuu: expected one of auto, gpu, ",
    ),
    "several machines": (
        ["+trainer.num_nodes=2"],
        "num_nodes is 2: nothing has started this process on several machines",
    ),
    "devices of no number": (
        ["trainer.devices=-3"],
        "command line: trainer: `devices` selected with `CPUAccelerator`",
    ),
    "no folder for runs": (["runs=/proc/none"], "/proc/none/shapes_owl3"),
    "a file for runs": (["runs=a_file"], "a_file"),
}
WITHOUT_GPU = {
    "trainer=gpu": (
        ["trainer=gpu"],
        "torch finds no GPU on this machine; to train on the CPU, write trainer=cpu",
    ),
    "cuda": (
        ["trainer.accelerator=cuda"],
        "trainer.accelerator is cuda: torch finds no GPU on this machine",
    ),
    "tpu": (["trainer.accelerator=tpu"], "trainer.accelerator is tpu: torch finds no such device"),
    "mps": (["trainer.accelerator=mps"], "trainer.accelerator is mps: torch finds no such device"),
    "more processes than cores": (
        ["trainer=fsdp", f"trainer.devices={CORES + 1}"],
        f"there is no GPU, and this machine has {CORES} CPU core",
    ),
    "ddp likewise": (
        ["trainer=ddp", f"trainer.devices={CORES + 6}"],
        "say trainer.accelerator=cpu to start as many",
    ),
}


@pytest.mark.parametrize(("words", "message"), MISHAPS.values(), ids=MISHAPS)
@pytest.mark.fast_cases(3)
def test_a_trainer_that_cannot_work_is_told_in_one_line(words, message, capsys, monkeypatch):
    monkeypatch.setattr(
        "owlfuse.training.module.MultimodalModule.configure_model",
        lambda _: pytest.fail("a weight is made"),
    )
    code, line = told([*TRAIN, *words], capsys)
    assert message in line
    assert code == (1 if words[0].startswith("runs=") else 2)
    assert not Path("runs/shapes_owl3/x").exists()


@no_gpu
@pytest.mark.parametrize(("words", "message"), WITHOUT_GPU.values(), ids=WITHOUT_GPU)
@pytest.mark.fast_cases(3)
def test_what_this_machine_does_not_have_is_told_in_one_line(words, message, capsys, monkeypatch):
    monkeypatch.setattr(
        "owlfuse.training.module.MultimodalModule.configure_model",
        lambda _: pytest.fail("a weight is made"),
    )
    code, line = told([*TRAIN, *words], capsys)
    assert (code, message in line) == (2, True), line


@pytest.mark.parametrize("wanted", [3, "3", [0, 1, 2]])
@pytest.mark.fast_cases(1)
def test_more_gpus_than_there_are_are_refused(wanted, monkeypatch):
    from owlfuse.config.compose import compose
    from owlfuse.core.errors import ConfigError
    from owlfuse.training.machine_checks import check_machine

    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    for words in (["trainer=gpu"], ["trainer=ddp"]):
        with pytest.raises(ConfigError, match=r"trainer.devices is .*: this machine has 2 GPUs"):
            check_machine(compose(["experiment=shapes_owl3", *words, f"trainer.devices={wanted}"]))
        check_machine(compose(["experiment=shapes_owl3", *words, "trainer.devices=2"]))


@no_gpu
def test_processes_on_the_cpu_are_told_where_gpus_may_have_been_meant(monkeypatch):
    from owlfuse.config.compose import compose
    from owlfuse.training.machine_checks import check_machine

    monkeypatch.setattr("os.sched_getaffinity", lambda _: range(16))
    for name in ("RANK", "LOCAL_RANK", "SLURM_PROCID"):
        monkeypatch.delenv(name, raising=False)
    for kind in ("ddp", "fsdp", "tp"):
        notice = check_machine(
            compose(["experiment=shapes_owl3", f"trainer={kind}", "trainer.devices=8"])
        )
        assert notice == "there is no GPU: trainer.devices=8 starts 8 processes on the CPU"
    asked = compose(
        ["experiment=shapes_owl3", "trainer=ddp", "trainer.devices=99", "trainer.accelerator=cpu"]
    )
    assert check_machine(asked) is None


@pytest.fixture(scope="module")
def silent_run(folder):
    """A run without evaluation, loggers and progress bar."""
    without = ["evaluation=null", "logger=null", "trainer.enable_progress_bar=false"]
    assert (
        __main__.main([*(word for word in TRAIN if word != "name=x"), "name=silent", *without]) == 0
    )
    return Path("runs/shapes_owl3/silent")


@pytest.mark.slow
def test_a_run_without_evaluation_has_empty_metrics_and_can_be_evaluated_later(silent_run, capsys):
    results = json.loads((silent_run / "results.json").read_text())
    assert (results["metrics"], results["questions"], results["steps"]) == ({}, {}, 2)
    assert not (silent_run / "answers.jsonl").exists()
    assert __main__.main(["eval", str(silent_run)]) == 0
    assert json.loads((silent_run / "results.json").read_text())["metrics"]["val/loss"] > 0


def test_a_folder_of_another_kind_is_named_as_what_it_is(silent_run, capsys):
    if not Path("out").exists():
        assert __main__.main(["export", str(silent_run), "out"]) == 0
    Path("runs/grid").mkdir()
    Path("runs/grid/ablation.json").write_text("{}")
    checkpoint = next((silent_run / "checkpoints").glob("step_*.ckpt"))
    capsys.readouterr()
    export = (
        "out is an exported model and no run; owlfuse eval out task=NAME evaluates it, and "
        "owlfuse train init_from=out"
    )
    run, of_run = (
        f"{silent_run} is a run; owlfuse export {silent_run} OUT",
        f"is of the checkpoints of the run {silent_run}",
    )
    cases = [
        (["eval", "out"], export),
        (["train", "resume=out"], export),
        (["report", "out"], "it is an exported model and no run"),
        (["report", silent_run], "it is a run"),
        (["train", "experiment=shapes_owl3", f"init_from={silent_run}"], run),
        *(
            ([command, path], of_run)
            for command in ("eval", "chat")
            for path in (checkpoint, checkpoint.parent)
        ),
        (["export", checkpoint, "other"], of_run),
        (["train", f"resume={checkpoint}"], of_run),
        *(
            ([command, "runs/shapes_owl3"], f"holds runs and is none; name one of {silent_run}")
            for command in ("eval", "chat")
        ),
        (["export", "runs/shapes_owl3", "other"], "holds runs and is none"),
        (["eval", "runs/grid"], "is the folder of an ablation"),
        (["chat", "runs/grid"], "is the folder of an ablation"),
        (["chat", REPO / "experiments/fusion"], "owlfuse ablate fusion runs it"),
        (["eval", REPO / "experiments/owl3"], "owlfuse recipe owl3 runs it"),
    ]
    for words, message in cases:
        code, line = told(words, capsys)
        assert code in (1, 2)
        assert message in line, (words, line)
    shutil.rmtree("runs/grid")


FILES = {
    "config.yaml": ".config.yaml.temporary",
    "metrics.csv": "metrics.csv",
    "answers.jsonl": ".answers.jsonl.temporary",
    "mixture.json": ".mixture.json.temporary",
    "contact_sheet.png": "contact_sheet.png",
}
"""The file that is written first; where it is written atomically, a temporary one."""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")
@pytest.mark.parametrize("name", FILES)
def test_a_full_disk_is_one_line_whatever_is_written(name, monkeypatch, capsys):
    name_of_all = SimpleNamespace(hex="temporary")
    monkeypatch.setattr(files, "uuid", SimpleNamespace(uuid4=lambda: name_of_all))
    run = Path("runs/shapes_owl3/x")
    shutil.rmtree(run, ignore_errors=True)
    run.mkdir(parents=True)
    (run / FILES[name]).symlink_to("/dev/full")
    code, line = told([*TRAIN, *SHORT_ANSWERS], capsys)
    assert code == 1
    assert "No space left on device" in line
    assert str(run) in line
    assert ("go on with: owlfuse train resume=" in line) == any(run.glob("checkpoints/step_*.ckpt"))
    # an empty folder is gone already
    shutil.rmtree(run, ignore_errors=True)


def test_only_errors_about_writing_are_taken_for_a_full_disk(tmp_path):
    with (
        pytest.raises(DataError, match=r"No space left on device; make room"),
        disk_errors_as_data_errors(tmp_path),
    ):
        raise OSError(28, "x")
    for error in (OSError(2, "x"), ConnectionError("x"), ValueError("x")):
        with pytest.raises(type(error)), disk_errors_as_data_errors(tmp_path):
            raise error


WRITERS = {
    "tokenizers": lambda path: Tokenizer(
        WordLevel({str(number): number for number in range(500)})
    ).save(str(path / "t.json")),
    "safetensors": lambda path: save_file({"a": torch.zeros(5000)}, path / "a.safetensors"),
}


@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)
def test_a_folder_that_a_library_cannot_write_is_one_line_and_gone(write, tmp_path):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        with (
            pytest.raises(
                DataError,
                match="out could not be written: .*File too large.*; make room or permit it",
            ),
            atomic_directory(tmp_path / "out") as folder,
        ):
            write(folder)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_below_a_file_is_told_as_a_place_that_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    for make in (lambda: (tmp_path / "file/x").write_text("a"), lambda: tmp_path.write_text("a")):
        with pytest.raises(OSError) as caught:  # which of them is the system's to say  # noqa: PT011
            make()
        assert disk_error_reason(caught.value)


@pytest.mark.parametrize(
    "argv", [[sys.executable, "-m", "owlfuse", "--version"], ["owlfuse", "--version"]]
)
def test_the_version_is_told_at_once(argv):
    argv = [shutil.which(argv[0], path=Path(sys.executable).parent) or argv[0], *argv[1:]]
    done = subprocess.run(argv, capture_output=True, text=True, check=True)
    assert done.stdout == f"owlfuse {__version__}\n"


COMPLETED = {
    "owlfuse rec": ["recipe"],
    "owlfuse train exp": ["experiment="],
    "owlfuse train experiment=shapes_owl": [
        "experiment=shapes_owl1",
        "experiment=shapes_owl2",
        "experiment=shapes_owl3",
    ],
    "owlfuse train seed=1 model/fusion=h": ["model/fusion=hyperattention"],
    "owlfuse config model/adapter@model.adapter.llm=lo": ["model/adapter@model.adapter.llm=lora"],
    "owlfuse recipe owl3": ["owl3", "owl3_paper"],
    "owlfuse ablate fus": ["fusion", "fusions_all"],
    "owlfuse eval out task=gq": ["task=gqa"],
    "owlfuse completion z": ["zsh"],
}


@pytest.mark.parametrize("line", COMPLETED)
def test_words_are_completed(line, capsys):
    assert __main__.main(["completion", "words", line]) == 0
    assert capsys.readouterr().out.split() == COMPLETED[line]


@pytest.mark.skipif(shutil.which("bash") is None, reason="there is no bash")
@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["owlfuse", "rec"], "recipe"),
        (["owlfuse", "train", "experiment", "=", "shapes_owl3"], "shapes_owl3"),
        (["owlfuse", "train", "model/adapter", "@", "model.adapter.llm", "=", "lo"], "lora"),
    ],
)
def test_bash_completes_words_that_it_splits_at_its_own_places(words, expected):
    line = re.sub(r" ([=@]) ", r"\1", " ".join(words))
    script = f"""
owlfuse() {{ "{sys.executable}" -m owlfuse "$@"; }}
eval "$(owlfuse completion bash)"
COMP_LINE='{line}'; COMP_POINT=${{#COMP_LINE}}; COMP_WORDS=({" ".join(f"'{word}'" for word in words)})
COMP_CWORD={len(words) - 1}; _owlfuse; printf '%s\\n' "${{COMPREPLY[@]}}"
"""
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.split() == [expected]


class Hub(BaseHTTPRequestHandler):
    """Answers every question with one code."""

    code, reason = 404, "RepoNotFound"

    def do_HEAD(self):
        self.send_response(self.code)
        self.send_header("X-Error-Code", self.reason)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_):
        pass


@pytest.fixture(params=["refuses", "hangs", "has none", "gated"])
def hub(request):
    """A hub on loopback, and what is to be said of it."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{listening.getsockname()[1]}"
        if request.param == "hangs":
            listening.listen()
        if request.param in ("refuses", "hangs"):
            yield address, "no connection to the hub"
            return
    answers = {
        "has none": (404, "RepoNotFound", "has no such model"),
        "gated": (403, "GatedRepo", "terms"),
    }
    code, reason, message = answers[request.param]
    handler = type("Answer", (Hub,), {"code": code, "reason": reason})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}", message
        server.shutdown()


@pytest.mark.fast_cases(1)
def test_what_cannot_be_had_from_the_hub_is_named_within_seconds(
    hub, monkeypatch, capsys, tmp_path
):
    address, message = hub
    endpoint = hub_access.constants.ENDPOINT
    monkeypatch.setattr(hub_access.constants, "ENDPOINT", address)
    monkeypatch.setattr(hub_access.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub_access, "TIMEOUT", 0.5)
    monkeypatch.setattr(
        hub_access, "hf_hub_url", lambda name, file: f"{address}/{name}/resolve/main/{file}"
    )
    assert endpoint != address
    llm = ["model/llm=qwen2_7b", "model.llm.pretrained=nobody/llm", "model.llm.architecture=null"]
    for words, name, remedy in (
        (["data.tokenizer=nobody/nothing"], "nobody/nothing", "a folder with tokenizer.json"),
        (llm, "nobody/llm", "set model.llm.pretrained"),
        (["model.vision.pretrained=true"], "timm/resnet10t", "set model.vision.weights"),
    ):
        hub_access.check_hub_has.cache_clear()
        hub_access.ask.cache_clear()
        code, line = told([*TRAIN, *words], capsys)
        assert code in (1, 2)
        assert all(part in line for part in (name, message, remedy)), line
        shutil.rmtree("runs/shapes_owl3/x", ignore_errors=True)


def test_the_readmes_part_is_complete_as_it_stands(tmp_path):
    """The code and the file name that the README gives, and nothing else."""
    page = (REPO / "README.md").read_text()
    (code,) = re.findall(r"^```python\n(.*?)^```$", page, flags=re.MULTILINE | re.DOTALL)
    file = tmp_path / "mean.py"
    file.write_text(code)
    connector = runpy.run_path(str(file))["MeanConnector"](
        in_width=6, out_width=4, patches=9, grid=(3, 3)
    )
    features = torch.randn(2, 9, 6)
    torch.testing.assert_close(connector(features)[:, 0], connector.proj(features.mean(1)))
    assert connector.tokens == connector(features).shape[1]


def test_a_variable_that_lightning_would_take_is_refused():
    from owlfuse.core.errors import ConfigError
    from owlfuse.training.machine_checks import check_environment

    check_environment({"PL_TRAINER_OVERFIT_BATCHES": "", "PL_GLOBAL_SEED": "1"})
    with pytest.raises(ConfigError, match=r"PL_TRAINER_MAX_TIME=1: .* \+trainer\.max_time="):
        check_environment({"PL_TRAINER_MAX_TIME": "1"})


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["init_from="], "init_from= is empty"),
        (["resume="], "resume= is empty; name a run's folder"),
        (["runs="], "runs= is empty"),
        (["seed=-1"], "seed is -1, expected a number from 0 to"),
        (["seed=4294967296"], "seed is 4294967296, expected"),
    ],
)
@pytest.mark.fast_cases(5)
def test_an_empty_or_impossible_word_is_refused(words, message):
    from owlfuse.config.compose import compose
    from owlfuse.core.errors import ConfigError

    with pytest.raises(ConfigError, match=message):
        compose(["experiment=shapes_owl3", *words])


@pytest.mark.parametrize(
    ("variables", "devices", "refused"),
    [
        ({"TORCHELASTIC_RUN_ID": "a", "RANK": "0", "WORLD_SIZE": "2"}, 1, True),
        ({"TORCHELASTIC_RUN_ID": "a", "RANK": "0", "WORLD_SIZE": "2"}, 2, False),
        ({"TORCHELASTIC_RUN_ID": "a", "RANK": "0", "WORLD_SIZE": "4"}, 2, True),
        ({"RANK": "1"}, 1, True),
        ({"WORLD_SIZE": "2"}, 1, False),
    ],
)
@pytest.mark.fast_cases(5)
def test_processes_of_a_launcher_are_those_of_the_trainer(variables, devices, refused, monkeypatch):
    """Else each would train alone, into one folder."""
    from lightning.pytorch.utilities import rank_zero_only

    from owlfuse.config.compose import compose
    from owlfuse.core.errors import ConfigError
    from owlfuse.training.machine_checks import check_launcher

    for name in ("TORCHELASTIC_RUN_ID", "RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(rank_zero_only, "rank", int(variables.get("RANK", 0)), raising=False)
    trainer = SimpleNamespace(num_nodes=1, num_devices=devices, world_size=devices, strategy=None)
    config = compose(["experiment=shapes_owl3"])
    if refused:
        with pytest.raises(ConfigError, match=r"trainer.devices is .*: a launcher has started"):
            check_launcher(trainer, config)
    else:
        check_launcher(trainer, config)


@pytest.mark.parametrize(
    ("variables", "refused"),
    [
        ({"SLURM_NTASKS": "1"}, True),
        ({"SLURM_NTASKS": "1", "SLURM_JOB_NAME": "interactive"}, False),
        ({"SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "2"}, False),
    ],
)
def test_a_batch_script_without_srun_does_not_train_on_one_of_its_devices(
    variables, refused, monkeypatch
):
    from lightning.pytorch import Trainer
    from lightning.pytorch.strategies import DDPStrategy

    from owlfuse.config.compose import compose
    from owlfuse.core.errors import ConfigError
    from owlfuse.training.machine_checks import check_launcher

    slurm = {"SLURM_JOB_ID": "7", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0"}
    for name, value in {"SLURM_JOB_NAME": "train.sh", **slurm, **variables}.items():
        monkeypatch.setenv(name, value)
    trainer = Trainer(accelerator="cpu", devices=2, strategy=DDPStrategy(), logger=False)
    config = compose(["experiment=shapes_owl3", "trainer.devices=2"])
    if refused:
        with pytest.raises(ConfigError, match=r"trainer.devices is 2: SLURM has 1 tasks"):
            check_launcher(trainer, config)
    else:
        check_launcher(trainer, config)
