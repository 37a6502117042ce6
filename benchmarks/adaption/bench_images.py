"""A DeiT's accuracy on Tiny ImageNet, and how much of it Mambas get, by method, share of the data and seed.

    python benchmarks/adaption/bench_images.py --output benchmarks/results/adaption_<device>_<date>.jsonl

Images are the 100-class cut of Tiny ImageNet (TRANSMAMBA_DATA, images/), at 64 pixels, or with --size 32 averaged 2 by
2. A DeiT-tiny is trained on them first, in fp16's precision, and kept in the folder; --teacher takes one that is there.
Every job is a run of `transmamba adapt` and writes a line: top-1 and top-5 on the validation images, and how it
learnt. Jobs come seed after seed, the telling ones first, and run side by side, --parallel of them; a job that has a
line in the output already, or in a file named by --done, is left out. --only keeps the jobs whose names hold one of
some words, --jobs takes others.
"""

import argparse
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from transmamba.data import ImageData, ImageDataset, ImageSource, load_images, share_of_images
from transmamba.errors import TransMambaError
from transmamba.inference import resolve_device
from transmamba.ops import backends
from transmamba.recipes import (
    TeacherTraining,
    adapt_images,
    find_adaptation,
    train_image_teacher,
    with_fields,
)
from transmamba.recipes.adapt_images import _Batches, _load_teacher  # what a run reads its teacher with
from transmamba.recipes.run_folder import provenance
from transmamba.tasks import evaluate_classifier

ROOT = Path(__file__).resolve().parents[2]
DATA = Path(os.environ.get("TRANSMAMBA_DATA", ROOT.parent / "shared" / "data"))
STUDENTS = ("plain_mamba_tiny", "vim_tiny")
SHARES = (0.5, 0.1, 0.25, 0.75)
BASELINES = ("from_scratch", "adapt", "weight_reuse", "soft_logits", "adapt_v2")
OTHERS = ("distil_only", "public_release", "bridging", "mixing", "adapt_v1")
ABLATIONS: dict[str, dict[str, str]] = {
    "first 3 layers": {"subcloning.early_layers": "3"},
    "first 6 layers": {"subcloning.early_layers": "6"},
    "first 9 layers": {"subcloning.early_layers": "9"},
    "no directions": {"loss.features": "merged"},
    "layers weighed alike": {"loss.layer_weights": "uniform"},
    "final layer": {"loss.target": "final"},
    "no logits": {"loss.logit_weight": "0"},
    "V and O": {"subcloning.mixer_source": "value"},
    "mixers drawn": {"subcloning.mixer_source": "none", "subcloning.gate_source": "none"},
    "evenly spaced": {"subcloning.ranking": "uniform"},
}
# What else the recipe could be; the first seed only.
SETTINGS: dict[str, tuple[str, dict[str, str]]] = {
    "alpha 2": ("adapt", {"loss.alpha": "2"}),
    "alpha 0": ("adapt", {"loss.alpha": "0"}),
    "logits 2": ("adapt", {"loss.logit_weight": "2"}),
    "alpha 2, logits 2": ("adapt", {"loss.alpha": "2", "loss.logit_weight": "2"}),
    "projections 10": ("adapt", {"projection_rate": "10"}),
    "merged, alpha 2": ("adapt", {"loss.features": "merged", "loss.alpha": "2"}),
    "a projection each": ("adapt", {"sharing": "none"}),
    "layer decay 0.8": ("adapt", {"layer_decay": "0.8"}),
    "rate 5e-4": ("adapt", {"learning_rate": "5e-4"}),
    "rate 2e-3": ("adapt", {"learning_rate": "2e-3"}),
    "scratch, rate 5e-4": ("from_scratch", {"learning_rate": "5e-4"}),
    "scratch, rate 2e-3": ("from_scratch", {"learning_rate": "2e-3"}),
    "not mixed": ("adapt", {"augmentation.mixup": "0", "augmentation.cutmix": "0"}),
    "scratch, not mixed": ("from_scratch", {"augmentation.mixup": "0", "augmentation.cutmix": "0"}),
}
PLACES = ("teacher", "output", "images")  # where things lay on the machine that ran it


