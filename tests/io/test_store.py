import json
import stat

import pandas as pd
import pytest
import torch
from tokmerge.io import store


def test_what_is_saved_comes_back(tmp_path):
    table = pd.DataFrame({"a": [1, 2], "b": [0.5, None], "c": ["x", "y"], "d": [[1, 2], [3]]})
    store.save_table(table, tmp_path / "new" / "t.parquet")
    back = store.load_table(tmp_path / "new" / "t.parquet")
    pd.testing.assert_frame_equal(back.drop(columns="d"), table.drop(columns="d"))
    assert [list(row) for row in back.d] == [[1, 2], [3]]
    store.save_json({"a": 1, "b": [True, None]}, tmp_path / "j.json")
    assert store.load_json(tmp_path / "j.json") == {"a": 1, "b": [True, None]}
    tensors = {"w": torch.randn(3, 2).T, "n": torch.tensor([1])}
    store.save_tensors(tensors, tmp_path / "w.safetensors")
    back = store.load_tensors(tmp_path / "w.safetensors")
    assert all(torch.equal(value, tensors[name]) for name, value in back.items())


@pytest.mark.parametrize(
    ("save", "content"),
    [(store.save_tensors, {"w": torch.ones(1)}), (store.save_table, pd.DataFrame({"a": [1]})), (store.save_json, {})],
)
def test_others_may_read_what_is_saved(tmp_path, save, content):
    save(content, tmp_path / "saved")
    (tmp_path / "reference").touch()
    modes = {stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("saved", "reference")}
    assert len(modes) == 1


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "j.json"
    store.save_json({"old": 1}, path)
    with pytest.raises(ValueError, match="JSON"):
        store.save_json({"new": float("nan")}, path)

    def interrupted():
        with store.writing(path) as temporary:
            temporary.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert store.load_json(path) == {"old": 1}
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(("text", "message"), [('{"a": ', r"j\.json is not valid JSON"), ("[1]", "holds a list")])
def test_what_is_not_json_is_named(tmp_path, text, message):
    (tmp_path / "j.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        store.load_json(tmp_path / "j.json")


def test_provenance_is_plain_json():
    content = store.provenance({"seed": 0, "rates": [1, 2.5]})
    assert json.loads(json.dumps(content)) == content
    assert content["params"] == {"seed": 0, "rates": [1, 2.5]}
    assert content["versions"]["torch"].startswith(torch.__version__.split("+")[0])
