"""`python notebooks/rehearse.py PROFILE [NOTEBOOK ...]`: a profile's notebooks end to end, before anything is fetched.

Models have their real size (a language model two layers) and random weights; data sets have the hub's columns and
files and a few synthetic pictures; notebooks get the profile's words (models, splits, precisions, what is left out)
and the small numbers of their own first cells. Nothing that comes out says anything about merging: it shows that
shapes fit, that files are written and read, that memory suffices, how long each notebook takes with so little, and what
an image takes against what docs/scale.md counts for it.
"""

import argparse
import os
import resource
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import datasets
import nbformat
import numpy as np
import timm
import tokmerge
import torch
import transformers as hf
import yaml
from PIL import Image, ImageDraw
from safetensors.torch import save_file
from timm.data import ImageNetInfo
from tokmerge.data.imagenet import IMAGENETTE
from tokmerge.evaluation import vqa_objective, workers
from tokmerge.evaluation.vqa import SHORT
from tokmerge.io import notebook, paths, store
from tokmerge.models import tiny_llava
from tokmerge.models.configuration import LlavaConfiguration

ROOT = paths.root()
# Vision transformers: ViT-B/16 as in the paper; the laptop's own.
VITS = {"paper": "vit_base_patch16_224", "laptop": "deit_small_patch16_224"}
# Towers of LLaVA-1.5 and of LLaVA-Interleave 0.5B with their language models' widths; the second without most layers.
TOWERS = {
    "paper": hf.CLIPVisionConfig(
        hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16, image_size=336,
        patch_size=14,
    ),
    "laptop": hf.SiglipVisionConfig(
        hidden_size=1152, intermediate_size=4304, num_hidden_layers=4, num_attention_heads=16, image_size=384,
        patch_size=14,
    ),
}  # fmt: skip
ENDS: dict[str, Any] = {"num_hidden_layers": 2, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
LANGUAGE = {
    "paper": (hf.LlamaConfig, {"hidden_size": 4096, "intermediate_size": 11008, "num_attention_heads": 32}),
    "laptop": (hf.Qwen2Config, {"hidden_size": 1024, "intermediate_size": 2816, "num_attention_heads": 16,
                             "num_key_value_heads": 16}),
}  # fmt: skip
CHAT = (
    "{% for m in messages %}<|im_start|>{{ m.role }} {% for c in m.content %}{{ '<image>\n' if c.type == 'image' else "
    "c.text }}{% endfor %}<|im_end|>\n{% endfor %}<|im_start|>assistant"
)
# What runs beside what, with half of the cores each, in turn; what a notebook reads comes before it.
LANES = (("00 10 20 30 35 36 37 40 41", "45 50"), ("65 70 47", "55 60 61 62"), ("90 91",))
ASKED = ("is it red", "how many are there", "what is it", "where is it")
# Numbers that are smaller than in the notebooks' first cells, because these models are larger.
FEWER: dict[str, dict[str, Any]] = {
    "10_inputs": {"n_search": 16, "n_select": 8, "n_test": 8, "batch_size": 8},
    "20_merging": {"n_calibration": 4, "n_ranked": 2, "n_test": 4, "speed_rounds": 1, "speed_images": 2,
                   "deit_images": 0},
    "30_search": {"n_images": 6, "n_front_images": 4, "n_trials": 8},
    "35_images_study": {"n_images": 2, "n_select": 4, "n_test": 4, "shard_size": 4, "seeds": [0], "more_seeds": [],
                        "n_trials": 4, "limits": [0.1],
                        "left_out": ["capped threshold", "relative threshold", "ToMe on tokens", "size-aware ToMe",
                                     "PiToMe", "ToFu", "keep rates", "random pruning"]},
    "37_images_study_adaptivity": {"n_test": 4, "n_budget": 2, "n_counterparts": 20, "shard_size": 4},
    "36_search_study": {"n_long": 6, "sizes": [], "n_select": 4},
    "40_images": {"n_test": 8, "rounds": 1, "shard_size": 4, "batch_size": 4},
    "41_baselines": {"n_baseline": 4, "n_head": 4, "batch_size": 4},
    "45_questions_study": {"n_search": [1], "n_select": [1], "n_test": [1], "n_calibration": 1, "n_trials": 3,
                           "limits": [0.1], "n_sobol": 2, "n_grid": 1, "more_seeds": [], "max_new_tokens": 2,
                           "dtype": "float32",
                           "left_out": ["ToMe on tokens", "PiToMe", "ToMe constant", "random pruning", "PruMerge",
                                        "PruMerge+", "attention pruning", "attention, last layer", "window pooling"]},
    "47_questions_study_adaptivity": {"n_counterparts": 3},
    "50_questions": {"n_test": [1], "n_codec": 1, "max_new_tokens": 2, "shard_questions": 4, "dtype": "float32"},
    "55_channel_study": {"n_search": 4, "n_select": 4, "n_test": 4, "n_candidates": 2, "n_training": 4, "vqa": None},
    "60_channel": {"n_select": 4, "n_test": 6, "n_payloads": 1},
    "61_link_adaptation": {"n_select": 4, "n_test": 6},
    "62_device_and_server": {"n_talk": 2},
    "65_privacy_study": {"n_public": 24, "n_test": 6, "n_judge": 48, "judge_epochs": 8.0, "judge_name": None,
                         "retrain_seeds": [1], "batch_size": 4, "steps": 2, "check_every": 1,
                         "n_gradient": 1, "attackers": ["grid"], "precisions": [],
                         "left_out": ["pruned", "same counts", "class token"]},
}  # fmt: skip


def pictures(n: int, seed: int) -> list[Image.Image]:
    """Coloured shapes on gradients, 320 x 240; every tenth has the same hue, so that there is something to learn."""
    rng = np.random.default_rng(seed)
    made = []
    for index in range(n):
        light = rng.integers(160, 256, (2, 2, 2), dtype=np.uint8)
        hue = np.full((2, 2, 1), 25 * (index % 10), np.uint8)
        corners = Image.fromarray(np.concatenate([hue, light], axis=2), "HSV").convert("RGB")
        picture = corners.resize((320, 240), Image.Resampling.BICUBIC)
        draw = ImageDraw.Draw(picture)
        for _ in range(rng.integers(1, 3)):
            x, y, size = (int(value) for value in rng.integers((0, 0, 20), (260, 180, 120)))
            draw.ellipse((x, y, x + size, y + size), fill=tuple(int(value) for value in rng.integers(0, 256, 3)))
        made.append(picture)
    return made


def write(folder: Path, split: str, rows: list[dict[str, Any]], features: datasets.Features) -> None:
    """A split as the hub keeps it: a parquet file below ``data``."""
    file = folder / "data" / f"{split}-00000-of-00001.parquet"
    file.parent.mkdir(parents=True, exist_ok=True)
    datasets.Dataset.from_list(rows, features=features).to_parquet(file)


def build_data(folder: Path, profile: str) -> None:
    """Stand-ins of the data sets: images with ImageNet's or Imagenette's classes, and VQAv2."""
    info = ImageNetInfo("imagenet-1k")
    names = list(IMAGENETTE) if profile == "laptop" else [info.index_to_label_name(i) for i in range(1000)]
    features = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(names=names))
    for seed, (split, n) in enumerate({"train": 80, "validation": 80}.items()):
        rows = [{"image": picture, "label": i % 10} for i, picture in enumerate(pictures(n, seed))]
        write(folder / "images", split, rows, features)
    text, number = datasets.Value("string"), datasets.Value("int64")
    features = datasets.Features(
        question_type=text, multiple_choice_answer=text, image_id=number, answer_type=text, question_id=number,
        question=text, image=datasets.Image(),
        answers=[{"answer": text, "answer_confidence": text, "answer_id": number}],
    )  # fmt: skip
    answers = [{"answer": "red", "answer_confidence": "yes", "answer_id": i} for i in range(10)]
    rows = [
        {"question_type": "what", "multiple_choice_answer": "red", "answers": answers, "image_id": image,
         "answer_type": "other", "question_id": 10 * image + k, "question": f"{asked}?", "image": picture}
        for image, picture in enumerate(pictures(6, 2)) for k, asked in enumerate(ASKED[:2])
    ]  # fmt: skip
    write(folder / "vqav2", "validation", rows, features)


