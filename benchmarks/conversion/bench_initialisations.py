"""How well the state space imitates attention before any training: KL(teacher || student), by initialisation.

    python benchmarks/conversion/bench_initialisations.py

The teacher is a real checkpoint, the text what it was not trained on; V9 scaled to the window, and every layer a state
space from the first token. Calibration text is never the text that is judged. Needs the development data
(TRANSMAMBA_DATA).
"""

import argparse
import json
import lzma
import os
import platform
import shlex
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div, log_softmax
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from transmamba import TransMambaForCausalLM
from transmamba.conversion import INITIALISATIONS, convert
from transmamba.conversion.folder import token_windows
from transmamba.data import TextSource, load_documents

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "conversion_initialisations_cpu_2026-11-23.json"
DATA = Path(os.environ.get("TRANSMAMBA_DATA", ROOT.parent / "shared" / "data"))
TEACHER = DATA / "teachers" / "llama_wiki_31m"
SCHEDULES = ("v9", "mamba2", "transformer")


@torch.no_grad()
def main() -> None:
    options = parse()
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(TEACHER)
    teacher = AutoModelForCausalLM.from_pretrained(TEACHER, dtype=torch.float32).eval()
    judged = judged_windows(tokenizer, options.windows, options.length)
    log_teacher = [log_softmax(teacher(window[None], use_cache=False).logits, -1) for window in judged]
    texts = {"python-docs": load_documents(TextSource(source="builtin:python-docs", validation_share=0)).train}
    texts["wikipedia"] = [tail_of_training_text()]
    rows = []
    for initialisation, text, ssm_rope in cases():
        windows = None if text is None else token_windows(tokenizer, texts[text], options.length)
        begin = time.perf_counter()
        student, _ = convert(
            TEACHER,
            seq_len=options.length,
            initialisation=initialisation,
            calibration=windows,
            ssm_rope=ssm_rope,
            dtype=torch.float32,
        )
        row: dict[str, Any] = {"initialisation": initialisation, "calibration": text, "ssm_rope": ssm_rope}
        row["seconds"] = round(time.perf_counter() - begin, 1)
        for schedule in SCHEDULES:
            student.set_trans_points(
                student.config.schedule.parse(schedule, 8, options.length).stays_attention_from(options.length)
            )
            row[f"kl_{schedule}"], row[f"loss_{schedule}"] = judge(student, judged, log_teacher)
        rows.append(row)
        print(json.dumps(row), flush=True)
    result = {
        "command": shlex.join(["python", *sys.argv]),
        "device": f"CPU, {torch.get_num_threads()} thread(s), {platform.machine()}",
        "date": "2026-11-23",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "teacher": TEACHER.name,
        "teacher_loss": -sum(_picked(x, window) for x, window in zip(log_teacher, judged, strict=True)) / len(judged),
        "judged": f"{options.windows} windows of {options.length} tokens, wiki_en_valid, spread evenly",
        "seed": 0,
        "rows": rows,
    }
    if not options.no_write:
        RESULTS.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def cases() -> Iterator[tuple[str, str | None, bool]]:
    for ssm_rope in (True, False):
        for name, row in INITIALISATIONS.items():
            for text in ("python-docs", "wikipedia") if row.needs_text else (None,):
                yield name, text, ssm_rope


def judge(student: TransMambaForCausalLM, judged: Tensor, log_teacher: list[Tensor]) -> tuple[float, float]:
    """Mean KL(teacher || student) and mean loss, nats per token."""
    divergence = loss = 0.0
    for window, exact in zip(judged, log_teacher, strict=True):
        found = log_softmax(student(window[None], use_cache=False).logits, -1)
        divergence += kl_div(found[0], exact[0], log_target=True, reduction="batchmean").item() / len(judged)
        loss -= _picked(found, window) / len(judged)
    return round(divergence, 4), round(loss, 4)


def _picked(log_probabilities: Tensor, window: Tensor) -> float:
    return -cross_entropy(log_probabilities[0, :-1], window[1:]).item()


def judged_windows(tokenizer: PreTrainedTokenizerBase, windows: int, length: int) -> Tensor:
    with lzma.open(DATA / "text" / "wiki_en_valid.txt.xz", "rt", encoding="utf-8") as file:
        ids = torch.tensor(tokenizer(file.read(2_000_000), verbose=False).input_ids)
    count = len(ids) // length
    return ids[: count * length].view(count, length)[:: count // windows][:windows]


def tail_of_training_text() -> str:
    """Of the training file, what the teacher was not trained on: its last megabyte."""
    with lzma.open(DATA / "text" / "wiki_en_train.txt.xz", "rt", encoding="utf-8") as file:
        text = ""
        while block := file.read(1 << 20):
            text = (text + block)[-(1 << 20) :]
    return text


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--no-write", action="store_true", help="print only")
    return parser.parse_args()


if __name__ == "__main__":
    main()
