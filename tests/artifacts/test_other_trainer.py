"""transformers' own Trainer trains an export as it trains its own models."""

import pytest
import torch
from transformers import Trainer, TrainingArguments

from helpers import IMAGE_SIZE, PLACEHOLDER, all_fusions, each, llm_fields, make_model
from owlfuse.artifacts.hf.modeling import OwlfuseForConditionalGeneration


def samples(model):
    """Two, of which the first has twice as many supervised tokens."""
    generator = torch.Generator().manual_seed(0)
    image = [PLACEHOLDER] * model.config.tokens_per_image
    for answer in ([11, 12, 13, 14, 15, 16], [17, 18, 19]):
        question = [21, *image, 22]
        yield {
            "input_ids": question + answer,
            "labels": [-100] * len(question) + answer,
            "pixel_values": torch.randn(3, IMAGE_SIZE, IMAGE_SIZE, generator=generator),
        }


def collate(rows):
    longest = max(len(row["input_ids"]) for row in rows)
    batch = {"input_ids": [], "attention_mask": [], "labels": []}
    for row in rows:
        padding = longest - len(row["input_ids"])
        batch["input_ids"].append(row["input_ids"] + [0] * padding)
        batch["attention_mask"].append([1] * len(row["input_ids"]) + [0] * padding)
        batch["labels"].append(row["labels"] + [-100] * padding)
    tensors = {name: torch.tensor(values) for name, values in batch.items()}
    return {**tensors, "pixel_values": torch.stack([row["pixel_values"] for row in rows])}


def trained(node, folder, **options):
    """The weights after two steps, and the logged losses."""
    torch.manual_seed(0)
    model = make_model(node, llm=llm_fields("llama"))
    wrapped = OwlfuseForConditionalGeneration.wrap(model, PLACEHOLDER, {"pad_token_id": 0})
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=2,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        optim="sgd",
        max_grad_norm=0.1,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        remove_unused_columns=False,
        disable_tqdm=True,
        **options,
    )
    trainer = Trainer(
        wrapped, arguments, train_dataset=list(samples(wrapped)), data_collator=collate
    )
    trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    return wrapped.state_dict(), losses


@each(all_fusions())
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.fast_cases(1)
def test_micro_batches_and_gradient_checkpointing_do_not_change_the_steps(
    node, checkpointing, tmp_path
):
    whole, losses = trained(node, tmp_path, per_device_train_batch_size=2)
    parts, losses_of_parts = trained(
        node,
        tmp_path,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=2,
        gradient_checkpointing=checkpointing,
    )
    assert losses_of_parts == pytest.approx(losses, abs=2e-4)  # logged with four digits
    for name, weight in whole.items():
        torch.testing.assert_close(parts[name], weight, rtol=0, atol=1e-5, msg=name)


def test_label_smoothing_is_of_the_next_token(tmp_path):
    """The Trainer computes that loss itself, and has to know that labels are to be shifted."""
    model = make_model("concat", llm=llm_fields("llama"))
    wrapped = OwlfuseForConditionalGeneration.wrap(model, PLACEHOLDER, {"pad_token_id": 0})
    arguments = TrainingArguments(
        output_dir=str(tmp_path), label_smoothing_factor=1e-6, report_to=[], use_cpu=True
    )
    trainer = Trainer(wrapped, arguments, data_collator=collate)
    batch = collate(list(samples(wrapped)))
    with torch.no_grad():
        smoothed = trainer.compute_loss(wrapped, dict(batch))
        torch.testing.assert_close(smoothed, wrapped(**batch).loss, rtol=1e-4, atol=1e-4)
