"""Small models with the structure of the real ones, images that hold both plain and busy regions, and data sets."""

import hashlib
import io
import json
import tarfile

import datasets
import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import VisionTransformer
from tokmerge.data import debian
from tokmerge.data.image_sets import Batch, split_batch
from tokmerge.io import store
from tokmerge.models.dense import DenseViT
from torch import nn

torch.set_num_threads(1)

GEOMETRY = {"img_size": 32, "patch_size": 4, "embed_dim": 48, "depth": 4, "num_heads": 3, "num_classes": 10}
VARIANTS = {
    "cls": (VisionTransformer, {}),
    "no_cls_avg": (VisionTransformer, {"class_token": False, "global_pool": "avg"}),
    "cls_avg": (VisionTransformer, {"global_pool": "avg"}),
    "avgmax": (VisionTransformer, {"class_token": False, "global_pool": "avgmax"}),
    "max": (VisionTransformer, {"global_pool": "max"}),
    "map": (VisionTransformer, {"class_token": False, "global_pool": "map"}),
    "registers": (VisionTransformer, {"reg_tokens": 4, "no_embed_class": True}),
    "distilled": (VisionTransformerDistilled, {}),
    "layer_scale": (VisionTransformer, {"init_values": 0.5}),
    "qk_norm": (VisionTransformer, {"qk_norm": True}),
    "pre_norm": (VisionTransformer, {"pre_norm": True}),
    "include_prefix": (VisionTransformer, {"global_pool": "avg", "pool_include_prefix": True}),
}


def spread(model):
    """Random weights whose tokens are as spread out as a trained model's."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.3 if name == "pos_embed" else 1.5 * parameter.shape[-1] ** -0.5)
    return model.eval().requires_grad_(False)


def build(variant="cls", **overrides):
    """A small random model."""
    kind, arguments = VARIANTS[variant]
    torch.manual_seed(7)
    return spread(kind(**{**GEOMETRY, **arguments, **overrides}))


def build_dense():
    """A small random dense model: every patch of the 8 x 8 grid becomes 4 x 4 pixels of a map."""
    torch.manual_seed(7)
    decoder = nn.Sequential(nn.ConvTranspose2d(48, 1, 4, 4), nn.Flatten(1, 2))
    arguments = {name: value for name, value in GEOMETRY.items() if name not in ("num_classes", "global_pool")}
    return spread(DenseViT(decoder, **arguments))


@pytest.fixture(params=VARIANTS)
def any_model(request):
    return build(request.param)


@pytest.fixture
def model():
    return build()


@pytest.fixture
def images():
    """(5, 3, 32, 32): noise on growing parts of plain canvases, so that images differ in redundancy."""
    generator = torch.Generator().manual_seed(3)
    canvas = torch.zeros(5, 3, 32, 32) + torch.linspace(-1, 1, 5)[:, None, None, None]
    for i in range(5):
        rows = 4 + 7 * i
        canvas[i, :, :rows] += torch.randn(3, min(rows, 32), 32, generator=generator)
    return canvas


@pytest.fixture
def batch(images):
    return Batch(list("abcde"), images, torch.arange(5))


@pytest.fixture
def batches(batch):
    return list(split_batch(batch, 3))


def save_inputs(folder, splits, **params):
    """What 10_inputs leaves behind: {split: ids of its images}, and what it was given, by default the sample."""
    sample = {"dataset": "sample", "data_path": None, "search_source": "train", "test_source": "test"}
    params = {**sample, "model_name": "fashion-vit", "checkpoint": None, **params}
    rows = [(split, identifier) for split, ids in splits.items() for identifier in ids]
    store.save_table(pd.DataFrame(rows, columns=["split", "id"]), folder / "splits.parquet")
    store.save_json({"params": params}, folder / "inputs.json")
    return folder


def annotation(row, public=True):
    """One of VQAv2's: of (question id, image id, question, answers, answer type, question type)."""
    number, image, _, texts, answer_type, question_type = row
    given = [{"answer": text, "answer_confidence": "yes", "answer_id": i + 1} for i, text in enumerate(texts)]
    known = {"question_type": question_type, "multiple_choice_answer": texts[0], "answers": given,
             "answer_type": answer_type}  # fmt: skip
    return {"question_id": number, "image_id": image} | (known if public else dict.fromkeys(known))


def save_vqav2(folder, rows, photos, splits=(("val2014", "val2014"),)):
    """VQAv2's official files of rows as of `annotation`, and {image id: photo}, for each (split, folder of images)."""
    asked = [{"image_id": image, "question": text, "question_id": number} for number, image, text, *_ in rows]
    for split, part in splits:
        content = {"info": {"version": "2.0"}, "task_type": "Open-Ended", "data_subtype": split, "questions": asked}
        (folder / part).mkdir(parents=True)
        (folder / f"v2_OpenEnded_mscoco_{split}_questions.json").write_text(json.dumps(content))
        for image, photo in photos.items():
            photo.save(folder / part / f"COCO_{part}_{image:012d}.jpg")
    # The official annotations come in an order of their own.
    annotations = {"annotations": [annotation(row) for row in rows[::-1]]}
    (folder / "v2_mscoco_val2014_annotations.json").write_text(json.dumps(annotations))
    return folder


def hub_folder(folder, splits, size=(28, 28), classes=10, names=None):
    """A local data set with the hub's columns, one parquet file per split."""
    names = names or [f"class {i}" for i in range(classes)]
    label, rng, classes = datasets.ClassLabel(names=names), np.random.default_rng(1), len(names)
    photos = {}
    (folder / "data").mkdir(parents=True)
    for split, n in splits.items():
        photos[split] = [Image.fromarray(rng.integers(0, 256, size, np.uint8)) for _ in range(n)]
        rows = {"image": photos[split], "label": [i % classes for i in range(n)]}
        rows = datasets.Dataset.from_dict(rows, datasets.Features(image=datasets.Image(), label=label))
        rows.to_parquet(folder / "data" / f"{split}-00000-of-00001.parquet")
    return photos


def serve_package(archive, monkeypatch, place, files):
    """A Debian package of these files in an archive on disk; gives its place and checksum."""
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w:xz") as packed:
        for name, part in files.items():
            member = tarfile.TarInfo(f"./{name}")
            member.size = len(part)
            packed.addfile(member, io.BytesIO(part))
    content = b"!<arch>\n"
    for name, part in (("debian-binary", b"2.0"), ("data.tar.xz", data.getvalue())):
        header = f"{name:<16}{0:<12}{0:<6}{0:<6}{100644:<8}{len(part):<10}`\n"
        content += header.encode() + part + b"\n" * (len(part) % 2)
    file = archive / "pool" / "main" / place
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(content)
    monkeypatch.setattr(debian, "ARCHIVES", (archive.as_uri(),))
    return {place: hashlib.sha256(content).hexdigest()}
