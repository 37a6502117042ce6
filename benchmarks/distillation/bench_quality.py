"""What distillation keeps of a teacher's perplexity, by recipe, schedule and seed.

    python benchmarks/distillation/bench_quality.py --output benchmarks/results/distillation_<device>_<date>.jsonl

The teacher is a real checkpoint (TRANSMAMBA_DATA, teachers/llama_wiki_31m), the text the end of its training file,
which it has not seen. Every job distils the same converted student and writes a line: validation loss over whole
windows of the teacher's context, at the target and at five schedules from there to attention throughout. Jobs run side
by side, --parallel of them; a job that has a line in the output already is left out.
"""

import argparse
import json
import lzma
import math
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from transmamba.conversion import convert_checkpoint
from transmamba.data import TextSource, load_documents, load_tokenizer, pack_documents
from transmamba.errors import TransMambaError
from transmamba.inference import load_language_model, resolve_device
from transmamba.recipes import distil, find_distillation, with_fields
from transmamba.recipes.run_folder import provenance
from transmamba.schedule import TransPointSchedule
from transmamba.tasks import evaluate_language_model

ROOT = Path(__file__).resolve().parents[2]
DATA = Path(os.environ.get("TRANSMAMBA_DATA", ROOT.parent / "shared" / "data"))
UNSEEN_BYTES = 33_000_000  # of the training file's end: less than the 8 M tokens that the teacher has not seen
BYTES_PER_TOKEN = 4.2
SEQ_LEN = 2048
TARGETS = {"V9": "v9", "V9 bounded": "0,32,64,128,256,512,1024,512"}
PLACES = ("teacher", "student", "text", "output")  # where things lay on the machine that ran it
LEARNING_RATE = "0.001"  # of the last stage, for every recipe: better than 2e-3 with KL and cross-entropy (docs/log.md)
RECIPES = ("descend", "mohawk", "plain_kl")


def main() -> None:
    options = parse()
    folder = Path(options.folder)
    if options.worker:
        work(folder, options)
        return
    prepare(folder, options.device)
    jobs = json.loads(Path(options.jobs).read_text()) if options.jobs else list(table(options.tokens, options.seeds))
    done = [json.loads(line) for line in options.output.read_text().splitlines()] if options.output.exists() else []
    finished = {row["name"] for row in done if "failed" not in row}
    if "teacher" not in finished:
        write(options.output, {"name": "teacher", **score_teacher(folder, options.validation_tokens, options.device)})
    waiting = [job for job in jobs if job["name"] not in finished]
    with ThreadPoolExecutor(options.parallel) as pool:
        list(pool.map(lambda _: watch_worker(waiting, options), range(options.parallel)))


def table(tokens: int, seeds: int) -> Iterator[dict[str, Any]]:
    """Every recipe at both targets, seed after seed, so that what comes first is a whole comparison."""
    for seed in range(seeds):
        for target, schedule in TARGETS.items():
            for recipe in RECIPES:
                yield {
                    "name": f"{recipe}, {target}, {tokens / 1e6:g} M, seed {seed}",
                    "recipe": recipe,
                    "set": {
                        "schedule": schedule,
                        "max_tokens": str(tokens),
                        "seed": str(seed),
                        "logits.learning_rate": LEARNING_RATE,
                    },
                }


def prepare(folder: Path, device: str) -> None:
    """The texts and the converted student that all jobs share."""
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "train.txt").exists():
        (folder / "valid.txt").write_bytes(lzma.decompress((DATA / "text" / "wiki_en_valid.txt.xz").read_bytes()))
        text = lzma.decompress((DATA / "text" / "wiki_en_train.txt.xz").read_bytes())
        (folder / "train.txt").write_bytes(text[-UNSEEN_BYTES:].partition(b"\n\n")[2])
    if not (folder / "student").exists():
        texts = load_documents(TextSource(source=str(folder / "train.txt"), document_separator="\n\n")).train
        teacher = DATA / "teachers" / "llama_wiki_31m"
        done = convert_checkpoint(
            teacher, folder / "student", schedule="v9", seq_len=SEQ_LEN, texts=texts, device=resolve_device(device)
        )
        print(f"converted, largest relative difference at None {done.difference:.1e}", flush=True)


def validation_windows(folder: Path, tokens: int) -> Any:
    tokenizer = load_tokenizer(str(folder / "student"))
    source = TextSource(source=str(folder / "valid.txt"), document_separator="\n\n", validation_share=0)
    return pack_documents(first_documents(load_documents(source).train, tokens), tokenizer, SEQ_LEN, boundaries=False)


def first_documents(documents: list[str], tokens: int) -> list[str]:
    """As many documents as hold so many tokens, of BYTES_PER_TOKEN each."""
    kept, size = [], 0
    for text in documents:
        if size > tokens * BYTES_PER_TOKEN:
            break
        kept.append(text)
        size += len(text.encode())
    return kept


