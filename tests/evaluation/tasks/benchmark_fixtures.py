"""Three rows of every benchmark, written as parquet in its published schema with small PNGs."""

import io
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from meteor_jax.data.sources.records import TaskSpec
from meteor_jax.evaluation.tasks.benchmarks.datasets import FOLDERS
from meteor_jax.evaluation.tasks.registry import REGISTRY

IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
SIZE = (40, 20)  # width and height of every image


def image(number: int) -> dict:
    buffer = io.BytesIO()
    Image.new("RGB", SIZE, (60 * number, 90, 200 - 40 * number)).save(buffer, format="PNG")
    return {"bytes": buffer.getvalue(), "path": f"{number}.png"}


IMAGES = [image(number) for number in range(4)]
TEN = [["net"] * 8 + ["a net"] * 2, ["2"] * 3 + ["two"] * 7, ["yes"] * 10]


def numbered(answers):
    return [
        {"answer": answer, "answer_confidence": "yes", "answer_id": i}
        for i, answer in enumerate(answers, start=1)
    ]


def document(number, answers, **more):
    return {
        "questionId": str(100 + number),
        "question": f"What is line {number}?",
        "image": IMAGES[number],
        "answers": answers,
        "data_split": "val",
        **more,
    }


def page(number):
    return {
        "question_types": ["layout"],
        "docId": number,
        "ucsf_document_id": f"doc{number // 2}",
        "ucsf_document_page_no": str(number // 2),
    }


def mmbench(index, base, letter, options, hint="nan"):
    return {
        "index": index,
        "question": f"Which of {base}?",
        "hint": hint,
        "answer": letter,
        **dict(zip("ABCD", options, strict=True)),
        "category": "ocr",
        "image": IMAGES[base],
        "source": "s",
        "L2-category": "perception",
        "comment": "nan",
        "split": "dev",
    }


def mmmu(subject, number, question, options, answer, kind, **images):
    blank = dict.fromkeys((f"image_{i}" for i in range(1, 8)), None)
    return {
        "id": f"validation_{subject}_{number}",
        "question": question,
        "options": options,
        "explanation": "",
        **blank,
        **images,
        "img_type": "['Tables']",
        "answer": answer,
        "topic_difficulty": "Easy",
        "question_type": kind,
        "subfield": "x",
    }


def mathvista(pid, question, answer, kind, answer_type, *, choices=None, precision=None, unit=""):
    return {
        "pid": str(pid),
        "question": question,
        "image": f"images/{pid}.jpg",
        "decoded_image": IMAGES[pid],
        "choices": choices,
        "unit": unit,
        "precision": precision,
        "answer": answer,
        "question_type": kind,
        "answer_type": answer_type,
        "query": "",
    }


# By source.
ROWS = {
    "scienceqa_img": [
        {"image": IMAGES[i], "question": f"Which is {i}?", "choices": ["one", "two", "three"],
         "answer": i, "hint": "Look." if i else "", "task": "closed choice", "grade": "grade2",
         "subject": "s", "topic": "t", "category": "c", "skill": "k", "lecture": "", "solution": ""}
        for i in range(3)
    ],
    "ai2d": [
        {"question": f"What is {i}?", "options": ["w", "x", "y", "z"], "answer": str(i),
         "image": IMAGES[i // 2]} for i in range(3)
    ],
    "mmmu_val": [
        mmmu("Art", 1, "<image 1> Which?", "['left', 'right']", "B", "multiple-choice",
             image_1=IMAGES[0]),
        mmmu("Art_Theory", 2, "In <image 2> and <image 1>, not <image 2>: how many?", "[]", "3.14",
             "open", image_1=IMAGES[0], image_2=IMAGES[1]),
        mmmu("Math", 3, "Which?", "['<image 1>', '<image 2>', 'none']", "C", "multiple-choice",
             image_1=IMAGES[0], image_2=IMAGES[1]),
    ],
    "mathvista_testmini": [
        mathvista(1, "Which?", "blue", "multi_choice", "text", choices=["red", "blue"]),
        mathvista(2, "How many?", "12", "free_form", "integer", unit="$"),
        mathvista(3, "How long?", "1.5", "free_form", "float", precision=1.0),
    ],
    "mme": [
        {"question_id": name, "image": IMAGES[i], "answer": answer, "category": category,
         "question": f"Is it {i}? Please answer yes or no."}
        for i, name, answer, category in [
            (0, "OCR/1.png", "Yes", "OCR"), (0, "OCR/1.png", "No", "OCR"),
            (1, "count/2.png", "Yes", "count"),
        ]
    ],
    "mmbench_en_dev": [
        mmbench(7, 0, "A", ("cat", "dog", "nan", "nan")),
        mmbench(1000007, 0, "B", ("dog", "cat", "nan", "nan")),
        mmbench(8, 1, "C", ("red", "blue", "green", "grey"), hint="A room."),
    ],
    "seedbench": [
        {"answer": "A", "choice_a": "w", "choice_b": "x", "choice_c": "y", "choice_d": "z",
         "data_id": "1", "data_type": kind, "question": f"Which {i}?", "question_id": str(i),
         "question_type_id": 1, "image": [IMAGES[i]], "segment": []}
        for i, kind in enumerate(["image", "video", "image"])
    ],
    "pope": [
        {"id": str(i), "question_id": "1", "question": f"Is there a {i}? ", "answer": answer,
         "image_source": "COCO_1", "image": IMAGES[0], "category": subset}
        for i, (answer, subset) in enumerate(
            [("yes", "adversarial"), ("no", "popular"), ("yes", "random")]
        )
    ],
    "vqav2_val": [
        {"question_type": "what", "multiple_choice_answer": answers[0],
         "answers": numbered(answers), "image_id": 5 + i // 2, "answer_type": "other",
         "question_id": 50 + i, "question": f"What is {i}?", "image": IMAGES[i // 2]}
        for i, answers in enumerate(TEN)
    ],
    "vizwiz_val": [
        {"question_id": f"VizWiz_val_{i:08}", "image": IMAGES[i], "question": f"WHAT is {i}?",
         "answers": answers, "category": "other"} for i, answers in enumerate(TEN)
    ],
    "textvqa_val": [
        {"image_id": f"id{i // 2}", "question_id": 30 + i, "question": f"what BRAND is {i}?",
         "question_tokens": ["what"], "image": IMAGES[i // 2], "image_width": 40,
         "image_height": 20,
         "flickr_original_url": "", "flickr_300k_url": "", "answers": answers,
         "image_classes": ["sign"], "set_name": "val", "ocr_tokens": ["STOP", str(i)]}
        for i, answers in enumerate(TEN)
    ],
    "chartqa": [
        {"type": kind, "question": f"How many {i}?", "answer": answer, "image": IMAGES[i // 2]}
        for i, (kind, answer) in enumerate(
            [("human_test", "14"), ("augmented_test", "5%"), ("human_test", "Blue")]
        )
    ],
    "docvqa_val": [
        document(i, answers, **page(i))
        for i, answers in enumerate([["one line", "line"], ["two"], ["3,000"]])
    ],
    "infovqa_val": [
        document(i, answers, answer_type=["single span"], image_url=f"http://x/{i // 2}",
                 ocr="[]", **{"operation/reasoning": ["none"]})
        for i, answers in enumerate([["one line", "line"], ["two"], ["3,000"]])
    ],
    "ocrbench": [
        {"dataset": name, "question": f" What is written in {i}? ", "question_type": kind,
         "answer": answers, "image": IMAGES[i]}
        for i, (name, kind, answers) in enumerate([
            ("IIIT5K", "Regular Text Recognition", ["STOP"]),
            ("HME100k", "Handwritten Mathematical Expression Recognition", ["x ^ 2 + Y"]),
            ("SROIE", "Key Information Extraction", ["12.50", "$12.50"]),
        ])
    ],
    "realworldqa": [
        {"image": IMAGES[i], "question": f"Which way {i}?\n\nAnswer in one word.", "answer": answer,
         "image_path": f"{i}.webp"} for i, answer in enumerate(["B", "Downhill", "3"])
    ],
    "mmvp": [
        {"Index": i + 1, "Question": "Is it open?", "Options": "(a) Open (b) Closed",
         "Correct Answer": answer, "image": IMAGES[i]}
        for i, answer in enumerate(["(a)", "(b)", "(a)"])
    ],
    "refcoco_val": [
        {"question_id": str(i), "image": IMAGES[i], "question": "Describe it.",
         "answer": expressions, "segmentation": [0.0, 0.0], "bbox": [4.0 * i, 5.0, 20.0, 10.0],
         "iscrowd": 0, "file_name": f"COCO_{i}.jpg"}
        for i, expressions in enumerate([["left man", "the man"], ["dog"], ["red cup"]])
    ],
}  # fmt: skip
ROWS["gqa"] = [
    {"id": f"2{i}", "imageId": f"n{1 - i // 2}", "question": f"Is it {i}?", "answer": answer,
     "fullAnswer": "", "isBalanced": True} for i, answer in enumerate(["no", "left", "Red"])
]  # fmt: skip
GQA_IMAGES = [{"id": "n0", "image": IMAGES[0]}, {"id": "n1", "image": IMAGES[1]}]
for _name in ("vqav2", "vizwiz", "docvqa", "infovqa"):  # test splits have no answers
    ROWS[f"{_name}_test"] = [row | {"answers": None} for row in ROWS[f"{_name}_val"]]

# By task, a right answer to each of its questions, these sorted by their ids as text.
RIGHT = {
    "scienceqa_img": ["A", "b", "C. three"], "ai2d": ["A", "B. x", "c."],
    "mmmu_val": ["The answer is (B).", "It is 3.14", "C"],
    "mathvista_testmini_rules": ["B", "12.0", "1.5"],
    "mme_perception": ["Yes.", "no", "y"], "mmbench_en_dev_rules_circular": ["cat", "A", "C."],
    "mmbench_en_dev_static": ["cat", "A", "C."], "seedbench_image": ["A", "a) w"],
    "gqa": ["No.", "left", "red"], "pope": ["yes", " No", "Yes"], "pope_random": ["yes"],
    "pope_popular": ["no"], "pope_adversarial": ["yes"], "vqav2_val": ["net", "2", "Yes"],
    "vizwiz_vqa_val": ["The net.", "two", "yes"], "textvqa_val": ["net", "2", "yes"],
    "textvqa_val_ocr": ["net", "2", "yes"], "chartqa": ["14.5", "5%", "blue"],
    "chartqa_human": ["14", "BLUE"], "chartqa_augmented": ["0.05"],
    "docvqa_val": ["line", "Two", "3,000"], "infovqa_val": ["one  line", "two", "3,000"],
    "ocrbench": ["it says stop", "x^2+Y", "total: 12.50"],
    "realworldqa": ["(B)", "downhill.", "3"], "mmvp": ["A", "(b)", "a"],
    "refcoco_val_boxes": ["[0, 0.25, 0.5, 0.75]"] * 2
    + ["[0.1, 0.25, 0.6, 0.75]", "box: [0.2, 0.25, 0.7, 0.75]"],
}  # fmt: skip


def column_type(values):
    """None: as pyarrow reads the values."""
    given = [value[0] if isinstance(value, list) and value else value for value in values]
    if any(isinstance(value, dict) and "bytes" in value for value in given):
        return pa.list_(IMAGE) if isinstance(values[0], list) else IMAGE
    return None


def write_rows(path, rows):
    """The rows as one parquet file, two to a row group."""
    path.parent.mkdir(parents=True, exist_ok=True)
    arrays = {
        name: pa.array(values, column_type(values))
        for name, values in ((name, [row[name] for row in rows]) for name in rows[0])
    }
    pq.write_table(pa.table(arrays), path, row_group_size=2)


def write_folder(task: TaskSpec | str, data_dir: Path) -> None:
    """What a task asks, as a download leaves it: `<config or data>/<split>-….parquet`."""
    spec = REGISTRY[task] if isinstance(task, str) else task
    folder = FOLDERS[spec.source]
    base, file = Path(data_dir) / folder.directory, f"{folder.split}-00000-of-00001.parquet"
    if folder.image_config:
        write_rows(base / folder.image_config / file, GQA_IMAGES)
    write_rows(base / (folder.config or "data") / file, ROWS[spec.source])