def main() -> None:
    options = parse()
    if options.worker:
        data = read_images(options)
        for job in json.loads(sys.stdin.read()):
            print(json.dumps(finished_or_failed(job, data, options)), flush=True)
        return
    begun = time.monotonic()
    data = read_images(options)
    classes, train, validation = len(data.classes), len(data.train), len(data.validation)
    print(f"{classes} classes, {train:,} + {validation:,} images, {time.monotonic() - begun:.1f} s", flush=True)
    files = [*options.done, *([options.output] if options.output.exists() else [])]
    rows = [json.loads(line) for file in files for line in file.read_text().splitlines()]
    finished = {row["name"] for row in rows if "failed" not in row}
    if f"teacher, {options.size} px" not in finished or not (teacher_folder(options) / "config.json").exists():
        write(options.output, make_teacher(data, options))
    jobs = json.loads(Path(options.jobs).read_text()) if options.jobs else list(table(options.seeds))
    jobs = [job for job in jobs if not options.only or any(word in job["name"] for word in options.only)]
    jobs = [{**job, "name": f"{job['name']}, {options.size} px"} for job in jobs]
    waiting = [job for job in jobs if job["name"] not in finished]
    print(f"{len(waiting)} of {len(jobs)} jobs", flush=True)
    # A worker gets every so many-th job, so that the first ones are done first.
    devices = options.devices.split(",")
    count = options.parallel * len(devices)
    work = [(waiting[number::count], devices[number % len(devices)]) for number in range(min(count, len(waiting)))]
    with ThreadPoolExecutor(count) as pool:
        list(pool.map(lambda one: watch_worker(*one, options), work))


def table(seeds: int) -> Iterator[dict[str, Any]]:
    """Seed after seed; of each, what decides first: methods, then half the data, then the rest."""
    for seed in range(seeds):
        for student in STUDENTS:
            for recipe in BASELINES:
                yield job(f"{recipe}, {student}", recipe, student, seed)
        for share in SHARES:
            for student in STUDENTS:
                for recipe in ("adapt", "from_scratch"):
                    name = f"{recipe}, {student}, {share:.0%} of the data"
                    yield {**job(name, recipe, student, seed), "share": share}
        for student in STUDENTS:
            for recipe in OTHERS:
                yield job(f"{recipe}, {student}", recipe, student, seed)
        if not seed:
            for name, (recipe, changes) in SETTINGS.items():
                yield job(f"setting {name}, {STUDENTS[0]}", recipe, STUDENTS[0], seed, **changes)
        for name, changes in ABLATIONS.items():
            for student in STUDENTS:
                yield job(f"adapt, {student}, {name}", "adapt", student, seed, **changes)


def job(name: str, recipe: str, student: str, seed: int, **changes: str) -> dict[str, Any]:
    settings = {"student": student, "seed": str(seed), **changes}
    return {"name": f"{name}, seed {seed}", "recipe": recipe, "share": 1.0, "set": settings}


def read_images(options: argparse.Namespace) -> ImageData:
    """The images at the size asked for; decoded once and kept in the folder."""
    if options.archive == "digits":
        return load_images(ImageSource(image_size=options.size, validation_share=0.5))
    kept = Path(options.folder) / f"images-{options.size}.safetensors"
    if not kept.exists():
        kept.parent.mkdir(parents=True, exist_ok=True)
        partial = kept.with_suffix(".partial")
        save_file(decode(Path(options.archive), options.size), partial)
        partial.rename(kept)
    found = load_file(kept)
    sides = {side: ImageDataset(found[f"{side}_pixels"], found[f"{side}_labels"]) for side in ("train", "val")}
    classes = int(found["train_labels"].max()) + 1
    data = ImageData(
        train=sides["train"], validation=sides["val"], classes=tuple(f"class {number}" for number in range(classes))
    )
    return data if options.classes is None else cut(data, options.classes, options.per_class)


def decode(archive: Path, size: int) -> dict[str, torch.Tensor]:
    """train and val of an archive whose members are .../train/CLASS/*.JPEG, as uint8 pixels and class numbers."""
    with tarfile.open(archive) as files:
        found = [
            (*member.name.split("/")[-3:-1], files.extractfile(member).read())  # type: ignore[union-attr]  # is a file
            for member in files
            if member.isfile() and member.name.lower().endswith((".jpeg", ".jpg", ".png"))
        ]
    classes = {name: number for number, name in enumerate(sorted({name for _, name, _ in found}))}
    with ThreadPoolExecutor() as pool:
        pixels = list(pool.map(lambda one: np.asarray(Image.open(io.BytesIO(one[2])).convert("RGB")), found))
    images = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2)
    factor = images.shape[-1] // size
    if factor * size != images.shape[-1]:
        raise SystemExit(f"--size {size} does not divide the images' {images.shape[-1]} pixels.")
    if factor > 1:
        images = torch.nn.functional.avg_pool2d(images.float(), factor).round().to(torch.uint8)
    labels = torch.tensor([classes[name] for _, name, _ in found])
    result = {}
    for side in ("train", "val"):
        rows = torch.tensor([number for number, one in enumerate(found) if one[0] == side])
        result[f"{side}_pixels"], result[f"{side}_labels"] = images[rows].contiguous(), labels[rows]
    return result


