"""The pages of `--help`, of owlfuse and of its commands train, recipe and ablate. Imports nothing heavy."""

import argparse
from typing import Any, NoReturn

LAYOUT: dict[str, Any] = {"formatter_class": argparse.RawDescriptionHelpFormatter}
EXIT_CODES = """\
exit codes:
  0    done
  1    a file or the data is not as it should be (one line), or a fault of the program (a traceback)
  2    the configuration or the command line is wrong (one line)
  130  interrupted
"""

EXAMPLES = """\
examples:
  owlfuse train experiment=shapes_owl3
  owlfuse train experiment=shapes_owl2 model/fusion=hyperattention seed=1 name=trial
  owlfuse train model/adapter@model.adapter.llm=lora trainer.max_steps=100
  owlfuse train -m experiment=shapes_owl1,shapes_owl3 seed=0,1,2   a run of each combination, and a table
  owlfuse train experiment=mine dry_run=true plan.gpus=8 plan.gpu_memory=80   what a run would need, and stop
  owlfuse train resume=runs/shapes_owl3/trial trainer.max_steps=200
"""

RECIPE = """\
examples:
  owlfuse recipe owl1
  owlfuse recipe owl1_paper dry_run=true plan.gpus=32    what each stage trains and needs; nothing is trained
  owlfuse recipe owl3 name=second seed=1 stages.instruct.optim.lr=1e-3
  torchrun --nproc-per-node 8 -m owlfuse recipe owl1_paper trainer.devices=8 trainer.strategy=ddp data.folder=DIR

The same command again goes on: finished stages are skipped, the one that was stopped resumes from its last checkpoint.
"""

EVAL_USAGE = "owlfuse eval MODEL [task=NAME] [overrides ...]"
EVAL = """\
examples:
  owlfuse eval runs/shapes_owl3/trial                     the run's own validation sources again
  owlfuse eval runs/shapes_owl3/trial which=best          of its best checkpoint by validation loss, not its last
  owlfuse eval OUT task=gqa task.file=GQA/testdev_balanced_questions.json task.image_root=GQA/images batch_size=16
  torchrun --nproc-per-node 8 -m owlfuse eval OUT task=mmbench task.file=mmbench_dev_20230712.tsv dtype=saved

With task=<name>, MODEL may be a run, an export or an imported release. The tasks are vqav2, textvqa, gqa, docvqa, pope,
scienceqa, mmbench, captions, exact_match and perplexity, or your own in configs/task/. Keys beside task.<key>: batch_size,
max_questions, dtype, workers, out, name, which. An evaluation that was stopped goes on by the same command.
"""


ABLATE = """\
examples:
  owlfuse ablate fusion
  owlfuse ablate fusion dry_run=true                      the cells and an estimate, nothing is trained
  owlfuse ablate fusion seeds=[0] trainer.max_steps=100 name=trial
  owlfuse ablate fusion jobs=2                            two cells at a time (pip install 'owlfuse[sweep]')
  owlfuse ablate fusion launcher=submitit_slurm jobs=8 launcher.partition=gpu launcher.timeout_min=120
  owlfuse report fusion                                   at any time, of what is finished
  owlfuse report fusion baseline=owl3                     with differences to another cell

Settings of its own: jobs=N; launcher=basic (one after another), joblib, submitit_local or submitit_slurm, and launcher.<key>=
for its own keys; seeds=[0,1]; name= of the folder runs/<name>; dry_run=true; anew=true.

The same command again goes on: finished cells are skipped, what was under way resumes from its last checkpoint, and failed
cells are tried again. Runs of other code, configuration or data are never mixed in: it stops and says so. anew=true puts
them aside into runs/<name>/old and runs them again.
"""

DEMO = """\
examples:
  owlfuse demo runs/shapes_owl3/trial
  owlfuse demo runs/fusion/owl1-seed0 runs/fusion/owl3-seed0     the same question to both, answers side by side

It needs the extra `demo` (pip install 'owlfuse[demo]') and no network. Ctrl-C ends it.
"""


class TrainHelp(argparse.Action):
    """`owlfuse train --help` reads the folders, and only when asked."""

    def __call__(self, parser: argparse.ArgumentParser, namespace: Any, values: Any, option_string: Any = None) -> NoReturn:
        from owlfuse.config_files import find_folders

        folders = find_folders()
        lines = ["experiments (experiment=<name>):", "  " + (", ".join(folders.experiment_names) or "none"), ""]
        lines += ["recipes (owlfuse recipe <name>):", "  " + (", ".join(folders.recipe_names) or "none"), ""]
        lines += ["ablations (owlfuse ablate <name>):", "  " + (", ".join(folders.ablation_names) or "none"), ""]
        lines += ["groups (<group>=<option>):"]
        lines += [f"  {group:<18}{', '.join(options)}" for group, options in folders.groups.items()]
        parser.epilog = "\n".join([*lines, "", EXAMPLES])
        parser.print_help()
        raise SystemExit(0)
