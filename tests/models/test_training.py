import pytest
import torch
from tokmerge.models.training import adamw, muon, train
from torch import nn


def stages(step):
    return min((step + 1) / 2, (9 - step) / 4, 1.0)


OPTIMIZATIONS = {
    "one cycle": lambda model: adamw(model, 0.05, 9, 0.01, warm_up=0.2),
    "two optimisers": lambda model: muon(model, ["hidden"], 0.02, 0.01, 0.05, stages),
}


def run(kind, seed, checkpoint=None, die_at=None):
    """Nine steps on noise, with dropout and running statistics; the losses, the weights, and the checks made."""
    torch.manual_seed(1)
    model = nn.ModuleDict({"hidden": nn.Linear(6, 8), "norm": nn.BatchNorm1d(8), "drop": nn.Dropout(0.3),
                           "head": nn.Linear(8, 3)})  # fmt: skip
    checks = []

    def loss(step):
        x = torch.randn(5, 6)
        for part in model.values():
            x = part(x)
        return x.square().mean() / (step + 1)

    def check(done, losses):
        checks.append((done, len(losses), model.training))
        torch.rand(1)
        if done == die_at:
            raise InterruptedError

    losses = train(model, loss, OPTIMIZATIONS[kind](model), 9, clip=0.5, seed=seed, check=check, check_every=4,
                   checkpoint=checkpoint)  # fmt: skip
    assert not model.training
    return losses, model.state_dict(), checks


@pytest.mark.parametrize("seed", [3, None])
@pytest.mark.parametrize("kind", OPTIMIZATIONS)
def test_a_run_goes_on_from_its_checkpoint_to_the_bit(tmp_path, kind, seed):
    expected, weights, checks = run(kind, seed, tmp_path / "whole.pt")
    assert checks == [(4, 4, False), (8, 8, False)]
    file = tmp_path / "new" / "cut.pt"
    with pytest.raises(InterruptedError):
        run(kind, seed, file, die_at=4)
    losses, again, checks = run(kind, seed, file)
    assert checks == [(8, 8, False)]
    assert losses == expected
    assert all(torch.equal(value, again[name]) for name, value in weights.items())
    assert [path.name for path in file.parent.iterdir()] == ["cut.pt"]
    # A run that is done is only read.
    done, final, checks = run(kind, seed, file)
    assert (done, checks) == (losses, [])
    assert all(torch.equal(value, again[name]) for name, value in final.items())


def test_losses_fall_and_gradients_are_clipped():
    torch.manual_seed(0)
    model, x = nn.Linear(4, 1), torch.randn(64, 4)
    y, norms = x.sum(1, keepdim=True), []

    def loss(step):
        if model.weight.grad is not None:
            norms.append(torch.stack([part.grad.norm() for part in model.parameters()]).norm().item())
        return 100 * (model(x) - y).square().mean()

    losses = train(model, loss, adamw(model, 0.2, 60, 0.0), 60, clip=0.5)
    assert len(losses) == 60
    assert losses[-1] < 0.01 * losses[0]
    assert max(norms) <= 0.5 + 1e-5


def test_muon_takes_the_matrices_that_are_named():
    model = nn.ModuleDict({"hidden": nn.Linear(6, 8), "head": nn.Linear(8, 3)})
    (first, second), schedules = muon(model, ["hidden"], 0.02, 0.01, 0.05, lambda step: 0.5)
    assert [part.shape for part in first.param_groups[0]["params"]] == [(8, 6)]
    assert [part.shape for part in second.param_groups[0]["params"]] == [(8,), (3, 8), (3,)]
    assert [schedule.get_last_lr() for schedule in schedules] == [[0.01], [0.005]]
    assert (first.param_groups[0]["weight_decay"], second.param_groups[0]["weight_decay"]) == (0.01, 0.05)
