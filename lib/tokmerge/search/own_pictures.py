"""How much can a model merge on pictures of one's own? A search that needs no labels, a policy file, and one page.

Half of the pictures are searched on; the points that no other beats are measured again on the other half, which is what
the page shows. Without labels a point's score is its agreement with the unmerged model: the share of pictures given
the same class, or the correlation of maps.
"""

import shutil
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from torch import nn

from tokmerge.data import image_sets
from tokmerge.data.image_sets import DataError, ImageSet
from tokmerge.evaluation import workers
from tokmerge.evaluation.objective import COSTS, Objective
from tokmerge.io import store
from tokmerge.merging import front
from tokmerge.models import zoo
from tokmerge.models.configuration import Configuration, from_row
from tokmerge.models.merged import digest_weights
from tokmerge.models.patching import patch
from tokmerge.plots.merge_maps import draw_merge_map, map_grid, merge_map
from tokmerge.plots.style import style
from tokmerge.search import baselines, bayesian, pareto
from tokmerge.search.space import threshold_space

FEWEST_PICTURES = 8
# Of the root of the divergence, MACs and bytes: what is worse is not worth searching for.
REFERENCE = (0.25, 1.0, 1.0)
LOSSES = (0.005, 0.01, 0.02, 0.05)
N_UNIFORM, N_SHOWN = 8, 4


def front_points(trials: pd.DataFrame, axis: str, worst: float, objective: Objective) -> pd.DataFrame:
    """The trials that none beats, measured again on other images, as far as none beats them there.

    Args:
        trials: of a search.
        axis: the loss that counts beside MACs and bytes.
        worst: trials that lose more are left out; if all do, the best is kept.
        objective: on images that were not searched on.
    """
    rows, left = [], trials[trials[axis] <= worst]
    # Where nothing is good enough, what loses least is all that there is.
    left = left if len(left) else trials.nsmallest(1, axis)
    for row in pareto.best(left, axis).to_dict("records"):
        configuration = from_row(row)
        rows.append({"trial": row["trial"], **configuration.row(), **objective(configuration)})
    return pareto.best(pd.DataFrame(rows), axis)


def policy_file(points: pd.DataFrame, model: str, dataset: str, objective: Objective) -> front.Front:
    """What `front_points` gives as a `Front`."""
    rows = [{**row, "policy": from_row(row).policy} for row in points.to_dict("records")]
    unmerged = objective.unmerged.summary()["score"]
    return front.build_front(rows, model, dataset, unmerged, digest_weights(objective.model))


def search_pictures(
    name: str, model: nn.Module, images: ImageSet, out: Path, n_trials: int = 64, n_images: int = 64, seed: int = 0
) -> pd.DataFrame:
    """Search a model's thresholds on some pictures, and write front.json, report.md and report.png into a folder.

    Args:
        name, model: timm VisionTransformer, or one with a decoder (`tokmerge.models.dense`).
        images: half of them are searched on, at most ``n_images``; as many of the others are what is reported.
        out: the folder. An interrupted search goes on where it stopped.
        n_trials, seed: of the search.

    Returns:
        The points of the front, as measured on the other half.

    Raises:
        DataError: fewer than `FEWEST_PICTURES` pictures.
    """
    if len(images) < FEWEST_PICTURES:
        raise DataError(f"{images.name}: {len(images)} pictures are too few, {FEWEST_PICTURES} are needed")
    order = np.random.default_rng(seed).permutation(len(images))
    half = min(n_images, len(images) // 2)
    searched, others = (
        image_sets.tensors(image_sets.subset(images, part), zoo.transform(model))
        for part in (order[:half], order[half : 2 * half])
    )
    measure, again = (Objective(model, batch, batch_size=16) for batch in (searched, others))
    work = out / "search"
    space = threshold_space(patch(model, None).depth, 6)
    settings = bayesian.Settings(
        reference=REFERENCE, n_curve=min(4, n_trials), n_sobol=max(2, n_trials // 8), samples=16, seed=seed
    )
    about = {"model": name, "pictures": images.name, **measure.about}
    trials = bayesian.Search(work, space, settings, about).run(workers.here(measure), n_trials, description="search")
    points = front_points(trials, "kl", REFERENCE[0] ** 2, again)
    front.save_front(policy_file(points, name, images.name, again), out / "front.json")
    uniform = pd.DataFrame([{**one.row(), **again(one)} for one in baselines.uniform(N_UNIFORM)])
    with store.writing(out / "report.md") as temporary:
        temporary.write_text(_report(name, images.name, n_trials, again, points, uniform))
    _draw(out / "report.png", model, others, points)
    shutil.rmtree(work)
    return points


def _report(
    name: str, pictures: str, n_trials: int, objective: Objective, points: pd.DataFrame, uniform: pd.DataFrame
) -> str:
    """The page."""
    unmerged, n = objective.unmerged, len(objective.images.ids)
    lines = [
        f"# How much {name} can merge on {pictures}", "",
        f"{n_trials} trials on {n} pictures; what follows was measured on {n} others. Unmerged an image takes "
        f"{unmerged.macs.double().mean() / 1e6:,.0f} M multiply-accumulates and "
        f"{unmerged.payload_bytes.double().mean() / 1e3:,.1f} kB in float16. "
        f"The score is {unmerged.score_name}, unmerged {unmerged.summary()['score']:.3f}.", "",
        "| loss of score, at most | thresholds per layer: MACs | bytes | one threshold: MACs | bytes |",
        "|---|---|---|---|---|",
    ]  # fmt: skip
    for loss in LOSSES:
        cells = []
        for table in (points, uniform):
            for cost in COSTS:
                within = table[table.score_drop <= loss].nsmallest(1, cost)
                cells += [f"{row[cost]:.3f} (loses {row.score_drop:.3f})" for _, row in within.iterrows()] or ["none"]
        lines.append(f"| {loss:g} | {' | '.join(cells)} |")
    lines += [
        "", "Shares of the unmerged model's; each the cheapest point on these very pictures: a little flattered.", "",
        "![Which patches became one token](report.png)", "", "```python",
        'policy = tokmerge.load_front("front.json").pick(max_drop=0.01)  # or max_macs=0.5, max_bytes=0.1',
        "merged = tokmerge.patch(model, policy)", "```", "",
    ]  # fmt: skip
    return "\n".join(lines)


def _draw(file: Path, model: nn.Module, batch: image_sets.Batch, points: pd.DataFrame) -> None:
    """Merge maps of a few pictures at points from careful to bold."""
    style()
    some = points.sort_values("macs_ratio", ascending=False)
    some = some.iloc[np.unique(np.linspace(0, len(some) - 1, N_SHOWN).round().astype(int))]
    shown = [Configuration(None), *map(from_row, some.to_dict("records"))]
    titles = ["unmerged", *(f"MACs {row.macs_ratio:.2f}" for row in some.itertuples())]
    first, merged = batch.images[:N_SHOWN], patch(model, None)
    fig, axes = map_grid(len(first), titles, 1.9)
    device = next(model.parameters()).device
    for column, configuration in enumerate(shown):
        with torch.inference_mode():
            record = patch(model, configuration.policy)(first.to(device), source=True)[1]
        for row, image in enumerate(first):
            source = record.source[row].cpu().numpy()
            draw_merge_map(axes[row, column], zoo.pixels(model, image) / 255, merge_map(source, merged.protected))
            axes[row, column].set_title(f"{int(record.tokens[row, -1])} tokens", fontsize=8)
    with store.writing(file) as temporary:
        fig.savefig(temporary, format="png")
    plt.close(fig)