def build_models(folder: Path, profile: str) -> None:
    """Stand-ins of the models: weights of a vision transformer, and a LLaVA's folder as `save_pretrained` writes it."""
    torch.manual_seed(0)
    save_file(timm.create_model(VITS[profile]).state_dict(), folder / "vit.safetensors")
    words = tiny_llava.words([SHORT, *ASKED, "red blue yes no one two user assistant <|im_start|> <|im_end|> ?"])
    vision, (kind, sizes) = TOWERS[profile], LANGUAGE[profile]
    whole, n = profile == "laptop", (vision.image_size // vision.patch_size) ** 2
    strategy = "full" if whole else "default"
    config = hf.LlavaConfig(
        vision_config=vision, text_config=kind(vocab_size=len(tiny_llava.SPECIAL) + len(words), **sizes, **ENDS),
        image_token_index=tiny_llava.IMAGE, image_seq_length=n, vision_feature_select_strategy=strategy,
        vision_feature_layer=-1 if whole else -2,
    )  # fmt: skip
    hf.LlavaForConditionalGeneration(config).save_pretrained(folder / "llava")
    processor = tiny_llava.processor({"image_size": vision.image_size, "patch_size": vision.patch_size}, words)
    processor.vision_feature_select_strategy = strategy
    processor.num_additional_image_tokens = 0 if whole else 1
    processor.chat_template = CHAT if whole else None
    processor.save_pretrained(folder / "llava")


def is_number(value: Any) -> bool:
    """A number other than 0, or a list with numbers in it."""
    if isinstance(value, list):
        return any(is_number(one) for one in value)
    return isinstance(value, int | float) and not isinstance(value, bool) and value != 0


def values(profile: str, stem: str, folder: Path) -> dict[str, Any]:
    """The parameters of a notebook in the rehearsal; data and models are those in the folder."""
    book = nbformat.read(ROOT / "notebooks" / f"{stem}.ipynb", as_version=4)
    own = notebook.literals(next(cell.source for cell in book.cells if cell.cell_type == "code"))
    given = yaml.safe_load((ROOT / "params" / profile / f"{stem}.yaml").read_text()) or {}
    words = {key: value for key, value in given.items() if not is_number(value)}
    small = own | words | FEWER.get(stem, {})
    if given.get("left_out"):
        small["left_out"] = given["left_out"]
    here = {"data_path": str(folder / ("images" if stem == "10_inputs" else "vqav2")), "model_name": VITS[profile],
            "checkpoint": str(folder / "vit.safetensors"), "models": [str(folder / "llava")],
            "datasets": [str(folder / "llava")]}  # fmt: skip
    small |= {key: value for key, value in here.items() if key in own}
    for key, value in small.items():
        if key.endswith("_dir") and value and value.startswith("results/"):
            small[key] = f"results/rehearsal/{profile}/{value.split('/', 2)[2]}"
    return small


def speeds(profile: str, folder: Path) -> None:
    """Print what an image takes, unmerged, and what docs/scale.md would count for it on a core of its machine."""
    table = store.load_table(paths.ASSETS / "scale" / "scale.parquet")
    known = table[table.axis == "tokens"]
    rate = torch.get_num_threads() * (known.macs / known.seconds).min()
    vit = timm.create_model(VITS[profile]).eval()
    task = vqa_objective.load_task(str(folder / "llava"), 1, 1, 1, source="vqav2-hub", path=str(folder / "vqav2"),
                                   split="validation", dtype="float32", max_new_tokens=2)  # fmt: skip
    model, images = tokmerge.patch(vit, None), torch.rand(4, 3, 224, 224)
    one = workers.Shard(LlavaConfiguration(None), 0, 1)
    works = {VITS[profile]: (4, lambda: model(images)[1].macs.sum().item()),
             "LLaVA, one question": (1, lambda: task(one).macs.sum())}  # fmt: skip
    for name, (n, work) in works.items():
        work()
        begin = time.monotonic()
        with torch.inference_mode():
            macs = work() / n
        took = (time.monotonic() - begin) / n
        print(f"{name}: {took:.2f} s an image; {macs / 1e9:.1f} G multiply-accumulates, counted as {macs / rate:.2f} s")


def run(profile: str, stem: str, work: Path, cores: int) -> None:
    """One notebook; RuntimeError if it fails."""
    params, done, started = work / "params" / f"{stem}.yaml", work / "executed" / f"{stem}.ipynb", time.monotonic()
    with store.writing(params) as temporary:
        temporary.write_text(yaml.safe_dump(values(profile, stem, work / "stand-ins")))
    done.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "papermill", "--cwd", "notebooks", "--no-progress-bar", "-f", str(params),
               str(ROOT / "notebooks" / f"{stem}.ipynb"), str(done)]  # fmt: skip
    if subprocess.run(command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": str(cores)}).returncode:
        raise RuntimeError(f"{stem} failed: its cells are in {done}")
    most = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1e6
    print(f"{stem:28s} {time.monotonic() - started:6.0f} s, at most {most:.1f} GB in one so far", flush=True)


def main() -> None:
    """Build the stand-ins, run the notebooks, say what each took."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("profile", choices=VITS)
    parser.add_argument("notebooks", nargs="*", help="the numbers of those that run; all by default")
    given = parser.parse_args()
    work = paths.resolve(f"results/rehearsal/{given.profile}")
    stand_ins, begin = work / "stand-ins", time.monotonic()
    if not stand_ins.exists():
        building = work / "building"
        building.mkdir(parents=True, exist_ok=True)
        build_data(building, given.profile)
        build_models(building, given.profile)
        building.rename(stand_ins)
    stems = {file.stem[:2]: file.stem for file in sorted((ROOT / "params" / given.profile).glob("*.yaml"))}
    assert set(stems) == {number for lanes in LANES for lane in lanes for number in lane.split()}

    def through(lane: str, cores: int) -> None:
        for number in lane.split():
            if number in (given.notebooks or stems):
                run(given.profile, stems[number], work, cores)

    for lanes in LANES:
        with ThreadPoolExecutor() as pool:
            cores = max(1, (os.cpu_count() or 1) // len(lanes))
            for done in [pool.submit(through, lane, cores) for lane in lanes]:
                done.result()
    speeds(given.profile, stand_ins)
    print(f"the {given.profile} profile in {(time.monotonic() - begin) / 60:.1f} minutes")


if __name__ == "__main__":
    main()
