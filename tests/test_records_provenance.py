"""What is read back of how a model came about."""

import json

import pytest
import yaml

from dmpo_dist.artifacts.stamp import ModelStamp
from dmpo_dist.modeling.backbone import ModelSource
from dmpo_dist.records.provenance import read_provenance


@pytest.mark.parametrize(("shots", "drawn"), [(None, 0), (16, 0), (16, 3)])
def test_the_data_a_run_saw_is_known_again_also_where_it_saw_a_few_groups(world, tmp_path, shots, drawn):
    fingerprint = world.data.few(shots, drawn).fingerprint if shots else world.data.fingerprint
    (tmp_path / "environment.json").write_text(json.dumps({"data_fingerprint": fingerprint}))
    source = ModelSource(str(tmp_path / "model"), str(tmp_path / "model"), False, ModelStamp())
    for said, same in (({"shots": shots, "shots_seed": drawn}, True), ({"shots": 8}, False)):
        (tmp_path / "config.yaml").write_text(yaml.safe_dump({"data": {"path": str(world.data.path)} | said}))
        assert read_provenance(source, None).same_data is same
