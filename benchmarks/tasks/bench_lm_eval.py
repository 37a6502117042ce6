"""A teacher and its conversion on the same tasks of lm-eval: as they are, and with the state space switched on.

    python benchmarks/tasks/bench_lm_eval.py

With every TransPoint at None the student has to give the teacher's log-likelihoods; with V9, before any distillation,
what it loses is what distillation has to win back. Multiple choice out of files, bits per byte of texts, generated
text. Needs the development data (TRANSMAMBA_DATA) and the extra `eval`.
"""

import argparse
import json
import lzma
import math
import os
import platform
import shlex
import sys
import tempfile
import time
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from transmamba import TransMambaForCausalLM
from transmamba.conversion import convert
from transmamba.conversion.folder import token_windows
from transmamba.data import TextSource, load_documents
from transmamba.inference import load_language_model
from transmamba.tasks import HarnessResult, evaluate_tasks

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "lmeval_llama_wiki_31m_cpu_2026-11-24.json"
DATA = Path(os.environ.get("TRANSMAMBA_DATA", ROOT.parent / "shared" / "data"))
TEACHER = DATA / "teachers" / "llama_wiki_31m"
LENGTH = 512  # the student's V9 is scaled to it
# file: every so many rows, from the first; BLiMP has 500 rows of each of 67 kinds, one kind after the other
FILES = {
    "blimp_dev.jsonl.xz": 20,
    "arc_easy_dev.jsonl": 6,
    "piqa_dev.jsonl": 5,
    "openbookqa_dev.jsonl": 1,
    "winogrande_dev.jsonl": 3,
}
TEXT_TASK = """task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {data}}}
test_split: train
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: text
metric_list:
  - {{metric: bits_per_byte}}
  - {{metric: word_perplexity}}
"""
WRITING_TASK = """task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {data}}}
test_split: train
output_type: generate_until
doc_to_text: prompt
doc_to_target: text
generation_kwargs: {{until: ["\\n"], max_gen_toks: 48}}
metric_list:
  - {{metric: exact_match, aggregation: mean, higher_is_better: true}}
"""


def main() -> None:
    options = parse()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tasks = write_tasks(folder, options.thin)
        teacher, tokenizer = load_language_model(TEACHER, dtype=torch.float32)
        documents = load_documents(TextSource(source="builtin:python-docs", validation_share=0)).train
        windows = token_windows(tokenizer, documents, LENGTH)
        student, _ = convert(TEACHER, schedule="v9", seq_len=LENGTH, calibration=windows, dtype=torch.float32)
        v9 = student.config.schedule
        rows, samples = [], {}
        for label, model, schedule in (
            ("teacher", teacher, None),
            ("student, every TransPoint None", student, "transformer"),
            (f"student, V9 scaled to {LENGTH}, not distilled", student, v9),
        ):
            if isinstance(model, TransMambaForCausalLM):
                model.set_trans_points(schedule)
            row, result = measure(model, tokenizer, tasks, folder, options.batch_size)
            rows.append({"model": label, **row})
            samples[label] = result.samples
            print(json.dumps(rows[-1]), flush=True)
        exact, lossless, _ = samples.values()
        content = {
            "command": shlex.join(["python", *sys.argv]),
            "device": f"CPU, {torch.get_num_threads()} thread(s), {platform.machine()}, fp32",
            "date": datetime.now(UTC).date().isoformat(),
            "versions": {name: version(name) for name in ("torch", "transformers", "lm_eval", "datasets")},
            "teacher": TEACHER.name,
            "student": f"convert(teacher, schedule='v9', seq_len={LENGTH}), calibrated on Python's documentation",
            "trans_points": v9.to_list(),
            "rows_of_files": {name: f"one row in {step * options.thin}" for name, step in FILES.items()},
            "chance": {"blimp_dev": 0.5, "arc_easy_dev": 0.25, "piqa_dev": 0.5, "openbookqa_dev": 0.25}
            | {"winogrande_dev": 0.5},
            "teacher_against_lossless_student": compare(exact, lossless),
            "rows": rows,
        }
    print(json.dumps(content["teacher_against_lossless_student"]))
    if not options.no_write:
        RESULTS.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def measure(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tasks: list[str], folder: Path, batch_size: int
) -> tuple[dict[str, Any], HarnessResult]:
    begin = time.perf_counter()
    result = evaluate_tasks(
        model, tokenizer, tasks, task_folder=folder / "yaml", batch_size=batch_size, keep_samples=True
    )
    row: dict[str, Any] = {"seconds": round(time.perf_counter() - begin, 1)}
    for score in result.scores:
        error = {} if score.standard_error is None else {"standard_error": round(score.standard_error, 4)}
        row.setdefault(score.task, {"documents": score.num_samples})[score.metric] = {
            "value": round(score.value, 5),
            **error,
        }
    return row, result


def compare(exact: dict[str, list[dict[str, Any]]], found: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """The largest relative difference of two log-likelihoods, and how many generated texts are equal."""
    largest, count, texts, equal = 0.0, 0, 0, 0
    for task, documents in exact.items():
        for one, other in zip(documents, found[task], strict=True):
            for a, b in zip(leaves(one["resps"]), leaves(other["resps"]), strict=True):
                if isinstance(a, str):
                    texts, equal = texts + 1, equal + (a == b)
                else:
                    largest, count = max(largest, abs(a - b) / abs(a)), count + 1
    assert math.isfinite(largest)
    return {
        "largest_relative_difference": largest,
        "log_likelihoods": count,
        "generated_texts": texts,
        "of_them_equal": equal,
    }


def leaves(value: Any) -> list[Any]:
    """Log-likelihoods and texts out of what lm-eval records; whether a text was the greedy one is left out."""
    if isinstance(value, list | tuple):
        return [leaf for part in value for leaf in leaves(part)]
    return [] if isinstance(value, bool) else [value]


def write_tasks(folder: Path, thin: int) -> list[str]:
    """Files of choices, thinned, and two tasks on text that the teacher was not trained on; the tasks' names."""
    names = []
    for name, step in FILES.items():
        content = (DATA / "lmeval" / name).read_bytes()
        text = (lzma.decompress(content) if name.endswith(".xz") else content).decode()
        rows = text.splitlines(keepends=True)[:: step * thin]
        target = folder / name.removesuffix(".xz")
        target.write_text("".join(rows), encoding="utf-8")
        names.append(str(target))
    with lzma.open(DATA / "text" / "wiki_en_valid.txt.xz", "rt", encoding="utf-8") as file:
        articles = [text for text in file.read(400_000).split("\n\n") if len(text) > 2000][: 8 // thin or 1]
    (folder / "yaml").mkdir()
    for task, template, rows in (
        ("wikipedia", TEXT_TASK, [{"text": text[:6000]} for text in articles]),
        ("writing", WRITING_TASK, [{"prompt": text[:500], "text": text[500:600]} for text in articles]),
    ):
        data = folder / f"{task}.json"
        data.write_text("\n".join(json.dumps(row) for row in rows) + "\n", encoding="utf-8")
        (folder / "yaml" / f"{task}.yaml").write_text(template.format(name=task, data=data), encoding="utf-8")
        names.append(task)
    return names


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--thin", type=int, default=1, help="read only one row in so many of those usually read")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--no-write", action="store_true", help="print only")
    return parser.parse_args()


if __name__ == "__main__":
    main()
