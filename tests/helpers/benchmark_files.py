"""Small files in the real layouts of the published benchmarks, with made-up questions and generated images.

Each ``write_*`` function writes one file and returns the rows that it wrote, as they stand in the file. Parquet needs
pyarrow: tests that write it start with ``pytest.importorskip("pyarrow")``.
"""

import base64
import csv
import io
import json
import random
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

NOUNS = ("fox", "kite", "lamp", "drum", "boat", "pear", "shoe", "bell")
ROTATION = 1_000_000
HALLUSION_COLUMNS = ("category", "subcategory", "visual_input", "set_id", "figure_id", "question_id")


def png(seed: int, size: int = 12) -> bytes:
    """An image of noise, so that no two are alike."""
    pixels = np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "png")
    return file.getvalue()


def base64_png(seed: int) -> str:
    return base64.b64encode(png(seed)).decode()


def hf_image(seed: int) -> dict[str, Any]:
    return {"bytes": png(seed), "path": f"{seed}.png"}


def write_tsv(path: Path, rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Write what ``pandas.DataFrame(rows).to_csv(path, sep="\\t", index=False)`` would."""
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), delimiter="\t", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    return [dict(row) for row in rows]


def write_parquet(path: Path, rows: Sequence[Mapping[str, Any]], row_group_size: int = 3) -> list[dict[str, Any]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.Table.from_pylist([dict(row) for row in rows]), path, row_group_size=row_group_size)
    return [dict(row) for row in rows]


def write_jsonl(path: Path, rows: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    rows = [dict(row) for row in rows]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return rows


def _options(draw: random.Random, count: int = 4) -> dict[str, str]:
    return dict(zip("ABCD", draw.sample(NOUNS, count)))


def write_mmstar_tsv(path: Path, rows: int = 8, seed: int = 0) -> list[dict[str, Any]]:
    draw = random.Random(seed)
    return write_tsv(
        path,
        [
            {
                "index": number,
                "question": f'Which one, "{draw.choice(NOUNS)}"\tor\nanother, is shown in picture {number}?',
                **_options(draw),
                "answer": draw.choice("ABCD"),
                "category": ("math", "logical reasoning")[number % 2],
                "l2_category": ("geometry", "code")[number % 2],
                "image": base64_png(seed * 1000 + number),
            }
            for number in range(rows)
        ],
    )


def write_mmstar_parquet(path: Path, rows: int = 8, seed: int = 0) -> list[dict[str, Any]]:
    draw = random.Random(seed)
    found = []
    for number in range(rows):
        options = ", ".join(f"{letter}: {option}" for letter, option in _options(draw).items())
        found.append(
            {
                "index": number,
                "question": f"What is shown in picture {number}?\nOptions: {options}",
                "image": hf_image(seed * 1000 + number),
                "answer": draw.choice("ABCD"),
                "category": "math",
                "l2_category": "geometry",
                "meta_info": {"source": "MathVista", "split": "testmini", "image_path": f"images/{number}.jpg"},
            }
        )
    return write_parquet(path, found)


def mmbench_rows(questions: int = 3, seed: int = 0) -> list[dict[str, Any]]:
    """Every rotation of each question. Question k has 4, 3 or 2 options; rotations point to its first row's image."""
    draw = random.Random(seed)
    rows = []
    for group in range(questions):
        count = 4 - group % 3
        options = list(_options(draw, count).values())
        answer = draw.randrange(count)
        for rotation in range(count):
            turned = options[rotation:] + options[:rotation]
            rows.append(
                {
                    "index": group + rotation * ROTATION,
                    "question": f"What is in picture {group}?",
                    "hint": "It was taken at night." if group % 2 else "",
                    **{letter: (turned[place] if place < count else "") for place, letter in enumerate("ABCD")},
                    "answer": "ABCD"[(answer - rotation) % count],
                    "category": "object_localization",
                    "image": base64_png(seed * 1000 + group) if rotation == 0 else str(group),
                    "source": "made up",
                    "l2-category": "finegrained_perception",
                    "comment": "",
                    "split": "dev",
                }
            )
    return sorted(rows, key=lambda row: row["index"])


def write_mmbench_tsv(path: Path, questions: int = 3, seed: int = 0) -> list[dict[str, Any]]:
    return write_tsv(path, mmbench_rows(questions, seed))


def write_mmbench_parquet(path: Path, questions: int = 3, seed: int = 0) -> list[dict[str, Any]]:
    rows = mmbench_rows(questions, seed)
    for row in rows:
        group = row["index"] % ROTATION
        row["L2-category"] = row.pop("l2-category")
        row["image"] = hf_image(seed * 1000 + group)
        row |= {name: row[name] or "nan" for name in ("hint", "C", "D", "comment")}  # as in lmms-lab's file
    return write_parquet(path, rows)


def mmvet_rows(rows: int = 6, seed: int = 0) -> list[dict[str, Any]]:
    draw = random.Random(seed)
    return [
        {
            "index": f"v1_{number}",
            "question": f"What does picture {number} say?",
            "answer": f"{draw.choice(NOUNS)}<AND>{draw.choice(NOUNS)}",
            "category": ("ocr", "ocr,math", "rec,know,gen")[number % 3],
            "image": base64_png(seed * 1000 + number),
        }
        for number in range(rows)
    ]


def write_mmvet_tsv(path: Path, rows: int = 6, seed: int = 0) -> list[dict[str, Any]]:
    return write_tsv(path, mmvet_rows(rows, seed))


def write_mmvet_parquet(path: Path, rows: int = 6, seed: int = 0) -> list[dict[str, Any]]:
    found = mmvet_rows(rows, seed)
    for number, row in enumerate(found):
        row["question_id"], row["capability"] = row.pop("index"), row.pop("category")
        row |= {"image": hf_image(seed * 1000 + number), "image_source": "made up"}
    return write_parquet(path, found)


def mathvista_rows(rows: int = 8, seed: int = 0) -> list[dict[str, Any]]:
    """Rows as Hugging Face has them: every fourth has choices; the others ask for an integer, a float and a list."""
    draw = random.Random(seed)
    found = []
    for number in range(rows):
        kind = ("choice", "integer", "float", "list")[number % 4]
        question, unit, precision, choices = f"How much is in picture {number}?", None, None, None
        if kind == "choice":
            hint = (
                "Hint: Please answer the question and provide the correct option letter, e.g., A, B, C, D, at the end."
            )
            choices = draw.sample(NOUNS, 4)
            answer = draw.choice(choices)
        elif kind == "integer":
            hint = "Hint: Please answer the question requiring an integer answer and provide the final value."
            answer, unit = str(draw.randrange(100)), "$"
        elif kind == "float":
            hint = "Hint: Please answer the question requiring a floating-point number with two decimal places."
            answer, precision = f"{draw.random():.2f}", 2.0
        else:
            hint = "Hint: Please answer the question requiring a Python list as an answer."
            answer = str([draw.randrange(9), draw.randrange(9)])
        asked = f"Question: {question}" + (f" (Unit: {unit})" if unit else "")
        listed = [f"({letter}) {choice}" for letter, choice in zip("ABCD", choices or [])]
        found.append(
            {
                "pid": str(number + 1),
                "question": question,
                "image": f"images/{number + 1}.jpg",
                "decoded_image": hf_image(seed * 1000 + number),
                "choices": choices,
                "unit": unit,
                "precision": precision,
                "answer": answer,
                "question_type": "multi_choice" if kind == "choice" else "free_form",
                "answer_type": "text" if kind == "choice" else kind,
                "metadata": {
                    "category": "general-vqa",
                    "context": "synthetic scene",
                    "grade": "daily life",
                    "img_height": 12,
                    "img_width": 12,
                    "language": "english",
                    "skills": ["arithmetic reasoning", "statistical reasoning"][: 1 + number % 2],
                    "source": "made up",
                    "split": "testmini",
                    "task": ("figure question answering", "math word problem")[number % 2],
                },
                "query": "\n".join([hint, asked, *(["Choices:", *listed] if listed else [])]),
            }
        )
    return found


def write_mathvista_parquet(path: Path, rows: int = 8, seed: int = 0) -> list[dict[str, Any]]:
    return write_parquet(path, mathvista_rows(rows, seed))


def write_mathvista_tsv(path: Path, rows: int = 8, seed: int = 0) -> list[dict[str, Any]]:
    found = []
    for number, row in enumerate(mathvista_rows(rows, seed)):
        choices = row["choices"] or []
        found.append(
            {
                "index": row["pid"],
                "question": row["query"],
                "image": base64_png(seed * 1000 + number),
                "answer": row["answer"],
                "answer_option": "ABCD"[choices.index(row["answer"])] if choices else "",
                "choices": str(choices),
                "question_type": row["question_type"],
                "answer_type": row["answer_type"],
                "unit": row["unit"] or "",
                "precision": "" if row["precision"] is None else row["precision"],
                "task": row["metadata"]["task"],
                "skills": str(row["metadata"]["skills"]),
            }
        )
    return write_tsv(path, found)


def write_ai2d_tsv(path: Path, rows: int = 6, seed: int = 0) -> list[dict[str, Any]]:
    """Options are letters here, as the masked diagrams have them."""
    draw = random.Random(seed)
    return write_tsv(
        path,
        [
            {
                "index": number,
                "question": f"Which label shows the {draw.choice(NOUNS)}?",
                **dict(zip("ABCD", draw.sample("ABCDEFG", 4))),
                "answer": draw.choice("ABCD"),
                "image": base64_png(seed * 1000 + number),
            }
            for number in range(rows)
        ],
    )


def write_ai2d_parquet(path: Path, rows: int = 6, seed: int = 0) -> list[dict[str, Any]]:
    draw = random.Random(seed)
    return write_parquet(
        path,
        [
            {
                "question": f"Which label shows the {draw.choice(NOUNS)}?",
                "options": draw.sample("ABCDEFG", 4),
                "answer": str(draw.randrange(4)),
                "image": hf_image(seed * 1000 + number),
            }
            for number in range(rows)
        ],
    )


def hallusion_rows(seed: int = 0, blind: bool = True) -> list[dict[str, Any]]:
    """Sets as Hugging Face has them: all questions about all figures. In VS figure 0 is the question without an image.

    Both categories have a set 0 of the subcategory ocr, which VLMEvalKit takes as one.
    """
    draw = random.Random(seed)
    shape = {("VD", "ocr", 0): (2, 3), ("VS", "ocr", 0): (3, 2), ("VS", "chart", 0): (3, 2), ("VD", "math", 1): (2, 1)}
    rows = []
    for (category, subcategory, set_id), (figures, questions) in shape.items():
        for figure in range(figures):
            is_blind = category == "VS" and figure == 0
            if is_blind and not blind:
                continue
            seen = hf_image(seed * 1000 + len(rows))
            for question in range(questions):
                place = (category, subcategory, 0 if is_blind else 1 + (figure > 1), set_id, figure, question)
                rows.append(
                    dict(zip(HALLUSION_COLUMNS, map(str, place)))
                    | {
                        "sample_note": "made up",
                        "question": f"Is there a {draw.choice(NOUNS)}?",
                        "gt_answer_details": "There is.",
                        "gt_answer": draw.choice("01"),
                        "filename": None if is_blind else f"./{category}/{subcategory}/{set_id}_{figure}.png",
                        "image": None if is_blind else seen,
                    }
                )
    return rows


def write_hallusion_parquet(path: Path, seed: int = 0, blind: bool = True) -> list[dict[str, Any]]:
    return write_parquet(path, hallusion_rows(seed, blind))


def write_hallusion_tsv(path: Path, seed: int = 0, blind: bool = True) -> list[dict[str, Any]]:
    found = []
    for row in hallusion_rows(seed, blind):
        image = row["image"]
        found.append(
            {
                "index": "_".join(row[name] for name in HALLUSION_COLUMNS),
                "category": row["category"],
                "l2-category": row["subcategory"],
                "question": row["question"],
                "answer": ("No", "Yes")[int(row["gt_answer"])],
                "image": base64.b64encode(image["bytes"]).decode() if image else "",
            }
        )
    return write_tsv(path, found)


def write_custom_jsonl(path: Path, rows: int = 8, seed: int = 0) -> list[dict[str, Any]]:
    """ScienceQA-like rows. Images are files beside ``path``, base64, or missing; answers are places, letters, texts."""
    draw = random.Random(seed)
    found: list[dict[str, Any]] = []
    for number in range(rows):
        row: dict[str, Any] = {"id": f"own-{number}", "question": f"What is in picture {number}?"}
        choices = draw.sample(NOUNS, 3)
        place = draw.randrange(3)
        row |= (
            {"choices": choices, "answer": place, "hint": "Look closely."},
            {"choices": choices, "answer": "ABC"[place]},
            {"choices": choices, "answer": choices[place]},
            {"answer": "42", "answer_type": "integer", "unit": "cm"},
        )[number % 4]
        if number % 3 == 0:
            name = f"picture-{seed}-{number}.png"
            (path.parent / name).write_bytes(png(seed * 1000 + number))
            row["image"] = name
        elif number % 3 == 1:
            row["image"] = base64_png(seed * 1000 + number)
        found.append(row)
    return write_jsonl(path, found)
