import math

import pytest
import toy
from tokmerge import store
from tokmerge.trials import Trial, Trials


def trial(index, tau=0.8):
    parameters = {"tau_00": tau, "tau_01": 0.7}
    return Trial(index, "sobol", parameters, toy.SPACE.configuration(parameters))


def test_every_trial_is_on_disk_in_trial_order(tmp_path):
    begun = Trials(tmp_path, {"seed": 0})
    assert len(begun) == 0
    assert begun.completed.empty
    begun.add(trial(1), {"kl": 0.5, "seconds": 1.5}, ask_seconds=2)
    begun.add(trial(0), {"kl": 0.4, "seconds": 1.0})
    table = store.load_table(begun.folder / "trials.parquet")
    assert table.trial.tolist() == [0, 1]
    row = table.iloc[1]
    assert (row.status, row.kl, row.tau_00, row.policy, row.ask_seconds) == ("completed", 0.5, 0.8, "Threshold", 2)
    assert list(row.thresholds) == [0.8, 0.7]
    assert store.load_json(begun.folder / "about.json") == {"seed": 0}
    with pytest.raises(ValueError, match="trial 1 has already been told"):
        begun.add(trial(1), {"kl": 0.5})


def test_the_same_search_goes_on_and_another_begins_anew(tmp_path):
    begun = Trials(tmp_path, {"seed": 0, "space": (1, 2)})
    begun.add(trial(0), {"kl": 0.4})
    clock = begun.row(0)["clock"]
    again = Trials(tmp_path, {"space": [1, 2], "seed": 0})
    assert 0 in again
    assert 1 not in again
    again.add(trial(1), {"kl": 0.3})
    assert again.table.kl.tolist() == [0.4, 0.3]
    assert again.row(1)["clock"] >= clock, "seconds go on counting"
    assert len(Trials(tmp_path, {"seed": 1, "space": (1, 2)})) == 0


def test_failed_trials_are_kept_apart_until_they_are_too_many(tmp_path):
    begun = Trials(tmp_path, {}, max_failures=2)
    begun.add(trial(0), {"kl": 0.1})
    begun.add(trial(1), ArithmeticError("no"))
    begun.add(trial(2), {"kl": math.nan, "macs_ratio": math.inf})
    assert begun.table.status.tolist() == ["completed", "failed", "failed"]
    assert begun.table.reason.tolist()[1:] == ["ArithmeticError: no", "kl is nan, macs_ratio is inf"]
    assert begun.completed.trial.tolist() == [0]
    with pytest.raises(RuntimeError, match=r"3 of 4 trials failed, more than max_failures=2; trial 3 with: OSError: x"):
        begun.add(trial(3), OSError("x"))
    with pytest.raises(RuntimeError, match="3 of 4 trials failed"):
        Trials(tmp_path, {}, max_failures=2).check_failures()
    assert len(Trials(tmp_path, {}, max_failures=3)) == 4
