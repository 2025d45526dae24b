import math

import pytest
import toy
from tokmerge.evaluation.workers import here
from tokmerge.io import store
from tokmerge.models.configuration import from_row
from tokmerge.search.trials import AskTell, Trial


class Given(AskTell):
    """Proposes trials of these thresholds, two at a time."""

    taus = (0.8, 0.6, 0.95, 0.7, 0.9)

    def _propose(self, n):
        start = self.n
        return [trial(index, tau) for index, tau in enumerate(self.taus)][start : start + 2]


def trial(index, tau=0.8):
    parameters = {"tau_00": tau, "tau_01": 0.7}
    return Trial(index, "sobol", parameters, toy.SPACE.configuration(parameters))


def test_every_trial_is_on_disk_in_trial_order(tmp_path):
    begun = Given(tmp_path, {"seed": 0})
    assert (begun.n, begun.completed.empty) == (0, True)
    begun.tell(trial(1), {"kl": 0.5, "seconds": 1.5})
    begun.tell(trial(0), {"kl": 0.4, "seconds": 1.0})
    table = store.load_table(begun.folder / "trials.parquet")
    assert table.trial.tolist() == [0, 1]
    row = table.iloc[1]
    assert (row.status, row.kl, row.tau_00, row.policy, row.ask_seconds) == ("completed", 0.5, 0.8, "Threshold", 0)
    assert from_row(row) == trial(1).configuration
    assert store.load_json(begun.folder / "about.json") == {"seed": 0}
    with pytest.raises(ValueError, match="trial 1 has already been told"):
        begun.tell(trial(1), {"kl": 0.5})


def test_the_same_search_goes_on_and_another_begins_anew(tmp_path):
    begun = Given(tmp_path, {"seed": 0, "space": (1, 2)})
    begun.tell(trial(0), {"kl": 0.4})
    clock = begun.table.clock[0]
    again = Given(tmp_path, {"space": [1, 2], "seed": 0})
    assert again.n == 1
    again.tell(trial(1), {"kl": 0.3})
    assert again.table.kl.tolist() == [0.4, 0.3]
    assert again.table.clock[1] >= clock, "seconds go on counting"
    assert Given(tmp_path, {"seed": 1, "space": (1, 2)}).n == 0


def test_failed_trials_are_kept_apart_until_they_are_too_many(tmp_path):
    begun = Given(tmp_path, {}, max_failures=2)
    begun.tell(trial(0), {"kl": 0.1})
    begun.tell(trial(1), ArithmeticError("no"))
    begun.tell(trial(2), {"kl": math.nan, "macs_ratio": math.inf})
    assert begun.table.status.tolist() == ["completed", "failed", "failed"]
    assert begun.table.reason.tolist()[1:] == ["ArithmeticError: no", "kl is nan, macs_ratio is inf"]
    assert begun.completed.trial.tolist() == [0]
    with pytest.raises(RuntimeError, match=r"3 of 4 trials failed, more than max_failures=2; trial 3 with: OSError: x"):
        begun.tell(trial(3), OSError("x"))
    with pytest.raises(RuntimeError, match="3 of 4 trials failed"):
        Given(tmp_path, {}, max_failures=2).ask(1)
    assert Given(tmp_path, {}, max_failures=3).n == 4


def test_run_asks_evaluates_and_tells(tmp_path, capsys):
    assert Given(tmp_path, {}).run(here(toy.measure), 3).trial.tolist() == [0, 1, 2]
    assert capsys.readouterr().err == ""
    table = Given(tmp_path, {}).run(here(toy.touchy), at_once=2, description="given")
    assert "given" in capsys.readouterr().err
    assert table.tau_00.tolist() == list(Given.taus)
    assert table.kl.tolist() == [toy.measure(trial(0, tau).configuration)["kl"] for tau in Given.taus]
    assert (table.seconds >= 0).all()


def test_two_runs_in_one_folder_exclude_each_other(tmp_path):
    first, second = Given(tmp_path, {}), Given(tmp_path, {})

    def interfering(configurations):
        with pytest.raises(RuntimeError, match="another run is searching in"):
            second.run(here(toy.measure), 1)
        return here(toy.measure)(configurations)

    first.run(interfering, 2)
    with pytest.raises(RuntimeError, match=r"has searched in .* since: open it again"):
        second.run(here(toy.measure), 3)
    assert Given(tmp_path, {}).run(here(toy.measure), 3).trial.tolist() == [0, 1, 2]


def test_trials_of_another_search_are_refused(tmp_path):
    class Replaying(Given):
        def _propose(self, n):
            return [trial(0)]

    Given(tmp_path, {}).tell(trial(0, 0.5), {"kl": 0.1})
    with pytest.raises(ValueError, match=r"trials.parquet: trial 0 is not one of this search: .* delete .* afresh"):
        Replaying(tmp_path, {}).ask(2)
    begun = Given(tmp_path / "damaged", {})
    begun.tell(trial(0), {"kl": 0.1})
    (begun.folder / "trials.parquet").write_bytes(b"PAR1")
    with pytest.raises(ValueError, match="is no parquet table"):
        Given(tmp_path / "damaged", {})
