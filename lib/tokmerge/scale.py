"""`python -m tokmerge.scale`: how the cost grows, measured here; and what the paper profile would take, estimated.

Measures the growth with images, tokens, trials and workers, fits a line to each, and writes the tables of docs/scale.md
and docs/paper_profile.md. What is measured and what is estimated is never in one table.
"""

import argparse
import io
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import psutil
import timm
import torch
from PIL import Image

from tokmerge import data, evaluate, models, paths, policies, spaces, store, vit, workers
from tokmerge.objective import Objective

TABLE = paths.ASSETS / "scale.parquet"
POLICY = policies.Threshold(0.85)
COUNTS = (64, 128, 256, 512)
SIZES = (96, 128, 160, 224, 288)
GPUS = (1, 8, 64)
ROUNDS = 3

# What the estimates assume: a GPU of A100's class, eight CPU cores beside each, and its rent.
FLOPS = {"DeiT-S, float32": 8e12, "LLaVA-1.5-7B, float16": 90e12}  # sustained: 40 % and 30 % of the peak
CORES_PER_GPU, DOLLARS_PER_GPU_HOUR = 8, 2.0
DEIT, LLAVA = "DeiT-S, float32", "LLaVA-1.5-7B, float16"
CPU = "DeiT-S, CPU"  # one process on eight cores, each as fast as the one measured here
# Multiply-accumulates of one forward pass: 4.6 G (DeiT-S), and 8.2 TFLOP = 4.1 T (576 visual tokens; 2412.04467).
MACS = {DEIT: 4.6e9, CPU: 4.6e9, LLAVA: 4.1e12}


@dataclass(frozen=True)
class Work:
    """What a stage of the paper profile evaluates.

    Attributes:
        stage: of params/paper/dvc.yaml.
        model: one of `MACS`.
        passes: images or questions, times the configurations each is seen with.
        ratio: mean multiply-accumulates of a pass, merged / unmerged.
        trials: proposals of an optimiser, one after the other; the passes of their evaluations are among the others.
    """

    stage: str
    model: str
    passes: int
    ratio: float = 1.0
    trials: int = 0


WORK = (
    Work("inputs", DEIT, 50_000),
    # On all test images; what the unmerged model makes of them is that of inputs, here and in imagenet.
    Work("merging", DEIT, (6 + 5) * 45_000, 0.6),
    Work("search", DEIT, (96 + 12 + 16) * 2_000 + 20 * 5_000, 0.5, trials=96),
    # Up to three points of the front within each divergence, two of ToMe; codecs, splits and precisions on a few.
    Work("imagenet", DEIT, (3 * 4 + 2) * 45_000 + 30 * 2_000, 0.7),
    # Every question left of the validation split: unmerged, ours, the grids of seven other methods, ours in fewer bits;
    # codecs on some.
    Work("vqav2", LLAVA, (1 + 9 + 48 + 2 * 10) * 212_000 + 8 * 10_600, 0.5),
    # The server's half of the model for every policy, precision, SNR and draw.
    Work("channel", CPU, 20 * 3 * 11 * 2 * 5_000, 0.25),
    # Two decoders trained: a step is three passes. They are about as large as the model.
    Work("privacy", DEIT, 2 * 6_000 * 64 * 3),
)


