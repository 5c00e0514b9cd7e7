"""Small files that look as the benchmarks' published ones do, with pictures beside them."""

import base64
import csv
import io
import json

from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

TEMPLATE = (
    "{% for message in messages %}{{ message.role + ': ' + message.content }}"
    "{% if message.role == 'assistant' %}{{ eos_token }}{% endif %}{{ ' ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
)


def small_tokenizer(image=None, place=4):
    """Byte-level, 300 tokens; `image` is its token of that `place`."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = [
        "<unk>",
        "<s>",
        "</s>",
        "<pad>",
        *([*[f"<extra_{n}>" for n in range(4, place)], image] if image else []),
    ]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(
        ["What is in the image? Answer the question using a single word or phrase."] * 3, trainer
    )
    tokens = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=TEMPLATE, **tokens)


def picture(path, color):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (40, 30), color).save(path)


def dump(path, content):
    path.write_text(json.dumps(content))
    return path


def vqav2(folder):
    """v2_OpenEnded_mscoco_val2014_questions.json and v2_mscoco_val2014_annotations.json."""
    head = {
        "info": {"description": "This is v2.0 of the VQA dataset."},
        "license": {},
        "data_subtype": "val2014",
    }
    asked = [
        (
            262148000,
            262148,
            "Where is he looking?",
            "other",
            ["down"] * 7 + ["at table", "skateboard", "table"],
        ),
        (
            262148001,
            262148,
            "What are the people in the background doing?",
            "other",
            ["spectating"] * 5 + ["watching"] * 5,
        ),
        (393225000, 393225, "How many bowls are there?", "number", ["2"] * 9 + ["3"]),
        (393225001, 393225, "Is this soup?", "yes/no", ["yes"] * 10),
    ]
    questions = [
        {"image_id": image, "question": text, "question_id": key}
        for key, image, text, _, _ in asked
    ]
    annotations = [
        {
            "question_type": "none of the above",
            "multiple_choice_answer": answers[0],
            "answers": [
                {"answer": a, "answer_confidence": "yes", "answer_id": n}
                for n, a in enumerate(answers, 1)
            ],
            "image_id": image,
            "answer_type": kind,
            "question_id": key,
        }
        for key, image, _, kind, answers in reversed(asked)
    ]
    kind = {"task_type": "Open-Ended", "data_type": "mscoco"}
    dump(
        folder / "v2_OpenEnded_mscoco_val2014_questions.json",
        {**head, **kind, "questions": questions},
    )
    dump(
        folder / "v2_mscoco_val2014_annotations.json",
        {**head, "data_type": "mscoco", "annotations": annotations},
    )
    for image, color in ((262148, "red"), (393225, "blue")):
        picture(folder / f"COCO_val2014_{image:012d}.jpg", color)
    return {
        "file": folder / "v2_OpenEnded_mscoco_val2014_questions.json",
        "annotations": folder / "v2_mscoco_val2014_annotations.json",
    }


def textvqa(folder):
    """TextVQA_0.5.1_val.json."""
    camera = ["nous les gosses", "clos culombu"] + ["dakota digital"] * 3 + ["dakota"] * 5
    records = [
        {
            "question": question,
            "image_id": image,
            "image_classes": ["Cassette deck", "Printer"],
            "flickr_original_url": "https://farm2.staticflickr.com/4/5566811_bc00d504a6_o.jpg",
            "image_width": 1024,
            "image_height": 730,
            "answers": answers,
            "question_tokens": question.split(),
            "question_id": number,
            "set_name": "val",
        }
        for number, question, image, answers in [
            (
                34602,
                "what is the brand of this camera?",
                "003a8ae2ef43b901",
                camera,
            ),
            (
                34603,
                "what does the small white text spell?",
                "4b13d3cd5b6a9bf1",
                ["copenhagen"] * 9 + ["thursday"],
            ),
        ]
    ]
    head = {"dataset_type": "val", "dataset_name": "textvqa", "dataset_version": "0.5.1"}
    dump(folder / "TextVQA_0.5.1_val.json", {**head, "data": records})
    for image, color in (("003a8ae2ef43b901", "red"), ("4b13d3cd5b6a9bf1", "white")):
        picture(folder / "train_images" / f"{image}.jpg", color)
    return {"file": folder / "TextVQA_0.5.1_val.json", "image_root": folder / "train_images"}


def gqa(folder):
    """testdev_balanced_questions.json."""
    asked = [
        ("201307251", "Is it overcast?", "n161313", "no", "verify"),
        ("201640614", "Who is wearing the dress?", "n235859", "woman", "query"),
        ("202225914", "Is the tall clock small or large?", "n161313", "large", "choose"),
    ]
    content = {
        key: {
            "semantic": [{"operation": "select", "dependencies": [], "argument": "scene"}],
            "entailed": [],
            "equivalent": [key],
            "question": question,
            "imageId": image,
            "isBalanced": True,
            "groups": {"global": None, "local": "13-weather_overcast"},
            "answer": answer,
            "semanticStr": "select: scene->verify weather: overcast [0]",
            "annotations": {"answer": {}, "question": {}, "fullAnswer": {}},
            "types": {"detailed": "weatherVerify", "semantic": "global", "structural": kind},
            "fullAnswer": "No, it is clear.",
        }
        for key, question, image, answer, kind in asked
    }
    dump(folder / "testdev_balanced_questions.json", content)
    for image, color in (("n161313", "gray"), ("n235859", "green")):
        picture(folder / "images" / f"{image}.jpg", color)
    return {"file": folder / "testdev_balanced_questions.json", "image_root": folder / "images"}


def docvqa(folder):
    """val_v1.0_withQT.json."""
    asked = [
        (
            49153,
            "What is the \u2018actual\u2019 value per 1000, during the year 1975?",
            "pybv0228_81",
            ["0.28"],
        ),
        (
            24580,
            "What is name of university?",
            "nkbl0226_1",
            ["university of california", "University of California"],
        ),
    ]
    records = [
        {
            "questionId": key,
            "question": question,
            "question_types": ["figure/diagram"],
            "image": f"documents/{page}.png",
            "docId": 14465,
            "ucsf_document_id": page.split("_")[0],
            "ucsf_document_page_no": page.split("_")[1],
            "answers": answers,
            "data_split": "val",
        }
        for key, question, page, answers in asked
    ]
    head = {"dataset_name": "SP-DocVQA", "dataset_version": "1.0", "dataset_split": "val"}
    dump(folder / "val_v1.0_withQT.json", {**head, "data": records})
    for record in records:
        picture(folder / record["image"], "white")
    return {"file": folder / "val_v1.0_withQT.json"}


def pope(folder):
    """coco_pope_{random,popular,adversarial}.json, which hold an object a line."""
    for category, absent in (("random", "toilet"), ("popular", "car"), ("adversarial", "backpack")):
        lines = [
            {
                "question_id": n,
                "image": image,
                "text": f"Is there a {thing} in the image?",
                "label": label,
            }
            for n, (image, thing, label) in enumerate(
                [
                    ("COCO_val2014_000000310196.jpg", "snowboard", "yes"),
                    ("COCO_val2014_000000310196.jpg", absent, "no"),
                    ("COCO_val2014_000000210789.jpg", "person", "yes"),
                ],
                1,
            )
        ]
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (folder / f"coco_pope_{category}.json").write_text(text)
    for name, color in (("310196", "white"), ("210789", "blue")):
        picture(folder / "val2014" / f"COCO_val2014_000000{name}.jpg", color)
    return {
        "file": folder / "coco_pope_{random,popular,adversarial}.json",
        "image_root": folder / "val2014",
    }


def scienceqa(folder):
    """problems.json and pid_splits.json."""
    common = {
        "task": "closed choice",
        "grade": "grade5",
        "topic": "physics",
        "lecture": "",
        "solution": "",
        "split": "test",
    }
    problems = {
        "1": {
            "question": "Which of these states is farthest north?",
            "choices": ["West Virginia", "Louisiana", "Arizona", "Oklahoma"],
            "answer": 0,
            "hint": "",
            "image": "image.png",
            "subject": "social science",
            "category": "Geography",
            "skill": "Read a map: cardinal directions",
            **common,
            "split": "train",
        },
        "4": {
            "question": (
                "Which figure of speech is used in this text?\nSing, O goddess, the anger of "
                "Achilles."
            ),
            "choices": ["chiasmus", "apostrophe"],
            "answer": 1,
            "hint": "",
            "image": None,
            "subject": "language science",
            "category": "Literary devices",
            "skill": "Classify the figure of speech",
            **common,
        },
        "11": {
            "question": "Will these magnets attract or repel each other?",
            "choices": ["attract", "repel"],
            "answer": 0,
            "hint": "Two magnets are placed as shown.",
            "image": "image.png",
            "subject": "natural science",
            "category": "Magnets",
            "skill": "Predict whether magnets will attract or repel",
            **common,
        },
    }
    dump(folder / "problems.json", problems)
    dump(
        folder / "pid_splits.json",
        {"train": ["1"], "val": [], "test": ["4", "11"], "minival": [], "minitest": []},
    )
    picture(folder / "images" / "test" / "11" / "image.png", "red")
    return {
        "file": folder / "problems.json",
        "splits": folder / "pid_splits.json",
        "image_root": folder / "images",
    }


def encoded(color):
    file = io.BytesIO()
    Image.new("RGB", (24, 24), color).save(file, "JPEG")
    return base64.b64encode(file.getvalue()).decode()


def mmbench(folder):
    """mmbench_dev_20230712.tsv; the third row shows the first one's picture, and has a line
    break in its question."""
    columns = [
        "index",
        "question",
        "hint",
        *"ABCD",
        "answer",
        "category",
        "image",
        "source",
        "l2-category",
        "comment",
        "split",
    ]
    rows = [
        {
            "index": 241,
            "question": (
                "Identify the question that Madelyn and Tucker's experiment can best answer."
            ),
            "answer": "B",
            "hint": "The passage below describes an experiment.",
            "A": "Does it slide faster?",
            "B": ("Does wax matter?"),
            "category": "identity_reasoning",
            "image": encoded("red"),
            "l2-category": "attribute_reasoning",
        },
        {
            "index": 252,
            "question": "Which one is the correct caption of this image?",
            "answer": "D",
            "hint": "nan",
            "A": "A cat",
            "B": "A dog",
            "C": "A bowl, full",
            "D": 'A "stop" sign',
            "category": "image_topic",
            "image": encoded("blue"),
            "l2-category": "coarse_perception",
        },
        {
            "index": 253,
            "question": "What is right?\nChoose.",
            "answer": "A",
            "hint": "",
            "A": "yes",
            "B": "no",
            "C": "maybe",
            "category": "image_topic",
            "image": "241",
            "l2-category": "coarse_perception",
        },
    ]
    with (folder / "mmbench_dev_20230712.tsv").open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, delimiter="\t", lineterminator="\n")
        writer.writeheader()
        writer.writerows({"source": "scienceqa", "split": "dev", **row} for row in rows)
    return {"file": folder / "mmbench_dev_20230712.tsv"}


def captions(folder):
    """captions_val2014.json."""
    ids = {391895: "red", 522418: "blue", 184613: "green"}
    said = [
        (391895, "A man with a red helmet on a small moped on a dirt road. "),
        (391895, "Man riding a motor bike on a dirt road on the countryside."),
        (522418, "A woman wearing a net on her head cutting a cake. "),
        (522418, "A woman cutting a large white sheet cake."),
        (184613, "A child holding a flowered umbrella and petting a yak."),
    ]
    content = {
        "info": {
            "description": "This is stable 1.0 version of the 2014 MS COCO dataset.",
            "year": 2014,
        },
        "images": [
            {
                "license": 3,
                "file_name": f"COCO_val2014_{key:012d}.jpg",
                "height": 360,
                "width": 640,
                "id": key,
            }
            for key in ids
        ],
        "licenses": [],
        "annotations": [
            {"image_id": image, "id": n, "caption": text}
            for n, (image, text) in enumerate(said, 770337)
        ],
    }
    dump(folder / "captions_val2014.json", content)
    for key, color in ids.items():
        picture(folder / "val2014" / f"COCO_val2014_{key:012d}.jpg", color)
    return {"file": folder / "captions_val2014.json", "image_root": folder / "val2014"}


def chats(folder):
    """A file of chats as LLaVA's instruction data."""
    records = [
        {
            "id": "000000033471",
            "image": "train2017/000000033471.jpg",
            "conversations": [
                {"from": "human", "value": "<image>\nWhat are the colors of the bus in the image?"},
                {"from": "gpt", "value": "white and red"},
                {"from": "human", "value": "What feature can be seen on the back of the bus?"},
                {"from": "gpt", "value": "an advertisement"},
            ],
        },
        {
            "id": "text",
            "conversations": [
                {"from": "human", "value": "Say yes."},
                {"from": "gpt", "value": "yes"},
            ],
        },
    ]
    dump(folder / "chats.json", records)
    picture(folder / "train2017" / "000000033471.jpg", "red")
    return {"file": folder / "chats.json"}


BENCHMARKS = {
    "vqav2": vqav2,
    "textvqa": textvqa,
    "gqa": gqa,
    "docvqa": docvqa,
    "pope": pope,
    "scienceqa": scienceqa,
    "mmbench": mmbench,
    "captions": captions,
    "exact_match": chats,
    "perplexity": chats,
}
