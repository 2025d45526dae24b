import pytest
import tokmerge
from conftest import build
from tokmerge.evaluation import split_point


@pytest.mark.parametrize("policy", [None, tokmerge.Threshold([0.2, 1.0, 0.5, -1.0]), tokmerge.TopR([5, 0, 9, 2])])
@pytest.mark.parametrize("variant", ["cls", "cls_avg"])
def test_one_run_says_what_every_split_would(policy, variant, images, batches):
    model = build(variant)
    table = split_point.measure_splits(model, policy, batches, "int8")
    for split in range(5):
        record = tokmerge.patch(model, policy, precision="int8", split_layer=split)(images)[1]
        rows = table[table.split_layer == split]
        assert rows.id.tolist() == list("abcde")
        assert rows.tokens.tolist() == record.tokens[:, split].tolist()
        assert rows.edge_macs.tolist() == record.edge_macs.tolist()
        assert rows.server_macs.tolist() == (record.macs - record.edge_macs).tolist()
        assert rows.payload_bytes.tolist() == record.payload_bytes.tolist()