def cut(data: ImageData, classes: int, per_class: int) -> ImageData:
    """A problem for a CPU: the first classes, so many images of each to learn from, all others to validate."""
    pixels = torch.cat([data.train.pixels, data.validation.pixels])
    labels = torch.cat([data.train.labels, data.validation.labels])
    rows = [(labels == number).nonzero().squeeze(1) for number in range(classes)]
    whole = ImageDataset(pixels, labels)
    return ImageData(
        train=whole.rows(torch.cat([of_class[:per_class] for of_class in rows])),
        validation=whole.rows(torch.cat([of_class[per_class:] for of_class in rows])),
        classes=data.classes[:classes],
    )


def settings_of(options: argparse.Namespace) -> dict[str, str]:
    """What holds for every run."""
    fields = {"images.image_size": str(options.size), "epochs": str(options.epochs), "learning_rate": options.rate}
    return fields | {"log_every": "50"} | dict(pair.split("=", 1) for pair in options.set)


def make_teacher(data: ImageData, options: argparse.Namespace) -> dict[str, Any]:
    """Train a teacher and keep it in fp16, as which it is small enough to be kept; or score the one that is given."""
    place = teacher_folder(options)
    begun = time.monotonic()
    run = replace(
        find_adaptation("adapt")(),
        teacher="new",
        student="plain_mamba_tiny",
        teacher_training=TeacherTraining(
            epochs=options.teacher_epochs, learning_rate=options.teacher_rate, patch_size=options.patch
        ),
        batch_size=options.teacher_batch,
        log_every=50,
        output=str(Path(options.folder) / f"teacher-run-{options.size}"),
    )
    run = with_fields(
        run, {"images.image_size": str(options.size)} | dict(p.split("=", 1) for p in options.set_teacher)
    )
    seconds, steps = 0.0, 0
    if not (place / "config.json").exists():
        shutil.rmtree(run.output, ignore_errors=True)
        model, _ = train_image_teacher(run, device=options.device, data=data)
        model.half().save_pretrained(place)
        shutil.rmtree(Path(run.output) / "teacher")
        seconds, steps = time.monotonic() - begun, run.steps_of(options.teacher_epochs, len(data.train))
    scored = replace(run, teacher=str(place), teacher_training=replace(run.teacher_training, epochs=0))
    device = resolve_device(options.device)
    model = _load_teacher(str(place), {}).to(device)
    score = evaluate_classifier(model, _Batches(scored, data.validation, 256))
    return {
        "name": f"teacher, {options.size} px",
        "top_1": score.top_1,
        "top_5": score.top_5,
        "loss": score.loss,
        "num_images": score.num_images,
        "num_parameters": sum(parameter.numel() for parameter in model.parameters()),
        "steps": steps,
        "wall_seconds": round(seconds, 1),
        "recipe_fields": {name: value for name, value in run.to_json().items() if name not in PLACES},
        "date": datetime.now(UTC).date().isoformat(),
        "scan": backends.resolve_backend("selective_scan", None, torch.empty(1, device=device), size=16),
        **provenance(device.type),
    }


def teacher_folder(options: argparse.Namespace) -> Path:
    return Path(options.teacher or Path(options.folder) / f"teacher-{options.size}")