def score_teacher(folder: Path, tokens: int, device: str) -> dict[str, Any]:
    model, _ = load_language_model(DATA / "teachers" / "llama_wiki_31m", dtype=torch.float32)
    score = evaluate_language_model(model, validation_windows(folder, tokens), device=resolve_device(device))
    print(f"teacher: {score.loss:.4f} nats a token, perplexity {math.exp(score.loss):.2f}", flush=True)
    return {
        "loss": score.loss,
        "perplexity": math.exp(score.loss),
        "bits_per_byte": score.bits_per_byte,
        "validation_tokens": score.num_tokens,
        "seq_len": SEQ_LEN,
        "date": datetime.now(UTC).date().isoformat(),
        **provenance(resolve_device(device).type),
    }


def watch_worker(waiting: list[dict[str, Any]], options: argparse.Namespace) -> None:
    """Hand jobs to a process of their own, one after another, and write its rows as they come."""
    command = [sys.executable, __file__, "--worker", "--folder", str(options.folder), "--device", options.device]
    command += ["--validation-tokens", str(options.validation_tokens), "--parallel", str(options.parallel)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as worker:
        assert worker.stdin is not None
        assert worker.stdout is not None
        while waiting:
            print(json.dumps(waiting.pop(0)), file=worker.stdin, flush=True)
            write(options.output, json.loads(worker.stdout.readline()))
        worker.stdin.close()


def work(folder: Path, options: argparse.Namespace) -> None:
    """Do the jobs that come, a line each, with a share of the device's memory."""
    if options.device == "cuda":
        torch.cuda.set_per_process_memory_fraction(0.93 / options.parallel)
    for line in sys.stdin:
        print(json.dumps(finished_or_failed(folder, json.loads(line), options)), flush=True)


def finished_or_failed(folder: Path, job: dict[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    begun = time.monotonic()
    try:
        row = run_job(folder, job, options.validation_tokens, options.device)
    except (TransMambaError, RuntimeError) as error:
        row = {**job, "failed": " ".join(str(error).split())[:300]}
    return {**row, "wall_seconds": round(time.monotonic() - begun, 1)}


def run_job(folder: Path, job: dict[str, Any], tokens: int, device: str) -> dict[str, Any]:
    fields = {
        "teacher": str(DATA / "teachers" / "llama_wiki_31m"),
        "student": str(folder / "student"),
        "text.source": str(folder / "train.txt"),
        "text.validation_share": "0",
        "text.document_separator": "\n\n",
        "document_boundaries": "false",
        "seq_len": str(SEQ_LEN),
        "save_every": "none",
        "output": str(folder / "runs" / job["name"].replace(", ", "_").replace(" ", "-")),
        **job["set"],
    }
    done = distil(with_fields(find_distillation(job["recipe"])(), fields), device=device)
    windows = validation_windows(folder, tokens)
    model = done.model
    target = model.config.schedule
    own = evaluate_language_model(model, windows)
    family = [{"share": 1.0, "trans_points": target.to_list(), "loss": own.loss}]
    for share in (0.75, 0.5, 0.25, 0.0):
        schedule = target.partway(SEQ_LEN, share)
        model.set_trans_points(schedule)
        score = evaluate_language_model(model, windows)
        family.append({"share": share, "trans_points": schedule.to_list(), "loss": score.loss})
    last = {name: history.training[-1] for name, history in done.histories.items()}
    return {
        **job,
        "loss": own.loss,
        "perplexity": math.exp(own.loss),
        "bits_per_byte": own.bits_per_byte,
        "loss_by_position": [(part.start, part.end, part.loss) for part in own.loss_by_position],
        "schedules": family,
        "stages": {
            name: {"steps": row.step, "tokens": row.tokens, "seconds": row.seconds} for name, row in last.items()
        },
        "recipe_fields": {name: value for name, value in done.run.to_json().items() if name not in PLACES},
        "kl_curve": [(row.tokens, row.metrics.get("kl")) for row in done.histories["logits"].training[::4]],
        "trans_points": TransPointSchedule(target).to_list(),
    }


def write(output: Path, row: dict[str, Any]) -> None:
    output.parent.mkdir(parents=True, exist_ok=True)
    with output.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")
    if "schedules" in row:
        family = " ".join(f"{one['loss']:.4f}" for one in row["schedules"])
        speed = sum(s["tokens"] for s in row["stages"].values()) / sum(s["seconds"] for s in row["stages"].values())
        print(
            f"{row['name']}: {row['loss']:.4f} | {family} | {speed:,.0f} tokens/s {row['wall_seconds']} s", flush=True
        )
    elif "failed" in row:
        print(f"{row['name']}: failed with {row['failed']}", flush=True)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=ROOT / "runs" / "distillation" / "rows.jsonl")
    parser.add_argument("--folder", default=str(ROOT / "runs" / "distillation"), help="texts, student and runs")
    parser.add_argument("--tokens", type=int, default=20_000_000)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--validation-tokens", type=int, default=420_000)
    parser.add_argument("--parallel", type=int, default=1)
    parser.add_argument("--jobs", help="a JSON file with jobs of your own instead of the table")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--device", default="cuda")
    return parser.parse_args()


if __name__ == "__main__":
    main()
