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
    assert all(
        torch.equal(value, tensors[name]) for name, value in store.load_tensors(tmp_path / "w.safetensors").items()
    )


@pytest.mark.parametrize("name", ["w.safetensors", "t.parquet", "j.json"])
def test_others_may_read_what_is_saved(tmp_path, name):
    path = tmp_path / name
    save = {
        ".safetensors": lambda: store.save_tensors({"w": torch.ones(1)}, path),
        ".parquet": lambda: store.save_table(pd.DataFrame({"a": [1]}), path),
        ".json": lambda: store.save_json({}, path),
    }
    save[path.suffix]()
    reference = tmp_path / "reference"
    reference.touch()
    assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE(reference.stat().st_mode)


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


def test_what_is_not_json_is_named(tmp_path):
    path = tmp_path / "j.json"
    path.write_text('{"a": ')
    with pytest.raises(ValueError, match=r"j\.json is not valid JSON"):
        store.load_json(path)
    path.write_text("[1]")
    with pytest.raises(ValueError, match="holds a list"):
        store.load_json(path)


def test_provenance_is_plain_json():
    content = store.provenance({"seed": 0, "rates": [1, 2.5]})
    assert json.loads(json.dumps(content)) == content
    assert content["params"] == {"seed": 0, "rates": [1, 2.5]}
    assert content["versions"]["torch"].startswith(torch.__version__.split("+")[0])


def test_sha256_of_a_known_content(tmp_path):
    (tmp_path / "f").write_bytes(b"abc")
    assert store.sha256(tmp_path / "f") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