def watch_worker(jobs: list[dict[str, Any]], device: str, options: argparse.Namespace) -> None:
    """Hand jobs to a process of their own, which sees one GPU if one is named, and write its rows as they come."""
    with subprocess.Popen(
        [sys.executable, __file__, *sys.argv[1:], "--worker"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | ({"CUDA_VISIBLE_DEVICES": device} if device else {}),
    ) as worker:
        assert worker.stdin is not None
        assert worker.stdout is not None
        worker.stdin.write(json.dumps(jobs))
        worker.stdin.close()
        for line in worker.stdout:
            write(options.output, json.loads(line))


def finished_or_failed(job: dict[str, Any], data: ImageData, options: argparse.Namespace) -> dict[str, Any]:
    begun = time.monotonic()
    try:
        row = run_job(job, data, options)
    except (TransMambaError, RuntimeError) as error:
        row = {**job, "failed": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}
    return {**row, "wall_seconds": round(time.monotonic() - begun, 1)}


def run_job(job: dict[str, Any], data: ImageData, options: argparse.Namespace) -> dict[str, Any]:
    output = Path(options.folder) / "runs" / job["name"].replace(", ", "_").replace(" ", "-").replace("%", "pc")
    shutil.rmtree(output, ignore_errors=True)
    fields = {"teacher": str(teacher_folder(options)), "output": str(output)} | settings_of(options) | job["set"]
    share = job.get("share", 1.0)
    run = with_fields(find_adaptation(job["recipe"])(), fields)
    # As many steps with less data, so that only the data differ.
    if share < 1:
        run = replace(run, epochs=round(run.epochs / share))
    used = replace(data, train=share_of_images(data.train, share))
    done = adapt_images(run, device=options.device, data=used, report=False)
    rows = done.history.training
    last = rows[-1]
    shutil.rmtree(output)
    return {
        **job,
        "top_1": done.student_score.top_1,
        "top_5": done.student_score.top_5,
        "loss": done.student_score.loss,
        "teacher_top_1": done.teacher_score.top_1,
        "training_images": len(used.train),
        "steps": last.step,
        "seconds": round(last.seconds, 2),
        "images_per_second": round(last.step * run.batch_size / last.seconds, 1),
        "num_parameters": sum(parameter.numel() for parameter in done.model.parameters()),
        "share_from_teacher": 0.0 if done.plan is None else done.plan.share_from_teacher,
        "curve": [
            (row.step, round(row.loss, 4), row.metrics.get("feature_loss")) for row in rows[:: 1 + len(rows) // 20]
        ],
        "last_metrics": last.metrics,
        "recipe_fields": {name: value for name, value in run.to_json().items() if name not in PLACES},
    }


def write(output: Path, row: dict[str, Any]) -> None:
    output.parent.mkdir(parents=True, exist_ok=True)
    with output.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")
    if "failed" in row:
        print(f"{row['name']}: failed with {row['failed']}", flush=True)
        return
    speed = f", {row['images_per_second']:,.0f} images/s" if "images_per_second" in row else ""
    print(
        f"{row['name']}: top-1 {row['top_1']:.4f}, top-5 {row['top_5']:.4f}{speed}, {row['wall_seconds']} s", flush=True
    )


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=ROOT / "runs" / "adaption" / "rows.jsonl")
    parser.add_argument("--done", type=Path, nargs="*", default=[], help="files of rows that need not be made")
    parser.add_argument("--folder", default=str(ROOT / "runs" / "adaption"), help="images, teacher and runs")
    parser.add_argument("--archive", default=str(DATA / "images" / "tinyimagenet100.tar.xz"), help="or digits")
    parser.add_argument("--teacher", help="a folder with a teacher, to be used or made; default: one in --folder")
    parser.add_argument("--size", type=int, default=64, help="pixels of a side")
    parser.add_argument("--patch", type=int, default=8, help="pixels of a patch's side; students have the teacher's")
    parser.add_argument("--epochs", type=int, default=20, help="of students, over all the images")
    parser.add_argument("--rate", default="1e-3", help="learning rate of students")
    parser.add_argument("--teacher-epochs", type=int, default=100)
    parser.add_argument("--teacher-rate", type=float, default=1e-3)
    parser.add_argument("--teacher-batch", type=int, default=512)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--parallel", type=int, default=1, help="jobs at a time, on each of the devices")
    parser.add_argument("--devices", default="", help="numbers of GPUs, such as 0,1; default: what torch takes")
    parser.add_argument("--only", nargs="*", help="words, of which a job's name must hold one")
    parser.add_argument("--jobs", help="a JSON file with jobs of your own instead of the table")
    parser.add_argument("--set", nargs="*", default=[], metavar="NAME=VALUE", help="fields of every student's run")
    parser.add_argument(
        "--set-teacher", nargs="*", default=[], metavar="NAME=VALUE", help="fields of the teacher's run"
    )
    parser.add_argument(
        "--classes", type=int, help="only so many classes, with --per-class images of each to learn from"
    )
    parser.add_argument("--per-class", type=int, default=150)
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--device", default="auto")
    return parser.parse_args()


if __name__ == "__main__":
    main()