def measure(quick: bool = False) -> pd.DataFrame:
    """Run everything.

    Args:
        quick: the smallest sizes only, to see that it works.

    Returns:
        One row per measurement: axis, x, seconds, and macs per image where they are known. Of axis "busy", seconds is
        the share of the processors that others used just before the row below.

    Raises:
        FileNotFoundError: 30_search has not run; the optimiser's growth is that of its real trials.
    """
    asked = store.load_table(paths.need("results/embedded/search/trials.parquet", made_by="30_search"))
    asked = asked[asked.ask_seconds > 0]
    rows: list[tuple[str, float, Any, int | None]] = [
        ("trials", float(row.trial + 1), row.ask_seconds, None) for row in asked.itertuples()
    ]
    model = models.load(models.FASHION_VIT)
    photos = data.tensors(data.load("sample"), models.transform(model))
    for n in COUNTS[:2] if quick else COUNTS:
        parts = [batch for _ in range(-(-n // 256)) for batch in evaluate.split_batch(photos, 32)][: n // 32]
        rows.append(("images", n, _seconds(partial(evaluate.run, vit.patch(model, POLICY), parts)), None))
    for size in SIZES[:2] if quick else SIZES:
        one = timm.create_model("deit_small_patch16_224", img_size=size).eval()
        merged, images = vit.patch(one, None), torch.rand(4, 3, size, size)
        with torch.inference_mode():
            macs = int(merged(images)[1].macs[0])
            rows.append(("tokens", (size // 16) ** 2 + 1, _seconds(partial(merged, images)) / 4, macs))
    rows.append(("decode", 1, _seconds(_decoder(), rounds=20), None))
    # Taking turns, with how busy the machine was before each: what two workers gain is what others leave.
    for n in (1, 2) * (1 if quick else ROUNDS):
        rows.append(("busy", n, psutil.cpu_percent(interval=1) / 100, None))
        rows += [(f"workers, {name}", n, seconds, None) for name, seconds in _ray(n, 2 if quick else 16).items()]
    return pd.DataFrame(rows, columns=["axis", "x", "seconds", "macs"])


def _seconds(function: Callable[[], Any], rounds: int = ROUNDS) -> float:
    """Median of some rounds after a warm-up."""
    return float(evaluate.alternate({"one": function}, rounds).one.median())


def _decoder() -> Callable[[], Any]:
    """Makes a photo of ImageNet's mean size, from JPEG, into what a model is shown."""
    rng = np.random.default_rng(0)
    smooth = Image.fromarray(rng.integers(0, 256, (24, 32, 3), np.uint8)).resize((500, 375), Image.Resampling.BICUBIC)
    file = io.BytesIO()
    smooth.save(file, "jpeg", quality=92)
    transform = models.transform(timm.create_model("deit_tiny_patch16_224"))
    return lambda: transform(data.open_rgb(io.BytesIO(file.getvalue()), "photo"))


def sample_objective() -> Objective:
    """The shipped model on the shipped photos; made by every worker for itself, and with one thread in each.

    Without that one worker would have all cores and two half of them each: threads would be compared, not workers.
    """
    torch.set_num_threads(1)
    model = models.load(models.FASHION_VIT)
    return Objective(model, data.tensors(data.load("sample"), models.transform(model)))


def _ray(n: int, trials: int) -> dict[str, float]:
    """Seconds until n Ray workers stand, and for a number of evaluations after that."""
    from tokmerge.trials import Trial

    space = spaces.threshold_space("cosine", 12, knots=2)
    points = space.sobol(2 + trials, seed=0)
    proposed = [Trial(index, "sobol", point, space.configuration(point)) for index, point in enumerate(points)]
    begin = time.monotonic()
    with workers.start(sample_objective(), sample_objective, n, "local") as answer:
        results = list(answer(proposed[:n]))  # one each, and never again: an objective remembers
        ready = time.monotonic()
        results += answer(proposed[2:])
        done = time.monotonic()
    for _, result in results:
        if isinstance(result, Exception):
            raise result
    return {"start": ready - begin, "evaluations": (done - ready) / trials}


def line(table: pd.DataFrame, axis: str) -> tuple[float, float]:
    """Least squares of seconds over x: (seconds at none, seconds per one more)."""
    part = table[table.axis == axis]
    slope, start = np.polyfit(part.x, part.seconds, 1)
    return float(start), float(slope)


def estimate(table: pd.DataFrame, work: Work, gpus: int) -> float:
    """Hours of a stage on so many GPUs.

    Passes are shared among the GPUs, each limited by its own arithmetic or by decoding on its cores, whichever is
    slower; those on the CPU stay in one process. The optimiser proposes one trial after the other on one machine,
    however many GPUs wait.
    """
    decode = table[table.axis == "decode"].seconds.item() / CORES_PER_GPU
    if work.model == CPU:
        tokens, gpus = table[table.axis == "tokens"], 1
        flops = 2 * CORES_PER_GPU * (tokens.macs / tokens.seconds).min()
    else:
        flops = FLOPS[work.model]
    compute = 2 * MACS[work.model] * work.ratio / flops
    start, slope = line(table, "trials")
    asks = sum(max(0.0, start + slope * trial) for trial in range(1, work.trials + 1))
    return (work.passes * max(compute, decode) / gpus + asks) / 3600


def growth(table: pd.DataFrame) -> str:
    """Markdown: what was measured, and the lines through it."""
    tokens = table[table.axis == "tokens"]
    exponent = np.polyfit(np.log(tokens.x), np.log(tokens.seconds), 1)[0]
    rate = (tokens.macs / tokens.seconds) / 1e9
    (at_none, each), (first, more) = line(table, "images"), line(table, "trials")
    decode = 1000 * table[table.axis == "decode"].seconds.item()
    asked = len(table[table.axis == "trials"])
    rows = (
        ("grows with", "measured", "model"),
        ("---",) * 3,
        ("images", _list(table, "images", "images", 2), f"{at_none:.2f} s + {1000 * each:.2f} ms per image"),
        (
            "tokens (DeiT-S, unmerged)",
            f"{_list(tokens, 'tokens', 'tokens', 3)}, per image",
            f"tokens^{exponent:.2f}; {rate.min():.0f} to {rate.max():.0f} G multiply-accumulates per second",
        ),
        (
            "trials (the optimiser alone)",
            f"{asked} proposals of 30_search",
            f"{first:.2f} s + {1000 * more:.0f} ms for every trial before it",
        ),
        ("workers (Ray), an evaluation every", _rounds(table), _speedups(table)),
        ("photos to decode", "a JPEG of 375 x 500, on one core", f"{decode:.1f} ms each"),
    )
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _turns(table: pd.DataFrame, axis: str) -> pd.DataFrame:
    """What was measured with 1 and with 2 workers, a row per round."""
    part = table[table.axis == axis]
    return pd.DataFrame({n: part[part.x == n].seconds.to_numpy() for n in (1, 2)})


def _rounds(table: pd.DataFrame) -> str:
    each, busy = _turns(table, "workers, evaluations"), 100 * _turns(table, "busy")
    return "; ".join(
        f"{each[1][turn]:.2f} s with 1, {each[2][turn]:.2f} s with 2 "
        f"(processors {busy[1][turn]:.0f} % and {busy[2][turn]:.0f} % busy before)"
        for turn in each.index
    )


def _speedups(table: pd.DataFrame) -> str:
    each = _turns(table, "workers, evaluations")
    start = _turns(table, "workers, start").to_numpy()
    ratios = ", ".join(f"{ratio:.2f}" for ratio in each[1] / each[2])
    return f"2 workers against 1: {ratios} times as fast; {start.min():.0f} to {start.max():.0f} s until they are up"


def _list(table: pd.DataFrame, axis: str, what: str, digits: int) -> str:
    part = table[table.axis == axis]
    return ", ".join(f"{row.seconds:.{digits}f} s at {row.x:.0f}" for row in part.itertuples()) + f" {what}"


def hours(table: pd.DataFrame) -> str:
    """Markdown: what the stages of the paper profile would take, all of it estimated."""
    head = "| stage | model | passes | " + " | ".join(f"{n} GPU{'s' * (n > 1)}" for n in GPUS) + " | on 1 GPU, $ |"
    rows, sums = [head, "|---" * (4 + len(GPUS)) + "|"], np.zeros(len(GPUS))
    for work in WORK:
        times = np.array([estimate(table, work, n) for n in GPUS])
        sums += times
        shown = " | ".join(f"{one:.2f} h" for one in times)
        rows.append(
            f"| {work.stage} | {work.model} | {work.passes:,} | {shown} | {times[0] * DOLLARS_PER_GPU_HOUR:.2f} |"
        )
    shown = " | ".join(f"{one:.2f} h" for one in sums)
    return "\n".join([*rows, f"| all | | | {shown} | {sums[0] * DOLLARS_PER_GPU_HOUR:.2f} |"])


def fill(text: str, table: pd.DataFrame) -> str:
    """A page with its generated parts made anew.

    >>> fill("a", pd.DataFrame())
    'a'
    """
    for name, make in (("growth", growth), ("hours", hours)):
        pattern = re.compile(f"(<!-- {name} -->\n).*?(\n<!-- end -->)", re.DOTALL)
        if pattern.search(text):
            made = make(table)
            text = pattern.sub(lambda match, made=made: match[1] + made + match[2], text)  # type: ignore[misc]
    return text


def main() -> None:
    """Measure, save the table, and write it into the pages."""
    parser = argparse.ArgumentParser(prog="python -m tokmerge.scale", description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--keep", action="store_true", help="measure nothing: write the saved measurements into the pages"
    )
    if not parser.parse_args().keep:
        torch.set_num_threads(1)  # what one core does, here as in the workers
        store.save_table(measure(), TABLE)
    table = store.load_table(TABLE)
    for page in sorted(Path(paths.root() / "docs").glob("*.md")):
        with store.writing(page) as temporary:
            temporary.write_text(fill(page.read_text(), table))
    print(growth(table), hours(table), sep="\n\n")


if __name__ == "__main__":
    main()
