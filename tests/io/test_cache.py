import pandas as pd
import pytest
import torch
from tokmerge.io import store
from tokmerge.io.cache import Cache, digest

PIECES = {
    "table": pd.DataFrame({"a": [1, 2], "b": [0.5, None]}),
    "tensors": {"w": torch.ones(2, 3)},
    "json": {"a": [1, None]},
}


def same(kind, found, expected):
    if kind == "tensors":
        return list(found) == list(expected) and all(torch.equal(found[name], expected[name]) for name in found)
    return found.equals(expected) if kind == "table" else found == expected


@pytest.mark.parametrize("kind", PIECES)
def test_a_piece_is_made_once_and_read_from_then_on(tmp_path, kind):
    made = []

    def make():
        made.append(kind)
        return PIECES[kind]

    for _ in range(2):
        # Another run of the same work, its settings in another order.
        cache = Cache(tmp_path, {"seed": 0, "steps": 3} if made else {"steps": 3, "seed": 0})
        assert same(kind, getattr(cache, kind)("one piece", make), PIECES[kind])
    assert made == [kind]
    assert same(kind, getattr(cache, kind)("another", make), PIECES[kind])
    assert len(made) == 2


def test_other_settings_are_another_work_and_what_failed_is_made_again(tmp_path):
    first, second = Cache(tmp_path, {"seed": 0}), Cache(tmp_path, {"seed": 1})
    first.json("value", lambda: {"seed": 0})
    with pytest.raises(ValueError, match="JSON"):
        second.json("value", lambda: {"value": float("nan")})
    assert second.json("value", lambda: {"seed": 1}) == {"seed": 1}
    assert store.load_json(second.folder / "about.json") == {"seed": 1}
    first.remove()
    assert list(tmp_path.iterdir()) == [second.folder]
    second.remove()
    assert not tmp_path.exists()


def test_any_name_is_one_file(tmp_path):
    cache = Cache(tmp_path, {})
    names = ["a/b 10 dB", "merged to 16.5%", "../up"]
    for index, name in enumerate(names):
        cache.json(name, lambda index=index: {"index": index})
    assert [cache.json(name, dict)["index"] for name in names] == [0, 1, 2]
    assert len(list(cache.folder.iterdir())) == 4


def test_only_what_is_written_down_counts_and_is_checked():
    assert len({digest(about) for about in ({"a": 1}, {"a": 1.5}, {"a": "1"}, {})}) == 4
    with pytest.raises(TypeError, match="not JSON serializable"):
        digest({"a": object()})
