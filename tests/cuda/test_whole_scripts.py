"""The scripts from their first line to their last on a stand-in for a card: no mixed devices anywhere in them."""

from __future__ import annotations

import runpy
import sys

import pytest
import torch

from cleanai import exit
from cleanai.measure.significance import unpack
from cleanai.runtime.checkpoints import read_record
from tests.cuda.stand_in import cuda_stand_in, needs_fused_adam
from tests.helpers import SCRIPTS, SMALL_MODEL, SWEEP, own_scripts

pytestmark = needs_fused_adam

FEW = ["--dataset", "Digits", "--train-samples", "48", "--batch-size", "16", "--epochs", "1"]
CALIBRATION = ["--calibration-batches", "2", "--repair-batches", "2"]
PRUNE = ["--steps", "2", "--timing-seconds", "0.1", "--robustness-images", "10", *CALIBRATION]
OPTIONS = {
    SCRIPTS[0]: ["--weights", "none"],
    SCRIPTS[1]: ["--coverage-metric", "combined", *PRUNE],
    SCRIPTS[2]: ["--calibrate-on", "train", *PRUNE],
    SWEEP: ["--ratios", "0.3", "--test-samples", "40", "--calibrate-on", "train", *CALIBRATION],
}


@pytest.mark.parametrize(
    ("precision", "capability"), [("bfloat16", (8, 6)), pytest.param("float16", (7, 5), marks=pytest.mark.long)]
)
def test_each_script_runs_whole(precision, capability, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(exit, "_SIGNALS", [])
    scripts = own_scripts(tmp_path, MODEL=SMALL_MODEL)
    with cuda_stand_in(capability) as card:
        for name, options in OPTIONS.items():
            command = [str(scripts[name]), *FEW, *options, "--checkpoints-dir", str(tmp_path / "out")]
            monkeypatch.setattr(sys, "argv", command)
            with pytest.raises(SystemExit) as ending:
                runpy.run_path(command[0], run_name="__main__")
            printed = capsys.readouterr()
            assert not ending.value.code, printed.err
            assert f"Device: cuda (Stand-in), precision: {precision}" in printed.out
    assert ("cuda", getattr(torch, precision), True) in card.autocasts
    assert {device for device, _, enabled in card.autocasts if enabled} == {"cuda"}
    assert all(dtype is None for _, dtype, enabled in card.autocasts if not enabled)
    records = [read_record(path) for path in (tmp_path / "out").rglob("TS1*.json")]
    assert len(records) == len(OPTIONS)
    assert {record["environment"]["device_type"] for record in records} == {"cuda"}
    pruned = [record for record in records if record.get("method") in ("Coverage", "Wanda")]
    assert [record["models"]["original"]["latency_by"] for record in pruned] == ["as a CUDA graph"] * 2
    assert [unpack(record["heldout_bits"], 360).sum() for record in pruned] == [
        360 if record["config"]["calibrate_on"] == "train" else 360 - 32 for record in pruned
    ]
