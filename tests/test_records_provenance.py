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


@pytest.mark.parametrize(("card", "license"), [
    ("---\nlicense: mit\n---\nPor José\n".encode("latin-1"), "mit"),
    (b"\xef\xbb\xbf---\nlicense: mit\n---\n", "mit"),
    (b"---\nlicense: mit\ndate: 2024-13-45\n---\n", None),
    (b"---\nlicense: " + b"[" * 3000 + b"\n---\n", None),
    (b'---\nlicense: "\\ud83d"\n---\n', None),
])  # fmt: skip
def test_the_card_of_somebody_elses_model_may_hold_anything(tmp_path, card, license):
    model = tmp_path / "model"
    model.mkdir()
    (model / "README.md").write_bytes(card)
    assert read_provenance(ModelSource(str(model), str(model), False, ModelStamp()), None).base_license == license
